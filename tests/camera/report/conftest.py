"""A real run, small: every stage on a tiny random model, once for all tests of a process."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.benchmark.bench import BenchModel, run_benchmark
from camera.checkpoints.checkpoint import Checkpoint
from camera.evaluation.perplexity import perplexity
from camera.files import write_json
from camera.formats.convert import convert_to_gguf, write_twin
from camera.options import BenchmarkOptions, CaptureOptions, PruneOptions, QuantizeOptions
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture, prune, save, score
from camera.quantization.execute import quantize_checkpoint
from camera.report.collect import collect_results
from camera.report.schema import Results
from tests.tiny import TOKENS, tiny_checkpoint

PRUNE = PruneOptions(ratio=0.3, multiple_of=16)
TEXT = "held-out"


@dataclass(frozen=True)
class Run:
    """What the stages of a run wrote."""

    source: Checkpoint
    folders: Mapping[str, Path]
    gguf: Path
    """Folder with the GGUF of the product and its twin."""
    recipe: dict[str, Any]

    def results(self, *, name: str = "tiny-camera", without: tuple[str, ...] = ()) -> Results:
        """The results, as if the parts whose names start with one of `without` had not run."""
        folders = {key: path for key, path in self.folders.items() if not key.startswith(without or ("-",))}
        return collect_results(name=name, recipe=self.recipe, folders=folders, source=self.source)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """192 FFN channels of which 144 stay: too few for Q4_0_64's blocks, so that there are fall-backs to report."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    source = Checkpoint.open(tiny_checkpoint(root / "source", "llama", layers=3))
    folders: dict[str, Path] = {}

    def folder(key: str) -> Path:
        folders[key] = root / "stages" / key.replace("+", "-")
        folders[key].mkdir(parents=True)
        return folders[key]

    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, TOKENS, (6, 32), generator=random)
    text = torch.randint(3, TOKENS, (200,), generator=random)
    capturing = CaptureOptions(propagate="one-shot", device="cpu", dtype="float32")
    capture(source, tokens, folder("capture"), capturing)
    score(source, folders["capture"], folder("scores"), 0.95)
    plan = plan_prune(source, capturing, PRUNE)
    prune(source, folders["scores"], folder("pruned"), plan, PRUNE)
    save(source, folders["pruned"], folder("saved"))
    quantize_checkpoint(Checkpoint.open(folders["saved"]), folder("quantized"), QuantizeOptions())
    quantize_checkpoint(source, folder("quantized/baseline"), QuantizeOptions(type="q4_0"))
    gguf = folder("gguf")
    convert_to_gguf(folders["quantized"], gguf / "tiny-q4_0_64.gguf", name="tiny", lineage={})
    convert_to_gguf(folders["quantized/baseline"], root / "baseline.gguf", name="baseline", lineage={})
    write_twin(gguf / "tiny-q4_0_64.gguf", gguf / "tiny-q4_0-twin.gguf")
    models = {
        "original": source.folder,
        "baseline": folders["quantized/baseline"],
        "pruned": folders["saved"],
        "pruned+quantized": folders["quantized"],
    }
    for model, path in models.items():
        measured = perplexity(path, text, window=50, dtype="float32", device="cpu")
        write_json(
            folder(f"evaluate/{model}/{TEXT}") / "perplexity.json", {"dataset": TEXT, **asdict(measured)}
        )
    timed = run_benchmark(
        [
            BenchModel(label="original", path=source.folder),
            BenchModel(label="baseline", path=root / "baseline.gguf", baseline=True),
            BenchModel(label="pruned+quantized", path=gguf / "tiny-q4_0_64.gguf"),
        ],
        BenchmarkOptions(device="cpu", decode=(4, 8), repeats=2, threads=1),
    )
    write_json(folder("benchmark") / "benchmark.json", timed.model_dump(mode="json"))
    del folders["gguf"]
    recipe = {
        "name": "tiny-camera",
        "model": str(source.folder),
        "baseline": "q4_0",
        "prune": PRUNE.model_dump(mode="json"),
        "quantize": QuantizeOptions().model_dump(mode="json"),
    }
    return Run(source, folders, gguf, recipe)
