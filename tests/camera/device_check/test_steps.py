"""Steps in this process, where what they find can be looked at closely."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.device_check.context import Context, read_lines
from camera.device_check.schema import Measurement
from camera.device_check.steps import imports, int4_kernels, operators, profile, quantizing, recipe
from camera.engines.parts.launches import launches_of
from camera.engines.torch_engine import TorchEngine
from camera.evaluation.perplexity import perplexity
from camera.options import CaptureOptions, CheckOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint

CPU = CheckOptions(device="cpu", tiny=True)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Context(CPU, tmp_path / "findings.jsonl", scratch)


def found(context: Context) -> list[Measurement]:
    return [line.measurement for line in read_lines(context.findings) if line.measurement]


def test_a_module_whose_extra_is_missing_is_told_of_and_no_failure(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "camera.evaluation.language_model", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    imports.run(context)
    bad = [one for one in found(context) if not one.holds]
    assert "camera.evaluation.language_model" in {one.of["module"] for one in bad}
    assert all(one.optional and "the extra `tasks` is not installed" in str(one.error) for one in bad)


def test_a_module_that_is_missing_for_no_extra_is_a_failure(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "camera.units", None)
    monkeypatch.delitem(sys.modules, "camera.device_check.page", raising=False)
    imports.run(context)
    assert "camera.device_check.page" in {
        one.of["module"] for one in found(context) if not one.holds and not one.optional
    }


def test_rounding_and_gptq_are_timed_and_leave_nothing(context: Context) -> None:
    quantizing.run(context)
    assert {one.what for one in found(context)} == {"rounding", "calibration tokens", "GPTQ of a layer"}
    assert all(one.value and one.value > 0 for one in found(context))
    assert [path.name for path in context.scratch.iterdir()] == ["layer"]


def test_a_kernel_that_computes_something_else_is_wrong_and_has_no_time(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camera.engines.parts.int4_linear import CpuInt4Linear

    right = CpuInt4Linear.matmul
    monkeypatch.setattr(CpuInt4Linear, "matmul", lambda self, x: right(self, x) * 1.1)
    int4_kernels.run(context)
    times = [one for one in found(context) if one.what == "time of a product" and one.of["way"] != "16 bits"]
    assert times
    assert all(one.value is None and "off by" in str(one.error) for one in times)
    ways = [one for one in found(context) if one.what == "ways that are right"]
    assert not any(one.holds for one in ways)


def test_a_part_of_a_matrix_is_named_as_one(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = context.shapes.vocab
    monkeypatch.setattr(int4_kernels.KERNELS["cpu"][0], "rows_limit", rows - 1)
    int4_kernels.run(context)
    ways = [one for one in found(context) if one.what == "ways that are right"]
    tried = {one.of["matrix"]: one.of["rows"] for one in ways}
    assert tried["head, one of 2 parts"] == rows / 2
    assert "head" not in tried
    assert {one.of["matrix"] for one in found(context)} == set(tried)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda self, x: x.new_full((len(x), self.out_features), torch.nan), "off by nan%"),
        (lambda self, x: x.not_there, "failed with 1 tokens: AttributeError"),
    ],
)
def test_a_kernel_that_raises_or_gives_no_numbers_is_told_of_and_the_others_go_on(
    context: Context, monkeypatch: pytest.MonkeyPatch, wrong: Any, reason: str
) -> None:
    from camera.engines.parts.int4_linear import CpuInt4Linear

    class Broken(CpuInt4Linear):
        kernel = "broken"
        matmul = wrong

    monkeypatch.setitem(int4_kernels.KERNELS, "cpu", (Broken, CpuInt4Linear))
    int4_kernels.run(context)
    broken = [one for one in found(context) if one.of.get("way") == "broken"]
    assert {one.what for one in broken} == {"time of a product"}
    assert all(str(one.error).startswith(reason) and one.optional for one in broken)
    assert all(one.holds for one in found(context) if one not in broken)


def test_an_operator_that_differs_or_raises_is_named_and_the_others_go_on(
    context: Context,
) -> None:
    def case(run: Any) -> operators.Case:
        return operators.Case(run, dtypes=(torch.float32,))

    cases = {
        "good": case(lambda x: x + 1),
        "raises": case(lambda x: x @ x),
        "differs": case(Differing()),
        "last": case(lambda x: x * 2),
    }
    operators.measure(context, [f"{name}, float32" for name in cases], cases)
    named = {one.of["operator"]: one for one in found(context)}
    assert {name for name, one in named.items() if one.holds} == {"good", "last"}
    assert "cannot be multiplied" in str(named["raises"].error)
    assert named["differs"].value is not None


class Differing:
    """Computes something else the first time than the second."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


