"""The models that methods are compared on, each with text to calibrate on, held-out text, and text of another domain."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.data.local import read
from camera.data.sampling import joined_windows
from camera.data.stdlib import part_of
from camera.errors import CameraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from quality_leaks import Runs, assert_disjoint, clean_windows

ROOT = Path(__file__).parent.parent
OWN, OTHER = "own", "other"
"""The two held-out corpora of a model: of the calibration text's domain, and of another."""
_SPARE = 2
"""Windows are drawn so many times over, to have enough where some share words with held-out text."""
_END_OF_STORY = "<|endoftext|>"
_OTHER_GOAL = 0.2


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
        return self.goals.get(ratio) if corpus == OWN else _OTHER_GOAL

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def shared_folder() -> Path:
    """The folder of texts, tasks and models that are not in the repository."""
    return Path(os.environ.get("CAMERA_SHARED_DATA", ROOT.parent / "shared" / "data"))


def tiny_openpangu(third: Path) -> Subject:
    """The bundled model, on doc strings."""
    checkpoint = Checkpoint.open(ROOT / "data" / "models" / "tiny-openpangu")
    held_out = {OWN: _joined(read(_there(ROOT / "data" / "text" / "stdlib-test.jsonl"), "text").texts)}
    sources = {OWN: "doc strings of the standard library, test part"}
    wikitext = shared_folder() / "text" / "wikitext2_test_raw.txt"
    if wikitext.is_file():
        held_out[OTHER], sources[OTHER] = wikitext.read_text("utf-8"), "WikiText-2, test split"
    calibration = _joined(read(_there(ROOT / "data" / "text" / "stdlib-train.jsonl"), "text").texts)
    goals = {0.2: 0.45, 0.4: 0.6, 0.5: 0.6}
    return Subject("tiny-openpangu", checkpoint, 64, calibration, held_out, sources, goals)


def stories260k(third: Path) -> Subject:
    """A public Llama of 260 thousand parameters, on children's stories."""
    folder = _there(shared_folder())
    checkpoint = Checkpoint.open(_there(folder / "models" / "stories260k"))
    raw = _there(folder / "text" / "tinystories_sample.txt").read_text("utf-8")
    stories = [story.strip() for story in raw.split(_END_OF_STORY) if story.strip()]
    held_out = {
        OWN: _joined(_part(stories, "test")),
        OTHER: _there(folder / "text" / "wikitext2_test_raw.txt").read_text("utf-8"),
    }
    sources = {OWN: "TinyStories, 15 % of a sample", OTHER: "WikiText-2, test split"}
    goals = dict.fromkeys((0.2, 0.4, 0.5), 0.4)
    return Subject("stories260k", checkpoint, 4, _joined(_part(stories, "train")), held_out, sources, goals)


def third_model(third: Path) -> Subject:
    """A Qwen2 that was trained for this benchmark on two domains and is calibrated on one; trained where it is absent."""
    folder = _there(shared_folder())
    if not third.exists():
        _train(third, folder / "text")
    documents = list(read(_there(folder / "text" / "c4_en_sample.jsonl"), "text").texts)
    held_out = {
        OWN: _joined(_part(documents, "test")),
        OTHER: _there(folder / "text" / "wikitext2_test_raw.txt").read_text("utf-8"),
    }
    sources = {OWN: "C4, 15 % of a sample", OTHER: "WikiText-2, test split"}
    calibration = _joined(_part(documents, "train"))
    return Subject("third", Checkpoint.open(third), 64, calibration, held_out, sources, {})


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "tiny-openpangu": tiny_openpangu,
    "stories260k": stories260k,
    "third": third_model,
}


def _there(path: Path) -> Path:
    """Raise CameraError if a file or folder is absent; else give it back."""
    if not path.exists():
        raise CameraError(
            f"{path} is not there: run `dvc pull`, or set CAMERA_SHARED_DATA for what is shared"
        )
    return path


def _part(texts: list[str], part: str) -> list[str]:
    """The `train` or `test` part of documents, each text once: a function of the text alone."""
    return [text for text in dict.fromkeys(texts) if part_of(text) == part]


def _joined(texts: object) -> str:
    return "\n\n".join(texts)  # type: ignore[arg-type]


def _train(out: Path, texts: Path) -> None:
    """Run the script that trains the third model.

    Raises:
        CameraError: if it fails.
    """
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_third.py"),
        "--out",
        str(out),
        "--texts",
        str(texts),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise CameraError(
            f"the third model could not be trained: see above; or give one with --third (now {out})"
        )
