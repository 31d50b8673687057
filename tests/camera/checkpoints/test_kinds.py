"""Folders that people give in place of a checkpoint: the message says what each is and what makes one of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.checkpoints.weights import INDEX_NAME, SINGLE_NAME
from camera.errors import CameraError
from tests.tiny import tiny_checkpoint

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SINGLE_NAME).rename(folder / name)


def an_adapter(folder: Path) -> None:
    renamed("adapter_model.safetensors")(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def of_its_maker(folder: Path) -> None:
    (folder / "config.json").rename(folder / "params.json")
    renamed("consolidated.00.pth")(folder)


def one_folder_above(folder: Path) -> None:
    (folder / "inside").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "inside" / path.name)


def place_in_the_cache(folder: Path) -> None:
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "blobs").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        os.symlink(f"../../blobs/{path.name}", folder / "snapshots" / "abc" / path.name)
        path.rename(folder / "blobs" / path.name)


def prefixed(prefix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {name: value.clone() for name, value in read_tensors(folder / SINGLE_NAME).items()}
        write_tensors(folder / SINGLE_NAME, {prefix + name: value for name, value in tensors.items()})

    return change


def multimodal(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))


def of_integers(folder: Path) -> None:
    tensors = read_tensors(folder / SINGLE_NAME)
    whole = {
        name: value.to(torch.int8) if value.ndim == 2 else value.clone() for name, value in tensors.items()
    }
    write_tensors(folder / SINGLE_NAME, whole)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (an_adapter, r"config\.json is missing: it holds an adapter: merge it into its model first"),
        (of_its_maker, r"config\.json is missing: it holds a model in its maker's own format"),
        (one_folder_above, r"config\.json is missing: give .*/model/inside$"),
        (place_in_the_cache, r"place in the hub's cache: give .*/model/snapshots/abc$"),
        (renamed("pytorch_model.bin"), "only safetensors are read, no pickles: load it with transformers'"),
        (
            renamed("model.gguf"),
            r"it holds model\.gguf: `camera import .*model\.gguf OUT` makes a checkpoint",
        ),
        (renamed("model.safetensors.incomplete"), "a download of it is not complete: fetch it again"),
        (renamed("model-00001-of-00001.safetensors"), f"its shards lack {INDEX_NAME}"),
        (renamed("model.fp16.safetensors"), r"model\.fp16\.safetensors is not the name of a model's weights"),
        (
            lambda folder: (folder / SINGLE_NAME).write_text(LFS),
            "is a pointer of Git LFS and no weights: `git lfs",
        ),
        (prefixed("module."), r"it has module\.model\.layers\.0.*, as some trainers save it"),
        (prefixed("base_model.model."), r"it has base_model\.model\.model\.layers\.0.*Save it again"),
        (multimodal, "llava is a model of text and more, with a llama in it"),
        (of_integers, "is torch.int8: the weights are quantised already"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_told_what_it_is(
    tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    change(folder)
    with pytest.raises(CameraError, match=told):
        Checkpoint.open(folder).check_shapes()


def test_a_checkpoint_with_other_forms_of_itself_beside_is_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "model.gguf", "original/consolidated.00.pth"):
        (folder / name).write_bytes(b"")
    Checkpoint.open(folder).check_shapes()


def test_a_tokenizer_that_git_left_out_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "tokenizer.model").write_text(LFS)
    with pytest.raises(CameraError, match=r"tokenizer\.model is a pointer of Git LFS"):
        Checkpoint.open(folder).load_tokenizer()
