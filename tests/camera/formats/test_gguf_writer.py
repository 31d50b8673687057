from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from camera.formats.gguf_writer import OutputTensor, Segment, gguf_file, stream_tensors

ARRAYS = {
    "texts": ["", "plain", "▁übergroß", "🙂"],
    "scores": [0.0, -1000.0, 0.1, 1e-30],
    "types": [1, 6, -5, 2**31 - 1],
    "flags": [True, False],
}


def write(writer: gguf.GGUFWriter, arrays: Mapping[str, list[Any]]) -> None:
    writer.add_name("arrays")
    for key, values in arrays.items():
        writer.add_array(key, values)
    writer.add_key_value("unsigned", [0, 2**32 - 1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    writer.add_key_value("short", [0, 2**16 - 1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write_ours(path: Path, arrays: Mapping[str, list[Any]]) -> None:
    with gguf_file(path, "llama") as writer:
        write(writer, arrays)


def test_arrays_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    write(theirs, ARRAYS)
    theirs.close()
    write_ours(tmp_path / "ours.gguf", ARRAYS)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize(
    ("values", "error"), [([1, "two"], ValueError), ([1, 2.0], ValueError), ([2**31], OverflowError)]
)
def test_an_array_that_is_of_no_type_is_refused(
    tmp_path: Path, values: list[Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_ours(tmp_path / "ours.gguf", {"mixed": values})
    assert list(tmp_path.iterdir()) == []


def test_segments_lie_end_to_end_whether_copied_or_made(tmp_path: Path) -> None:
    experts = np.arange(3 * 2 * 5, dtype=np.float32).reshape(3, 2, 5)
    (tmp_path / "shard").write_bytes(b"head" + experts[1].tobytes())

    def made(number: int) -> list[np.ndarray]:
        return [row.view(np.uint8) for row in experts[number]]

    segments = (
        Segment(lambda: made(0)),
        Segment(lambda: pytest.fail("it is copied"), (tmp_path / "shard", 4)),
        Segment(lambda: made(2)),
    )
    tensors = [
        OutputTensor("merged", "f32", (3, 2, 5), segments),
        OutputTensor("next", "f32", (5,), (Segment(lambda: [experts[0, :1].view(np.uint8)]),)),
    ]
    with gguf_file(tmp_path / "out.gguf", "llama") as writer:
        assert [tensor.name for tensor in stream_tensors(writer, tensors)] == ["merged", "next"]
    merged, after = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    np.testing.assert_array_equal(merged.data, experts)
    np.testing.assert_array_equal(after.data, experts[0, 0])
