"""A Q4_0_64 file's lossless Q4_0 twin: what a llama.cpp that does not define the type can be given in its place."""

from pathlib import Path

import numpy as np

from camera.errors import CameraError
from camera.formats.convert import write_twin
from camera.formats.gguf_reader import GgufFile, open_gguf
from camera.formats.layout import TWIN_KEY
from camera.formats.types.q4_0_64 import Q4_0_64


def stock_twin(file: GgufFile, scratch: Path) -> Path:
    """The twin that lies beside a file under the name that conversion gives it, else one written to `scratch`.

    Raises:
        CameraError: if the file holds no Q4_0_64, or a type that is not written here.
        OSError: if there is no room for it: 4.5 bits per weight.
    """
    name = f"{file.path.stem}-q4_0-twin.gguf"
    beside = file.path.with_name(name)
    if beside.is_file() and _is_twin(beside, file):
        return beside
    write_twin(file.path, scratch / name)
    return scratch / name


def _is_twin(path: Path, file: GgufFile) -> bool:
    """Whether a file has the tensors of the other, and the first row of each holds the same numbers."""
    try:
        candidate = open_gguf(path)
    except CameraError:
        return False
    if candidate.metadata.get(TWIN_KEY) != "q4_0_64" or candidate.tensors.keys() != file.tensors.keys():
        return False
    for name, tensor in file.tensors.items():
        other = candidate.tensors[name]
        row = tensor.data[:1]
        type, expected = ("q4_0", Q4_0_64().twin(row)) if tensor.type == "q4_0_64" else (tensor.type, row)
        if (other.type, other.shape) != (type, tensor.shape) or not np.array_equal(other.data[:1], expected):
            return False
    return True
