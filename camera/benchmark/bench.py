"""The measurement: every model on every engine, in runs that alternate between the models."""

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from camera.ascend.causes import explain
from camera.benchmark.report import NOISY, BenchmarkReport, BenchmarkRow, Spread
from camera.devices import (
    describe_device,
    driver_versions,
    memory_bandwidth,
    refuse_false_times,
    resolve_device,
)
from camera.engines import ENGINES, Engine, Timing
from camera.errors import CameraError
from camera.held import SourceChangedError
from camera.options import BenchmarkOptions
from camera.progress import Progress, silent
from camera.versions import versions

log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 8
_FAILURES = (CameraError, RuntimeError, OSError, MemoryError)
"""What a model too large, a damaged file or a broken build raise: a row of the report, and the others go on."""


@dataclass(frozen=True)
class BenchModel:
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
        except SourceChangedError:  # of that no row is to be kept
            raise
        except _FAILURES as error:
            self.failure = str(error) or type(error).__name__
            if cause := explain(self.failure):
                self.failure = f"{cause} ({self.failure})"
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
        progress: called with (runs done, runs in all).

    Raises:
        CameraError: if there is no model, labels repeat, there are two baselines, the device does not exist,
            or its times would be false.
    """
    _check(models)
    device = resolve_device(options.device)
    refuse_false_times(device)
    runs = {
        name: [_Run(model, name) for model in models if model.engines is None or name in model.engines]
        for name in options.engines
    }
    done, total = 0, options.repeats * sum(map(len, runs.values()))
    with _threads(options.threads):
        bandwidth = memory_bandwidth(device)
        rows: list[BenchmarkRow] = []
        described: dict[str, dict[str, Any]] = {}
        for name, of_engine in runs.items():
            with ExitStack() as loaded:
                for run in of_engine:
                    _load(run, options, device, loaded)
                for turn in range(options.repeats):
                    for run in of_engine if turn % 2 == 0 else reversed(of_engine):
                        if run.engine and run.lengths and run.failure is None:
                            with run.failing():
                                run.timings.append(run.engine.time_once(options.prompt, run.lengths))
                        done += 1
                        progress(done, total)
                # What an engine of its own does on an accelerator is beyond torch's measurement of this device.
                comparable = ENGINES[name].in_torch or device.type == "cpu"
                for run in of_engine:
                    rows += [
                        _row(run, length, options.prompt, bandwidth.bytes_per_second if comparable else None)
                        for length in options.decode
                    ]
                    if run.engine:
                        described[f"{name}: {run.model.label}"] = run.engine.describe()
        baseline = next((model.label for model in models if model.baseline), None)
        return BenchmarkReport(
            options=options.model_dump(mode="json"),
            baseline=baseline,
            device=describe_device(device),
            bandwidth_bytes_per_second=bandwidth.bytes_per_second,
            bandwidth_measured_by=bandwidth.measured_by,
            engines=described,
            versions={
                "python": platform.python_version(),
                **versions(),
                **{name: version for name, version in driver_versions(device).items() if version is not None},
            },
            rows=tuple(_compared(row, rows, baseline) for row in rows),
        )


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


def _load(run: _Run, options: BenchmarkOptions, device: torch.device, loaded: ExitStack) -> None:
    """Load a model and warm it up; it is closed with the stack."""
    with run.failing():
        run.engine = ENGINES[run.engine_name].load(run.model.path, options, device)
        loaded.callback(run.engine.close)
        limit = run.engine.positions - options.prompt
        run.lengths = tuple(length for length in options.decode if length <= limit)
        if run.lengths:
            run.engine.time_once(options.prompt, (min(_WARM_UP_TOKENS, *run.lengths),))


def _row(run: _Run, length: int, prompt: int, bandwidth: float | None) -> BenchmarkRow:
    """One model on one engine at one length: measured, or the reason why not."""
    failure = run.failure
    if failure is None and length not in run.lengths and run.engine:
        failure = f"{prompt} + {length} tokens are more than the model's {run.engine.positions} positions"
    row = BenchmarkRow(
        model=run.model.label, engine=run.engine_name, prompt=prompt, decode=length, failure=failure
    )
    if failure is not None or run.engine is None:
        return row
    decode_ms = Spread.of([1000 * timing.decode_s[length] / length for timing in run.timings])
    footprint = run.engine.footprint()
    # Decoding token i reads the keys and values of all positions before it and its own.
    mean_context = prompt + (length + 1) / 2
    moved = footprint.weight_bytes_per_token + round(footprint.kv_bytes_per_position * mean_context)
    measured = {
        "stand_in": run.engine.stand_in,
        "prefill_ms": Spread.of([1000 * timing.prefill_s / prompt for timing in run.timings]),
        "decode_ms": decode_ms,
        "tokens_per_second": 1000 / decode_ms.median,
        "model_bytes": footprint.model_bytes,
        "held_bytes": footprint.held_bytes,
        "peak_bytes": footprint.peak_bytes,
        "bytes_per_token": moved,
        "bandwidth_share": None if bandwidth is None else moved / (decode_ms.median / 1000) / bandwidth,
        "noisy": decode_ms.relative > NOISY,
    }
    return row.model_copy(update=measured)


def _compared(row: BenchmarkRow, rows: Sequence[BenchmarkRow], baseline: str | None) -> BenchmarkRow:
    """The row with its speed-ups over the baseline's row of the same engine and length, where both were measured."""
    for other in rows:
        if (other.model, other.engine, other.decode) != (baseline, row.engine, row.decode):
            continue
        if row.decode_ms and row.prefill_ms and other.decode_ms and other.prefill_ms:
            speedups = {
                "prefill_speedup": other.prefill_ms.median / row.prefill_ms.median,
                "decode_speedup": other.decode_ms.median / row.decode_ms.median,
            }
            return row.model_copy(update=speedups)
    return row
