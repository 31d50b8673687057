"""Train the third model of `benchmarks/quality.py`: another family, shape, corpus and tokenizer than the bundled one.

    python scripts/train_third.py --out .camera/quality/third --texts ../shared/data/text

A Qwen2 of 1.3 million parameters (4 layers, hidden 128, FFN 640, tied embeddings, byte-level BPE of 1,024 tokens),
trained from scratch in about ten minutes of one core on the `train` part of a sample of C4 and on the validation split of
WikiText-2. So it knows two domains, and the benchmark calibrates on one of them. Texts of the `test` part, 15 % of the
C4 documents, and WikiText-2's test split are not seen. The texts are not ours to give on, so the model is made where it is
needed and not kept in the repository. The same seed, threads and torch give the same weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
import transformers

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.tokenizer import load_tokenizer
from camera.data.sets.file import read
from camera.data.sets.stdlib import part_of
from camera.errors import CameraError
from camera.files import atomic_folder, write_json

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 640,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
VOCAB_SIZE = 1024
END = "<|endoftext|>"
"""Token 0."""
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2 tokenizers split text into words."""
C4, WIKITEXT = "c4_en_sample.jsonl", "wikitext2_valid_unk.txt"
SHORT, LONG = 256, 512
TOKENS_PER_STEP = 1024


def c4_part(folder: Path, part: str) -> list[str]:
    """The documents of one part of the sample of C4, each text once.

    Raises:
        CameraError: if the file is missing.
    """
    texts = dict.fromkeys(read(folder / C4, "text").texts)
    return [text for text in texts if part_of(text) == part]


def train_tokenizer(
    texts: list[str], folder: Path, size: int = VOCAB_SIZE
) -> "transformers.PreTrainedTokenizerBase":
    """A byte-level BPE in the files that Qwen2 models have, beside a config.json that says the family.

    transformers splits a Qwen2 model's text into words by that family's pattern whatever the file says, so it is trained
    with that one, and what is returned is what a user of the folder gets.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": END},
    )
    return load_tokenizer(folder)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, into a folder that appears only when it is whole. Returns the content of training.json."""
    training.make_repeatable(arguments)
    train_texts = c4_part(arguments.texts, "train") + _articles(arguments.texts)
    test_texts = c4_part(arguments.texts, "test")
    with atomic_folder(arguments.out) as folder:
        config = transformers.Qwen2Config(
            **SHAPE, vocab_size=VOCAB_SIZE, eos_token_id=0, bos_token_id=0, pad_token_id=0
        )
        config.save_pretrained(folder)
        tokenizer = train_tokenizer(train_texts, folder)

        def encode(text: str) -> list[int]:
            return tokenizer(text, verbose=False)["input_ids"]

        train_ids = np.array(encode("\n\n".join(train_texts)), dtype=np.int64)
        test_ids = np.array(encode("\n\n".join(test_texts)), dtype=np.int64)
        model = transformers.Qwen2ForCausalLM(config).float().train()
        record = training.train(
            model,
            lambda length, random: training.windows(train_texts, encode, length, random, bos=None),
            (len(train_ids), torch.from_numpy(test_ids)),
            (TOKENS_PER_STEP, SHORT, LONG),
            arguments,
            folder,
        )
        model.save_pretrained(folder)
        checkpoint = Checkpoint.open(folder)
        checkpoint.check_shapes()
        loaded = checkpoint.load_model(torch.float32)
        record |= {
            "held_out_perplexity": {
                "model": training.perplexity(loaded, torch.from_numpy(test_ids), SHORT),
                "unigram": training.unigram_perplexity(train_ids, test_ids, VOCAB_SIZE),
                "bigram": training.bigram_perplexity(train_ids, test_ids, VOCAB_SIZE),
            },
            "texts": [C4, WIKITEXT],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_json(folder / "training.json", record)
    return record


def _articles(folder: Path) -> list[str]:
    """WikiText-2's validation split, cut at its top headings (` = Title = `), so that an epoch can shuffle it."""
    (text,) = read(folder / WIKITEXT, "text").texts
    articles: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith(" = ") and not line.startswith(" = = ") and line.rstrip().endswith(" ="):
            articles.append([])
        articles[-1].append(line)
    return ["\n".join(lines).strip() for lines in articles if any(line.strip() for line in lines)]


def main() -> None:
    """The command."""
    parser = training.parser_of(__doc__, steps=1600, threads=1, rate=3e-3)
    parser.add_argument("--texts", type=Path, required=True, help=f"folder with {C4} and {WIKITEXT}")
    arguments = parser.parse_args()
    try:
        record = run(arguments)
    except CameraError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(record["held_out_perplexity"]))


if __name__ == "__main__":
    main()
