"""What tests/npu/test_decode.py runs in a process whose NPU is the stub."""

import json
import sys
from pathlib import Path
from typing import Any

from camera.devices import resolve_device
from camera.engines.parts import int4_choice, int4_npu, step
from camera.engines.parts.int4_trials import TrialsError
from camera.engines.torch_engine import TorchEngine
from tests.npu.process import mark

PROMPT, TOKENS, CAPACITY = [1, 5, 9, 33, 120, 7], 37, 56


def decode_in_4_bits(folder: str, rows: int) -> None:
    """The same of weights in the plain layout, with a kernel that takes no more than so many rows of a matrix."""

    def no_trials(*given: Any) -> None:
        raise TrialsError("trials have tests of their own")

    int4_choice.try_layouts = no_trials
    int4_npu.NpuInt4Linear.rows_limit = rows
    decode(folder)


def decode(folder: str, device: str = "npu:0") -> None:
    """Decode every model in a folder by fused layers if it has any, eagerly and by graphs, over three strides of positions.

    Prints what came of them as JSON, by their names. One token more of each is marked: `NAME eager` and `NAME graph`.
    """
    step.POSITIONS_TOGETHER = 16
    step._TRIED_STEPS = 2
    found = {path.name: _decoded(path, device) for path in sorted(Path(folder).iterdir())}
    sys.stdout.write(json.dumps(found) + "\n")


def _decoded(path: Path, device: str) -> dict[str, Any]:
    engine = TorchEngine(path, resolve_device(device), CAPACITY)
    assert engine.step is not None
    found: dict[str, Any] = {"engine": engine.describe()}
    engine.step.choose(step.FUSED if step.FUSED in engine.step.milliseconds else step.PLAIN)
    engine.step.record(engine.step.visible)
    found["graph of it"] = engine.step.describe()["graph"]
    for how in ("eager", "graph"):
        engine.step.replays = how == "graph"
        first = engine.prefill(PROMPT)
        found[how] = {
            "tokens": engine.decode(TOKENS).tolist(),
            "first": first.float().tolist(),
            "last": engine.step.logits_V.float().tolist(),
        }
        mark(f"{path.name} {how}")
        engine.decode(1)
        mark("after")
    return found
