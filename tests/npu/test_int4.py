"""4-bit linear layers on the real torch_npu: what their weights are, what they compute, and trials of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.npu.process import OnNpu

OPERATORS = ("aclnnWeightQuantBatchMatmulV2", "aclnnWeightQuantBatchMatmulV3")
PREPARE = """
import json, torch, torch_npu
from contextlib import nullcontext
from camera.devices import resolve_device
from camera.engines.parts import int4_npu, int4_trial, int4_trials
from camera.engines.parts.int4_linear import Int4Parts, rows_of_a_part
from camera.engines.parts.int4_measure import relative_error, tokens_and_products
from camera.engines.parts.int4_npu import LAYOUTS
from camera.engines.parts.int4_trial import Key, Shape, TrialBench, random_blocks
from tests.npu.process import mark

device = resolve_device("npu")
"""
MODEL = (
    PREPARE
    + """
def errors(shape, kind, *, precise=0):
    blocks, bias = random_blocks(shape), torch.linspace(-3, 3, shape.rows)
    x, exact = tokens_and_products(blocks, 16, torch.float16)
    layer = kind(blocks, bias, device, precise)
    mark("product")
    found = [relative_error(layer, x[:count], exact[:count] + bias, device) for count in (1, 4, 16)]
    mark("after")
    return {"kernel": layer.kernel, "errors": found, "format": layer.npu_format}
"""
)
KILLED = """
import os, sys
from camera.engines.parts import int4_trials

def trial(bench, key, whole=int4_trials.TrialBench.trial):
    if key.variant == ("plain", 1):
        os.kill(os.getpid(), 9)
    return whole(bench, key)

int4_trials.TrialBench.trial = trial
int4_trials.work(int(sys.argv[1]))
"""
"""What a process of trials runs when the plain layout with `inner_precise=1` ends it."""
FRACTAL_NZ, ND = 29, 2


def printed(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


def weights(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The weight of each product, as the library was told of it."""
    return [event["tensors"][1] for event in events if event.get("operator") in OPERATORS]


