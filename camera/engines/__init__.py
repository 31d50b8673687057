"""What runs models for the benchmark: one module of this package for each engine, registered in `ENGINES`.

A module is imported as soon as engine names are checked, so it leaves what is slow to import until a model is loaded.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from camera.options import BenchmarkOptions, Options
from camera.registry import ENGINES

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINES", "Engine", "Footprint", "Timing"]

_THREADS = ("GOMP_", "KMP_", "MKL_", "OMP_")


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
    """Weights read to decode one token: all but the embedding, of which one row is read, and of the experts of a layer as
    many as a token is routed to."""
    kv_bytes_per_position: int
    """Keys and values of one position in all layers: read for every earlier position, at each token."""


class Engine(ABC):
    """A loaded model, ready to be timed; the class itself tells what the engine is."""

    options: ClassVar[type[Options]] = Options
    """What this engine alone is asked: further fields of the section `benchmark`."""
    in_torch: ClassVar[bool] = False
    """Whether models run on the device that torch measures, on an accelerator too."""
    settings: ClassVar[tuple[str, ...]] = ()
    """How the names of the environment variables begin that change its speed, beside those of CPU threads."""
    positions: int
    """Most tokens that prompt and decoding may have together (the model's max_position_embeddings)."""
    stand_in: str | None = None
    """What runs in the model's place, where the engine cannot read the model itself."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path, options: BenchmarkOptions, device: "torch.device") -> Self:
        """Load a checkpoint folder, a quantised folder or a GGUF file, of which an engine may take some only.

        Raises:
            CameraError: if the engine is not installed, or does not read this model.
        """

    @classmethod
    @abstractmethod
    def build(cls, options: BenchmarkOptions) -> str:
        """Which build of the engine is installed, for people: a version or a path.

        Raises:
            CameraError: if there is none; what to do stands after the last colon of the message.
        """

    @classmethod
    def identity(cls, options: BenchmarkOptions) -> dict[str, Any]:
        """What beside the options and the device makes a time another result, as plain JSON: versions, digests, settings
        of the environment."""
        beginnings = (*_THREADS, *cls.settings)
        names = [name for name in sorted(os.environ) if name.startswith(beginnings)]
        # Where something lies makes nothing faster.
        return {
            "settings": {name: os.environ[name] for name in names if not name.endswith(("_DIR", "_PATH"))}
        }

    @abstractmethod
    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        """Prefill `prompt` tokens and decode as many as the largest of `decode`.

        Raises:
            CameraError: if the engine fails.
        """

    @abstractmethod
    def footprint(self) -> Footprint:
        """What the model weighs; complete after a timed run."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON for whoever reads the result: dtype, kernels, build, settings."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
