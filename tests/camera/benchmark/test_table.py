from camera.benchmark.report import BenchmarkReport, BenchmarkRow, Spread
from camera.benchmark.table import markdown_table


def report(*rows: BenchmarkRow) -> BenchmarkReport:
    return BenchmarkReport(
        options={},
        baseline="whole",
        device={},
        bandwidth_bytes_per_second=1e10,
        bandwidth_measured_by="sums",
        versions={},
        rows=rows,
    )


def measured(**more: object) -> BenchmarkRow:
    return BenchmarkRow(
        model="pruned",
        engine="torch",
        prompt=4,
        decode=256,
        prefill_ms=Spread.of([2.0, 1.0, 3.0]),
        decode_ms=Spread.of([4.0, 5.0, 6.0]),
        tokens_per_second=200.0,
        model_bytes=3 << 20,
        decode_speedup=1.25,
        bandwidth_share=0.5,
        **more,
    )


FAILED = BenchmarkRow(
    model="whole", engine="llama.cpp", prompt=4, decode=256, failure="llama-bench is not on PATH"
)


def test_a_row_gives_medians_with_their_range() -> None:
    header, _, line = markdown_table(report(measured())).splitlines()
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    found = {title.strip(): cell.strip() for title, cell in cells.items()}
    assert found["prefill ms/token"] == "2.000 (1.000–3.000)"
    assert found["decode ms/token"] == "5.000 (4.000–6.000)"
    assert found["decode vs baseline"] == "1.25×"
    assert found["model MiB"] == "3.0"
    assert found["peak MiB"] == ""
    assert found["bandwidth"] == "50%"


def test_a_stand_in_is_named_and_explained() -> None:
    text = markdown_table(report(measured(stand_in="its Q4_0 twin")))
    assert "| pruned (its Q4_0 twin) |" in text
    assert "does not read Q4_0_64 or cannot be asked" in text
    assert "twin" not in markdown_table(report(measured()))


def test_failures_are_told_below_the_table() -> None:
    lines = markdown_table(report(measured(), FAILED)).splitlines()
    assert lines[-1] == "- llama.cpp, whole, 256 tokens: not measured. llama-bench is not on PATH"
    assert markdown_table(report(FAILED)) == lines[-1]


def test_noisy_rows_are_marked_and_explained() -> None:
    text = markdown_table(report(measured(noisy=True)))
    assert "5.000 (4.000–6.000) *" in text
    assert "further apart than 20 %" in text
