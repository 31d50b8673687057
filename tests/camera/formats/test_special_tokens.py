import json
from pathlib import Path
from typing import Any

import pytest

from camera.files import read_json
from tests.camera.formats.tokenizer_keys import edit, keys
from tests.tiny import TOKENS, tiny_checkpoint

END, OTHER = 4, 7


def without(path: Path, *names: str) -> None:
    path.write_text(json.dumps({key: value for key, value in read_json(path).items() if key not in names}))


@pytest.mark.parametrize("model_type", ["PanguEmbedded", "qwen2"])
def test_of_a_list_of_ends_the_tokenizer_s_own_comes_first_and_the_others_end_a_text_too(
    tmp_path: Path, model_type: str
) -> None:
    tiny_checkpoint(tmp_path, model_type)
    own = keys(tmp_path)[0]["eos_token_id"]
    edit(tmp_path / "config.json", eos_token_id=[OTHER, own])
    edit(tmp_path / "generation_config.json", eos_token_id=[own, OTHER, OTHER + 1])
    tokenizer, warnings = keys(tmp_path)
    assert (tokenizer["eos_token_id"], tokenizer["eot_token_id"], tokenizer["eom_token_id"]) == (
        *(own, OTHER),
        OTHER + 1,
    )
    assert warnings == []


def test_ends_for_which_a_file_has_no_key_are_told(tmp_path: Path) -> None:
    edit(tiny_checkpoint(tmp_path) / "config.json", eos_token_id=[2, *range(6, 10)])
    (warning,) = keys(tmp_path)[1]
    assert "goes on after" in warning


def test_where_only_generation_config_names_an_end_it_is_that(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    without(tmp_path / "config.json", "eos_token_id")
    without(tmp_path / "tokenizer_config.json", "eos_token")
    edit(tmp_path / "generation_config.json", eos_token_id=[OTHER])
    assert keys(tmp_path)[0]["eos_token_id"] == OTHER


@pytest.mark.parametrize(("pad", "told"), [(-1, False), (None, False), (TOKENS + 5, True)])
def test_a_padding_token_that_is_none_is_left_out(tmp_path: Path, pad: int | None, told: bool) -> None:
    tiny_checkpoint(tmp_path)
    without(tmp_path / "tokenizer_config.json", "pad_token")
    without(tmp_path / "generation_config.json", "pad_token_id")
    edit(tmp_path / "config.json", pad_token_id=pad)
    tokenizer, warnings = keys(tmp_path)
    assert "padding_token_id" not in tokenizer
    assert ["pad_token_id" in warning for warning in warnings] == [True] * told


def template(*single: str) -> dict[str, Any]:
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if part == "$A"
        else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in single
    ]
    return {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": {}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("processor", "adds"),
    [
        (None, (False, False)),
        (BYTES, (False, False)),
        (template("$A"), (False, False)),
        (template("<|im_start|>", "$A"), (True, False)),
        (
            {"type": "Sequence", "processors": [BYTES, template("<|im_start|>", "$A", "<|im_end|>")]},
            (True, True),
        ),
    ],
)
def test_what_tokenizer_json_puts_around_a_text_llama_cpp_puts_there(
    tmp_path: Path, processor: dict[str, Any] | None, adds: tuple[bool, bool]
) -> None:
    tiny_checkpoint(tmp_path, "qwen2")
    without(tmp_path / "tokenizer_config.json", "add_bos_token", "add_eos_token")
    edit(tmp_path / "tokenizer.json", post_processor=processor)
    tokenizer, warnings = keys(tmp_path)
    assert (tokenizer["add_bos_token"], tokenizer["add_eos_token"]) == adds
    if adds[0]:
        assert tokenizer["tokens"][tokenizer["bos_token_id"]] == "<|im_start|>"
    assert warnings == []


def test_tokenizer_json_wins_over_a_flag_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_checkpoint(tmp_path, "qwen2")
    edit(tmp_path / "tokenizer_config.json", add_bos_token=True, bos_token="<|im_start|>")
    edit(tmp_path / "tokenizer.json", post_processor=BYTES)
    tokenizer, _ = keys(tmp_path)
    assert tokenizer["bos_token_id"] not in AutoTokenizer.from_pretrained(tmp_path)("river")["input_ids"]
    assert tokenizer["add_bos_token"] is False


@pytest.mark.parametrize(("flags", "adds"), [({}, (True, False)), ({"add_eos_token": True}, (True, True))])
def test_without_tokenizer_json_the_flags_decide(
    tmp_path: Path, flags: dict[str, bool], adds: tuple[bool, bool]
) -> None:
    tiny_checkpoint(tmp_path)
    without(tmp_path / "tokenizer_config.json", "add_bos_token", "add_eos_token")
    edit(tmp_path / "tokenizer_config.json", **flags)
    tokenizer, _ = keys(tmp_path)
    assert (tokenizer["add_bos_token"], tokenizer["add_eos_token"]) == adds


def test_more_tokens_before_a_text_than_llama_cpp_puts_there_are_told(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2")
    without(tmp_path / "tokenizer_config.json", "add_bos_token", "add_eos_token")
    edit(tmp_path / "tokenizer.json", post_processor=template("<|im_start|>", "<|im_end|>", "$A"))
    tokenizer, (warning,) = keys(tmp_path)
    assert tokenizer["add_bos_token"] is False
    assert "<|im_start|> <|im_end|>" in warning
