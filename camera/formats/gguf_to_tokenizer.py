"""The tokenizer of a GGUF file as Hugging Face files: tokenizer.json of a byte-level BPE, or tokenizer.model of sentencepiece."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from camera.errors import CameraError
from camera.files import write_json
from camera.formats.gguf_file import GgufFile
from camera.formats.pre_tokenizers import ignores_merges, pre_tokenizer_of

_P = "tokenizer.ggml."
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "mask": "mask",
}
"""Names in tokenizer_config.json, and in keys of a file; the typing error is llama.cpp's."""
_BEGINS = frozenset(
    {
        *(
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ),
        *("tekken", "chameleon"),
    }
)
"""Splitting rules under which llama.cpp starts a text with a token, where the file does not say whether to."""
_TEMPLATE = "tokenizer.chat_template"
_UNBOUND = 10**30
"""What transformers writes for texts of any length."""


@dataclass(frozen=True)
class Tokenizer:
    """What is to be written."""

    files: dict[str, Any]
    """JSON, text or bytes, by the name of a file."""
    unknown: tuple[str, ...]
    """What it had and the file does not say, a sentence each."""

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                write_json(path, content)


@dataclass(frozen=True)
class _Vocabulary:
    """Texts and types by id, without the padding behind the last token."""

    texts: list[str]
    types: list[TokenType]

    @classmethod
    def of(cls, file: GgufFile) -> "_Vocabulary":
        texts = _list(file, "tokens", str)
        types = _list(file, "token_type", int) or [int(TokenType.NORMAL)] * len(texts)
        if not texts or len(types) != len(texts):
            raise CameraError(
                f"{file.path}: {len(texts)} tokens and {len(types)} token types: the file is damaged, fetch or write it again"
            )
        used = len(texts)
        while used and types[used - 1] == TokenType.UNUSED:
            used -= 1
        try:
            return cls(texts[:used], [TokenType(type) for type in types[:used]])
        except ValueError as error:
            raise CameraError(f"{file.path}: {_P}token_type: {error}") from None

    def added(self) -> Iterator[tuple[int, str, bool]]:
        """Id, text and whether it is special, of the tokens that are found in a text before anything else."""
        for number, (text, type) in enumerate(zip(self.texts, self.types, strict=True)):
            if type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
                yield number, text, type != TokenType.USER_DEFINED


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The files of a tokenizer that gives the ids that llama.cpp gives.

    Raises:
        CameraError: if the file has no tokenizer, one of another kind, a splitting rule without a known counterpart, or
            a damaged one.
    """
    kind = file.value(f"{_P}model", str)
    vocabulary = _Vocabulary.of(file)
    if kind == "gpt2":
        files, unknown = _byte_bpe(file, vocabulary)
    elif kind == "llama":
        files, unknown = _sentencepiece(file, vocabulary)
    else:
        raise CameraError(
            f"{file.path}: a tokenizer of the kind {kind!r} cannot be written; known are gpt2 (byte-level BPE) and llama "
            "(sentencepiece). Take the tokenizer of the model that the file was made from"
        )
    templates = dict(_templates(file))
    if not templates:
        unknown += ("a chat template",)
    return Tokenizer({**files, **templates}, unknown)


def _byte_bpe(file: GgufFile, vocabulary: _Vocabulary) -> tuple[dict[str, Any], tuple[str, ...]]:
    rule = file.value(f"{_P}pre", str, "default")
    steps = pre_tokenizer_of(rule)
    if steps is None:
        raise CameraError(
            f"{file.path} splits text by the rule {rule!r}, which is not known here: take the tokenizer of the model that "
            "the file was made from. With another rule every prompt would be misread"
        )
    begins = rule in _BEGINS
    merges = [_pair(file, text) for text in _list(file, "merges", str)]
    vocab = {
        text: number
        for number, (text, type) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
        if type != TokenType.UNUSED
    }
    if lost := next((pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()), None):
        raise CameraError(
            f"{file.path}: the merge of {lost[0]!r} and {lost[1]!r} is of no tokens: the file is damaged"
        )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(*each) for each in vocabulary.added()],
        "normalizer": None,
        "pre_tokenizer": steps,
        "post_processor": _post_processor(file, vocabulary, begins=begins),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignores_merges(rule),
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    config = _config(file, vocabulary, "PreTrainedTokenizerFast", begins=begins)
    unknown = (
        "whether the tokenizer normalised text (NFC and the like), and blanks that its added tokens take along: llama.cpp "
        "does neither, and nor does the folder",
    )
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}, unknown


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> tuple[dict[str, Any], tuple[str, ...]]:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

    scores = _list(file, "scores", float) or [0.0] * len(vocabulary.texts)
    model = ModelProto()
    for text, type, score in zip(vocabulary.texts, vocabulary.types, scores, strict=False):
        model.pieces.add(piece=text, score=score, type=int(type))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary.texts)
    trainer.byte_fallback = TokenType.BYTE in vocabulary.types
    for name, (key, default) in {
        "unk": ("unknown", 0),
        "bos": ("bos", 1),
        "eos": ("eos", 2),
        "pad": ("padding", -1),
    }.items():
        number = file.metadata.get(f"{_P}{key}_token_id", default)
        setattr(trainer, f"{name}_id", number)
        if 0 <= number < len(vocabulary.texts):
            setattr(trainer, f"{name}_piece", vocabulary.texts[number])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = file.value(f"{_P}add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = file.value(f"{_P}remove_extra_whitespaces", bool, False)
    normalizer.escape_whitespaces = True
    config = _config(file, vocabulary, "LlamaTokenizer", begins=True)
    config |= {"add_prefix_space": normalizer.add_dummy_prefix, "legacy": False}
    unknown = (
        "how the sentencepiece model was trained, and a normalisation of text, which llama.cpp does not do",
    )
    return {
        "tokenizer.model": model.SerializeToString(deterministic=True),
        "tokenizer_config.json": config,
    }, unknown


def _config(file: GgufFile, vocabulary: _Vocabulary, tokenizer_class: str, *, begins: bool) -> dict[str, Any]:
    tokens = {
        f"{name}_token": vocabulary.texts[number]
        for name, key in _SPECIAL.items()
        if (number := _special(file, key, vocabulary)) is not None
    }
    return {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": file.value(f"{_P}add_bos_token", bool, begins),
        "add_eos_token": file.value(f"{_P}add_eos_token", bool, False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.value(f"{file.architecture}.context_length", int, _UNBOUND),
        **tokens,
        "added_tokens_decoder": {
            str(number): {
                key: value for key, value in _added_token(number, text, special).items() if key != "id"
            }
            for number, text, special in vocabulary.added()
        },
    }


def _added_token(number: int, text: str, special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **plain, "special": special}


def _post_processor(file: GgufFile, vocabulary: _Vocabulary, *, begins: bool) -> dict[str, Any]:
    """What stands around a text, of special tokens."""
    around = {
        "bos": file.value(f"{_P}add_bos_token", bool, begins),
        "eos": file.value(f"{_P}add_eos_token", bool, False),
    }
    ids = {key: _special(file, key, vocabulary) for key, is_added in around.items() if is_added}
    texts = {key: vocabulary.texts[number] for key, number in ids.items() if number is not None}

    def sequence(name: str, segment: int) -> list[dict[str, Any]]:
        marks = {key: {"SpecialToken": {"id": text, "type_id": segment}} for key, text in texts.items()}
        own = {"Sequence": {"id": name, "type_id": segment}}
        return [*([marks["bos"]] if "bos" in marks else []), own, *([marks["eos"]] if "eos" in marks else [])]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [ids[key]], "tokens": [text]} for key, text in texts.items()
        },
    }


def _templates(file: GgufFile) -> Iterator[tuple[str, str]]:
    for key, text in file.metadata.items():
        if key == _TEMPLATE and isinstance(text, str):
            yield "chat_template.jinja", text
        elif key.startswith(f"{_TEMPLATE}.") and isinstance(text, str):
            name = key.removeprefix(f"{_TEMPLATE}.")
            if not name.replace("_", "").replace("-", "").isalnum():
                raise CameraError(
                    f"{file.path}: {key[:60]!r} names no chat template that a file can be called by"
                )
            yield f"additional_chat_templates/{name}.jinja", text


def _special(file: GgufFile, key: str, vocabulary: _Vocabulary) -> int | None:
    stored = f"{_P}{key}_token_id"
    if stored not in file.metadata:
        return None
    number = file.value(stored, int)
    if number >= len(vocabulary.texts):
        raise CameraError(f"{file.path}: {stored} is {number}, and there are {len(vocabulary.texts)} tokens")
    return number


def _pair(file: GgufFile, text: str) -> tuple[str, str]:
    left, found, right = text.partition(" ")
    if not found or not left:
        raise CameraError(f"{file.path}: {text[:40]!r} is no merge of two tokens: the file is damaged")
    return left, right


def _list(file: GgufFile, name: str, kind: type) -> list[Any]:
    """A key's list; empty where there is none."""
    found = file.metadata.get(f"{_P}{name}", [])
    if not isinstance(found, list) or not all(type(each) is kind for each in found):
        raise CameraError(f"{file.path}: {_P}{name} is no list of {kind.__name__}: the file is damaged")
    return found
