import json
import shutil
from pathlib import Path

import pytest

from camera.errors import CameraError
from camera.files import read_json
from tests.camera.formats.tokenizer_keys import edit, keys
from tests.tiny import TOKENS, tiny_checkpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def test_sentencepiece_pieces_keep_their_texts_scores_and_types(tmp_path: Path) -> None:
    import sentencepiece

    tokenizer, warnings = keys(tiny_checkpoint(tmp_path, "PanguEmbedded"), TOKENS + 2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer["model"], tokenizer["pre"], tokenizer["add_space_prefix"]) == ("llama", "default", True)
    assert warnings == []
    pieces = [model.id_to_piece(number) for number in range(TOKENS)]
    assert tokenizer["tokens"] == [*pieces, f"[PAD{TOKENS}]", f"[PAD{TOKENS + 1}]"]
    added = 5  # <unk>, <s>, </s> and the two chat marks stand in tokenizer_config.json
    scores = [model.get_score(number) for number in range(TOKENS)]
    assert tokenizer["scores"] == [*[-1000.0] * added, *scores[added:], -10000.0, -10000.0]
    bytes_ = [number for number in range(TOKENS) if model.is_byte(number)]
    assert len(bytes_) == 256
    expected = [NORMAL] * TOKENS + [UNUSED] * 2
    expected[:added] = [CONTROL] * added
    for number in bytes_:
        expected[number] = BYTE
    assert tokenizer["token_type"] == expected


def test_without_a_config_the_sentencepiece_model_says_what_a_token_is(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer, _ = keys(tmp_path)
    assert tokenizer["token_type"][:6] == [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, BYTE]


def test_byte_level_bpe_keeps_its_tokens_and_merges(tmp_path: Path) -> None:
    tokenizer, _ = keys(tiny_checkpoint(tmp_path, "qwen2"), TOKENS + 1)
    source = read_json(tmp_path / "tokenizer.json")
    assert (tokenizer["model"], tokenizer["pre"]) == ("gpt2", "qwen2")
    by_number = sorted(source["model"]["vocab"], key=source["model"]["vocab"].get)
    assert tokenizer["tokens"] == [*by_number, f"[PAD{TOKENS}]"]
    assert tokenizer["token_type"] == [CONTROL] * 3 + [NORMAL] * (TOKENS - 3) + [UNUSED]
    assert tokenizer["merges"] == [" ".join(pair) for pair in source["model"]["merges"]]


LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ]+"
PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
RULES = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "deepseek-llm": [
        *("[\r\n]", LETTERS, PUNCTUATION, r"\s+$", "[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True},
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}


@pytest.mark.parametrize("name", RULES)
def test_a_splitting_rule_has_llama_cpp_s_name(tmp_path: Path, name: str) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2") / "tokenizer.json"
    tokenizer = read_json(path)
    steps = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        if isinstance(step, str)
        else step
        for step in RULES[name]
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]}
    path.write_text(json.dumps(tokenizer))
    assert keys(tmp_path)[0]["pre"] == name


@pytest.mark.parametrize(("ignores_merges", "name"), [(True, "llama-bpe"), (False, "dbrx")])
def test_the_rule_of_llama_3_has_a_name_for_either_order_of_words_and_merges(
    tmp_path: Path, ignores_merges: bool, name: str
) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2") / "tokenizer.json"
    path.write_text(path.read_text().replace(r"|\\p{N}|", r"|\\p{N}{1,3}|"))
    tokenizer = read_json(path)
    tokenizer["model"]["ignore_merges"] = ignores_merges
    path.write_text(json.dumps(tokenizer))
    assert keys(tmp_path)[0]["pre"] == name


def test_an_unknown_splitting_rule_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2") / "tokenizer.json"
    path.write_text(path.read_text().replace(r"|\\p{N}|", r"|\\p{N}{2}|"))
    with pytest.raises(CameraError, match=r"tokenizer\.json splits text by a rule"):
        keys(tmp_path)


def test_a_chat_template_in_its_own_file_is_found(tmp_path: Path) -> None:
    config = tiny_checkpoint(tmp_path) / "tokenizer_config.json"
    edit(config, chat_template=None)
    config.write_text(json.dumps({k: v for k, v in read_json(config).items() if k != "chat_template"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}!")
    assert keys(tmp_path)[0]["tokenizer.chat_template"] == "{{ messages }}!"


def test_added_text_tokens_are_user_defined(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"lighthouse▁keeper": TOKENS}))
    tokenizer, _ = keys(tmp_path, TOKENS + 1)
    assert tokenizer["tokens"][-1] == "lighthouse keeper"
    assert tokenizer["token_type"][-1] == USER_DEFINED


def test_a_space_prefix_that_config_and_model_disagree_on_is_told(tmp_path: Path) -> None:
    edit(tiny_checkpoint(tmp_path) / "tokenizer_config.json", add_prefix_space=False)
    tokenizer, warnings = keys(tmp_path)
    assert tokenizer["add_space_prefix"] is False
    assert len(warnings) == 1
    assert "add_prefix_space" in warnings[0]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_more_tokens_than_the_embedding_has_rows_are_refused(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(CameraError, match="belongs to another model"):
        keys(tiny_checkpoint(tmp_path, model_type), TOKENS - 1)


@pytest.mark.parametrize(
    ("model_type", "file", "content"),
    [
        ("llama", "tokenizer.model", b"\xff\x00 no protobuf"),
        ("llama", "tokenizer.model", b""),
        ("llama", "tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("llama", "tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
        ("llama", "tokenizer_config.json", b"[]"),
        ("llama", "tokenizer_config.json", b"{"),
        ("qwen2", "tokenizer.json", b"{}"),
        ("qwen2", "tokenizer.json", b"[]"),
        ("qwen2", "tokenizer.json", b'{"model": {"type": "Unigram"}, "decoder": {"type": "Metaspace"}}'),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_its_file(
    tmp_path: Path, model_type: str, file: str, content: bytes
) -> None:
    (tiny_checkpoint(tmp_path, model_type) / file).write_bytes(content)
    with pytest.raises(CameraError, match=file.replace(".", r"\.")):
        keys(tmp_path)


def test_openpangu_s_special_tokens_are_those_of_the_published_model(
    tmp_path: Path, shared_data: Path
) -> None:
    for path in (shared_data / "openpangu").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    shutil.copyfile(shared_data / "models" / "llama2_tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer, warnings = keys(tmp_path, 153376)
    assert warnings == []
    assert len(tokenizer["tokens"]) == 153376
    assert (tokenizer["bos_token_id"], tokenizer["eos_token_id"], tokenizer["padding_token_id"]) == (
        1,
        45892,
        0,
    )
    assert (tokenizer["add_bos_token"], tokenizer["add_eos_token"]) == (True, False)
    assert tokenizer["tokens"][45892] == "[unused10]"
    assert tokenizer["token_type"][45892] == CONTROL
    assert "[unused9]" in tokenizer["tokenizer.chat_template"]
