"""What the benchmark asks of an engine, whichever runs the model: time it once, say what it holds and what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Timing:
    """One timed run: a prefill from an empty context, then greedy decoding one token at a time."""

    prefill_s: float
    """Seconds for all prompt tokens together."""
    decode_s: dict[int, float]
    """Seconds for the first n tokens after the prompt, by n."""


@dataclass(frozen=True)
class Footprint:
    """Bytes: on disk, in memory, and moved for each decoded token."""

    model_bytes: int
    """Weights on disk."""
    held_bytes: int | None
    """Weights and key-value cache as the engine holds them; None if an engine does not tell."""
    peak_bytes: int | None
    """`held_bytes` and the temporary growth in the last run; None where it cannot be measured."""
    weight_bytes_per_token: int
    """Weights read to decode one token: all but the embedding, of which one row is read."""
    kv_bytes_per_position: int
    """Keys and values of one position in all layers: read for every earlier position, at each token."""


class Engine(Protocol):
    """A loaded model, ready to be timed."""

    name: str
    """As in `BenchmarkOptions.engines`."""
    positions: int
    """Most tokens that prompt and decoding may have together (the model's max_position_embeddings)."""
    stand_in: str | None
    """What runs in the model's place, where the engine cannot read the model itself."""

    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        """Prefill `prompt` tokens and decode as many as the largest of `decode`.

        Raises:
            CameraError: if the engine fails.
        """

    def footprint(self) -> Footprint:
        """What the model weighs; complete after a timed run."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON for whoever reads the result: dtype, kernels, build, settings."""

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
