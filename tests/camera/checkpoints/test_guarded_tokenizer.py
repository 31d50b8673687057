"""Texts become the ids that they always did, and a tokenizer made to hang, panic or grow is refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from camera.checkpoints import guarded_tokenizer
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.guarded_tokenizer import GuardedTokenizer
from camera.checkpoints.tokenizer import load_tokenizer
from camera.errors import CameraError
from camera.guarded import Limits
from camera.held import hold, holding
from tests.conftest import REPOSITORY
from tests.tiny import tiny_checkpoint

REAL = [
    REPOSITORY / "data" / "models" / "tiny-openpangu",
    REPOSITORY.parent / "shared" / "data" / "models" / "tiny-qwen3-moe",
]
TEXTS = [
    "",
    " ",
    "a\r\n\n  b\t" * 3,
    "The keeper's 12,345 lamps.\n" * 1_000,
    "é𝄞漢字\0 ñ " * 200,
    "<s> [unused9] </s>",
]


def tokenizer_of(vocab: dict[str, int] | None = None, **parts: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(BPE(vocab or {"a": 0}, []))
    for name, part in parts.items():
        setattr(made, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_ids_are_those_of_the_tokenizer_on_the_whole_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_tokenizer, "_TRIED", 1000)  # the beginning of a long text is tried first
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not here")
    tokenizer = Checkpoint.open(folder).load_tokenizer()
    with GuardedTokenizer(tokenizer) as guarded:
        for text in TEXTS:
            assert guarded.ids(text).tolist() == tokenizer(text)["input_ids"]
            assert guarded.encode(text, add_special_tokens=False) == tokenizer.encode(
                text, add_special_tokens=False
            )
        ids = tokenizer(TEXTS[4])["input_ids"]
        assert guarded.decode(ids) == tokenizer.decode(ids)


def test_a_normaliser_that_multiplies_text_is_refused_in_bounded_memory() -> None:
    ten = normalizers.Replace("a", "a" * 10)
    bomb = tokenizer_of(normalizer=normalizers.Sequence([ten] * 9))
    with GuardedTokenizer(bomb) as guarded, pytest.raises(CameraError, match="memory"):
        guarded.ids("a" * 10)


def test_a_pattern_without_end_is_refused_and_the_next_tokenizer_works() -> None:
    endless = tokenizer_of(pre_tokenizer=pre_tokenizers.Split(Regex(r"(a+a+)+b"), "isolated"))
    with GuardedTokenizer(endless) as guarded, pytest.raises(CameraError, match="the tokenizer: "):
        guarded.ids("a" * 30_000)
    with GuardedTokenizer(tokenizer_of()) as guarded:
        assert guarded.ids("aa").tolist() == [0, 0]


@pytest.mark.parametrize(
    ("template", "told"),
    [("{% set x = ['a' * 10**8] * 9 %}{{ x | join }}", "memory"), ("{{ 1 + }}", "the tokenizer: ")],
)
def test_a_chat_template_is_rendered_within_limits(template: str, told: str) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    with GuardedTokenizer(tokenizer) as guarded, pytest.raises(CameraError, match=told):
        guarded.chat([{"role": "user", "content": "a"}])


def test_a_tokenizer_file_that_its_reader_cannot_load_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen2", layers=1)
    form = json.loads(tokenizer_of().backend_tokenizer.to_str())
    model = {"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 0.0]]}
    (folder / "tokenizer.json").write_text(json.dumps({**form, "model": model}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CameraError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_of_a_tokenizer_whose_child_is_ended_no_copy_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen2", layers=1)
    large = tokenizer_of({f"t{id}": id for id in range(150_000)}).backend_tokenizer.to_str()
    (folder / "tokenizer.json").write_text(large)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr("camera.checkpoints.tokenizer._limits", lambda folder: Limits(seconds=0.1))
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    with holding(hold(folder, names)), pytest.raises(CameraError, match="no end after"):
        load_tokenizer(folder)
    assert not list((tmp_path / "scratch").iterdir())
