import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.digests import digest_files, files_below
from camera.errors import CameraError
from camera.formats.blocks import dequantize, quantize
from camera.formats.quantized_model import QuantizedModel
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.plan import plan_types
from tests.tiny import MODEL_TYPES, tiny_checkpoint

DOWN = "model.layers.0.mlp.down_proj.weight"
Q4_0_64 = QuantizeOptions(type="q4_0_64")


def open_tiny(folder: Path, model_type: str = "llama", **sizes: int) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(folder, model_type, **sizes))


def copy_of_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in read_tensors(folder / "model.safetensors").items()}


def digests(folder: Path) -> dict[str, str]:
    return digest_files(folder, files_below(folder))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_folder_holds_every_tensor_of_a_family_as_the_block_functions_pack_it(
    tmp_path: Path, model_type: str
) -> None:
    source = open_tiny(tmp_path / "source", model_type, shards=2)
    quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    model = QuantizedModel.open(tmp_path / "out")
    assert model.tensors.keys() == source.needed.keys()
    for name, record in model.tensors.items():
        weight = source.read(name)
        assert record.type == ("q4_0_64" if weight.dim() == 2 else "f32")
        np.testing.assert_array_equal(model.packed(name), quantize(weight, record.type))
        assert model.dequantize(name).shape == weight.shape
    assert model.config == source.config


def test_rows_that_do_not_divide_fall_back_and_the_report_says_why(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "source", ffn=172)
    report = quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    by_name = {record.name: record for record in report.tensors}
    assert by_name[DOWN].type == "f16"
    assert "172 weights are no multiple of q4_0_64's block of 64" in (by_name[DOWN].fallback or "")
    assert {record.name for record in report.fallbacks} == {DOWN, DOWN.replace("0", "1")}


@pytest.mark.parametrize(
    ("type", "ffn", "stored"),
    [
        ("q4_0_64", 192, "q4_0_64"),
        ("q4_0_64", 96, "q8_0"),
        ("q4_0_64", 80, "f16"),
        ("q4_0", 96, "q4_0"),
        ("q4_0", 80, "f16"),
        ("q8_0", 80, "f16"),
        ("bf16", 80, "bf16"),
    ],
)
def test_a_matrix_gets_the_first_type_whose_blocks_fill_its_rows(
    tmp_path: Path, type: str, ffn: int, stored: str
) -> None:
    plan = plan_types(open_tiny(tmp_path, ffn=ffn), QuantizeOptions(type=type))
    assert {planned.type for planned in plan if planned.name == DOWN} == {stored}


def test_the_last_matching_override_wins_over_all_else(tmp_path: Path) -> None:
    options = QuantizeOptions(
        type="q4_0",
        output_type="q8_0",
        embedding_type="f16",
        overrides={"*.mlp.*": "q8_0", "*.0.mlp.down_proj.weight": "bf16", "model.embed*": "f32"},
    )
    types = {planned.name: planned.type for planned in plan_types(open_tiny(tmp_path), options)}
    assert types["lm_head.weight"] == "q8_0"
    assert types["model.embed_tokens.weight"] == "f32"
    assert types[DOWN] == "bf16"
    assert types[DOWN.replace("0", "1")] == "q8_0"
    assert types["model.layers.0.self_attn.q_proj.weight"] == "q4_0"


def test_an_override_that_matches_no_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"overrides.*down_porj"):
        plan_types(open_tiny(tmp_path), QuantizeOptions(overrides={"*down_porj*": "f16"}))


def test_a_tied_output_head_is_not_stored(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, tied=True)
    tensors = copy_of_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(source / "model.safetensors", tensors)
    names = [planned.name for planned in plan_types(Checkpoint.open(source), QuantizeOptions())]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_report_counts_what_is_on_disk_and_measures_the_error(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "source")
    report = quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(type="q4_0"))
    packed = {
        name: t for shard in report.shards for name, t in read_tensors(tmp_path / "out" / shard.file).items()
    }
    assert report.bytes == sum(tensor.nbytes for tensor in packed.values())
    assert report.parameters == sum(source.read(name).numel() for name in source.needed)
    assert report.bits_per_weight == 8 * report.bytes / report.parameters
    record = next(record for record in report.tensors if record.name == DOWN)
    weight = source.read(DOWN)
    stored = torch.from_numpy(dequantize(packed[DOWN].numpy(), "q4_0", weight.shape[1]))
    expected = ((stored - weight).square().mean() / weight.square().mean()).sqrt().item()
    assert record.relative_error == pytest.approx(expected, rel=1e-5)
    assert 0.05 < report.relative_error < 0.15


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "source")
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(
        source, tmp_path / "out", Q4_0_64, progress=lambda done, total: seen.append((done, total))
    )
    total = len(source.needed)
    assert sorted(set(seen)) == [(done, total) for done in range(1, total + 1)]
    assert seen == sorted(seen)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "a", Q4_0_64)
    quantize_checkpoint(source, tmp_path / "b", Q4_0_64)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


