"""A local copy of a hub data set gives the rows, and so the tokens, that the hub gives."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from camera.checkpoints.checkpoint import Checkpoint
from camera.data.sampling import document_windows
from camera.data.sets import lines
from camera.data.sets.copies import rows_of_copy
from camera.data.tokens import calibration_tokens, evaluation_tokens
from camera.errors import CameraError
from camera.held import SourceChangedError, hold, holding
from camera.options import CalibrationOptions, DatasetOptions
from tests.adversary import while_swapped
from tests.tiny import tiny_checkpoint

RAW = " \n = The light = \n \n The keeper climbed . \n Ships\x0b came\u2028home . \n \n"
ROWS = ["", " = The light = \n", "", " The keeper climbed . \n", " Ships\x0b came\u2028home . \n", ""]
"""As the hub has the lines of `RAW`."""
DOCUMENTS = [f"{number} ships came home before the storm. " * (1 + number % 4) for number in range(30)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")).load_tokenizer()


def write(path: Path, rows: list[str]) -> Path:
    """A file of rows, of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": rows}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def wikitext2(path: Path) -> DatasetOptions:
    return DatasetOptions(name="wikitext2", path=path, split="test")


@pytest.mark.parametrize("name", ["wiki.test.raw", "wikitext2-test.txt", "rows.jsonl", "rows.parquet"])
def test_wikitext_is_measured_on_the_hubs_tokens_whatever_the_copy_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    if name.startswith("wiki"):
        (tmp_path / name).write_text(RAW, encoding="utf-8")
    else:
        write(tmp_path / name, ROWS)
    meant = tokenizer("\n\n".join(ROWS))["input_ids"]
    assert evaluation_tokens(wikitext2(tmp_path / name), tokenizer).tolist() == meant


def test_the_same_rows_in_a_file_of_ones_own_are_the_same_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = DatasetOptions(name="file", path=write(tmp_path / "rows.jsonl", ROWS))
    assert torch.equal(
        evaluation_tokens(own, tokenizer), evaluation_tokens(wikitext2(tmp_path / "rows.jsonl"), tokenizer)
    )


def test_of_a_clone_of_the_repository_the_part_and_the_variant_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for config in ("wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1"):
        for part in ("test", "train"):
            rows = [f"{config} {part}"]
            write(tmp_path / "wikitext" / config / f"{part}-00000-of-00001.parquet", rows)
    found = evaluation_tokens(wikitext2(tmp_path / "wikitext"), tokenizer)
    assert found.tolist() == tokenizer("wikitext-2-raw-v1 test")["input_ids"]


@pytest.mark.parametrize("name", ["c4.jsonl", "c4/en/c4-train.00000-of-01024.json.gz", "c4.parquet"])
def test_windows_of_c4_lie_within_its_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    path = write(tmp_path / name, DOCUMENTS)
    write(tmp_path / "c4" / "en" / "c4-train.00001-of-01024.json.gz", ["another file"])
    place = tmp_path / "c4" if name.startswith("c4/") else path
    found = calibration_tokens(
        CalibrationOptions(name="c4", path=place, samples=5, length=16, seed=3), tokenizer
    )
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in DOCUMENTS]
    assert torch.equal(found, document_windows(tokens.__getitem__, len(tokens), 5, 16, 3))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("c4", "c4.txt", "does not tell where a document ends; give .jsonl"),
        ("wikitext2", "wiki.csv", "no kind of file that a copy is read from"),
        ("wikitext2", "nowhere/", "nowhere does not exist"),
        ("wikitext2", "", "holds no file of the part test"),
    ],
)
def test_what_is_no_copy_is_refused_with_what_to_give(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, file: str, message: str
) -> None:
    path = tmp_path / file
    if path.suffix:
        path.write_text("text")
    with pytest.raises(CameraError, match=message):
        evaluation_tokens(DatasetOptions(name=name, path=path, split="test"), tokenizer, window=8)


@pytest.mark.parametrize("content", ['{"body": "one"}\n', '{"text": 7}\n', "{no json"])
def test_rows_without_text_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(CameraError, match=rf"{path}"):
        evaluation_tokens(wikitext2(path), tokenizer)


def test_copies_that_stand_for_gigabytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array(["word " * 40_000]))
    pq.write_table(pa.table({"text": text}), tmp_path / "test.parquet", compression="zstd")
    monkeypatch.setattr(lines, "_MAX_UNPACKED_BYTES", 1 << 20)
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(b'{"text": "one"}\n' * (1 << 17))
    for name, message in (
        ("test.parquet", "more text than is read"),
        ("a.json.gz", "more than a data set does"),
    ):
        with pytest.raises(CameraError, match=message):
            rows_of_copy(tmp_path / name, "test", within=None, field="text", by_line=False)


def rows_of(path: Path) -> list[str]:
    return list(rows_of_copy(path, "test", within=None, field="text", by_line=False))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows [1].json.gz", "rows.parquet"])
def test_a_copy_that_was_written_anew_with_its_old_time_is_read_anew(tmp_path: Path, name: str) -> None:
    for rows in (["one"], ["two"]):
        path = write(tmp_path / name, rows)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert rows_of(path) == rows
    assert not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.parquet"])
def test_a_copy_that_is_swapped_while_it_is_held_is_not_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "above" / "source" / name, ["row 1"] * 3)
    held = hold(path.parent, [name])
    with pytest.raises(SourceChangedError), holding(held), while_swapped("folder above", path.parent, name):
        rows_of(path)
