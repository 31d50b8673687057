"""The files and the program that tests of engines have."""

from tests.camera.engines.conftest import ggufs, llama_cpp, own_cache

__all__ = ["ggufs", "llama_cpp", "own_cache"]
