"""Whatever stands in a JSON file of a model: what a run begins with takes it or refuses it in words, before any step."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.convert import convert_to_gguf
from camera.formats.convertible import check_convertible
from camera.loading import open_source
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import tiny_checkpoint

VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "fraction": "0.5",
    "huge": str(10**15),
    "huger": "9" * 5000,
    "infinite": "1e999",
    "NaN": "NaN",
    "word": '"word"',
    "number as text": '"64"',
    "empty text": '""',
    "half a character": '"\\ud800"',
    "NUL": '"\\u0000"',
    "list": "[]",
    "list of lists": "[[[]]]",
    "list of words": '["word", "word"]',
    "object": "{}",
    "object of objects": '{"word": {"word": {}}}',
    "deep": "[" * 100_000 + "]" * 100_000,
}
WHOLE = {
    **VALUES,
    "empty": "",
    "BOM": "\ufeff{}",
    "half": '{"a": ',
    "two": "{} {}",
    "bytes": "\x00\x01\x02",
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every value that is not in a long list or object, and to a few in those."""
    if path:
        yield path
    items = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in items if len(items) < 60 else items[:2]:
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[str | int, ...], text: str) -> str:
    """The JSON text of a value with another text in one place."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "\x1fHERE\x1f"
    return json.dumps(value).replace(json.dumps("\x1fHERE\x1f"), text)


def wrong_texts(folder: Path, file: str) -> Iterator[tuple[str, str]]:
    for name, text in WHOLE.items():
        yield name, text
    content = read_json(folder / file)
    for path in places(content):
        for name, text in VALUES.items():
            yield f"{'.'.join(map(str, path))}: {name}", put(content, path, text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every JSON file that is read of one."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("whole") / "model", "qwen2", shards=2)
    for file in (
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "preprocessor_config.json",
    ):
        if not (folder / file).exists():
            content = {"chat_template": "{{ messages }}"} if file == "chat_template.json" else {}
            (folder / file).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(Checkpoint.open(checkpoint), folder, QuantizeOptions(type="q4_0"))
    return folder


def open_checkpoint(folder: Path) -> None:
    """What `camera plan` and `camera run` ask of a model before the first step."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    _ = (checkpoint.dtype, checkpoint.ffn_width)
    check_convertible(checkpoint)


def open_packed(folder: Path) -> None:
    """What reads a packed folder."""
    open_source(folder)
    out = folder / "out.gguf"
    try:
        convert_to_gguf(folder, out, name="model")
    finally:
        out.unlink(missing_ok=True)


def refused_or_taken(folder: Path, file: str, texts: list[tuple[str, str]], read: Any) -> int:
    """How many were refused; anything else than words fails."""
    whole, refused = (folder / file).read_bytes(), 0
    try:
        for name, text in texts:
            (folder / file).write_text(text, encoding="utf-8")
            try:
                read(folder)
            except CameraError:
                refused += 1
            except BaseException as error:
                raise AssertionError(f"{file}: {name}: {error!r}") from error
    finally:
        (folder / file).write_bytes(whole)
    return refused


def sample(texts: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return random.Random(0).sample(texts, min(count, len(texts)))


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def own_packed(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


@pytest.mark.parametrize("file", FILES)
def test_some_wrong_values_in_a_checkpoint(own: Path, file: str) -> None:
    if (own / file).exists():
        texts = list(wrong_texts(own, file))
        refused_or_taken(own, file, sample(texts, 6), open_checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_wrong_value_in_a_checkpoint(own: Path, file: str) -> None:
    if (own / file).exists():
        assert refused_or_taken(own, file, list(wrong_texts(own, file)), open_checkpoint) > 0 or file in (
            "preprocessor_config.json",
            "added_tokens.json",
        )


@pytest.mark.parametrize(
    "file", ["quantized.json", "config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_some_wrong_values_in_a_packed_folder(own_packed: Path, file: str) -> None:
    refused_or_taken(own_packed, file, sample(list(wrong_texts(own_packed, file)), 2), open_packed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["quantized.json", "config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_every_wrong_value_in_a_packed_folder(own_packed: Path, file: str) -> None:
    assert refused_or_taken(own_packed, file, list(wrong_texts(own_packed, file)), open_packed) > 0
