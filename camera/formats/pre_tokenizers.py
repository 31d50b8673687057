"""llama.cpp's names of the rules that split text before the merges, and tokenizer.json's steps that do the same.

A rule is a sequence of regular expressions: each splits the pieces that those before it left. What llama.cpp computes for a
name stands in its `src/llama-vocab.cpp`; where it spells an expression in another way than tokenizers, both mean the same
splits, and the spelling here is that of tokenizer.json.
"""

from typing import Any

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the step ByteLevel splits by, where it splits."""
_DIGIT = r"\p{N}"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    return rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_ENDS}"


def _cased(english: str, digits: str) -> str:
    """Words that end where a capital follows a small letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{english}|{start}{_UPPER}+{_LOWER}*{english}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDS}"
    )


_QWEN_2 = f"{_ENGLISH}|{_words(_DIGIT)}"
_LLAMA_3 = _ENGLISH + "|" + _words(r"\p{N}{1,3}")
_GPT_4O = _cased(f"{_ENGLISH}?", r"\p{N}{1,3}")
_HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"
_CASED_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
"""What DeepSeek's rule writes as a list of a hundred ranges."""
_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
"""What the step Punctuation takes together where its behavior is Contiguous."""

RULES: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT_2,),
    "smollm": (_DIGIT, _GPT_2),
    "qwen2": (_QWEN_2,),
    "llama-bpe": (_LLAMA_3,),
    "dbrx": (_LLAMA_3,),
    "gpt-4o": (_GPT_4O,),
    "tekken": (_cased("", _DIGIT),),
    "deepseek-llm": (
        *(r"[\r\n]", _CASED_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN_AND_HANGUL),
        _DIGIT,
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, _DIGIT),
    "deepseek-v3": (r"\p{N}{1,3}", _HAN_AND_KANA, rf"{_DEEPSEEK_WORDS}[\r\n]*{_ENDS}"),
    "spark2_5": (
        r"\p{N}{1,3}",
        _HAN_AND_KANA,
        rf"{_DEEPSEEK_WORDS}|[\r\n]|\s+(?!\S)|\s+",
        _DIGIT,
    ),
    "youtu": (
        rf"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_HAN_AND_KANA}",
        _cased(f"{_ENGLISH}?", _DIGIT),
    ),
    "qwen35": (
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_ENDS}",
    ),
    "ufakzeka": (_words(_DIGIT),),
    "seed-coder": (rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_ENDS}",),
    "exaone-moe": (
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?{_ENDS}",
    ),
    "minicpm5": (r"\p{N}{1,3}", _ENGLISH + "|" + _words(r"\p{N}+")),
    "jais-2": (
        _LLAMA_3.removesuffix(r"|\s+(?!\S)|\s+")
        + "".join(rf"|\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1))
        + r"|\s{1,2}(?!\S)|\s{1}",
    ),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT_4O),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "falcon": (_PUNCTUATION, _GPT_2, "[0-9][0-9][0-9]"),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, _DIGIT),
    "laguna": (r"[^\n]+|[\n]+", _QWEN_2),
}
"""By the name that is written for a rule; `OTHER_NAMES` are read too."""
_OTHERS = {
    "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe mpt olmo jais trillion granite-docling exaone4",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "qwen2": "stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2 bailingmoe bailingmoe2 llada-moe",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
    "dbrx": "smaug-bpe chatglm-bpe",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "tiny_aya": "cohere2moe",
    "bloom": "poro-chat gpt3-finnish",
}
OTHER_NAMES = {other: name for name, others in _OTHERS.items() for other in others.split()}
"""Names that split as another does."""
IGNORE_MERGES = frozenset({"llama-bpe", "tekken", "youtu", "minicpm5"})
"""Rules under which llama.cpp takes a piece that is a token whole, whatever the merges make of it."""

_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("'(?i:[sdmt]|ll|ve|re)", _ENGLISH),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _ENGLISH),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    ("?+", "?"),  # possessive; what follows cannot match what it took
    ("]++", "]+"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),  # both end behind the last line break of the white space
)
"""Ways to write what splits the same, and the one used here."""


def rule_name(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool = False) -> str | None:
    """llama.cpp's name of the rule of a tokenizer.json; None if it has none.

    Args:
        pre_tokenizer: that part of the file.
        ignore_merges: as the file's model says.

    Raises:
        KeyError, TypeError, AttributeError: if it is not of tokenizer.json's form.
    """
    found = _rule(pre_tokenizer)
    names = [name for name, rule in RULES.items() if rule == found]
    return next(
        (name for name in names if (name in IGNORE_MERGES) == ignore_merges), names[0] if names else None
    )


def pre_tokenizer_of(name: str) -> dict[str, Any] | None:
    """The `pre_tokenizer` of a tokenizer.json that splits as llama.cpp does under a name; None if the name is not known."""
    rule = RULES.get(OTHER_NAMES.get(name, name))
    if rule is None:
        return None
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if step == _DIGIT
        else {"type": "Punctuation", "behavior": "Contiguous"}
        if step == _PUNCTUATION
        else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in rule
        if step != _GPT_2
    ]
    by_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": _GPT_2 in rule,
    }
    steps.insert(rule.index(_GPT_2) if _GPT_2 in rule else len(steps), by_bytes)
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def ignores_merges(name: str) -> bool:
    """Whether llama.cpp takes a piece that is a token whole under a name."""
    return OTHER_NAMES.get(name, name) in IGNORE_MERGES


def _rule(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions of all steps, in the spelling of this file; of a step that has none its type."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _rule(part))
    step = _step(pre_tokenizer)
    return (step,) if step else ()


def _step(step: dict[str, Any]) -> str:
    kind = str(step["type"])
    if kind == "ByteLevel":
        return _GPT_2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return _DIGIT if step.get("individual_digits", False) else r"\p{N}+"
    if kind == "Punctuation" and str(step.get("behavior", "Isolated")) == "Contiguous":
        return _PUNCTUATION
    if kind != "Split" or "Regex" not in step["pattern"]:
        return kind
    spelling = str(step["pattern"]["Regex"])
    for other, ours in _SPELLINGS:
        spelling = spelling.replace(other, ours)
    if spelling.startswith(r"\s?[A-Za-zµÀ-Ö"):
        spelling = _CASED_LETTERS
    everything = spelling.endswith(r"|\s+(?!\S)|\s+")
    behavior, inverted = step["behavior"], bool(step.get("invert", False))
    if behavior == "Isolated" or (behavior == "Removed" and inverted and everything):
        return spelling
    return f"{kind} {behavior}"
