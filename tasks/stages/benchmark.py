"""Benchmark as a stage: the pruned model against the unpruned baseline, alternately in one run."""

import torch

from camera.benchmark.report import BenchmarkReport
from camera.devices import BANDWIDTH_BUFFER_BYTES
from camera.files import write_json
from camera.options import BenchmarkOptions
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register
from tasks.stages import convert
from tasks.stages.convert import gguf_of

RESULT = "benchmark.json"


def run(context: Context) -> dict[str, float]:
    """Write `benchmark.json`."""
    # Brings all of transformers, three seconds that a run whose stages are cached does not need.
    from camera.benchmark.bench import BenchModel, run_benchmark

    models = [
        BenchModel(
            label=label,
            # By who made it: a GGUF that lies beside a checkpoint is no part of it.
            path=gguf_of(folder) if context.made_by[label] == convert.STAGE.name else folder,
            baseline=label == "baseline",
        )
        for label, folder in context.inputs.items()
    ]
    report = run_benchmark(models, context.options.of(BenchmarkOptions), context.progress)
    write_json(context.out / RESULT, report.model_dump(mode="json"))
    return _metrics(report)


def _metrics(report: BenchmarkReport) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for row in report.rows:
        name = f"{row.model}.{row.engine}.{row.decode}"
        if row.decode_ms is not None:
            metrics[f"{name}.decode_ms_per_token"] = row.decode_ms.median
        if row.prefill_ms is not None:
            metrics[f"{name}.prefill_ms_per_token"] = row.prefill_ms.median
    return metrics


def needs(known: Known) -> Needs:
    """Two models as they are stored, and one in float32; a CPU's memory is read to see how fast that goes."""
    on_cpu = known.options.of(BenchmarkOptions).device in ("auto", "cpu")
    read = BANDWIDTH_BUFFER_BYTES if on_cpu else 0  # an accelerator copies in its own memory
    return Needs(memory=max(read, 2 * known.whole + known.elements * torch.float32.itemsize))


STAGE = register(
    Stage("benchmark", 4, run, {"benchmark": BenchmarkOptions}, needs, intermediate=False, part="benchmark")
)
