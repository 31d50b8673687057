"""Text and token files of the user's own."""

import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from camera.data.sets import file as local
from camera.data.sets import lines, parquet
from camera.errors import CameraError


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo é\n".encode())
    assert local.read(tmp_path / "a.txt", "text").texts == ["one\r\n\ntwo é\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert local.read(tmp_path / "a.txt", "text").texts == ["one"]


def test_json_lines_are_a_document_each_and_blank_rows_are_kept(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "one\u2028two"}, {"text": "  "}, {"text": "three", "id": 3})
    file.write_text(file.read_text() + "\n")
    assert local.read(file, "text").texts == ["one\u2028two", "  ", "three"]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    assert local.read(jsonl(tmp_path / "a.jsonl", {"body": "one"}), "body").texts == ["one"]


def test_parquet_rows_are_a_document_each(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert local.read(tmp_path / "a.parquet", "text").texts == ["one", "two"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("second")
    jsonl(tmp_path / "c.jsonl", {"text": "third"})
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("no text file")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert local.read(tmp_path, "text").texts == ["first", "second", "third"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"nowhere does not exist"):
        local.read(tmp_path / "nowhere", "text")


def test_a_folder_without_texts_and_an_unknown_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"holds no text file \(\.txt, \.jsonl, \.parquet\)"):
        local.read(tmp_path, "text")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(CameraError, match=r"a\.csv: not a kind of text file"):
        local.read(tmp_path / "a.csv", "text")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"body": "x"}', r"line 2: no field 'text' \(it has body\)"),
        (b'["x"]', r"line 2: no field 'text' \(it has a JSON list\)"),
        (b'{"text": 5}', r"line 2: 'text' is int, not text"),
        (b'{"text": "x"', r"line 2: not valid JSON"),
        (b'{"text": "\xff"}', r"line 2: not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named(second: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + second + b"\n")
    with pytest.raises(CameraError, match=message):
        local.read(tmp_path / "a.jsonl", "text")


def test_bad_parquet_is_named_by_field_row_or_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "a.parquet")
    with pytest.raises(CameraError, match=r"no field 'body' \(it has text\)"):
        local.read(tmp_path / "a.parquet", "body")
    with pytest.raises(CameraError, match=r"row 2: 'text' is NoneType"):
        local.read(tmp_path / "a.parquet", "text")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CameraError, match=r"b\.parquet is no readable parquet file"):
        local.read(tmp_path / "b.parquet", "text")


def test_ready_made_tokens_are_read_as_they_are(tmp_path: Path) -> None:
    ids = torch.arange(12).view(3, 4)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    assert torch.equal(local.read_input_ids(tmp_path / "ids.safetensors", vocab_size=12), ids)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.zeros(1, 2, dtype=torch.int64)}, "no tensor input_ids; it has ids"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.int32)}, r"input_ids is torch\.int32 \[1, 2\]"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, r"input_ids is torch\.int64 \[2\]"),
        ({"input_ids": torch.zeros(0, 8, dtype=torch.int64)}, "not empty"),
        ({"input_ids": torch.tensor([[3, 10]])}, "holds 10, and the vocabulary has ids 0 to 9"),
        ({"input_ids": torch.tensor([[3, -1]])}, "holds -1"),
    ],
)
def test_tokens_that_cannot_be_right_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(CameraError, match=message):
        local.read_input_ids(tmp_path / "ids.safetensors", vocab_size=10)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"text": "\\ud800"}', "holds half a character"),
        ('{"text": 7}', "is int, not text"),
        ('{"text": null}', "is NoneType, not text"),
    ],
)
def test_json_that_is_no_text_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(CameraError, match=rf"a\.jsonl, line 2: .*{message}"):
        local.read(tmp_path / "a.jsonl", "text")


def test_a_line_of_a_gigabyte_and_a_text_of_more_are_refused_unread(tmp_path: Path) -> None:
    for name, size, message in (
        ("a.jsonl", 1 << 30, "line 1: longer than 33.6 MB"),
        ("a.txt", (1 << 30) + 1, "holds more text than is read"),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # takes no room
        with pytest.raises(CameraError, match=message):
            local.read(tmp_path / name, "text")


def test_a_kilobyte_of_parquet_that_stands_for_gigabytes_is_refused(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array(["word " * 40_000]))
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": text}), path, compression="zstd")
    assert path.stat().st_size < 2000
    with pytest.raises(CameraError, match="holds more text than is read of one data set"):
        local.read(path, "text")


@pytest.fixture
def half_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> int:
    """The most text of a data set, in place of a gigabyte."""
    for module in (lines, parquet, local):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", 1 << 19)
    return 1 << 19


def test_the_text_of_all_files_together_is_limited_not_the_size_of_files(
    tmp_path: Path, half_a_megabyte: int
) -> None:
    most = half_a_megabyte - lines.BYTES_PER_ROW
    for folder, texts in (("fits", [most]), ("fits too", [1000, 1000]), ("more", [most // 2] * 3)):
        (tmp_path / folder).mkdir()
        for number, length in enumerate(texts):
            table = pa.table({"text": ["x" * length]})
            pq.write_table(table, tmp_path / folder / f"{number}.parquet", compression="zstd")
    assert [len(text) for text in local.read(tmp_path / "fits", "text").texts] == [most]
    jsonl(tmp_path / "fits too" / "a.jsonl", {"text": "x", "else": "y" * (1 << 20)})
    assert [len(text) for text in local.read(tmp_path / "fits too", "text").texts] == [1000, 1000, 1]
    jsonl(tmp_path / "more.jsonl", *[{"text": "é" * (most // 4)}] * 3)
    for name in ("more", "more.jsonl"):
        with pytest.raises(CameraError, match=r"holds more text than is read .* all is read first.*head -n"):
            local.read(tmp_path / name, "text")


def test_one_child_reads_all_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To start one takes a tenth of a second, and hub data sets have hundreds of files."""
    for number in range(5):
        pq.write_table(pa.table({"text": [f"text {number}"]}), tmp_path / f"{number}.parquet")
    forks = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: [forks.append(1), fork()][1])
    assert local.read(tmp_path, "text").texts == [f"text {number}" for number in range(5)]
    assert len(forks) == 1
    (tmp_path / "3.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CameraError, match=r"^.*3\.parquet is no readable parquet file"):
        local.read(tmp_path, "text")


def test_a_part_of_parquet_rows_costs_what_it_holds_not_what_all_rows_stored_together_hold() -> None:
    """Or time grows with the square of the rows."""
    entries = pa.array([f"row {i}" for i in range(100_000)])
    column = pa.DictionaryArray.from_arrays(pa.array([7, None, 99_999, 7], pa.int32()), entries)
    tracemalloc.start()
    values = parquet._values(column)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values == ["row 7", None, "row 99999", "row 7"]
    assert values[0] is values[3], "one that repeats is sent and kept once"
    assert most < 100_000


def test_names_of_fields_are_shown_in_part(tmp_path: Path) -> None:
    """They are the file's own, and one may be 32 MB long."""
    names = {"a://b:" * 100_000: "x", **{str(number): "x" for number in range(1000)}}
    jsonl(tmp_path / "a.jsonl", names)
    pq.write_table(pa.table({name: ["x"] for name in names}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(CameraError, match=r"it has a://b:a.* and 997 more\); set `field`") as told:
            local.read(tmp_path / name, "text")
        assert len(str(told.value)) < 1000
