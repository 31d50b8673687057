"""What people's folders hold beside a model, or in place of one."""

import json
import logging
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_header, read_tensors, write_tensors
from camera.checkpoints.weights import INDEX_NAME, SINGLE_NAME
from camera.errors import CameraError
from tests.tiny import tiny_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def add(folder: Path, tensors: dict[str, torch.Tensor], file: str = SINGLE_NAME) -> None:
    """Put further tensors into a file, or others in place of its own."""
    write_tensors(
        folder / file, {**{k: v.clone() for k, v in read_tensors(folder / file).items()}, **tensors}
    )


def ffn_of_first_shard(folder: Path) -> str:
    return next(name for name in read_header(folder / FIRST) if name.endswith("up_proj.weight"))


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "value_head.0.bias"])
def test_the_heads_of_trainers_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    plain = Checkpoint.open(folder).tensors.keys()
    add(folder, {name: torch.ones(1)})
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    assert checkpoint.tensors.keys() == plain
    assert f"{folder} holds {name}, which no language model reads (a trainer's): left out" in caplog.text


def test_what_is_left_out_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    add(folder, {"v_head.summary.weight": torch.ones(1)})
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        Checkpoint.open(folder)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "of an adapter that is not merged into the model"),
        ("model.layers.0.self_attn.q_proj.qweight", "the weights are quantised already"),
        ("model.layers.0.mlp.up_proj.weight_packed", "the weights are quantised already"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "the weights are quantised already"),
    ],
)
def test_adapters_and_quantised_weights_are_refused_when_it_is_opened(
    tmp_path: Path, name: str, message: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    add(folder, {name: torch.ones(1)})
    with pytest.raises(CameraError, match=f"{folder} has {name}.*{message}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.vision.weight"])
def test_a_tensor_that_the_config_asks_for_nowhere_is_refused_with_the_shapes(
    tmp_path: Path, name: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    add(folder, {name: torch.ones(64)})
    with pytest.raises(CameraError, match=f"{folder} has {name}, which a llama with this config.json lacks"):
        Checkpoint.open(folder).check_shapes()


def test_a_tensor_that_two_shards_hold_alike_is_read_where_the_index_says(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=2)
    before = Checkpoint.open(folder).tensors
    name = ffn_of_first_shard(folder)
    add(folder, {name: Checkpoint.open(folder).read(name)}, SECOND)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == before.keys()
    assert checkpoint.tensors[name].file == FIRST
    assert torch.equal(checkpoint.read(name), checkpoint.load_model().state_dict()[name])


def test_shards_that_disagree_are_both_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=2)
    name = ffn_of_first_shard(folder)
    add(folder, {name: Checkpoint.open(folder).read(name) + 1}, SECOND)
    with pytest.raises(CameraError, match=f"{FIRST} and {SECOND} both hold {name}, and not the same numbers"):
        Checkpoint.open(folder)


def test_an_index_that_puts_a_tensor_beside_its_file_is_told_the_file_that_lacks_it(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=2)
    index = json.loads((folder / INDEX_NAME).read_text())
    name = ffn_of_first_shard(folder)
    index["weight_map"][name] = SECOND
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert name not in read_header(folder / SECOND)
    with pytest.raises(CameraError, match=f"{SECOND} does not hold {name}, which {INDEX_NAME} places there"):
        Checkpoint.open(folder)
