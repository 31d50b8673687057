"""Text becomes the same tokens in llama.cpp as in transformers, for every splitting rule and for the real tokenizers at hand."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from camera.checkpoints.tokenizer import load_tokenizer
from camera.files import read_json, write_json
from camera.formats.pre_tokenizers import RULES, ignores_merges, pre_tokenizer_of
from tests.camera.formats.test_real_llama_cpp import ask, converted
from tests.tiny import TOKENS, tiny_checkpoint

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")

TEXTS = (
    "The old lighthouse keeper climbed the stairs.",
    *("a", " a", "  a", "a ", "a  ", "  ", "   three of them", "in  the   middle, trailing  "),
    *(
        "one line\nand another\n\n\nand a tab\there",
        "\n",
        "\n\n",
        " \n \n",
        "\r\n",
        "a\r\nb",
        "\t\tx",
        "x \n  y",
    ),
    *(
        "naïve café, übergroß",
        "Ω≈ç√∫",
        "ＡＢＣ１２３",
        "系统：你好。",
        "日本語のテキスト",
        "한국어 문장",
        "ไทย กำลัง",
        "مرحبا ١٢٣",
    ),
    *("🙂 👩‍👩‍👧 emoji", "🇪🇺", "zero\u200bwidth", "soft\u00adhyphen", "\u00a0nbsp", "½ ² ③"),
    *(
        "1",
        "12",
        "123",
        "1234",
        "12345678",
        "3.14",
        "1,000,000",
        "v2.0.1-rc3",
        "0x1F",
        "2026-11-28T13:05:00Z",
    ),
    *(
        "don't, WE'LL, it's, I'M, y'all'd",
        "'quoted'",
        "''",
        "can’t",
        "camelCaseWord",
        "HTTPServer",
        "SNAKE_CASE_x",
    ),
    *(
        "def f(x):\n    return x**2  # code",
        "a.b(c)[d]{e}",
        "http://x.y/z?q=1&r=%20",
        "!!! ??? ...",
        "<b>bold</b>",
        "$5+€6=£7",
    ),
)
"""What splitting rules and normalisations stumble over."""
_MARKS = "llama.cpp's expression leaves marks that combine with a letter outside words"
_LEADING = "transformers' class for Llama puts no space before a text that starts with one"
KNOWN: dict[str, dict[str, str]] = {
    "gpt-4o": {"ไทย กำลัง": _MARKS},
    "tekken": {"ไทย กำลัง": _MARKS},
    "stories260k": {text: _LEADING for text in TEXTS if text.startswith(" ")},
}
"""By tokenizer and text: why the tokens differ."""


def split_by(folder: Path, name: str) -> Path:
    """A tiny model with a byte-level tokenizer that was trained under a splitting rule."""
    tiny_checkpoint(folder, "qwen2", vocab=704)
    tokenizer = Tokenizer(models.BPE())
    form = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre_tokenizer_of(name)}
    tokenizer = Tokenizer.from_str(json.dumps(form))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    form = json.loads(tokenizer.to_str())
    form["model"]["ignore_merges"] = ignores_merges(name)
    write_json(folder / "tokenizer.json", form)
    config = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", config)
    return folder


def different(folder: Path, out: Path, ids: dict[str, list[int]]) -> dict[str, tuple[list[int], list[int]]]:
    """The texts of which llama.cpp makes other tokens, with its and the expected ones."""
    gguf = converted(folder, out, "f16")
    body = {"add_special": True, "parse_special": False}
    answers = ask(gguf, *(("/tokenize", {"content": text, **body}) for text in ids))
    found = zip(ids.items(), answers, strict=True)
    return {
        text: (answer["tokens"], wanted) for (text, wanted), answer in found if answer["tokens"] != wanted
    }


@pytest.mark.parametrize("name", RULES)
def test_every_splitting_rule_gives_the_tokens_of_tokenizers(tmp_path: Path, name: str) -> None:
    folder = split_by(tmp_path / "model", name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.encode(text).ids for text in TEXTS if text not in KNOWN.get(name, {})}
    assert different(folder, tmp_path, ids) == {}


def from_shared(folder: Path, shared_data: Path, name: str) -> Path:
    """A tiny model with a real tokenizer."""
    vocabularies = {
        "stories260k": ("llama", 512),
        "tiny-qwen3-moe": ("qwen3", 8192),
        "openpangu": ("PanguEmbedded", 153376),
    }
    family, rows = vocabularies[name]
    tiny_checkpoint(folder, family, vocab=max(rows, TOKENS), hidden=32)
    source = shared_data / "openpangu" if name == "openpangu" else shared_data / "models" / name
    for old in folder.glob("*token*"):
        old.unlink()
    for path in source.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    if name == "openpangu":
        shutil.copyfile(shared_data / "models" / "llama2_tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("name", ["stories260k", "tiny-qwen3-moe", "openpangu"])
def test_real_tokenizers_give_transformers_tokens(tmp_path: Path, shared_data: Path, name: str) -> None:
    folder = from_shared(tmp_path / "model", shared_data, name)
    tokenizer = load_tokenizer(folder)
    ids = {text: tokenizer(text)["input_ids"] for text in TEXTS if text not in KNOWN.get(name, {})}
    assert different(folder, tmp_path, ids) == {}