def test_each_layout_is_what_it_says_and_computes_what_the_blocks_say(on_npu: OnNpu) -> None:
    done = on_npu(
        MODEL
        + """
found = {}
for layout, group in (("plain", 64), ("plain", 32), ("transposed", 64), ("transposed", 32), ("tiled", 64)):
    for precise in (0, 1):
        found[f"{layout} {group} {precise}"] = errors(Shape(192, 256, group), LAYOUTS[layout], precise=precise)
print(json.dumps(found))
"""
    )
    found = printed(done.output)
    assert len(found) == 10
    assert all(max(each["errors"]) < 0.001 for each in found.values())
    assert {name for name, each in found.items() if each["format"] == "FRACTAL_NZ"} == {
        "tiled 64 0",
        "tiled 64 1",
    }
    assert all(each["format"] in each["kernel"] for each in found.values())
    told = [(each["format"], each["storage"], each["strides"]) for each in weights(done.events)]
    plain = (ND, [256 * 24], [24, 1])
    transposed = (ND, [192 * 32], [1, 32])
    tiled = (FRACTAL_NZ, [192 // 64, 256 // 16, 16, 8], [24, 1])
    assert told == 12 * [plain] + 12 * [transposed] + 6 * [tiled]


def test_the_tiled_layout_refuses_itself_where_torch_npu_makes_the_plain_one(on_npu: OnNpu) -> None:
    done = on_npu(
        MODEL
        + """
errors(Shape(192, 256, 64), LAYOUTS["tiled"])
cast = torch_npu.npu_format_cast(torch.zeros(64, 64, dtype=torch.float16, device=device), 29)
found = [torch_npu.get_npu_format(cast).name]  # the switch for it is off again
int4_npu._internal_formats = nullcontext
try:
    errors(Shape(192, 256, 64), LAYOUTS["tiled"])
except RuntimeError as error:
    print(json.dumps([*found, str(error)]))
"""
    )
    assert printed(done.output) == ["ND", "asked for the tiled layout FRACTAL_NZ, torch_npu made ND"]


def test_weights_that_are_packed_and_then_tiled_for_16_bits_are_caught_by_a_trial(on_npu: OnNpu) -> None:
    done = on_npu(
        PREPARE
        + """
int4_npu._tiled = lambda packed: torch_npu.npu_format_cast(packed, 29)
print(TrialBench(device).trial(Key("tiled", 0, 256, 256, 64, 1)).model_dump_json())
"""
    )
    trial = printed(done.output)
    assert trial["npu_format"] == "FRACTAL_NZ"
    assert trial["error"].endswith("against dequantised weights")
    assert trial["relative_error"] > 0.5


def test_where_cann_does_not_tile_packed_weights_they_are_tiled_first_and_packed_then(
    on_npu: OnNpu,
) -> None:
    # torch_npu takes the tiles apart by an operator of the old interface, which the stub does not compute: the numbers are
    # those that it would pack.
    done = on_npu(
        MODEL
        + """
int4_npu._tiles_words = lambda device: False
errors(Shape(192, 256, 64), LAYOUTS["tiled"])
packed = LAYOUTS["plain"](random_blocks(Shape(192, 256, 64)), None, device).packed
torch_npu.npu_format_cast = lambda weight, layout: weight
print(json.dumps(torch.equal(int4_npu._tiled(packed).cpu(), packed.cpu())))
""",
        strict=False,
    )
    assert printed(done.output) is True
    assert {tuple(weight["storage"]) for weight in weights(done.between("product"))} == {(3, 16, 16, 8)}


def test_a_twin_has_weights_of_its_own_in_the_same_tiles(on_npu: OnNpu) -> None:
    done = on_npu(
        PREPARE
        + """
blocks = random_blocks(Shape(192, 256, 64))
x, exact = tokens_and_products(blocks, 16, torch.float16)
for kind in LAYOUTS.values():
    layer = kind(blocks, None, device)
    twin = layer.twin()
    for name, buffer in layer.named_buffers():
        assert twin.get_buffer(name).data_ptr() != buffer.data_ptr()
    mark("twin")
    assert relative_error(twin, x, exact, device) < 0.001
    mark("after")
"""
    )
    tiled = [weight for weight in weights(done.events) if weight["format"] == FRACTAL_NZ]
    assert [weight["storage"] for weight in tiled] == [[3, 16, 16, 8]]


def test_while_a_layer_is_made_the_device_holds_its_weights_twice_at_the_most(on_npu: OnNpu) -> None:
    done = on_npu(
        PREPARE
        + """
blocks, found = random_blocks(Shape(2048, 4096, 64)), []
for kind in LAYOUTS.values():
    torch.npu.reset_peak_memory_stats()
    layer = kind(blocks, None, device)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    found.append([torch.npu.memory_allocated() / held, torch.npu.max_memory_allocated() / held])
    del layer
print(json.dumps(found))
"""
    )
    for held, peak in printed(done.output):
        assert held == pytest.approx(1, abs=0.01)
        assert peak < 2.1


@pytest.mark.slow
def test_layouts_are_tried_in_processes_of_their_own_and_what_was_found_is_kept(
    on_npu: OnNpu, tmp_path: Path
) -> None:
    code = (
        PREPARE
        + f"int4_trials._PROGRAM = {KILLED!r}\n"
        + """
int4_trials.VARIANTS = tuple(int4_trial.Variant(*each) for each in [("plain", 1), ("tiled", 0)])
shapes = [Shape(128, 512, 64), Shape(128, 256, 64)]
found = int4_trials.try_layouts(shapes, device)
best = [int4_trials.fastest(found, shape).model_dump() for shape in shapes]
print(json.dumps([[trial.model_dump() for trial in found], best]))
"""
    )
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    first = on_npu(code, environment=home, time_out=600)
    trials, best = printed(first.output)
    errors = [each["error"] for each in trials if each["layout"] == "plain"]
    assert len(errors) == 2 * 3
    assert all("its process ended with -9" in error for error in errors)
    right = [each for each in trials if each["layout"] == "tiled"]
    assert len(right) == 2 * 3
    assert {each["npu_format"] for each in right} == {"FRACTAL_NZ"}
    assert all(each["microseconds"] > 0 and each["relative_error"] < 0.001 for each in right)
    assert best == [each for each in right if each["tokens"] == 1]
    assert len({event["process"] for event in first.events}) == 1 + 2 + 1

    again = on_npu(code, environment=home)
    assert printed(again.output) == [trials, best]
    assert len({event["process"] for event in again.events}) == 1
    newer = on_npu(
        code.replace('("plain", 1), ', ""), environment=home | {"STUB_CANN": "9.2.0"}, time_out=600
    )
    assert len({event["process"] for event in newer.events}) == 2


def test_an_embedding_in_blocks_is_looked_up_on_the_card(on_npu: OnNpu) -> None:
    done = on_npu(
        PREPARE
        + """
from camera.engines.parts.embedding import BlockEmbedding
blocks, tokens = random_blocks(Shape(50, 256, 64)), torch.tensor([[3, 49, 0]])
here, there = (BlockEmbedding(blocks, torch.float16, torch.device(each)) for each in ("cpu", device))
tokens_there = tokens.to(device)
mark("look up")
rows = there(tokens_there)
mark("after")
print(json.dumps(torch.equal(rows.cpu(), here(tokens))))
"""
    )
    assert printed(done.output) is True
    assert not done.not_computed
    assert sum(done.launches("look up").values()) <= 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "columns"), [(6144, 4096), (25_600, 4096), (4096, 12_800), (4096, 10_240), (153_376, 128)]
)
def test_openpangus_matrices_and_as_many_rows_as_its_head_are_right_in_each_layout(
    on_npu: OnNpu, rows: int, columns: int
) -> None:
    done = on_npu(
        PREPARE
        + f"""
blocks, found = random_blocks(Shape({rows}, {columns}, 64)), []
x, exact = tokens_and_products(blocks, 1, torch.float16)
for kind in LAYOUTS.values():
    step = rows_of_a_part(blocks.rows, [kind])
    parts = [kind(blocks.part(start, start + step), None, device) for start in range(0, blocks.rows, step)]
    layer = parts[0] if len(parts) == 1 else Int4Parts(parts, blocks.rows)
    found.append([len(parts), relative_error(layer, x, exact, device)])
print(json.dumps(found))
""",
        time_out=900,
    )
    for parts, error in printed(done.output):
        assert parts == (3 if rows == 153_376 else 1)
        assert error < 0.001