class Killed(BaseException):
    """As a signal would: nothing in the code under test may catch it."""


@pytest.mark.parametrize("tensors_done", [1, 10, 14, 20])
def test_a_killed_run_goes_on_at_the_first_unfinished_shard(tmp_path: Path, tensors_done: int) -> None:
    source = open_tiny(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "whole", Q4_0_64)

    def kill(done: int, total: int) -> None:
        if done == tensors_done:
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(source, tmp_path / "out", Q4_0_64, progress=kill)
    with pytest.raises(CameraError, match="no finished quantised model"):
        QuantizedModel.open(tmp_path / "out")
    partial = json.loads((tmp_path / "out" / "quantized.partial.json").read_text())
    finished = {shard["file"] for shard in partial["report"]["shards"]}
    assert len(finished) == tensors_done // 9  # of a layer's nine tensors
    before = stamps(tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    after = stamps(tmp_path / "out")
    assert {name for name in after if before.get(name) == after[name]} == finished
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["a digit", "no JSON", "the source"])
def test_an_unfinished_run_whose_record_or_source_was_changed_begins_again(
    tmp_path: Path, damage: str
) -> None:
    source = open_tiny(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "whole", Q4_0_64)

    def kill(done: int, total: int) -> None:
        if done == 14:
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(source, tmp_path / "out", Q4_0_64, progress=kill)
    record = tmp_path / "out" / "quantized.partial.json"
    content = json.loads(record.read_text())
    if damage == "a digit":
        content["report"]["tensors"][0]["rms"] *= 2
        record.write_text(json.dumps(content))
    elif damage == "no JSON":
        record.write_text("{")
    else:  # beyond the numbers that its digest samples, and put back in time
        path = source.folder / "model.safetensors"
        times, data = path.stat(), bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        quantize_checkpoint(source, tmp_path / "whole-again", Q4_0_64)
    quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    wanted = tmp_path / ("whole-again" if damage == "the source" else "whole")
    assert digests(tmp_path / "out") == digests(wanted)


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_only_a_damaged_shard_is_made_again(tmp_path: Path, damage: str) -> None:
    source = open_tiny(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    before = digests(tmp_path / "out")
    shard = tmp_path / "out" / "layer-00000.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "truncate":
        shard.write_bytes(content[:-100])
    elif damage == "flip":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    left = stamps(tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    now = stamps(tmp_path / "out")
    assert [name for name in now if left.get(name) != now[name]] == ["layer-00000.safetensors"]
    assert digests(tmp_path / "out") == before


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each shard is, and when it was written."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def test_the_work_of_another_source_is_not_mixed_in(tmp_path: Path) -> None:
    quantize_checkpoint(open_tiny(tmp_path / "a", seed=1), tmp_path / "out", Q4_0_64)
    (tmp_path / "out" / "rest.safetensors").unlink()
    with pytest.raises(CameraError, match="another checkpoint"):
        quantize_checkpoint(open_tiny(tmp_path / "b", seed=2), tmp_path / "out", Q4_0_64)


def test_the_work_of_other_options_is_not_mixed_in(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "out", Q4_0_64)
    with pytest.raises(CameraError, match="other options"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(type="q4_0"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "source")
    with pytest.raises(CameraError, match="not empty"):
        quantize_checkpoint(source, source.folder, Q4_0_64)


def test_nan_is_refused_by_folder_and_tensor(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source")
    tensors = copy_of_tensors(folder)
    tensors[DOWN][3, 5] = float("nan")
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CameraError, match=r"source: model\.layers\.0\.mlp\.down_proj\.weight holds NaN"):
        quantize_checkpoint(Checkpoint.open(folder), tmp_path / "out", Q4_0_64)


def test_a_summary_that_is_not_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quantized.json").write_text('{"type": "q5_0"}')
    with pytest.raises(CameraError, match=r"quantized\.json.*type"):
        QuantizedModel.open(tmp_path)


def test_a_truncated_shard_is_refused_on_opening(tmp_path: Path) -> None:
    quantize_checkpoint(open_tiny(tmp_path / "source"), tmp_path / "out", Q4_0_64)
    shard = tmp_path / "out" / "rest.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CameraError, match=r"rest\.safetensors.*truncated"):
        QuantizedModel.open(tmp_path / "out")
