"""The files of a pruned checkpoint are laid out once, and filled in any order."""

import json
import random
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_header, read_tensors, write_tensors
from camera.checkpoints.weights import INDEX_NAME
from camera.errors import CameraError
from camera.pruning.decision import Stays
from camera.pruning.model_writer import ModelWriter, changing_tensors, compare, pruned_tensor
from tests.camera.pruning.conftest import Build, change_tensors, contents
from tests.tiny import tiny_checkpoint

KEPT_K = torch.arange(0, 172, 2)  # 86 of 172
STAYS = Stays({"": KEPT_K})
NARROWER = {"intermediate_size": len(KEPT_K)}
PANGU = {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3}


@pytest.fixture
def source(build: Build) -> Checkpoint:
    return Checkpoint.open(build(**PANGU))


def matrices(source: Checkpoint, mode: str = "physical") -> dict[str, torch.Tensor | None]:
    """What the feed-forward matrices of all layers become."""
    return {
        name: pruned_tensor(source, place, STAYS, mode)
        for name, place in changing_tensors(source, {}).items()
    }


def write(source: Checkpoint, out: Path, order: list[int], mode: str = "physical") -> Path:
    out.mkdir()
    writer = ModelWriter(source, out, mode, NARROWER if mode == "physical" else {}, changed=True)
    for layer in order:
        writer.write(layer, STAYS)
    writer.write_rest()
    writer.finish()
    return out


def test_the_shards_have_their_size_and_their_place_before_a_weight_is_read(
    source: Checkpoint, tmp_path: Path, read_names: list[str]
) -> None:
    writer = ModelWriter(source, tmp_path, "physical", NARROWER, changed=True)
    laid_out = {
        name: info for file in source.weight_files for name, info in read_header(tmp_path / file).items()
    }
    writer.abandon()
    assert list(laid_out) == list(source.tensors)
    for name, info in laid_out.items():
        assert info.file == source.tensors[name].file
        assert info.shape == writer.shape(name)
    assert writer.shape("model.layers.2.mlp.gate_proj.weight") == (86, 64)
    assert writer.shape("model.layers.2.mlp.down_proj.weight") == (64, 86)
    assert writer.shape("model.norm.weight") == (64,)
    assert read_names == []


@pytest.mark.parametrize("mode", ["physical", "mask"])
def test_the_order_of_the_layers_does_not_matter(source: Checkpoint, tmp_path: Path, mode: str) -> None:
    first = write(source, tmp_path / "a", [0, 1, 2], mode)
    second = write(source, tmp_path / "b", random.Random(1).sample(range(3), 3), mode)
    third = write(source, tmp_path / "c", [2, 1, 0, 2], mode)
    assert contents(first) == contents(second) == contents(third)


def test_every_tensor_is_the_given_one_or_the_sources(source: Checkpoint, tmp_path: Path) -> None:
    written = Checkpoint.open(write(source, tmp_path / "out", [0, 1, 2]))
    meant = matrices(source)
    assert len(meant) == 9
    for name in source.tensors:
        expected = meant[name] if name in meant else source.read(name)
        assert expected is not None
        assert torch.equal(written.read(name), expected)
    sizes: list[int] = []
    compare(source, written, meant.get, sizes.append)
    assert sum(sizes) == sum(info.size_bytes for info in source.tensors.values())


