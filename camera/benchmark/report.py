"""What a benchmark found, as data: one row for each model, engine and number of decoded tokens."""

import statistics
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field

from camera.results import Result

NOISY = 0.2
"""Spread above which a row is marked: its differences to others may be the machine's."""


class Spread(Result):
    """The middle of repeated measurements, and how far apart they lie."""

    median: float
    low: float
    """Smallest."""
    high: float
    """Largest."""
    samples: tuple[float, ...]
    """All, in the order of the runs."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        return cls(
            median=statistics.median(samples), low=min(samples), high=max(samples), samples=tuple(samples)
        )

    @property
    def relative(self) -> float:
        """(largest − smallest) / median."""
        return (self.high - self.low) / self.median


class BenchmarkRow(Result):
    """One model on one engine, decoding so many tokens. Either measured, or with the reason why not."""

    model: str
    """The model's label."""
    engine: str
    prompt: int
    """Prompt tokens."""
    decode: int
    """Decoded tokens."""
    stand_in: str | None = None
    """What was timed in the model's place, where the engine cannot read the model itself: `its Q4_0 twin`. Sizes and bytes
    are then those of the stand-in."""
    failure: str | None = None
    """Why nothing was measured; every number below is then absent."""
    prefill_ms: Spread | None = None
    """Milliseconds per prompt token."""
    decode_ms: Spread | None = None
    """Milliseconds per decoded token, the mean over the row's tokens, with the context growing from the prompt."""
    tokens_per_second: float | None = None
    """1000 / the median of `decode_ms`."""
    model_bytes: int | None = None
    """Weights on disk."""
    held_bytes: int | None = None
    """Weights and key-value cache in memory, where the engine tells."""
    peak_bytes: int | None = None
    """The most memory in use while it ran, where it can be measured."""
    bytes_per_token: int | None = None
    """Weights, and keys and values at the mean context of the row, that one token reads."""
    bandwidth_share: float | None = None
    """`bytes_per_token` over the time of a token, as a share of the device's measured bandwidth. 1 is the limit of a
    model that does not fit the caches; a tiny model lives in them and may pass it."""
    prefill_speedup: float | None = None
    """The baseline's prefill time over this one's, on the same engine."""
    decode_speedup: float | None = None
    """The baseline's decode time over this one's, on the same engine and length."""
    noisy: bool = False
    """Whether the runs of `decode_ms` lie further apart than 20 % of their median."""


class BenchmarkReport(Result):
    """All rows, and what a reader must know to judge them."""

    options: dict[str, Any]
    """`BenchmarkOptions` as JSON has them."""
    baseline: str | None
    """Label of the model that the others are compared with."""
    device: dict[str, Any]
    """From `camera.devices.describe_device`."""
    bandwidth_bytes_per_second: float
    """Measured just before the runs, with the same threads."""
    bandwidth_measured_by: str
    """What was timed for it: sums on a CPU, copies on an accelerator."""
    engines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What each engine says of itself, by `engine: model`."""
    versions: dict[str, str]
    """Of Python and of the packages that compute."""
    rows: tuple[BenchmarkRow, ...]
