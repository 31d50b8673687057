"""Today's results, to the bit: what a change of structure must not change.

Weights of a plain prune are slices and block codes are integer arithmetic, so their digests hold on any machine. A refit
solves equations, whose last bits are the machine's own: there the channels that stay are held, by the rows of gate.
"""

import hashlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from camera.checkpoints.checkpoint import Checkpoint
from camera.cli import command_line
from tasks.versioning import pull_if_tracked
from tests.conftest import REPOSITORY

CALIBRATION = ("--samples", "8", "--length", "128", "--dtype", "float32")


def camera(*arguments: str | Path) -> None:
    """Run the command line, in this process."""
    result = CliRunner().invoke(command_line(), list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def digest(model: Path) -> str:
    """Of all tensors: names, shapes and bytes, in the order of the names."""
    checkpoint = Checkpoint.open(model)
    content = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.read(name).contiguous()
        content.update(f"{name} {list(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def kept_digest(model: Path, source: Path) -> str:
    """Of the channels that stay in each layer: the source's rows of gate that the model's own weights stand in."""
    pruned, whole = Checkpoint.open(model), Checkpoint.open(source)
    content = hashlib.sha256()
    for layer in range(whole.layer_count):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        rows_KH, rows_FH = pruned.read(name), whole.read(name)
        same_KF = ((rows_KH[:, None] == rows_FH[None]) | (rows_KH[:, None] == 0)).all(-1)
        assert same_KF.sum(-1).eq(1).all()
        content.update(str(same_KF.int().argmax(-1).tolist()).encode())
    return content.hexdigest()[:16]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@pytest.fixture(scope="session")
def models(shared_data: Path) -> dict[str, Path]:
    tiny = REPOSITORY / "data" / "models" / "tiny-openpangu"
    pull_if_tracked(tiny)
    return {"tiny-openpangu": tiny, "stories260k": shared_data / "models" / "stories260k"}


@pytest.fixture(scope="session")
def text(shared_data: Path) -> Path:
    return shared_data / "text" / "tinystories_sample.txt"


PLAIN = {
    ("tiny-openpangu", "sequential"): "4710a6a104be15e2",
    ("tiny-openpangu", "one-shot"): "ccf13be532e6f2f5",
    ("stories260k", "sequential"): "48374d151ff3ef9b",
    ("stories260k", "one-shot"): "e167d3e599994e0e",
}


@pytest.mark.parametrize(("model", "propagate"), PLAIN)
def test_plain_camera_writes_these_weights(
    models: dict[str, Path], text: Path, tmp_path: Path, model: str, propagate: str
) -> None:
    few = ("--multiple-of", "4") if model == "stories260k" else ()
    camera(
        "prune",
        models[model],
        tmp_path / "out",
        "--calibration",
        text,
        "--propagate",
        propagate,
        *few,
        *CALIBRATION,
    )
    assert digest(tmp_path / "out") == PLAIN[model, propagate]


METHODS = {
    "refit": (("--method", "refit"), "d17af6742096c0e4"),
    "obs": (("--method", "obs"), "b7b4076a1fb8ef71"),
    "sparsity": (("--sparsity", "0.5"), "cab3e45e8d69ce9a"),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_keep_these_channels(
    models: dict[str, Path], text: Path, tmp_path: Path, method: str
) -> None:
    flags, expected = METHODS[method]
    camera(
        "prune",
        models["stories260k"],
        tmp_path / "out",
        "--calibration",
        text,
        "--multiple-of",
        "4",
        *flags,
        *CALIBRATION,
    )
    assert kept_digest(tmp_path / "out", models["stories260k"]) == expected


TYPES = {
    "q4_0_64": "0843abbff56fae53",
    "q4_0": "9375af1d0f9c3e30",
    "q8_0": "4773ec6d8ecd1b4c",
    "f16": "8119cbae0b85a02b",
}


@pytest.mark.parametrize("type", TYPES)
def test_rounding_to_nearest_writes_this_gguf(models: dict[str, Path], tmp_path: Path, type: str) -> None:
    camera("quantize", models["tiny-openpangu"], tmp_path / "packed", "--type", type)
    camera("convert", tmp_path / "packed", tmp_path / "tiny.gguf")
    assert file_digest(tmp_path / "tiny.gguf") == TYPES[type]
