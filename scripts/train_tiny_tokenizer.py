"""Train the sentencepiece tokenizer of the tiny openPangu model and write its files.

    python scripts/train_tiny_tokenizer.py --out folder

The text is the `train` part of the built-in dataset, so the same Python gives the same file.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import sentencepiece

from camera.data.sets import stdlib
from camera.files import atomic_file, write_json

VOCAB_SIZE = 2048
UNUSED = [f"[unused{number}]" for number in range(32)]
ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def train(texts: list[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """A BPE model with byte fallback: `<unk>` 0, `<s>` 1, `</s>` 2, the `[unusedN]` marks, 256 bytes, then pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        user_defined_symbols=UNUSED,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def chat_template() -> str:
    """openPangu's form of a conversation: `[unused9]role: text[unused10]`, an empty system turn where none is given."""
    turn = "".join(
        f"{{% if message.role == '{role}' %}}[unused9]{name}: {{{{ message.content }}}}[unused10]{{% endif %}}"
        for role, name in ROLES.items()
    )
    return (
        "{% if messages and messages[0].role != 'system' %}[unused9]System: [unused10]{% endif %}"
        f"{{% for message in messages %}}{turn}{{% endfor %}}"
        "{% if add_generation_prompt %}[unused9]Assistant: {% endif %}"
    )


def _special(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write(folder: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Write tokenizer.model, tokenizer_config.json and special_tokens_map.json as openPangu has them."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    with atomic_file(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    added = ["<unk>", "<s>", "</s>", *UNUSED]
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": True,
            "added_tokens_decoder": {
                str(processor.piece_to_id(token)): {**_special(token), "special": True} for token in added
            },
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "[unused10]",
            "legacy": True,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<unk>",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "PanguTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
            "chat_template": chat_template(),
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": _special("<s>"),
            "eos_token": _special("[unused10]"),
            "pad_token": _special("<unk>"),
            "unk_token": _special("<unk>"),
        },
    )
    return processor


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer files to")
    parser.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, help="pieces in all (default: %(default)s)"
    )
    arguments = parser.parse_args()
    texts = stdlib.read("train").texts
    processor = write(arguments.out, train(texts, arguments.vocab_size))
    print(f"{arguments.out}: {processor.get_piece_size()} pieces from {len(texts)} documents")


if __name__ == "__main__":
    main()
