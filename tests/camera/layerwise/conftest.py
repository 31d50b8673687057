"""The tiny checkpoints that pruning is tested on."""

from tests.camera.pruning.conftest import build, read_names

__all__ = ["build", "read_names"]
