"""Steps in this process, where what they find can be looked at closely."""

from pathlib import Path
from typing import Any

import pytest
import torch

from camera.device_check.context import Context, read_lines
from camera.device_check.schema import Measurement
from camera.device_check.steps import int4_kernels, operators, profile, quantizing
from camera.options import CheckOptions

CPU = CheckOptions(device="cpu", tiny=True)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Context(CPU, tmp_path / "findings.jsonl", scratch)


def found(context: Context) -> list[Measurement]:
    return [line.measurement for line in read_lines(context.findings) if line.measurement]


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


def test_a_table_of_kernels_is_added_up_by_their_type(tmp_path: Path) -> None:
    table = tmp_path / "kernel_details.csv"
    rows = ["Name,Type,Duration(us)", *["a1,MatMul,8.0"] * 8, *["b,Add,1.0"] * 4]
    table.write_text("\n".join(rows) + "\n")
    assert profile.read_table(table) == [("MatMul", 2, 16.0), ("Add", 1, 1.0)]
