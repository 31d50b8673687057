"""Decoding on the real torch_npu: what a token launches, in which operators, and that its numbers are the CPU's."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.loading import load_model
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.npu.decoding import PROMPT
from tests.npu.process import OnNpu, Outcome
from tests.npu.stub import wheel
from tests.tiny import MODEL_TYPES, tiny_checkpoint, tiny_moe_checkpoint

LAYERS = 3
FUSED = {
    "aclnnAddRmsNorm",
    "aclnnAddmm",
    "aclnnApplyRotaryPosEmbV2",
    "aclnnFusedInferAttentionScoreV3",
    "aclnnMatmul",
    "aclnnRmsNorm",
    "aclnnScatterNdUpdate",
    "aclnnSwiGlu",
}
"""What a fused layer launches."""
AROUND = {
    "aclnnArgMax": 1,
    "aclnnEmbedding": 1,
    "aclnnGtTensor": 1,
    "aclnnIndexSelect": 1,
    "aclnnInplaceAdds": 1,
    "aclnnInplaceCopy": 1,
    "aclnnInplaceIndexCopy": 1,
}
"""What a token launches but once: the mask, the rotation, the embedding, what was fed, the likeliest token, the position, and
the tokens that decoding returns."""
NORM_AND_HEAD = 2
LAUNCHES = {"llama": 11, "qwen2": 11, "PanguEmbedded": 11, "qwen3": 13}
"""Of a layer; norms of query and key are one each."""
FUSED_ATTENTION = ("PanguProMoE", "mixtral", "qwen3_moe")
"""With experts, which stay as they are."""
OTHERWISE = {
    "deepseek_v3": "its rotary embedding does not turn whole heads",
    "ernie4_5_moe": "its key differs by",
    "hunyuan_v1_moe": "its key differs by",
    "olmoe": "its queries are normed over all heads together",
}
"""Attention that the operators do not compute, and why."""


class Decoded(NamedTuple):
    """What a process came to that decodes all models of a folder."""

    folder: Path
    found: dict[str, Any]
    """By model."""
    outcome: Outcome

    @classmethod
    def by(cls, stub: Path, folder: Path, call: str) -> "Decoded":
        """A call of a function of tests.npu.decoding."""
        on_npu = OnNpu(wheel.unpacked(), stub, folder.parent)
        done = on_npu(f"from tests.npu.decoding import *; {call}", time_out=900)
        return cls(folder, json.loads(done.output.splitlines()[-1]), done)

    def check(self, model: str) -> None:
        """Against the CPU in float32: logits within half-precision rounding, and tokens the best ones but for that."""
        reference = load_model(self.folder / model, "float32", "cpu")
        for how in ("eager", "graph"):
            found = self.found[model][how]
            tokens = found["tokens"]
            with torch.no_grad():
                logits_TV = reference(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 :]
            for name, exact in (("first", logits_TV[0]), ("last", logits_TV[-1])):
                off = torch.tensor(found[name]) - exact
                assert float(off.norm() / exact.norm()) < 0.01, f"{how}, {name}"
            lost = logits_TV[:-1].max(-1).values - logits_TV[range(len(tokens)), tokens]
            assert float(lost.max()) < 0.02 * float(logits_TV.abs().max()), how


@pytest.fixture(scope="module")
def dense(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """Heads of 64 in float16, as the operators want them; on the second card."""
    folder = tmp_path_factory.mktemp("dense") / "models"
    for model_type in MODEL_TYPES:
        sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "layers": LAYERS}
        tiny_checkpoint(folder / model_type, model_type, dtype=torch.float16, **sizes)
    return Decoded.by(stub, folder, f"decode({str(folder)!r}, 'npu:1')")


@pytest.fixture(scope="module")
def sparse(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """The same with experts."""
    folder = tmp_path_factory.mktemp("sparse") / "models"
    for model_type in (*FUSED_ATTENTION, *OTHERWISE):
        sizes = {} if model_type.startswith("deepseek_v") else {"hidden_size": 256, "head_dim": 64}
        tiny_moe_checkpoint(folder / model_type, model_type, dtype=torch.float16, **sizes)
    return Decoded.by(stub, folder, f"decode({str(folder)!r})")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_token_is_a_few_launches_a_layer(dense: Decoded, model_type: str) -> None:
    launched = dense.outcome.launches(f"{model_type} eager")
    assert launched.keys() <= FUSED | AROUND.keys()
    assert {name: launched[name] for name in AROUND} == AROUND
    assert launched.total() == LAYERS * LAUNCHES[model_type] + sum(AROUND.values()) + NORM_AND_HEAD


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_graph_is_one_replay_of_a_token(dense: Decoded, model_type: str) -> None:
    found = dense.found[model_type]
    assert (found["graph of it"], found["engine"]["step"]["failed"]) == (True, {})
    kinds = [event["event"] for event in dense.outcome.between(f"{model_type} graph")]
    assert kinds.count("replay") == 1
    launched = dense.outcome.launches(f"{model_type} graph")
    assert launched == {"aclnnInplaceCopy": 1}  # of the tokens, which decoding returns


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokens_and_logits_are_the_cpus(dense: Decoded, model_type: str) -> None:
    assert dense.found[model_type]["engine"]["step"]["fused layers"] == f"{LAYERS} of {LAYERS}"
    dense.check(model_type)


def test_nothing_is_on_another_card(dense: Decoded) -> None:
    assert dense.outcome.cards == {1}


@pytest.mark.parametrize("model_type", FUSED_ATTENTION)
def test_attention_is_fused_where_tokens_are_routed_to_experts(sparse: Decoded, model_type: str) -> None:
    step = sparse.found[model_type]["engine"]["step"]
    assert (step["fused layers"], step["not fused"]) == (f"{LAYERS} of {LAYERS}", {})
    launched = sparse.outcome.launches(f"{model_type} eager")
    assert launched["aclnnFusedInferAttentionScoreV3"] == LAYERS
    sparse.check(model_type)


@pytest.mark.parametrize("model_type", OTHERWISE)
def test_other_attention_decodes_as_it_is_and_the_report_says_why(sparse: Decoded, model_type: str) -> None:
    step = sparse.found[model_type]["engine"]["step"]
    assert (step["layers"], step["fused layers"]) == ("plain", f"0 of {LAYERS}")
    assert OTHERWISE[model_type] in str(step["not fused"])
    sparse.check(model_type)


def test_4_bit_products_with_their_bias_and_a_head_in_parts_are_launches_of_a_fused_layer_too(
    stub: Path, tmp_path: Path
) -> None:
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "layers": LAYERS, "vocab": 704}
    source = tiny_checkpoint(tmp_path / "source", "PanguEmbedded", dtype=torch.float16, **sizes)
    packed = tmp_path / "models" / "packed"
    quantize_checkpoint(Checkpoint.open(source), packed, QuantizeOptions(type="q4_0_64", device="cpu"))
    decoded = Decoded.by(stub, packed.parent, f"decode_in_4_bits({str(packed.parent)!r}, 512)")
    assert decoded.found["packed"]["engine"]["step"]["fused layers"] == f"{LAYERS} of {LAYERS}"
    launched = decoded.outcome.launches("packed eager")
    assert launched["aclnnWeightQuantBatchMatmulV2"] == LAYERS * 4 + 2
    assert launched["aclnnCat"] == 1
    around = launched.total() - LAYERS * 11
    assert (
        around <= sum(AROUND.values()) + NORM_AND_HEAD + 8
    )  # two parts and their join; rows of 4-bit blocks unpacked
    assert 34 * 11 + around <= 34 * 14  # what a layer of openPangu-7B may cost, with everything around
    decoded.check("packed")
