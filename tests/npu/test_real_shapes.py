"""Two layers of openPangu-7B's own shapes in Q4_0_64, decoded on the stub: minutes, so not part of `make test-npu`.

python -m pytest -n 0 -m "npu and real" tests/npu
"""

import json
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.checkpoints.synthetic import write_checkpoint
from camera.loading import load_model
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.npu.decoding import PROMPT
from tests.npu.process import OnNpu

SHAPES = {"layers": 2, "hidden": 4096, "ffn": 12_800, "vocab": 153_376, "heads": 32, "kv_heads": 8}


@pytest.mark.real
def test_a_token_is_eleven_launches_a_layer_and_eighteen_around_them(on_npu: OnNpu, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", **SHAPES, dtype=torch.bfloat16)
    options = QuantizeOptions(type="q4_0_64", output_type="q4_0_64", device="cpu")
    quantize_checkpoint(Checkpoint.open(source), tmp_path / "packed", options)
    done = on_npu(
        f"from tests.npu.decoding import decode_three; decode_three('{tmp_path}/packed', '{tmp_path}/logits.safetensors')",
        environment={"STUB_MEMORY": str(64 << 30)},
        time_out=3600,
    )
    assert sum(done.launches("token").values()) == 11 * 2 + 18
    found = json.loads(done.output.splitlines()[-1])
    assert found["engine"]["step"]["fused layers"] == "2 of 2"
    assert [kind for kind in found["engine"]["linears"] if "in 3 parts" in kind]
    model = load_model(tmp_path / "packed", dtype="float32", device="cpu")
    tokens = PROMPT[:3]
    with torch.inference_mode():
        for _ in range(3):
            logits_V = model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
            tokens = [*tokens, int(logits_V.argmax())]
        exact_V = model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
    assert found["tokens"] == tokens[3:5]
    logits_V = read_tensors(tmp_path / "logits.safetensors")["logits_V"]
    assert float((logits_V - exact_V).norm() / exact_V.norm()) < 0.005
