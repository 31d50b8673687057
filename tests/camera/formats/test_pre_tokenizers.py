import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from camera.formats.pre_tokenizers import OTHER_NAMES, RULES, ignores_merges, pre_tokenizer_of, rule_name

TEXT = "I've 'LL 12345\n\n  naïveCase..!\t١٢٣ 你好ですか e\u0301"


def loaded(pre_tokenizer: dict[str, Any]) -> Tokenizer:
    """A tokenizer with this rule, as tokenizers itself understands it."""
    form = json.loads(Tokenizer(models.BPE()).to_str())
    return Tokenizer.from_str(json.dumps({**form, "pre_tokenizer": pre_tokenizer}))


@pytest.mark.parametrize("name", [*RULES, *OTHER_NAMES])
def test_a_name_becomes_steps_that_tokenizers_runs_and_that_have_that_name(name: str) -> None:
    steps = pre_tokenizer_of(name)
    assert steps is not None
    tokenizer = loaded(steps)
    assert tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    written = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert rule_name(written, ignores_merges(name)) == OTHER_NAMES.get(name, name)


SPELLINGS = {
    "llama-bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "qwen2": "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
    "| ?[^\\s\\p{L}\\p{N}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(("behavior", "invert"), [("Isolated", False), ("Removed", True)])
def test_other_spellings_of_a_rule_have_its_name_and_split_as_it_does(
    name: str, behavior: str, invert: bool
) -> None:
    step = {
        "type": "Split",
        "pattern": {"Regex": SPELLINGS[name]},
        "behavior": behavior,
        "invert": invert,
    }
    assert rule_name(step, ignores_merges(name)) == name
    ours = pre_tokenizer_of(name)
    assert ours is not None
    (split, _) = ours["pretokenizers"]
    pieces = [loaded(each).pre_tokenizer.pre_tokenize_str(TEXT) for each in (step, split)]
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize(
    "step",
    [
        {"type": "WhitespaceSplit"},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "MergedWithNext", "invert": False},
        {"type": "Punctuation", "behavior": "Isolated"},
    ],
)
def test_a_step_that_llama_cpp_does_not_know_has_no_name(step: dict[str, Any]) -> None:
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert rule_name({"type": "Sequence", "pretokenizers": [step, last]}) is None
    assert pre_tokenizer_of("default") is None
