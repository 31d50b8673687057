"""Benchmark as a stage: the pruned model against the unpruned baseline, alternately in one run."""

from camera.benchmark.report import BenchmarkReport
from camera.files import write_json
from camera.options import BenchmarkOptions
from tasks.stage import Context, Stage
from tasks.stages.convert import gguf_of

RESULT = "benchmark.json"
_KEY_ONLY = ("device_name", "llama_cpp_build")
"""They tell one result from another; the measurement finds them out itself."""


def run(context: Context) -> dict[str, float]:
    """Write `benchmark.json`."""
    # Brings all of transformers, three seconds that a run whose stages are cached does not need.
    from camera.benchmark.bench import BenchModel, run_benchmark

    options = {name: value for name, value in context.options.items() if name not in _KEY_ONLY}
    models = [
        BenchModel(
            label=label,
            path=gguf_of(folder) if any(folder.glob("*.gguf")) else folder,
            baseline=label == "baseline",
        )
        for label, folder in context.inputs.items()
    ]
    report = run_benchmark(models, BenchmarkOptions(**options), context.progress)
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


STAGE = Stage("benchmark", version=1, run=run)
