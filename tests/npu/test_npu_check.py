"""`camera npu-check` as a person with a card runs it: the real torch_npu, fallback forbidden, and a report that says stub."""

import tarfile
from pathlib import Path

from camera.device_check.schema import CheckReport
from tests.npu.process import OnNpu


def test_all_that_applies_passes_and_the_report_says_that_it_is_a_stubs(
    on_npu: OnNpu, tmp_path: Path
) -> None:
    out = tmp_path / "check"
    on_npu(["npu-check", str(out), "--tiny"], time_out=3600)
    report = CheckReport.model_validate_json((out / "report.json").read_text())
    assert report.stub
    assert report.host["identity"]["torch_npu"] is not None
    ran = {step.name: step.verdict for step in report.steps if step.reason != "not asked for"}
    assert set(ran.values()) == {"passed"}, ran
    kernels = next(step for step in report.steps if step.name == "int4-kernels")
    right = [one for one in kernels.values("time of a product") if one.holds]
    assert {one.of["way"] for one in right} >= {"tiled", "transposed"}
    assert all("FRACTAL_NZ" in str(one.of["kernel"]) for one in right if one.of["way"] == "tiled")
    decoded = next(step for step in report.steps if step.name == "decode-q4_0_64-pruned")
    assert {one.of["way"] for one in decoded.values("time of a token")} == {"eager", "captured"}
    assert "Numbers of a stub, not of a card" in (out / "report.html").read_text()
    with tarfile.open(tmp_path / "check.tar.gz") as tar:
        assert "npu-check/logs/decode-q4_0_64-pruned.log" in tar.getnames()
