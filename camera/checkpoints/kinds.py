"""What a folder is that is no checkpoint of safetensors, and what makes one of it."""

from collections.abc import Iterator
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that git left in place of a large one."""
_INDEX = "model.safetensors.index.json"
_CONVERT = "load it with transformers' from_pretrained and save it with save_pretrained"


def what_is_there(folder: Path) -> str:
    """A sentence for a folder without config.json or weights: what it seems to be, and what to do; "" if nothing is known."""
    return next(_guesses(folder), "")


def _guesses(folder: Path) -> Iterator[str]:
    names = {path.name for path in folder.iterdir()}
    if "snapshots" in names and (here := _checkpoints(folder / "snapshots")):
        yield f"it is a model's place in the hub's cache: give {here[-1]}"
    if "adapter_config.json" in names:
        yield "it holds an adapter: merge it into its model first (peft: merge_and_unload(), then save_pretrained)"
    if any(name.startswith("consolidated.") for name in names) or "params.json" in names:
        yield (
            "it holds a model in its maker's own format: give the Hugging Face files, often the folder above or a "
            "repository whose name ends in -hf"
        )
    if any(name.endswith((".incomplete", ".part", ".crdownload", ".aria2")) for name in names):
        yield "a download of it is not complete: fetch it again"
    if any(name.startswith("model-") and name.endswith(".safetensors") for name in names):
        yield f"its shards lack {_INDEX}, which says where every tensor is: fetch that too"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        yield f"only safetensors are read, no pickles: {_CONVERT}"
    if found := sorted(name for name in names if name.endswith(".safetensors")):
        yield f"{found[0]} is not the name of a model's weights: rename it to model.safetensors if it holds them all"
    if found := sorted(name for name in names if name.endswith(".gguf")):
        yield f"it holds {found[0]}: `camera import {folder / found[0]} OUT` makes a checkpoint of it"
    if here := _checkpoints(folder):
        yield f"give {here[0]}" if len(here) == 1 else "give one of the folders in it"


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if (path / "config.json").is_file())
