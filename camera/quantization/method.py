"""What a quantising method is, and what it calibrates on.

A method is one module of `camera.quantization.methods`, which registers it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.rows import Rows
from camera.devices import resolve_device
from camera.errors import CameraError
from camera.formats import blocks
from camera.options import QuantizeOptions
from camera.quantization.imatrix import Imatrix, collect_imatrix
from camera.quantization.plan import PlannedTensor
from camera.registry import QUANTIZATION_METHODS


@dataclass(frozen=True)
class Stored:
    """What storing a tensor lost."""

    squares: blocks.Squares
    weighted_error: float | None = None
    """See `TensorRecord.weighted_error`."""
    few_tokens: int | None = None
    """See `TensorRecord.few_tokens`."""


@dataclass
class Calibration:
    """What a run calibrates on: tokens, or an importance matrix in their place."""

    checkpoint: Checkpoint
    options: QuantizeOptions
    tokens_ST: torch.Tensor | None
    """int64 [samples, tokens]."""
    given: Imatrix | None
    """The matrix in place of tokens."""

    def check(self) -> None:
        """Refuse a method or a target that lacks what it calibrates on.

        Raises:
            CameraError: naming what is needed.
        """
        method = QUANTIZATION_METHODS[self.options.method]
        for name, needed, matrix_will_do in (
            ("target_bpw", self.options.target_bpw is not None, True),
            (f"method: {self.options.method}", method.calibrates, method.reads_imatrix),
        ):
            if needed and self.tokens_ST is None and not (matrix_will_do and self.given is not None):
                instead = ", or an imatrix" if matrix_will_do else ""
                raise CameraError(f"quantize.{name} needs calibration tokens{instead}")

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [samples, tokens], of a run that was found to have them."""
        assert self.tokens_ST is not None
        return self.tokens_ST

    @cached_property
    def imatrix(self) -> Imatrix:
        """The importance matrix that was given, or that of the tokens, gathered when it is first asked for."""
        return self.given or collect_imatrix(self.checkpoint, self.tokens, self.options)


class Method(ABC):
    """How the matrices of one run are rounded."""

    calibrates: ClassVar[bool] = True
    """Whether calibration decides anything."""
    reads_imatrix: ClassVar[bool] = False
    """Whether an importance matrix will do in place of tokens."""
    inverts_moments: ClassVar[bool] = False
    """Whether it inverts the second moments of each layer's inputs, which takes memory."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """Fields of `QuantizeOptions` that only some methods use, and this one does."""

    def __init__(
        self, checkpoint: Checkpoint, options: QuantizeOptions, out: Path, calibration: Calibration
    ) -> None:
        """Args:
        checkpoint: the source.
        options: with all types chosen.
        out: the folder in which the finished shards are.
        calibration: of the run.
        """
        self.checkpoint = checkpoint
        self.options = options
        self.out = out
        self.calibration = calibration
        self.settle: Callable[[], None] = lambda: None
        """Waits until the shards of all tensors stored so far but the last one's are in `out`: for who reads them."""

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.options.device)

    @property
    def source(self) -> str | None:
        """Hex sha256 of what decides the bytes beside the checkpoint and the options; None if nothing does."""
        if not self.calibrates:
            return None
        if self.reads_imatrix and self.calibration.given is not None:
            return self.calibration.given.digest
        content = np.ascontiguousarray(self.calibration.tokens.numpy(), "<i8")
        return sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()

    @abstractmethod
    def store(self, tensor: PlannedTensor, rows: Rows, put: blocks.Put, name: str) -> Stored:
        """Pack one tensor, and have its bytes put where they belong.

        Tensors are asked for shard by shard: decoder layers in order, then the rest; those of shards that an earlier
        run has finished are left out.

        Args:
            tensor: what it is to be stored as.
            rows: its numbers.
            put: takes the bytes of all rows, in any order; see `blocks.store`.
            name: what to call it in messages.
        """

    def round_to_nearest(self, tensor: PlannedTensor, rows: Rows, put: blocks.Put, name: str) -> Stored:
        """`store` for a tensor alone, as llama.cpp's own quantisation without an importance matrix."""
        return Stored(blocks.store(rows, tensor.type, put, name=name, device=self.device))
