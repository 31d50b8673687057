"""A packed folder of a stranger is read as what it is, within its folder, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.quantized_model import QuantizedModel
from camera.loading import open_source
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import tiny_checkpoint

Summary = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", "llama")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(Checkpoint.open(source), folder, QuantizeOptions(type="q8_0"))
    return folder


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def in_file(name: str) -> Callable[[Summary], None]:
    def change(summary: Summary) -> None:
        first = summary["shards"][0]["file"]
        for entry in (*summary["shards"], *summary["tensors"]):
            entry["file"] = name if entry["file"] == first else entry["file"]

    return change


def of_first(**values: Any) -> Callable[[Summary], None]:
    return lambda summary: summary["tensors"][0].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_file("../elsewhere.safetensors"), "outside its folder"),
        (in_file("/etc/passwd"), "outside its folder"),
        (in_file(".."), "outside its folder"),
        (in_file("a\0b"), "outside its folder"),
        (of_first(file="no-shard.safetensors"), "none of its shards"),
        (of_first(shape=[-1, 64]), "has shape"),
        (of_first(shape=[2**62, 2**62]), "has shape"),
        (of_first(shape=[1] * 1000), "has shape"),
        (of_first(shape=[64, 65]), "no blocks of"),
        (of_first(name="another"), "has shape None"),
        (of_first(type="q99"), "does not fit"),
        (lambda summary: summary["tensors"].append(summary["tensors"][0]), "twice"),
        (lambda summary: summary["tensors"].pop(0), "is missing, and config.json asks for it"),
        (lambda summary: summary.update(tensors=[]), "config and weights do not belong together"),
        (lambda summary: summary.update(shards=5), "does not fit"),
    ],
)
def test_a_summary_that_is_not_of_its_folder_is_refused(
    own: Path, change: Callable[[Summary], Any], words: str
) -> None:
    summary = read_json(own / "quantized.json")
    change(summary)
    (own / "quantized.json").write_text(json.dumps(summary))
    with pytest.raises(CameraError, match=words):
        QuantizedModel.open(own)


def test_a_shard_that_is_a_link_to_elsewhere_is_refused(own: Path, tmp_path: Path) -> None:
    shard = own / "layer-00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CameraError, match="outside the model's folder"):
        QuantizedModel.open(own)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 3),
        ("hidden_size", 10**9),
        ("intermediate_size", 10**9),
        ("num_attention_heads", 10**9),
        ("vocab_size", 10**9),
        ("max_position_embeddings", 10**15),
        ("rms_norm_eps", []),
        ("model_type", ["llama"]),
    ],
)
def test_a_config_of_another_model_is_refused_before_anything_is_built(
    own: Path, key: str, value: Any
) -> None:
    config = read_json(own / "config.json")
    (own / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CameraError, match=r"config\.json"):
        open_source(own)


@pytest.mark.parametrize("opens", [Checkpoint.open, QuantizedModel.open, open_source])
def test_a_checkpoint_that_also_holds_a_packed_model_is_refused(
    own: Path, source: Path, opens: Callable[[Path], object]
) -> None:
    shutil.copyfile(source / "model.safetensors", own / "model.safetensors")
    with pytest.raises(CameraError, match="holds a checkpoint and a quantised model"):
        opens(own)
