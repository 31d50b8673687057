"""Readers given files that nobody meant: whatever they hold, the answer is a value or a CameraError, in bounded memory."""

import json
import resource
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_header, read_tensors
from camera.checkpoints.weights import INDEX_NAME
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.gguf_reader import hf_config, hf_names, open_gguf, read_hf_tensor
from camera.quantization.imatrix import Imatrix, read_imatrix, write_imatrix
from tasks.recipe import load_recipe
from tests.camera.formats.test_gguf_reader import tiny_file
from tests.fuzz.targets import TARGETS
from tests.tiny import tiny_checkpoint

MORE_MEMORY = 512 << 20
"""What a reader may take beyond what the process has: far more than the small files, far less than what they claim."""
HUGE = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]

_keys = st.sampled_from(
    ["dtype", "shape", "data_offsets", "weight_map", "metadata", "a.weight", "F32", "__metadata__"]
)
_numbers = st.integers(-2, 300) | st.sampled_from(HUGE) | st.floats()
_scalars = st.none() | st.booleans() | _numbers | st.text(max_size=8) | _keys
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_keys | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


def damaged(draw: st.DrawFn, content: bytes, head: int) -> bytes:
    """A file with bytes changed, numbers put in, and parts cut out or doubled, mostly in its head."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(head, len(changed)) - 9))
        kind = draw(st.sampled_from(["byte", "number", "short number", "cut", "double"]))
        if kind == "byte":
            changed[place] = draw(st.integers(0, 255))
        elif kind == "number":
            changed[place : place + 8] = struct.pack("<Q", draw(st.sampled_from(HUGE)))
        elif kind == "short number":
            changed[place : place + 4] = struct.pack("<I", draw(st.sampled_from(HUGE)) & 0xFFFFFFFF)
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 40))]
        else:
            changed[place:place] = changed[place : place + draw(st.integers(1, 40))]
    return bytes(changed)


def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced by others or taken out."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place, key = copy, None
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or draw(st.booleans()):
                break
            place = place[key]
        if key is None or not isinstance(place, dict | list) or not place:
            return draw(_values)
        with suppress(KeyError, IndexError, TypeError):
            if draw(st.booleans()):
                place[key] = draw(_values)
            else:
                del place[key]
    return copy


def safetensors(folder: Path) -> Callable[[st.DrawFn], None]:
    content = (tiny_checkpoint(folder / "model", "llama", layers=1) / "model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:length])

    def one(draw: st.DrawFn) -> None:
        path = folder / "x.safetensors"
        if draw(st.booleans()):
            path.write_bytes(damaged(draw, content, length))
        else:
            text = json.dumps(edited(draw, header)).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + content[length:])
        read_header(path)
        read_tensors(path)

    return one


def index(folder: Path) -> Callable[[st.DrawFn], None]:
    model = tiny_checkpoint(folder / "model", "llama", layers=1, shards=2)
    good = read_json(model / INDEX_NAME)
    paths = st.sampled_from(
        ["..", "../x.safetensors", "/etc/passwd", "", ".", "config.json", "a/b.safetensors", "\0", "é" * 300]
    )

    def one(draw: st.DrawFn) -> None:
        changed = edited(draw, good)
        if draw(st.booleans()) and isinstance(changed, dict) and isinstance(changed.get("weight_map"), dict):
            changed["weight_map"]["model.norm.weight"] = draw(paths)
        (model / INDEX_NAME).write_text(json.dumps(changed))
        Checkpoint.open(model)

    return one


def config(folder: Path) -> Callable[[st.DrawFn], None]:
    model = tiny_checkpoint(folder / "model", "llama", layers=1)
    good = read_json(model / "config.json")

    def one(draw: st.DrawFn) -> None:
        key = draw(st.sampled_from(sorted(good)))
        changed = {**good, key: draw(_values)} if draw(st.booleans()) else edited(draw, good)
        (model / "config.json").write_text(json.dumps(changed))
        Checkpoint.open(model).check_shapes()

    return one


def gguf(folder: Path) -> Callable[[st.DrawFn], None]:
    content = tiny_file()
    head = content.index(b"token_embd.weight") + 1200

    def one(draw: st.DrawFn) -> None:
        (folder / "x.gguf").write_bytes(damaged(draw, content, head))
        file = open_gguf(folder / "x.gguf")
        hf_config(file)
        for name in hf_names(file):
            read_hf_tensor(file, name)

    return one


def imatrix(folder: Path) -> Callable[[st.DrawFn], None]:
    model = Checkpoint.open(tiny_checkpoint(folder / "model", "llama", layers=1))
    names = [name for name, info in model.needed.items() if len(info.shape) == 2 and "embed" not in name]
    sums = {name: torch.rand(model.needed[name].shape[1]) for name in names}
    path = folder / "imatrix.gguf"
    write_imatrix(path, Imatrix(sums, dict.fromkeys(names, 64), 32, ("text",)), model)
    content = path.read_bytes()

    def one(draw: st.DrawFn) -> None:
        path.write_bytes(damaged(draw, content, len(content)))
        read_imatrix(path, model)

    return one


def recipe(folder: Path) -> Callable[[st.DrawFn], None]:
    pieces = [
        "name: x",
        "model: m",
        "a: &a",
        "<<: *a",
        "*a",
        "- *a",
        "prune:",
        "  ratio: 0.3",
        "{",
        "}",
        "[",
        "]",
        ", ",
    ]
    pieces += [
        "&a [*a]",
        "? ",
        ": ",
        "!!python/object/apply:os.system [ls]",
        "!!int 0x" + "f" * 5000,
        "|",
        ">",
        "\t",
    ]
    pieces += [
        "publish: {folder: /}",
        "evaluate: {datasets: [",
        "name: file, path: ..",
        "2024-99-99",
        "\n",
        "\n  ",
        "%YAML 9.9",
    ]
    texts = st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=30).map("".join)

    def one(draw: st.DrawFn) -> None:
        (folder / "recipe.yaml").write_text(draw(texts), encoding="utf-8", errors="ignore")
        load_recipe(folder / "recipe.yaml")

    return one


def of_target(name: str) -> Callable[[Path], Callable[[st.DrawFn], None]]:
    """A reader that is fuzzed too, given what is nearly its own file."""

    def prepare(folder: Path) -> Callable[[st.DrawFn], None]:
        target = TARGETS[name](folder)
        content = target.seed
        whole = json.loads(content) if content.startswith(b"{") and b"\n{" not in content else None

        def one(draw: st.DrawFn) -> None:
            if whole is not None and draw(st.booleans()):
                target.read(json.dumps(edited(draw, whole)).encode(errors="surrogatepass"))
            else:
                target.read(damaged(draw, content, len(content)))

        return one

    return prepare


HUNTS: dict[str, Callable[[Path], Callable[[st.DrawFn], None]]] = {
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "gguf": gguf,
    "imatrix": imatrix,
    "recipe": recipe,
    **{
        name: of_target(name)
        for name in ("tokenizer", "pieces", "quantized", "jsonl", "parquet", "readme", "lineage")
    },
}
SLOW = {"config", "tokenizer", "pieces", "parquet", "quantized"}
"""Of which fewer are tried: a reading takes tens of milliseconds, most of them in a child process."""


def hunt(kind: str, folder: Path, examples: int, chance: int) -> None:
    """Try so many files of a kind, in a process of its own with bounded memory; ends with an error at the first fault."""
    one = HUNTS[kind](folder)

    @seed(chance)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(data=st.data())
    def search(data: st.DataObject) -> None:
        with suppress(CameraError), np.errstate(all="ignore"):
            one(data.draw)

    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MORE_MEMORY, taken + MORE_MEMORY))
    search()
