"""The checkpoint of the suite: two layers of openPangu-7B's shapes, random weights, a tokenizer trained on real text."""

from pathlib import Path

import torch

from camera.checkpoints.synthetic import write_checkpoint
from camera.data.sets import stdlib
from scripts import train_tiny_tokenizer as tokenizer

LAYERS, HIDDEN, WIDTH, VOCABULARY, HEADS, KV_HEADS = 2, 4096, 12800, 153376, 32, 8
PIECES = 16000
"""Of the tokenizer: what a megabyte of text carries. The embedding is padded beyond, as openPangu's own is."""


def write_model(folder: Path) -> Path:
    """Write it: embedding, each layer, and head in a shard of its own; 3.3 GB."""
    write_checkpoint(
        folder,
        layers=LAYERS,
        hidden=HIDDEN,
        ffn=WIDTH,
        vocab=VOCABULARY,
        heads=HEADS,
        kv_heads=KV_HEADS,
        positions=32768,
        dtype=torch.bfloat16,
        shard_bytes=None,
    )
    tokenizer.write(folder, tokenizer.train(stdlib.read("train").texts, PIECES))
    return folder
