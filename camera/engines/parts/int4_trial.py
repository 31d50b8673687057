"""One trial of an NPU's int4 operator: a layout of weights at a shape, against dequantised weights and the clock."""

import logging
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from camera.engines.parts.blocks import Blocks
from camera.engines.parts.graph import FAILURES
from camera.engines.parts.int4_linear import INT4_TYPES
from camera.engines.parts.int4_measure import (
    TOKENS,
    is_wrong,
    relative_error,
    seconds_of,
    tokens_and_products,
)
from camera.engines.parts.int4_npu import LAYOUTS, NpuInt4Linear
from camera.registry import BLOCK_FORMATS

log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Of a matrix of 4-bit blocks, with as many weights in each."""

    rows: int
    columns: int
    group: int


class Variant(NamedTuple):
    """A way of calling the operator; the layout is a key of `LAYOUTS`."""

    layout: str
    inner_precise: int


class Key(NamedTuple):
    """What is tried."""

    layout: str
    inner_precise: int
    rows: int
    columns: int
    group: int
    tokens: int

    @property
    def variant(self) -> Variant:
        return Variant(self.layout, self.inner_precise)

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.columns, self.group)

    def failed(self, reason: str) -> "Trial":
        return Trial(**self._asdict(), error=reason)


class Trial(BaseModel):
    """What was found."""

    model_config = ConfigDict(frozen=True)

    layout: str
    inner_precise: int
    rows: int
    columns: int
    group: int
    tokens: int
    kernel: str | None = None
    """As the layer names it."""
    npu_format: str | None = None
    """Of the weights that were made, as torch_npu names it."""
    relative_error: float | None = None
    """Against dequantised weights; None if nothing finite came out."""
    microseconds: float | None = None
    """Of one product; None if it was wrong."""
    recorded: bool | None = None
    """Whether the calls were replayed as a graph; else the time has their launches in it."""
    error: str | None = None
    """Why it cannot be used; None if it can."""

    @property
    def key(self) -> Key:
        return Key(self.layout, self.inner_precise, self.rows, self.columns, self.group, self.tokens)

    def __str__(self) -> str:
        what = f"{self.rows} x {self.columns} in {self.group}, {self.tokens} tokens"
        outcome = f"{self.microseconds} µs" if self.error is None else self.error
        return f"{what}, {self.layout}, inner_precise={self.inner_precise}: {outcome}"


class TrialBench:
    """Holds trials on a device, and what trials of one shape have in common."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: tuple[Variant, Shape] | None = None
        self._layer: NpuInt4Linear
        self._x_MK: torch.Tensor
        self._exact_MN: torch.Tensor

    def trial(self, key: Key) -> Trial:
        """What is found; raises what the device does."""
        self._make(key)
        error = relative_error(
            self._layer, self._x_MK[: key.tokens], self._exact_MN[: key.tokens], self.device
        )
        found = {
            **key._asdict(),
            "kernel": self._layer.kernel,
            "npu_format": self._layer.npu_format,
            "relative_error": error if np.isfinite(error) else None,
        }
        if is_wrong(self._layer, error):
            return Trial(**found, error=f"off by {error:.1%} against dequantised weights")
        seconds, recorded = self._time(key.tokens)
        return Trial(**found, microseconds=round(1e6 * seconds, 2), recorded=recorded)

    def _make(self, key: Key) -> None:
        """The layer, and what it is to compute."""
        if self._made == (key.variant, key.shape) and key.tokens <= len(self._x_MK):
            return
        blocks = random_blocks(key.shape)
        kind = LAYOUTS[key.layout]
        self._layer = kind(blocks, None, self.device, key.inner_precise)
        self._x_MK, self._exact_MN = tokens_and_products(blocks, max(key.tokens, *TOKENS), kind.dtype)
        self._made = key.variant, key.shape

    def _time(self, tokens: int) -> tuple[float, bool]:
        """Seconds of a product, and whether the calls were recorded."""
        try:
            return seconds_of(self._layer, self.device, tokens, recorded=True), True
        except FAILURES as error:
            log.warning("int4 kernels are timed with their launches: they cannot be recorded: %s", error)
        return seconds_of(self._layer, self.device, tokens), False


def random_blocks(shape: Shape) -> Blocks:
    """Blocks of random weights."""
    kind = next(name for name in INT4_TYPES if BLOCK_FORMATS[name].block_length == shape.group)
    random = np.random.default_rng(0)
    blocks = shape.rows, shape.columns // shape.group
    scales = random.uniform(-0.01, 0.01, (*blocks, 1)).astype(np.float16).view(np.uint8)
    nibbles = random.integers(0, 256, (*blocks, shape.group // 2), dtype=np.uint8)
    return Blocks(kind, np.concatenate((scales, nibbles), axis=-1).reshape(shape.rows, -1))
