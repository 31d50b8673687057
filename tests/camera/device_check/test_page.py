"""What the page shows of figures."""

from pathlib import Path

from camera.device_check.page import _kernel_bars, render_page
from camera.device_check.runner import check
from camera.device_check.schema import CheckReport, Measurement, StepRecord
from camera.options import CheckOptions


def report_of(tmp_path: Path, name: str, *found: Measurement) -> CheckReport:
    empty = check(CheckOptions(device="cpu", tiny=True), tmp_path / "check", steps=())
    step = StepRecord(name=name, title=name, key="", verdict="passed", measurements=found)
    return empty.model_copy(update={"steps": (step,)})


def product(way: str, microseconds: float, recorded: bool) -> Measurement:
    of = {"matrix": "down", "type": "q4_0", "way": way, "tokens": 1, "recorded": str(recorded)}
    return Measurement(what="time of a product", of=of, value=microseconds)


def test_a_product_timed_with_its_launch_is_no_equal_of_one_that_was_recorded(tmp_path: Path) -> None:
    right = Measurement(what="ways that are right", of={"matrix": "down"}, value=3)
    launched, slow, fast = product("a", 1, False), product("b", 3, True), product("c", 2, True)

    def bars(*found: Measurement) -> list[tuple[str, bool]]:
        [each] = _kernel_bars(report_of(tmp_path, "int4-kernels", right, *found))
        return [(bar.label, bar.strong) for bar in each.bars]

    assert bars(launched, slow, fast) == [
        ("q4_0, a, with its launch", False),
        ("q4_0, b", False),
        ("q4_0, c", True),
    ]
    assert bars(launched) == [("q4_0, a", True)]


def test_a_published_figure_stands_beside_ours(tmp_path: Path) -> None:
    ours = Measurement(what="time of a token", value=20.5, unit="ms", beside=14.6)
    page = render_page(report_of(tmp_path, "recipe", ours))
    assert "published</th>" in page
    assert "14.6" in page
