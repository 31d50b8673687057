"""The files of a pruned checkpoint are laid out once, and filled in any order."""

import json
import random
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import INDEX_NAME, Checkpoint
from camera.checkpoints.safetensors_file import read_header
from camera.errors import CameraError
from camera.pruning.prune import pruned_matrix
from camera.pruning.target import PrunedTarget, compare
from tests.camera.pruning.conftest import Build, contents

KEPT_K = torch.arange(0, 172, 2)  # 86 of 172
PANGU = {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3}


@pytest.fixture
def source(build: Build) -> Checkpoint:
    return Checkpoint.open(build(**PANGU))


def matrices(source: Checkpoint, layer: int, mode: str = "physical") -> dict[str, torch.Tensor]:
    return {name: pruned_matrix(source, layer, name, KEPT_K, mode) for name in source.family.ffn_names(layer)}


def write(source: Checkpoint, out: Path, order: list[int], mode: str = "physical") -> Path:
    out.mkdir()
    target = PrunedTarget(source, out, len(KEPT_K), mode)
    for layer in order:
        target.write_layer(layer, matrices(source, layer, mode).get)
    target.write_rest()
    target.finish()
    return out


def test_the_shards_have_their_size_and_their_place_before_a_weight_is_read(
    source: Checkpoint, tmp_path: Path, read_names: list[str]
) -> None:
    target = PrunedTarget(source, tmp_path, len(KEPT_K), "physical")
    laid_out = {
        name: info for file in source.weight_files for name, info in read_header(tmp_path / file).items()
    }
    target.abandon()
    assert list(laid_out) == list(source.tensors)
    for name, info in laid_out.items():
        assert info.file == source.tensors[name].file
        assert info.shape == target.shape(name)
    assert target.shape("model.layers.2.mlp.gate_proj.weight") == (86, 64)
    assert target.shape("model.layers.2.mlp.down_proj.weight") == (64, 86)
    assert target.shape("model.norm.weight") == (64,)
    assert read_names == []


@pytest.mark.parametrize("mode", ["physical", "mask"])
def test_the_order_of_the_layers_does_not_matter(source: Checkpoint, tmp_path: Path, mode: str) -> None:
    first = write(source, tmp_path / "a", [0, 1, 2], mode)
    second = write(source, tmp_path / "b", random.Random(1).sample(range(3), 3), mode)
    third = write(source, tmp_path / "c", [2, 1, 0, 2], mode)
    assert contents(first) == contents(second) == contents(third)


def test_every_tensor_is_the_given_one_or_the_sources(source: Checkpoint, tmp_path: Path) -> None:
    written = Checkpoint.open(write(source, tmp_path / "out", [0, 1, 2]))
    meant = {name: value for layer in range(3) for name, value in matrices(source, layer).items()}
    assert len(meant) == 9
    for name in source.tensors:
        assert torch.equal(written.read(name), meant.get(name, source.read(name)))
    sizes: list[int] = []
    compare(source, written, meant.get, sizes.append)
    assert sum(sizes) == sum(info.size_bytes for info in source.tensors.values())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_one_bit_that_differs_is_found_and_named(source: Checkpoint, tmp_path: Path, name: str) -> None:
    out = write(source, tmp_path / "out", [0, 1, 2])
    info = Checkpoint.open(out).tensors[name]
    with (out / info.file).open("r+b") as file:
        file.seek(info.offset + info.size_bytes - 1)
        byte = file.read(1)[0]
        file.seek(info.offset + info.size_bytes - 1)
        file.write(bytes([byte ^ 128]))
    meant = {name: value for layer in range(3) for name, value in matrices(source, layer).items()}
    with pytest.raises(CameraError, match=f"{name} does not read back as it was written"):
        compare(source, Checkpoint.open(out), meant.get, lambda count: None)


def test_a_layer_that_was_never_given_is_an_error(source: Checkpoint, tmp_path: Path) -> None:
    target = PrunedTarget(source, tmp_path, len(KEPT_K), "physical")
    target.write_layer(0, matrices(source, 0).get)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.\w+\.weight changes, and was not given"):
        target.write_rest()
    with pytest.raises(ValueError, match="was announced and never written"):
        target.finish()
    target.abandon()


def test_a_target_goes_on_with_what_another_left(source: Checkpoint, tmp_path: Path) -> None:
    whole = write(source, tmp_path / "whole", [0, 1, 2])
    out = tmp_path / "out"
    out.mkdir()
    first = PrunedTarget(source, out, len(KEPT_K), "physical")
    first.write_layer(1, matrices(source, 1).get)
    first.write_layer(0, matrices(source, 0).get)
    first.sync()
    first.abandon()
    second = PrunedTarget(source, out, len(KEPT_K), "physical", resume=True)
    second.already_written(0)
    second.already_written(1)
    second.write_layer(2, matrices(source, 2).get)
    second.write_rest()
    second.finish()
    assert contents(out) == contents(whole)


def test_a_target_of_another_width_is_not_gone_on_with(source: Checkpoint, tmp_path: Path) -> None:
    PrunedTarget(source, tmp_path, 100, "physical").abandon()
    with pytest.raises(CameraError, match="is not the unfinished file it should be"):
        PrunedTarget(source, tmp_path, len(KEPT_K), "physical", resume=True)


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


def test_masked_and_unchanged_targets_keep_config_and_index_byte_for_byte(
    source: Checkpoint, tmp_path: Path
) -> None:
    out = write(source, tmp_path / "out", [0, 1, 2], "mask")
    for name in ("config.json", INDEX_NAME):
        assert (out / name).read_bytes() == (source.folder / name).read_bytes()
