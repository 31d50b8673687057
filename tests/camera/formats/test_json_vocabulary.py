import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from camera.errors import CameraError
from camera.files import read_json
from camera.formats.json_vocabulary import json_vocabulary
from camera.formats.piece_vocabulary import piece_vocabulary, read_pieces
from tests.camera.formats.tokenizer_keys import edit, keys
from tests.tiny import TOKENS, tiny_checkpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A sentencepiece tokenizer as transformers 5 saves it: tokenizer.json alone."""
    from transformers import AutoTokenizer

    source = tiny_checkpoint(tmp_path / "source", "llama")
    folder = shutil.copytree(source, tmp_path / "converted")
    (folder / "tokenizer.model").unlink()
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


def test_pieces_in_tokenizer_json_alone_are_those_of_the_sentencepiece_model(
    converted: Path, tmp_path: Path
) -> None:
    ours, _ = keys(converted)
    theirs, _ = keys(tmp_path / "source")
    same = ("model", "pre", "tokens", "token_type", "add_space_prefix", "add_bos_token", "eos_token_id")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}

    def order(tokenizer: dict[str, Any]) -> list[str]:
        made = {"".join(pair) for pair in read_json(converted / "tokenizer.json")["model"]["merges"]}
        pieces = zip(tokenizer["scores"], tokenizer["tokens"], strict=True)
        return [text for _, text in sorted(pieces, reverse=True) if text in made]

    assert order(ours) == order(theirs)


def with_part(folder: Path, **parts: Any) -> None:
    edit(folder / "tokenizer.json", **parts)


def test_prefixes_are_found_however_tokenizer_json_writes_them(converted: Path) -> None:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    legacy = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    gemma = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    for normalizer, pre_tokenizer, prefix in (
        (legacy, None, True),
        (spaces, gemma, False),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, True),
    ):
        with_part(converted, normalizer=normalizer, pre_tokenizer=pre_tokenizer)
        assert keys(converted)[0]["add_space_prefix"] is prefix


@pytest.mark.parametrize(
    ("model_type", "parts", "said"),
    [
        ("llama", {"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ("llama", {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "splits text by WhitespaceSplit"),
        ("qwen2", {"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
        (
            "qwen2",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
            "a space before a text",
        ),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_refused(
    tmp_path: Path, converted: Path, model_type: str, parts: dict[str, Any], said: str
) -> None:
    folder = converted if model_type == "llama" else tiny_checkpoint(tmp_path / "bytes", model_type)
    with_part(folder, **parts)
    with pytest.raises(CameraError, match=said):
        keys(folder)


def test_a_table_that_normalises_pieces_is_told(converted: Path) -> None:
    with_part(converted, normalizer={"type": "NFKC"})
    (warning,) = keys(converted)[1]
    assert "NFKC" in warning


def test_unigram_keeps_its_probabilities(tmp_path: Path) -> None:
    vocab = [["<unk>", 0.0], ["▁", -2.0], ["▁river", -3.5]]
    form = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    }
    vocabulary, warnings = json_vocabulary(form, tmp_path / "tokenizer.json", 4)
    assert (vocabulary.model, vocabulary.scores[:3], warnings) == ("t5", [0.0, -2.0, -3.5], [])
    assert [int(type) for type in vocabulary.types] == [UNKNOWN, NORMAL, NORMAL, UNUSED]
    assert vocabulary.further == {"add_space_prefix": True, "remove_extra_whitespaces": True}


def test_a_replacement_of_letters_is_refused(tmp_path: Path) -> None:
    form = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -2.0]]},
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    }
    with pytest.raises(CameraError, match="normalizer Replace"):
        json_vocabulary(form, tmp_path / "tokenizer.json", 2)


def test_added_tokens_that_look_special_steer(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2") / "tokenizer.json"
    added = [
        {"id": TOKENS + number, "content": text, "special": False}
        for number, text in enumerate(("<|think|>", "<｜x｜>", "<unused3>", "<think>"))
    ]
    edit(path, added_tokens=read_json(path)["added_tokens"] + added)
    assert keys(tmp_path, TOKENS + 4)[0]["token_type"][-4:] == [CONTROL, CONTROL, CONTROL, USER_DEFINED]


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2") / "tokenizer.json"
    with_part(
        tmp_path,
        added_tokens=[
            *read_json(path)["added_tokens"],
            {"id": TOKENS, "content": "<|im_end|>", "special": True},
        ],
    )
    with pytest.raises(CameraError, match="are both"):
        keys(tmp_path, TOKENS + 1)


def test_meta_s_list_named_tokenizer_model_is_passed_over(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2")
    before = keys(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert keys(tmp_path) == before


def test_vocab_and_merges_alone_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2")
    before, _ = keys(tmp_path)
    model = read_json(tmp_path / "tokenizer.json")["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer.json").unlink()
    after, _ = keys(tmp_path)
    assert {key: after[key] for key in ("tokens", "merges", "pre")} == {
        key: before[key] for key in ("tokens", "merges", "pre")
    }


def test_user_defined_pieces_are_whole_tokens_where_nothing_else_makes_them(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    model = read_pieces(folder / "tokenizer.model")
    assert model is not None
    pieces = {"@": 300, "▁▁": 301, "<tag>": 302}
    for text, number in pieces.items():
        model.pieces[number].piece, model.pieces[number].type = text, USER_DEFINED
    for prefix, expected in (
        (True, ["@", "▁▁", "<tag>"]),  # single or made by a merge: ordinary; else found whole
        (False, ["@", "  ", "<tag>"]),
    ):
        model.normalizer_spec.add_dummy_prefix = prefix
        vocabulary, _ = piece_vocabulary(model, folder, {}, TOKENS)
        assert [vocabulary.texts[number] for number in pieces.values()] == expected
        types = [int(vocabulary.types[number]) for number in pieces.values()]
        assert types == ([NORMAL, NORMAL, USER_DEFINED] if prefix else [USER_DEFINED] * 3)
