"""Every command and option that touches weights, as it is run at real shapes, and the memory that each may take.

`tests/real/test_covered.py`, which is in `make test`, compares this list with the command line: an option that is new must be
added to a command here, or to those that touch no weights.
"""

import re
from dataclasses import dataclass

_PLACE = re.compile(r"\{([\w-]+)\}")


@dataclass(frozen=True)
class Command:
    """A call of `camera`."""

    arguments: str
    """As typed, with `{out}` for what it makes, `{model}` for the checkpoint, `{name}` for what another one made, `{twin}`
    for the second file of `convert`, and `{folder}` for where all this lies."""
    bound_gb: float
    """The most memory that its largest process may take, in 10^9 bytes (VmHWM)."""
    beside: str | None = None
    """What may be held whole, so that its size comes on top of the bound: `model`, or what another one made."""
    makes: str = ""
    """How the name of `{out}` ends."""
    needs: tuple[str, ...] = ()
    """Modules without which it is left out."""
    over_gb: float = 0
    """How much more than its bound it takes today, which is known and not mended yet."""
    slow: bool = False
    """Whether it takes minutes, and is left out unless asked for."""
    after: tuple[str, ...] = ()
    """Commands that must have run before, whose output no argument names."""

    @property
    def words(self) -> list[str]:
        return self.arguments.split()

    @property
    def uses(self) -> set[str]:
        """Names of the commands whose output it reads."""
        named = set(_PLACE.findall(self.arguments)) | set(self.after)
        return {"convert" if name == "twin" else name for name in named} - {"out", "model", "folder"}


TOKENS = "--calibration stdlib --samples 2 --length 128"
MANY = "--calibration stdlib --samples 30 --length 2048 --batch-size 1"
"""A refit wants four tokens for each of 12,800 channels: minutes a layer."""
TEXT = "--text stdlib --window 128 --max-windows 1"

PRUNE, ROUND, STREAM, GRAM, EVALUATE, RUN = 1.3, 1.0, 1.5, 4.0, 2.0, 2.7
"""A layer and a half; rows of a matrix; a layer in float32; a square of 12,800 in float64 twice; a layer and logits; the
same beside Prefect and MLflow."""

COMMANDS = {
    # Pruning
    "prune": Command(f"prune {{model}} {{out}} --ratio 0.2 --json {TOKENS}", PRUNE),
    "prune-mask": Command(
        "prune {model} {out} --mode mask --ratio 0.3 --multiple-of 128 --reduce-ratio 0.5 --sparsity 0.5 "
        f"--propagate one-shot --batch-size 1 --dtype float32 --json {TOKENS}",
        PRUNE + 0.8,  # a layer in float32
    ),
    "prune-ranks": Command(
        f"prune {{model}} {{out}} --nproc 2 --batch-size 1 --dtype bfloat16 {TOKENS}", PRUNE
    ),
    "prune-few": Command(f"prune {{model}} {{out}} --method refit --json {TOKENS}", GRAM),
    "prune-refit": Command(
        f"prune {{model}} {{out}} --method refit --damping 0.01 --json {MANY}", GRAM, slow=True
    ),
    "prune-obs": Command(
        f"prune {{model}} {{out}} --method obs --round 400 --target layer --json {MANY}", GRAM, slow=True
    ),
    "prune-killed": Command(f"prune {{model}} {{out}} --ratio 0.2 {TOKENS}", PRUNE),
    "capture": Command(f"capture {{model}} {{out}} --propagate one-shot {TOKENS}", PRUNE),
    "capture-sequential": Command(
        "capture {model} {out} --propagate sequential --ratio 0.2 --reduce-ratio 0.5 --multiple-of 256 "
        f"--dtype float16 --batch-size 1 --nproc 2 {TOKENS}",
        PRUNE,
    ),
    "score": Command("score {model} {capture} {out} --reduce-ratio 0.95", PRUNE),
    "prune-scores": Command("prune {model} {out} --ratio 0.2 --scores {score}", PRUNE),
    "save": Command("save {model} {prune-scores} {out}", PRUNE),
    # Quantising
    "quantize": Command("quantize {model} {out} --type q4_0_64 --output-type q4_0_64 --json", ROUND),
    "quantize-types": Command(
        "quantize {model} {out} --type q8_0 --output-type f16 --embedding-type q4_0 "
        "--override *.1.*_proj.weight=bf16 --override *.1.*.k_proj.weight=f32 --json",
        ROUND,
    ),
    "imatrix": Command(
        f"imatrix {{model}} {{out}} --batch-size 1 --dtype float32 {TOKENS}", STREAM, makes=".gguf"
    ),
    "quantize-search": Command(  # the head and a layer: a search takes long
        "quantize {model} {out} --type q4_0 --method search --imatrix {imatrix} --embedding-type q8_0 "
        "--override *.layers.1.*=q8_0 --json",
        STREAM,
    ),
    "quantize-target": Command(
        f"quantize {{model}} {{out}} --type q4_0 --target-bpw 5 --dtype bfloat16 --batch-size 1 --json {TOKENS}",
        STREAM,
    ),
    "quantize-gptq": Command(  # one layer, for the same reason
        "quantize {model} {out} --type q4_0 --method gptq --damping 0.01 --output-type bf16 --embedding-type bf16 "
        f"--override *.layers.1.*=bf16 --json {TOKENS}",
        GRAM,
    ),
    "convert": Command("convert {quantize} {out} --twin q4_0", ROUND, makes=".gguf"),
    "import": Command("import {twin} {out} --dtype bfloat16 --json", ROUND),
    "import-narrowest": Command("import {convert} {out} --json", ROUND),
    # Measuring
    "evaluate": Command(f"evaluate {{prune}} --reference {{model}} --batch-size 1 --json {TEXT}", EVALUATE),
    "evaluate-float32": Command(
        f"evaluate {{model}} --reference {{model}} --dtype float32 --layer-by-layer --json {TEXT}", EVALUATE
    ),
    "evaluate-packed": Command(
        f"evaluate {{twin}} --tokenizer {{model}} --reference {{quantize}} --dtype float32 --json {TEXT}",
        EVALUATE,
    ),
    "evaluate-tasks": Command(
        "evaluate {model} --tasks boolq --task-folder {folder}/tasks --limit 2 --few-shot 1 --out {out} --json",
        EVALUATE,
        needs=("lm_eval",),
    ),
    "bench": Command(
        "bench {convert} --engine torch --prompt 4 --decode 8 --repeats 1 --threads 2 --json",
        0.5,
        beside="convert",
        over_gb=0.2,  # 0.6 GB beside the packed model, of which 0.4 are Python, torch and transformers
    ),
    "bench-bf16": Command(
        "bench {prune} --engine torch --prompt 4 --decode 4 --repeats 1 --json",
        0.5,
        beside="prune",
        over_gb=0.1,  # it is at its bound, and runs differ by some megabytes
    ),
    "bench-llama": Command(
        "bench {convert} --baseline {twin} --engine llama.cpp --prompt 4 --decode 4 --repeats 1 --json",
        0.8,  # of which llama.cpp takes 0.3 for the logits of a batch
        beside="twin",
        needs=("xllamacpp",),
    ),
    # The pipeline
    "plan": Command("plan recipe.yaml --json", PRUNE),
    "run": Command("run recipe.yaml --json", RUN, needs=("xllamacpp",)),
    "audit": Command("audit published/real --json", ROUND, after=("run",)),
}
"""By name, which is the name of the output too."""
