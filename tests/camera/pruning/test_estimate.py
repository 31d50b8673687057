"""What a capture will take is said before it: time from a trial, memory from the shapes and from what the process holds."""

import multiprocessing
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import peak_memory_bytes
from camera.heap import trim
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.estimate import CaptureEstimate, estimate_capture
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture
from tests.tiny import tiny_checkpoint

LENGTH = 64
OPTIONS = CaptureOptions(device="cpu", batch_size=2, propagate="sequential")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model", "PanguEmbedded", hidden=128, ffn=512)


def estimate(folder: Path, samples: int = 4, **asked: Any) -> CaptureEstimate:
    checkpoint = Checkpoint.open(folder)
    plan = plan_prune(checkpoint, OPTIONS, PruneOptions(ratio=0.25, **asked))
    return estimate_capture(checkpoint, samples, LENGTH, OPTIONS, plan)


def beyond(found: CaptureEstimate) -> int:
    """Bytes that the capture itself takes."""
    return found.peak_bytes - found.process_bytes


def test_what_a_capture_takes_is_not_what_the_process_holds_already(folder: Path) -> None:
    trim()  # of what other tests left, so that it does not go meanwhile
    before = estimate(folder)
    size = 64 << 20
    held = mmap(-1, size)  # not from the heap, which may have as much to spare
    held.write(b"\1" * size)
    after = estimate(folder)
    assert after.process_bytes - before.process_bytes > size / 2
    held.close()
    assert beyond(after) == beyond(before) > 0


def test_each_sample_adds_its_hidden_states_and_kept_activations(folder: Path) -> None:
    few, many = estimate(folder, 2000), estimate(folder, 2006)  # beyond what the heap keeps of the freed
    checkpoint = Checkpoint.open(folder)
    of_a_sample = LENGTH * (checkpoint.hidden_size + checkpoint.ffn_width) * checkpoint.dtype.itemsize
    assert beyond(many) - beyond(few) == 6 * of_a_sample
    assert many.seconds > 0


def test_a_method_with_gram_matrices_takes_their_memory_and_its_decisions_time(folder: Path) -> None:
    plain, obs = estimate(folder), estimate(folder, method="obs")
    assert beyond(obs) - beyond(plain) >= 2 * 4 * 512**2
    assert obs.seconds > plain.seconds


def _predict(folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    results.put(estimate(folder).peak_bytes)


def _measure(folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(folder)
    tokens = torch.randint(300, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    out = folder.parent / "out"
    out.mkdir()
    capture(checkpoint, tokens, out, OPTIONS, plan_prune(checkpoint, OPTIONS, PruneOptions(ratio=0.25)))
    results.put(peak_memory_bytes(torch.device("cpu")))


@pytest.mark.slow
def test_the_peak_of_a_small_capture_is_that_of_its_libraries_and_is_foreseen(folder: Path) -> None:
    """A process of its own for each; with larger models `benchmarks/plan.py` compares."""
    context = multiprocessing.get_context("spawn")
    results = [context.SimpleQueue() for _ in range(2)]
    processes = [
        context.Process(target=work, args=(folder, result))
        for work, result in zip((_predict, _measure), results, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    predicted, measured = (result.get() for result in results)
    assert predicted == pytest.approx(measured, rel=0.15)
