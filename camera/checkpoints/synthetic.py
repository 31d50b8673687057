"""Checkpoints of any size with random weights: the shapes are real, what they say is not."""

from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.checkpoints.weights import INDEX_NAME
from camera.files import write_json
from camera.models import family_of
from camera.models.shapes import QWEN3_30B_A3B, PanguSizes

_BLOCK = (1 << 20) - 3
"""Numbers that are drawn: a prime, so that no two rows of a matrix, however long, are the same ones."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen's tokenizers split text into words."""


def write_checkpoint(
    folder: Path, *, dtype: torch.dtype, shard_bytes: int | None = 5 << 30, **sizes: int
) -> Path:
    """Write an openPangu checkpoint tensor by tensor, with a tokenizer of single bytes; memory stays at one tensor.

    Weights are one block of a million normal numbers over and over, scaled as an initialisation would be. `sizes` are the
    fields of `PanguSizes`. Without `shard_bytes` each decoder layer is a shard, and so are what is before the layers and what is
    behind them.
    """
    _write(folder, PanguSizes(**sizes).config(dtype), dtype, shard_bytes)
    _write_tokenizer(folder)
    return folder


def write_moe_checkpoint(
    folder: Path, *, layers: int, vocab: int, dtype: torch.dtype, shard_bytes: int = 4 << 30, **sizes: int
) -> Path:
    """Write a checkpoint of Qwen3-30B-A3B's shapes, `sizes` of its config.json apart, as `write_checkpoint` does.

    The tokenizer knows single bytes. With the same weights for all experts a router would still spread its tokens, as its
    own rows differ.
    """
    config = (
        QWEN3_30B_A3B
        | sizes
        | {
            "num_hidden_layers": layers,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vocab_size": vocab,
        }
    )
    _write(folder, config, dtype, shard_bytes)
    _write_byte_tokenizer(folder)
    return folder


def _write(folder: Path, config: dict[str, Any], dtype: torch.dtype, shard_bytes: int | None) -> None:
    """config.json and weights."""
    folder.mkdir(parents=True)
    hidden = config["hidden_size"]
    family = family_of(config)
    shapes = {name: family.shape(config, placed.weight) for name, placed in family.names(config).items()}
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(hidden**-0.5).to(dtype)
    if shard_bytes is None:
        shards = [list(names) for _, names in groupby(shapes, family.layer_of)]
    else:
        shards = _shards(shapes, dtype.itemsize, shard_bytes)
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / file, {name: (dtype, shapes[name]) for name in names}) as writer:
            for name in names:
                writer.write(name, _weights(shapes[name], block))
                index[name] = file
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": index})
    write_json(folder / "config.json", config)


def _write_byte_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges, in the files of Qwen3."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(_WORDS), "isolated"), bytes_])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "tokenizer_config.json", described)


def _write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of the special tokens and the 256 single bytes: enough for a GGUF that llama.cpp loads."""
    model = ModelProto()
    model.trainer_spec.byte_fallback = True
    kinds = ModelProto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for number in range(256):
        model.pieces.add(piece=f"<0x{number:02X}>", score=0.0, type=kinds.BYTE)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def _weights(shape: tuple[int, ...], block: torch.Tensor) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    count = prod(shape)
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        extent = prod(shape) * itemsize
        if shards[-1] and size + extent > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += extent
    return shards
