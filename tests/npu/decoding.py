"""What tests/npu/test_decode.py runs in a process whose NPU is the stub."""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

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


def decode_three(folder: str, out: str) -> None:
    """Decode three tokens by fused layers, eagerly; the last is marked `token`, and its logits are saved.

    Prints the first two tokens and what the engine says of itself.
    """

    def no_trials(*given: Any) -> None:
        raise TrialsError("a trial takes minutes at these shapes")

    int4_choice.try_layouts = no_trials
    step._TRIED_STEPS = 1
    engine = TorchEngine(Path(folder), resolve_device("npu:0"), 16)
    assert engine.step is not None
    engine.step.choose(step.FUSED)
    engine.step.replays = False
    engine.prefill(PROMPT[:3])
    tokens = engine.decode(2).tolist()
    mark("token")
    engine.decode(1)
    mark("after")
    save_file({"logits_V": engine.step.logits_V.float().cpu()}, out)
    sys.stdout.write(json.dumps({"tokens": tokens, "engine": engine.describe()}) + "\n")
