"""The measurement: every model on every engine, in runs that alternate between the models."""

import importlib.metadata
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camera.benchmark.bandwidth import read_bandwidth
from camera.benchmark.engine import Engine, Timing
from camera.benchmark.llama_cpp import LlamaCppEngine
from camera.benchmark.report import NOISY, BenchmarkReport, BenchmarkRow, Spread
from camera.benchmark.torch_engine import TorchEngine
from camera.devices import describe_device, resolve_device
from camera.errors import CameraError
from camera.options import BenchmarkOptions, Options
from camera.progress import Progress, silent

log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 8
_FAILURES = (CameraError, RuntimeError, OSError, MemoryError)
"""What a model too large, a damaged file or a broken build raise: a row of the report, and the others go on."""


class BenchModel(Options):
    """One model to time."""

    label: str
    """Its name in the table."""
    path: Path
    """A GGUF file, or a checkpoint folder."""
    baseline: bool = False
    """Whether the others are compared with it: the unpruned model in Q4_0."""
    engines: tuple[str, ...] | None = None
    """Only on these of the engines; the default is all."""


@dataclass
class _Run:
    """One model on one engine, while it is measured."""

    model: BenchModel
    engine_name: str
    engine: Engine | None = None
    failure: str | None = None
    lengths: tuple[int, ...] = ()
    """Those of the lengths asked for that fit the model's positions."""
    timings: list[Timing] = field(default_factory=list)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turn a failure into the reason that the rows give."""
        try:
            yield
        except _FAILURES as error:
            self.failure = str(error) or type(error).__name__
            log.warning("%s on %s: %s", self.model.label, self.engine_name, self.failure)


def run_benchmark(
    models: Sequence[BenchModel], options: BenchmarkOptions, progress: Progress = silent
) -> BenchmarkReport:
    """Time every model on every engine.

    The models of one engine are all loaded, warmed up, and then timed in turns (the order reversed every other turn),
    so that what else the machine does falls on all of them alike. A model or engine that fails is a row with its
    reason.

    Args:
        models: labels differ, and at most one is the baseline.
        options: lengths, repeats, engines, device.
        progress: told (runs done, runs in all).

    Raises:
        CameraError: if there is no model, labels repeat, there are two baselines, or the device does not exist.
    """
    _check(models)
    device = resolve_device(options.device)
    with _threads(options.threads):
        bandwidth = read_bandwidth(device)
        rows: list[BenchmarkRow] = []
        described: dict[str, dict[str, Any]] = {}
        on = {name: _those_on(name, models) for name in options.engines}
        report_runs = _Counter(progress, options.repeats * sum(map(len, on.values())))
        for name, its_models in on.items():
            with _loaded(its_models, name, options, device) as runs:
                _measure(runs, options, report_runs)
                for run in runs:
                    # What llama.cpp does on an accelerator is beyond torch's measurement of this device.
                    comparable = name == "torch" or device.type == "cpu"
                    rows += _rows(run, options, bandwidth if comparable else None)
                    if run.engine:
                        described[f"{name}: {run.model.label}"] = run.engine.describe()
        baseline = next((model.label for model in models if model.baseline), None)
        return BenchmarkReport(
            options=options,
            baseline=baseline,
            device=describe_device(device),
            bandwidth_bytes_per_second=bandwidth,
            engines=described,
            versions=_versions(),
            rows=tuple(_compared(row, rows, baseline) for row in rows),
        )


def _those_on(engine: str, models: Sequence[BenchModel]) -> list[BenchModel]:
    return [model for model in models if model.engines is None or engine in model.engines]


def _check(models: Sequence[BenchModel]) -> None:
    labels = [model.label for model in models]
    if not models:
        raise CameraError("benchmark: there is no model to time")
    if len(set(labels)) < len(labels):
        raise CameraError(f"benchmark: two models have the same label ({', '.join(labels)})")
    if sum(model.baseline for model in models) > 1:
        raise CameraError("benchmark: more than one model is the baseline")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _loaded(
    models: Sequence[BenchModel], engine: str, options: BenchmarkOptions, device: torch.device
) -> Iterator[list[_Run]]:
    """Every model loaded and warmed up on one engine; closed at the end."""
    runs = [_Run(model, engine) for model in models]
    try:
        for run in runs:
            with run.failing():
                run.engine = _load(run.model, engine, options, device)
                limit = run.engine.positions - options.prompt
                run.lengths = tuple(length for length in options.decode if length <= limit)
                if run.lengths:
                    run.engine.time_once(options.prompt, (min(_WARM_UP_TOKENS, min(run.lengths)),))
        yield runs
    finally:
        for run in runs:
            if run.engine:
                run.engine.close()


def _load(model: BenchModel, engine: str, options: BenchmarkOptions, device: torch.device) -> Engine:
    if engine == "torch":
        return TorchEngine(model.path, device, options.prompt + max(options.decode))
    return LlamaCppEngine(model.path, options)


def _measure(runs: Sequence[_Run], options: BenchmarkOptions, progress: "_Counter") -> None:
    for turn in range(options.repeats):
        for run in runs if turn % 2 == 0 else reversed(runs):
            if run.engine and run.lengths and run.failure is None:
                with run.failing():
                    run.timings.append(run.engine.time_once(options.prompt, run.lengths))
            progress.advance()


def _rows(run: _Run, options: BenchmarkOptions, bandwidth: float | None) -> list[BenchmarkRow]:
    """The rows of one model on one engine, in the order of the lengths asked for."""
    return [_row(run, length, options, bandwidth) for length in options.decode]


def _row(run: _Run, length: int, options: BenchmarkOptions, bandwidth: float | None) -> BenchmarkRow:
    row = partial(
        BenchmarkRow, model=run.model.label, engine=run.engine_name, prompt=options.prompt, decode=length
    )
    if run.failure is None and length not in run.lengths and run.engine:
        reason = (
            f"{options.prompt} + {length} tokens are more than the model's {run.engine.positions} positions"
        )
        return row(failure=reason)
    if run.failure is not None or run.engine is None:
        return row(failure=run.failure)
    decode_ms = Spread.of([1000 * timing.decode_s[length] / length for timing in run.timings])
    footprint = run.engine.footprint()
    # Decoding token i reads the keys and values of all positions before it and its own.
    mean_context = options.prompt + (length + 1) / 2
    moved = footprint.weight_bytes_per_token + round(footprint.kv_bytes_per_position * mean_context)
    return row(
        stand_in=run.engine.stand_in,
        prefill_ms=Spread.of([1000 * timing.prefill_s / options.prompt for timing in run.timings]),
        decode_ms=decode_ms,
        tokens_per_second=1000 / decode_ms.median,
        model_bytes=footprint.model_bytes,
        held_bytes=footprint.held_bytes,
        peak_bytes=footprint.peak_bytes,
        bytes_per_token=moved,
        bandwidth_share=None if bandwidth is None else moved / (decode_ms.median / 1000) / bandwidth,
        noisy=decode_ms.relative > NOISY,
    )


def _compared(row: BenchmarkRow, rows: Sequence[BenchmarkRow], baseline: str | None) -> BenchmarkRow:
    """The row with its speed-ups over the baseline's row of the same engine and length, where both were measured."""
    for other in rows:
        if (other.model, other.engine, other.decode) != (baseline, row.engine, row.decode):
            continue
        if row.decode_ms and row.prefill_ms and other.decode_ms and other.prefill_ms:
            return row.model_copy(
                update={
                    "prefill_speedup": other.prefill_ms.median / row.prefill_ms.median,
                    "decode_speedup": other.decode_ms.median / row.decode_ms.median,
                }
            )
    return row


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "numpy", "gguf", "torch-npu", "xllamacpp")
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class _Counter:
    """Progress of the runs of all engines."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def advance(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)