def test_a_mask_writes_zeros_for_the_others_and_changes_nothing_else(build: Build) -> None:
    source = Checkpoint.open(build(model_type="llama", dtype=torch.bfloat16))
    gone = torch.ones(192, dtype=torch.bool)
    gone[KEPT_K] = False
    for name, place in changing_tensors(source, {}).items():
        dimension = 1 if place.weight.role == "down" else 0
        masked = pruned_tensor(source, place, STAYS, "mask")
        assert masked is not None
        found = masked.transpose(0, dimension)
        own = source.read(name).transpose(0, dimension)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found[~gone], own[~gone])
        assert not found[gone].any()
        assert own[gone].any()


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    folder = change_tensors(tiny_checkpoint(tmp_path / "model"), {name: torch.full((192, 64), float("nan"))})
    with pytest.raises(CameraError, match=f"{name} holds NaN"):
        matrices(Checkpoint.open(folder))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_one_bit_that_differs_is_found_and_named(source: Checkpoint, tmp_path: Path, name: str) -> None:
    out = write(source, tmp_path / "out", [0, 1, 2])
    info = Checkpoint.open(out).tensors[name]
    with (out / info.file).open("r+b") as file:
        file.seek(info.offset + info.size_bytes - 1)
        byte = file.read(1)[0]
        file.seek(info.offset + info.size_bytes - 1)
        file.write(bytes([byte ^ 128]))
    meant = matrices(source)
    with pytest.raises(CameraError, match=f"{name} does not read back as it was written"):
        compare(source, Checkpoint.open(out), meant.get, lambda count: None)


def test_a_layer_that_was_never_given_is_an_error(source: Checkpoint, tmp_path: Path) -> None:
    writer = ModelWriter(source, tmp_path, "physical", NARROWER, changed=True)
    writer.write(0, STAYS)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.\w+\.weight changes, and was not given"):
        writer.write_rest()
    with pytest.raises(ValueError, match="was announced and never written"):
        writer.finish()
    writer.abandon()


def test_a_writer_goes_on_with_what_another_left(source: Checkpoint, tmp_path: Path) -> None:
    whole = write(source, tmp_path / "whole", [0, 1, 2])
    out = tmp_path / "out"
    out.mkdir()
    first = ModelWriter(source, out, "physical", NARROWER, changed=True)
    first.write(1, STAYS)
    first.write(0, STAYS)
    first.sync()
    first.abandon()
    second = ModelWriter(source, out, "physical", NARROWER, changed=True, resume=True)
    second.already_written(0)
    second.already_written(1)
    second.write(2, STAYS)
    second.write_rest()
    second.finish()
    assert contents(out) == contents(whole)


def test_a_writer_of_another_width_is_not_gone_on_with(source: Checkpoint, tmp_path: Path) -> None:
    ModelWriter(source, tmp_path, "physical", {"intermediate_size": 100}, changed=True).abandon()
    with pytest.raises(CameraError, match="is not the unfinished file it should be"):
        ModelWriter(source, tmp_path, "physical", NARROWER, changed=True, resume=True)


def test_the_index_tells_the_new_size_and_the_config_the_new_width(
    source: Checkpoint, tmp_path: Path
) -> None:
    out = write(source, tmp_path / "out", [0, 1, 2])
    index = json.loads((out / INDEX_NAME).read_text())
    before = json.loads((source.folder / INDEX_NAME).read_text())
    written = Checkpoint.open(out)
    assert index["metadata"]["total_size"] == sum(info.size_bytes for info in written.tensors.values())
    assert index["metadata"]["total_size"] < before["metadata"]["total_size"]
    assert index["weight_map"] == before["weight_map"]
    assert written.config == {**source.config, "intermediate_size": 86}


def test_masked_and_unchanged_writers_keep_config_and_index_byte_for_byte(
    source: Checkpoint, tmp_path: Path
) -> None:
    out = write(source, tmp_path / "out", [0, 1, 2], "mask")
    for name in ("config.json", INDEX_NAME):
        assert (out / name).read_bytes() == (source.folder / name).read_bytes()


def test_what_lies_in_a_second_shard_too_and_what_a_trainer_left_is_not_written(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "model", layers=3, ffn=172, shards=3))
    file, name = source.weight_files[-1], "model.layers.0.mlp.up_proj.weight"
    assert source.tensors[name].file != file
    there = {kept: value.clone() for kept, value in read_tensors(source.folder / file).items()}
    more = {name: source.read(name).clone(), "v_head.summary.weight": torch.ones(1)}
    write_tensors(source.folder / file, {**there, **more})
    written = Checkpoint.open(write(Checkpoint.open(source.folder), tmp_path / "out", [0, 1, 2]))
    stored = [held for shard in written.weight_files for held in read_header(tmp_path / "out" / shard)]
    assert sorted(stored) == sorted(source.tensors)
