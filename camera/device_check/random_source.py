"""A model of random weights that is read as from a file and lies nowhere: a device is filled with what the host makes."""

from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING

from camera.loading import Source
from camera.models import family_of
from camera.models.shapes import PanguSizes
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

_NUMBERS = (1 << 20) - 3
"""Drawn, and used over and over: a prime, so that no two rows of a matrix are the same ones."""


def random_source(sizes: PanguSizes, type: BlockType | None = None) -> Source:
    """An openPangu model of some sizes.

    Args:
        sizes: of the model.
        type: of the blocks that matrices are; None: bfloat16.
    """
    config = sizes.config(torch.bfloat16)
    family = family_of(config)
    family.register()
    shapes = {name: family.shape(config, placed.weight) for name, placed in family.names(config).items()}
    numbers = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0))
    numbers = numbers.mul_(sizes.hidden**-0.5).bfloat16()

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return numbers.repeat(-(-prod(shape) // _NUMBERS))[: prod(shape)].view(shape)

    def packed(name: str) -> tuple[str, np.ndarray]:
        assert type is not None
        shape = shapes[name]
        return (
            ("bf16", read(name)[None].view(torch.uint8).numpy()) if len(shape) == 1 else (type, blocks(shape))
        )

    @cache  # all layers' matrices of a shape are the same on the host, and each has its own memory on the device
    def blocks(shape: tuple[int, int]) -> np.ndarray:
        assert type is not None
        form, (rows, columns) = BLOCK_FORMATS[type], shape
        stored = np.random.default_rng(0).integers(
            0, 256, (rows, columns // form.block_length, form.block_bytes), np.uint8
        )
        scale = np.float16(sizes.hidden**-0.5 / 4)
        stored[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
        return stored.reshape(rows, -1)

    return Source(
        Path("random weights"),
        CONFIG_MAPPING[family.model_type].from_dict(config),
        family,
        frozenset(shapes),
        torch.bfloat16 if type is None else torch.float32,
        read,
        packed=None if type is None else packed,
    )
