"""The files and the program that tests of engines have."""

from tests.camera.engines.conftest import ggufs, llama_cpp

__all__ = ["ggufs", "llama_cpp"]
