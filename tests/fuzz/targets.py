"""Every reader of what strangers write, as a function of bytes, with a file that it reads."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.guarded_tokenizer import GuardedTokenizer
from camera.checkpoints.safetensors_file import read_header, read_tensors
from camera.checkpoints.tokenizer import load_tokenizer
from camera.data.sets.file import read as read_texts
from camera.formats.gguf_reader import hf_config, hf_names, open_gguf
from camera.formats.gguf_to_tokenizer import read_tokenizer
from camera.formats.piece_vocabulary import read_pieces
from camera.formats.quantized_model import SUMMARY_NAME, QuantizedModel
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.imatrix import Imatrix, read_imatrix, write_imatrix
from camera.report.card import source_license
from tasks.lineage_form import read_lineage
from tasks.recipe import load_recipe
from tests.camera.formats.test_gguf_reader import tiny_file
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True)
class Target:
    """One reader."""

    seed: bytes
    """A file that it reads."""
    read: Callable[[bytes], object]
    """Reads other bytes in its place; all that may come of it is a value or a CameraError."""


def _file(path: Path, read: Callable[[Path], object], seed: bytes | None = None) -> Target:
    def one(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return Target(path.read_bytes() if seed is None else seed, one)


def _model(folder: Path, family: str = "llama") -> Path:
    return tiny_checkpoint(folder / "model", family, layers=1)


def _config(folder: Path) -> Target:
    model = _model(folder)
    return _file(model / "config.json", lambda _: Checkpoint.open(model).check_shapes())


def _tokenizer(folder: Path) -> Target:
    model = _model(folder, "qwen2")

    def use(_: Path) -> None:
        with GuardedTokenizer(load_tokenizer(model)) as guarded:
            guarded.decode(guarded.encode("The keeper's 12 lamps\n"))

    return _file(model / "tokenizer.json", use)


def _pieces(folder: Path) -> Target:
    return _file(_model(folder) / "tokenizer.model", read_pieces)


def _quantized(folder: Path) -> Target:
    packed = folder / "packed"
    quantize_checkpoint(Checkpoint.open(_model(folder)), packed, QuantizeOptions(type="q4_0"))
    shutil.rmtree(folder / "model")
    return _file(packed / SUMMARY_NAME, lambda _: QuantizedModel.open(packed))


def _gguf(folder: Path) -> Target:
    def use(path: Path) -> None:
        file = open_gguf(path)
        hf_config(file)
        hf_names(file)
        read_tokenizer(file)

    return _file(folder / "x.gguf", use, tiny_file())


def _imatrix(folder: Path) -> Target:
    model = Checkpoint.open(_model(folder))
    names = [name for name, info in model.needed.items() if len(info.shape) == 2 and "embed" not in name]
    sums = {name: torch.ones(model.needed[name].shape[1]) for name in names}
    path = folder / "imatrix.gguf"
    write_imatrix(path, Imatrix(sums, dict.fromkeys(names, 64), 32, ("text",)), model)
    return _file(path, lambda _: read_imatrix(path, model))


def _safetensors(folder: Path) -> Target:
    return _file(_model(folder) / "model.safetensors", lambda path: (read_header(path), read_tensors(path)))


def _parquet(folder: Path) -> Target:
    pq.write_table(pa.table({"text": ["one", "two", "two"], "id": [1, 2, 3]}), folder / "x.parquet")
    return _file(folder / "x.parquet", lambda path: read_texts(path, "text"))


def _jsonl(folder: Path) -> Target:
    rows = [{"text": "one é"}, {"text": "two", "id": 7, "more": [None, {"a": 0.5}]}]
    seed = "\n".join(map(json.dumps, rows)).encode()
    return _file(folder / "x.jsonl", lambda path: read_texts(path, "text"), seed)


def _readme(folder: Path) -> Target:
    seed = b"---\nlicense: other\nlicense_name: x\ntags: &a [b, *a]\n---\n# Name\n"
    return _file(folder / "README.md", lambda path: source_license(path.parent), seed)


def _recipe(folder: Path) -> Target:
    seed = b"name: x\nmodel: m\nprune: {ratio: 0.3}\nevaluate:\n  datasets: [{name: file, path: a.txt}]\n"
    return _file(folder / "recipe.yaml", load_recipe, seed)


def _lineage(folder: Path) -> Target:
    from tests.tasks.test_lineage_form import document

    return _file(folder / "lineage.json", read_lineage, json.dumps(document()).encode())


TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": _safetensors,
    "config": _config,
    "tokenizer": _tokenizer,
    "pieces": _pieces,
    "quantized": _quantized,
    "gguf": _gguf,
    "imatrix": _imatrix,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "readme": _readme,
    "recipe": _recipe,
    "lineage": _lineage,
}
