from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camera.checkpoints import rows as rows_module
from camera.checkpoints.rows import StoredRows
from camera.checkpoints.safetensors_file import DTYPES, SafetensorsWriter, read_header, write_tensors
from camera.errors import CameraError


def stored(path: Path, tensor: torch.Tensor) -> StoredRows:
    write_tensors(path, {"before": torch.ones(3), "x": tensor})
    return StoredRows(path, "x", read_header(path)["x"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (7,), (0, 5), (7, 0)])
def test_a_range_of_rows_is_that_slice_of_the_tensor(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.arange(7 * 5)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    rows = stored(tmp_path / "x", tensor)
    assert (rows.shape, rows.dtype) == (shape, dtype)
    for asked in (slice(None), slice(2, 5), slice(5, 100), slice(-2, None), slice(3, 3)):
        assert torch.equal(rows[asked], tensor[asked])


def test_rows_are_memory_of_their_own(tmp_path: Path) -> None:
    rows = stored(tmp_path / "x", torch.ones(4, 2))
    rows[0:2].zero_()
    assert torch.equal(rows[:], torch.ones(4, 2))


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    rows = stored(tmp_path / "x", torch.ones(4, 2))
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    assert torch.equal(rows[:3], torch.ones(3, 2))
    with pytest.raises(CameraError, match=r"ends within x: it was truncated"):
        rows[3:]
    (tmp_path / "x").unlink()
    with pytest.raises(CameraError, match="cannot be read"):
        rows[:1]


def test_a_tensor_may_be_written_by_rows_in_any_order(tmp_path: Path) -> None:
    tensor = torch.randn(10, 3, dtype=torch.bfloat16)
    with SafetensorsWriter(tmp_path / "x", {"x": (tensor.dtype, (10, 3))}) as writer:
        for start in (4, 8, 0):
            writer.write_rows("x", start, tensor[start : start + 4])
    write_tensors(tmp_path / "wanted", {"x": tensor})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_a_tensor_that_lacks_rows_is_not_finished(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="x was announced and never written"),
        SafetensorsWriter(tmp_path / "x", {"x": (torch.float32, (10, 3))}) as writer,
    ):
        writer.write_rows("x", 0, torch.ones(9, 3))


@pytest.mark.parametrize("wrong", [torch.ones(3, 2), torch.ones(3, 3).half(), torch.ones(5, 3)])
def test_rows_that_were_not_announced_are_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    with SafetensorsWriter(tmp_path / "x", {"x": (torch.float32, (4, 3))}) as writer:
        with pytest.raises(ValueError, match="x was not announced with"):
            writer.write_rows("x", 0, wrong)
        writer.write_rows("x", 0, torch.ones(4, 3))


@given(
    wanted=st.sets(st.integers(0, 199)).map(sorted),
    near=st.sampled_from([1, 40, 400, 4000]),
    at_once=st.sampled_from([1, 160, 1 << 20]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_are_picked_however_far_apart_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[int], near: int, at_once: int
) -> None:
    path, matrix = tmp_path / "picked.safetensors", torch.arange(2000, dtype=torch.float32).view(200, 10)
    if not path.exists():
        write_tensors(path, {"before": torch.ones(3), "m": matrix})
    monkeypatch.setattr(rows_module, "_GAP_BYTES", near)
    monkeypatch.setattr(rows_module, "_AT_ONCE_BYTES", at_once)
    rows_N = torch.tensor(wanted, dtype=torch.int64)
    assert torch.equal(StoredRows(path, "m", read_header(path)["m"]).pick(rows_N), matrix[rows_N])


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_all_bytes_come_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    path, vector = tmp_path / "chunks.safetensors", torch.arange(40, dtype=torch.uint8)
    write_tensors(path, {"before": torch.ones(3), "v": vector, "none": torch.empty(0)})
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", at_once)
    infos = read_header(path)
    assert torch.equal(
        torch.cat([each.clone() for each in StoredRows(path, "v", infos["v"]).chunks()]), vector
    )
    assert list(StoredRows(path, "none", infos["none"]).chunks()) == []


def test_a_file_that_was_truncated_since_is_told(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    write_tensors(path, {"m": torch.ones(4, 4)})
    stored = StoredRows(path, "m", read_header(path)["m"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CameraError, match=r"short\.safetensors ends within m: it was truncated"):
        stored.pick(torch.tensor([3]))
    with pytest.raises(CameraError, match="it was truncated"):
        list(stored.chunks())
