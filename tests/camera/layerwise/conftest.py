"""The tiny checkpoints that pruning is tested on."""

from tests.camera.pruning.conftest import build

__all__ = ["build"]
