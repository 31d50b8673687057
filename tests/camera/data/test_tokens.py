"""Documents and tokens from dataset options."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import calibration_tokens, calibration_windows, evaluation_tokens, read_documents
from camera.data.sets import DATA_SETS, hub
from camera.errors import CameraError
from camera.options import CalibrationOptions, DatasetOptions
from tests.tiny import MODEL_TYPES, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "pangu", "PanguEmbedded")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return Checkpoint.open(folder).load_tokenizer()


def from_file(path: Path, **options: int) -> CalibrationOptions:
    return CalibrationOptions(name="file", path=path, **options)


def test_the_built_in_dataset_gives_windows_of_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = calibration_tokens(CalibrationOptions(samples=4, length=256), tokenizer)
    assert tokens.shape == (4, 256)
    assert tokens.dtype == torch.int64
    assert int(tokens.max()) < len(tokenizer)
    again = calibration_tokens(CalibrationOptions(samples=4, length=256), tokenizer)
    assert torch.equal(tokens, again)


def test_windows_are_stretches_of_the_joined_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 40)
    (tmp_path / "b.txt").write_text("delta epsilon " * 40)
    stream = tokenizer("alpha beta gamma " * 40 + "\n\n" + "delta epsilon " * 40)["input_ids"]
    for window in calibration_tokens(from_file(tmp_path, samples=5, length=50), tokenizer).tolist():
        assert any(stream[start : start + 50] == window for start in range(len(stream) - 49))


def test_evaluation_reads_the_whole_text_once_with_one_begin_token(
    tokenizer: PreTrainedTokenizerBase, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "b.txt").write_text("second text")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = [processor.bos_id(), *processor.encode("first text\n\nsecond text")]
    assert evaluation_tokens(DatasetOptions(name="file", path=tmp_path), tokenizer).tolist() == expected


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_long_text_is_tokenised_without_a_warning(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Checkpoint.open(tiny_checkpoint(tmp_path / "model", model_type)).load_tokenizer()
    tokenizer.model_max_length = 512
    (tmp_path / "a.txt").write_text("some words of a long text " * 500)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        tokens = evaluation_tokens(DatasetOptions(name="file", path=tmp_path / "a.txt"), tokenizer)
    assert len(tokens) > 512
    assert "longer than" not in caplog.text + capfd.readouterr().err


def test_too_little_text_is_an_error_that_says_how_much_there_is(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("short")
    found = len(tokenizer("short")["input_ids"])
    with pytest.raises(CameraError, match=rf"a\.txt: the text has {found} tokens and one window needs 64"):
        calibration_tokens(from_file(tmp_path / "a.txt", length=64), tokenizer)


def test_an_empty_dataset_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(CameraError, match=r"a\.txt holds no text"):
        read_documents(DatasetOptions(name="file", path=tmp_path / "a.txt"))


def test_ready_made_windows_are_taken_in_order_and_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ids = torch.arange(300).view(10, 30)
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids}, file)
    assert torch.equal(calibration_tokens(from_file(file, samples=4, length=20), tokenizer), ids[:4, :20])
    assert torch.equal(evaluation_tokens(DatasetOptions(name="file", path=file), tokenizer), ids.flatten())


def test_ready_made_windows_need_no_tokenizer_and_fit_the_embedding(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    for name in checkpoint.tokenizer_files:
        (checkpoint.folder / name).unlink()
    rows = int(checkpoint.config["vocab_size"])
    file, outside = tmp_path / "ids.safetensors", tmp_path / "outside.safetensors"
    ids = torch.tensor([[0, rows - 1]])
    save_file({"input_ids": ids}, file)
    save_file({"input_ids": ids + 1}, outside)
    assert torch.equal(calibration_windows(from_file(file, samples=1, length=2), checkpoint), ids)
    with pytest.raises(CameraError, match=f"ids 0 to {rows - 1}"):
        calibration_windows(from_file(outside, samples=1, length=2), checkpoint)


def test_text_for_a_model_without_a_tokenizer_is_an_error_that_names_the_other_way(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    for name in checkpoint.tokenizer_files:
        (checkpoint.folder / name).unlink()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CameraError, match=r"cannot be loaded(.|\n)*`input_ids`"):
        calibration_windows(from_file(tmp_path / "a.txt"), checkpoint)


def test_text_becomes_a_models_windows_by_its_own_tokenizer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    (tmp_path / "a.txt").write_text("The keeper lit the lamp above the sea. " * 40)
    options = from_file(tmp_path / "a.txt", samples=2, length=16)
    expected = calibration_tokens(options, checkpoint.load_tokenizer())
    assert torch.equal(calibration_windows(options, checkpoint), expected)


def test_too_few_ready_made_windows_are_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, file)
    with pytest.raises(CameraError, match="2 windows of 8 tokens, and 3 of 8 are needed"):
        calibration_tokens(from_file(file, samples=3, length=8), tokenizer)


def test_ids_of_another_tokenizer_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.tensor([[0, len(tokenizer)]])}, file)
    with pytest.raises(CameraError, match="another tokenizer"):
        calibration_tokens(from_file(file, samples=1, length=2), tokenizer)


def test_tokens_are_not_documents(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="holds tokens, not text"):
        read_documents(DatasetOptions(name="file", path=tmp_path / "ids.safetensors"))


def test_c4_is_measured_on_the_256_windows_that_the_published_figures_use(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("lighthouse", "storm", "sea", "night", "wind", "boat")
    texts = [" ".join(words[(i * i + j) % 6] for j in range(3 + i * 7 % 50)) for i in range(90)]
    file = tmp_path / "c4" / hub.C4.files["validation"]
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    list(DATA_SETS)  # found before one of them is replaced
    monkeypatch.setitem(DATA_SETS._entries, "c4", replace(hub.C4, repository=str(tmp_path / "c4")))
    length = 40
    random = Random(0)
    expected: list[int] = []
    for _ in range(256):
        while len(ids := tokenizer(texts[random.randint(0, len(texts) - 1)])["input_ids"]) <= length:
            pass
        start = random.randint(0, len(ids) - length - 1)
        expected += ids[start : start + length]
    options = DatasetOptions(name="c4", split="test")
    assert evaluation_tokens(options, tokenizer, window=length).tolist() == expected
    with pytest.raises(
        CameraError, match=r"c4.*no.* longer than a window of 4000 .*; choose a shorter `window`"
    ):
        evaluation_tokens(options, tokenizer, window=4000)
