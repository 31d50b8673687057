"""The tokenizer's keys of a GGUF file, as a folder gives them."""

import json
from pathlib import Path
from typing import Any

import gguf

from camera.files import read_json
from camera.formats.gguf_reader import open_gguf
from camera.formats.gguf_tokenizer import write_tokenizer
from tests.tiny import TOKENS


def keys(folder: Path, rows: int = TOKENS) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's keys as they are read back from a file, and the warnings."""
    path = folder / "keys.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    try:
        warnings = write_tokenizer(writer, folder, rows)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): value for key, value in open_gguf(path).metadata.items()}, warnings


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}))
