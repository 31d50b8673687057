"""Recipes and model folders come from strangers: what they may not do, tried for real."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_header
from camera.checkpoints.weights import INDEX_NAME
from camera.errors import CameraError
from camera.files import read_json
from camera.secrets import without_secrets
from tasks.recipe import load_recipe
from tests.faults.conftest import ended, start
from tests.faults.hunts import HUNTS, SLOW, hunt
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize("kind", HUNTS)
def test_whatever_a_file_holds_it_is_read_or_refused_in_bounded_memory(kind: str, tmp_path: Path) -> None:
    assert ended(start(hunt, kind, tmp_path, 12 if kind in SLOW else 80, 0)) == 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", HUNTS)
def test_whatever_many_files_hold_they_are_read_or_refused_in_bounded_memory(
    kind: str, tmp_path: Path
) -> None:
    chance = int.from_bytes(os.urandom(4), "little")
    examples = 400 if kind in SLOW else 3000
    assert ended(start(hunt, kind, tmp_path, examples, chance), 900) == 0, f"seed {chance}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "llama", shards=2)


@pytest.mark.parametrize(
    "name", ["NOTES.md", "tokenizer.model", "model-00001-of-00002.safetensors", "config.json"]
)
def test_a_link_that_leaves_the_model_is_never_followed(tmp_path: Path, model: Path, name: str) -> None:
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("a private key")
    (model / name).symlink_to(secret)
    with pytest.raises(CameraError, match=r"is a link to .*secret, outside the model's folder: put a copy"):
        Checkpoint.open(model)


def test_a_folder_that_is_a_link_does_not_hide_a_way_out(tmp_path: Path, model: Path) -> None:
    (model / "templates").symlink_to(tmp_path)
    with pytest.raises(CameraError, match="outside the model's folder"):
        Checkpoint.open(model)


def test_links_within_the_folder_and_to_the_blobs_of_the_hub_s_cache_are_followed(
    tmp_path: Path, model: Path
) -> None:
    (model / "tokenizer-copy.model").symlink_to("tokenizer.model")
    Checkpoint.open(model)
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        if not path.is_symlink():
            path.rename(cache / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    Checkpoint.open(snapshot).load_tokenizer()


def test_a_pipe_in_place_of_a_file_does_not_hang_the_reader(model: Path) -> None:
    (model / "generation_config.json").unlink()
    os.mkfifo(model / "generation_config.json")
    with pytest.raises(CameraError, match="neither a file nor a folder"):
        Checkpoint.open(model)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "a/../../secret", ".."])
def test_an_index_that_names_a_path_is_refused(model: Path, path: str) -> None:
    index = read_json(model / INDEX_NAME)
    index["weight_map"]["model.norm.weight"] = path
    (model / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CameraError, match="outside its folder"):
        Checkpoint.open(model)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file"])
def test_a_tokenizer_that_names_a_path_is_refused(model: Path, key: str) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**read_json(path), key: "/etc/passwd"}))
    with pytest.raises(CameraError, match=f"{key} is '/etc/passwd'"):
        Checkpoint.open(model).load_tokenizer()


def test_code_that_a_model_brings_is_never_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    auto = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        (model / name).write_text(json.dumps({**read_json(model / name), "auto_map": auto}))
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    checkpoint.load_tokenizer()
    checkpoint.load_model()
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", "only safetensors"),
        ("model.pt", "only safetensors"),
        ("consolidated.00.pth", "give the Hugging Face files"),
    ],
)
def test_pickled_weights_are_neither_read_nor_carried_along(model: Path, name: str, advice: str) -> None:
    (model / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    checkpoint = Checkpoint.open(model)
    assert name not in checkpoint.weight_files + checkpoint.side_files
    for path in model.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CameraError, match=advice):
        Checkpoint.open(model)


def test_a_billion_layers_are_refused_before_one_is_built(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**read_json(path), "num_hidden_layers": 10**9}))
    with pytest.raises(CameraError, match="num_hidden_layers is 1000000000"):
        Checkpoint.open(model).check_shapes()


def test_a_header_of_many_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)
    with pytest.raises(CameraError, match="truncated or no safetensors"):
        read_header(path)


def test_a_json_file_of_gigabytes_is_refused_unread(model: Path) -> None:
    with (model / INDEX_NAME).open("r+b") as file:
        file.truncate(4 << 30)
    with pytest.raises(CameraError, match="no JSON file of more than"):
        Checkpoint.open(model)


def merges() -> str:
    lines = ["a0: &a0 {" + ", ".join(f"k{number}: 1" for number in range(9)) + "}"]
    lines += [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}" for level in range(1, 10)]
    return "\n".join(lines)


def laughs() -> str:
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [merges, laughs, lambda: "a: &a {b: *a}", lambda: "x: " + "[" * 100_000, lambda: "x: " + "y" * (2 << 20)],
    ids=["merges", "laughs", "a loop", "depth", "length"],
)
def test_a_yaml_bomb_is_refused(tmp_path: Path, text: Callable[[], str]) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\nmodel: m\n" + text())
    with pytest.raises(CameraError, match=r"recipe\.yaml is not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: !!python/object/apply:os.system ['false']\nmodel: m\n")
    with pytest.raises(CameraError, match="could not determine a constructor"):
        load_recipe(tmp_path / "recipe.yaml")


def test_secrets_are_taken_out_of_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    said = without_secrets(
        "postgresql://user:pass@host/db; https://host/x?a=1&X-Token=zzz&b=2; Bearer hf_abcdefghij; open sesame; "
        "sqlite:////data/mlflow.db; mail@host"
    )
    assert said == (
        "postgresql://***@host/db; https://host/x?a=1&X-Token=***&b=2; Bearer ***; ***; "
        "sqlite:////data/mlflow.db; mail@host"
    )
