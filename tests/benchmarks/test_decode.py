"""The synthetic models of the decode benchmark, and how its goals are judged."""

from pathlib import Path

import decode
import pytest

from camera.benchmark.bench import run_benchmark
from camera.formats.gguf_reader import open_gguf
from camera.options import BenchmarkOptions

SIZES = {"HIDDEN": 128, "FFN": 320, "PRUNED_FFN": 256, "HEADS": 4, "KV_HEADS": 2, "POSITIONS": 64}


def test_the_synthetic_models_are_timed_and_every_goal_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(decode, name, size)
    models = decode.synthetic_models(tmp_path, layers=1, vocab=320)
    assert [open_gguf(model.path).metadata["general.file_type"] for model in models[2:]] == [2, 39]
    report = run_benchmark(models, BenchmarkOptions(decode=(3, 5), repeats=2, device="cpu"))
    assert [row.failure for row in report.rows] == [None] * 8
    goals = decode.judge(report)
    assert [goal["to_reach"] for goal in goals] == ["1 ± 0.1", "≥ 1.7"] * 2
    baseline, pruned = report.rows[4], report.rows[6]
    assert baseline.decode_ms is not None
    assert pruned.decode_ms is not None
    assert baseline.bytes_per_token is not None
    assert pruned.bytes_per_token is not None
    speed = baseline.decode_ms.median / pruned.decode_ms.median
    assert goals[0]["value"] == pytest.approx(speed * pruned.bytes_per_token / baseline.bytes_per_token)
    wide = [row.decode_ms.median for row in (report.rows[0], report.rows[2]) if row.decode_ms]
    assert goals[1]["value"] == pytest.approx(min(wide) / pruned.decode_ms.median)
