"""Checkpoints of any size with random weights, for benchmarks: the shapes are real, what they say is not."""

from math import prod
from pathlib import Path

import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from camera.checkpoints.checkpoint import INDEX_NAME
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.files import write_json
from camera.models import family_of

_BLOCK = 1 << 20
_CONFIG = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 16e6,
    "tie_word_embeddings": False,
}


def write_checkpoint(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    ffn: int,
    vocab: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    positions: int = 2048,
    shard_bytes: int = 5 << 30,
) -> Path:
    """Write an openPangu checkpoint tensor by tensor, with a tokenizer of single bytes; memory stays at one tensor.

    Weights are one block of a million normal numbers over and over, scaled as an initialisation would be.
    """
    folder.mkdir(parents=True)
    config = _CONFIG | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    family = family_of(config)
    shapes = {name: family.shape(config, placed.weight) for name, placed in family.names(config).items()}
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(hidden**-0.5).to(dtype)
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
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of the special tokens and the 256 single bytes: enough for a GGUF that llama.cpp loads."""
    model = ModelProto()
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