ON_THE_HOST = {
    "aminmax",
    "quantile",
    "unique_consecutive",
    "normal_",
    "uniform_",
    "_has_compatible_shallow_copy_type",
}
"""Of weights as they are read or initialised, and of counts."""
PARTS = {"empty", "ones", "new_zeros", "item", "is_nonzero", "detach_", "_local_scalar_dense", "__iand__"}
"""Memory, single numbers, and what a case computes under another name."""


@torch.inference_mode()
def test_all_that_pruning_perplexity_and_decoding_launch_is_among_the_cases(context: Context) -> None:
    tried: Counter[str] = Counter()
    inputs = operators.inputs()
    for case in operators.CASES.values():
        tried += launches_of(lambda case=case: case.run(*(inputs[name].clone() for name in case.inputs)))
    sizes = {"layers": 2, "hidden": 64, "ffn": 128, "vocab": 320, "heads": 4, "kv_heads": 2}
    checkpoint = Checkpoint.open(write_checkpoint(context.scratch / "model", **sizes, dtype=torch.bfloat16))
    tokens_ST = torch.randint(320, (4, 32))
    launched: Counter[str] = Counter()
    for method in ("camera", "obs"):
        capture, prune = CaptureOptions(device="cpu"), PruneOptions(ratio=0.25, multiple_of=8, method=method)
        out = context.scratch / method
        launched += launches_of(
            lambda out=out, capture=capture, prune=prune: prune_checkpoint(
                checkpoint, tokens_ST, out, capture, prune
            )
        )
    flat = tokens_ST.flatten()
    launched += launches_of(lambda: perplexity(checkpoint.folder, flat, window=32, device="cpu"))
    engine = TorchEngine(checkpoint.folder, torch.device("cpu"), 32)
    step = engine.fixed_step()
    step.begin(engine._next_11, 1)
    launched += launches_of(lambda: step.run(step.visible[0]))
    assert launched.keys() - tried.keys() - ON_THE_HOST - PARTS == set()


@pytest.mark.parametrize(
    ("times", "holds"), [((), False), ((None, None), False), ((None, {"median": 20.5}), True)]
)
def test_a_recipe_of_which_no_row_was_timed_does_not_pass(
    context: Context, times: tuple[dict[str, float] | None, ...], holds: bool
) -> None:
    row = {"model": "original", "engine": "llama.cpp", "decode": 64, "failure": "no CANN in this build"}
    recipe._tell(context, {"models": [], "benchmark": [{**row, "decode_ms": time} for time in times]})
    assert all(one.holds or one.optional for one in found(context)) == holds
    if times and not holds:
        assert found(context)[0].error == "no CANN in this build"


def test_a_table_of_kernels_is_added_up_by_their_type(tmp_path: Path) -> None:
    table = tmp_path / "kernel_details.csv"
    rows = ["Name,Type,Duration(us)", *["a1,MatMul,8.0"] * 8, *["b,Add,1.0"] * 4]
    table.write_text("\n".join(rows) + "\n")
    assert profile.read_table(table) == [("MatMul", 2, 16.0), ("Add", 1, 1.0)]
