"""What torch_npu does, as far as the stub shows it: what the rest of the project is written for."""

import json
from typing import Any

import pytest

from tests.npu.process import OnNpu, Outcome

HALF = 2e-3
"""Relative: results in float16 against float32."""


@pytest.fixture(scope="module")
def process(on_npu: OnNpu) -> Outcome:
    """The process that ran facts.py."""
    return on_npu("import runpy; runpy.run_module('tests.npu.facts', run_name='__main__')")


@pytest.fixture(scope="module")
def facts(process: Outcome) -> dict[str, Any]:
    return dict(json.loads(process.output.splitlines()[-1]))


def test_a_sum_is_computed_on_the_card(on_npu: OnNpu) -> None:
    done = on_npu("""
        import torch
        from tests.npu.process import mark

        x = torch.arange(6.0).reshape(2, 3).npu()
        y = torch.ones(3, 2).npu().t()
        mark("sum")
        print((x + y).tolist())
    """)
    assert done.output.splitlines()[-1] == "[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]"
    assert done.launches("sum") == {"aclnnAdd": 1}
    assert done.cards == {0}


def test_an_operator_without_a_kernel_on_the_device_is_refused(on_npu: OnNpu) -> None:
    done = on_npu("import torch; torch.linalg.eigh(torch.eye(3).npu())", fails=True)
    assert "eigh" in done.errors


def test_operators_compute_what_the_cpu_computes(on_npu: OnNpu) -> None:
    done = on_npu("""
        import json, torch
        from tests.npu.arithmetic import far

        print(json.dumps({str(dtype): far(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}))
    """)
    assert json.loads(done.output.splitlines()[-1]) == {
        "torch.float32": {},
        "torch.float16": {},
        "torch.bfloat16": {},
    }


def test_fused_operators_compute_what_their_parts_compute(facts: dict[str, Any]) -> None:
    assert {name: error for name, error in facts["fused_operators"].items() if error > HALF} == {}


def test_double_precision_is_silently_single(facts: dict[str, Any]) -> None:
    assert facts["double_precision"] == "torch.float32"


def test_the_tiled_format_must_be_allowed(facts: dict[str, Any]) -> None:
    assert facts["tiled_format"]["format without allow_internal_format"] == 2
    assert facts["tiled_format"]["format"] == 29


def test_four_bit_weights_multiply_in_every_layout(facts: dict[str, Any]) -> None:
    for layout in ("cast, then packed", "with inner_precise", "plain", "transposed"):
        assert facts["tiled_format"][layout] < HALF, layout


def test_tiles_cast_after_packing_are_of_the_wrong_width(process: Outcome, facts: dict[str, Any]) -> None:
    def storage(mark: str) -> list[int]:
        (call,) = (e for e in process.between(mark) if "WeightQuantBatchMatmul" in e.get("operator", ""))
        return list(call["tensors"][1]["storage"])

    assert storage("tiled") == [2, 16, 16, 8]
    assert storage("tiled in the wrong order") == [1, 16, 16, 16]
    assert facts["tiled_format"]["packed, then cast"] > 0.1


def test_casting_back_gives_the_numbers_back(facts: dict[str, Any]) -> None:
    assert facts["tiled_format"]["cast back"]


def test_the_four_bit_product_refuses_what_its_page_says(facts: dict[str, Any]) -> None:
    assert "groups of 64 or 128" in facts["tiled_format"]["tiled, groups of 32"]
    assert facts["tiled_format"]["scale of another dtype"]
    assert "65535" in facts["tiled_format"]["70,000 columns"]


def test_a_replayed_graph_computes_from_what_its_input_holds_then(
    process: Outcome, facts: dict[str, Any]
) -> None:
    assert facts["captured_graph"]["replayed"] == [[3.0] * 3, [5.0] * 3]
    replays = [event for event in process.between("replays") if event["event"] == "replay"]
    assert len(replays) == 2
    assert "aclnnMuls" not in process.launches("replays")


def test_waiting_for_a_number_ends_a_capture(facts: dict[str, Any]) -> None:
    assert "captured" in facts["captured_graph"]["waiting inside"]


def test_cards_exchange_numbers_and_do_not_mix_them(process: Outcome, facts: dict[str, Any]) -> None:
    assert facts["two_cards"]["moved"] == [1.0, 2.0, 3.0]
    assert "runs on card 1 and was given memory of 0" in facts["two_cards"]["mixed"]
    assert process.cards == {0, 1}


def test_memory_is_counted(facts: dict[str, Any]) -> None:
    assert facts["memory"]["total"] == 64 << 30
    assert 64 << 20 <= facts["memory"]["taken"] < 70 << 20
    assert facts["memory"]["peak"] == 1


def test_a_full_card_is_out_of_memory(on_npu: OnNpu) -> None:
    code = "import torch; torch.empty(1 << 30, dtype=torch.uint8, device='npu')"
    done = on_npu(code, environment={"STUB_MEMORY": str(1 << 29)}, fails=True)
    assert "out of memory" in done.errors


def test_events_tell_the_time_between_them(facts: dict[str, Any]) -> None:
    assert facts["events"]


def test_what_the_stub_cannot_compute_is_an_error(facts: dict[str, Any]) -> None:
    assert "NOT COMPUTED" in facts["not_in_the_stub"]
