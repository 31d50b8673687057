"""Decoding by operators for whole parts of a layer, here those of a device that computes them by the book."""

import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.engines.parts import fused as fused_module
from camera.engines.parts import step as step_module
from camera.engines.parts.step import FUSED, PLAIN, DecodeStep
from camera.engines.torch_engine import TorchEngine
from tests.tiny import MODEL_TYPES, tiny_checkpoint

PROMPT = [1, 5, 9, 33, 120, 7]


def checkpoint(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """Of heads that are 64 wide, as the operators want them."""
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "dtype": torch.float16, **options}
    return tiny_checkpoint(folder, model_type, **sizes)


def loaded(folder: Path) -> tuple[TorchEngine, DecodeStep]:
    engine = TorchEngine(folder, torch.device("npu", 0), 40)
    assert engine.step is not None
    return engine, engine.step


def check_tokens_and_logits(engine: TorchEngine, folder: Path) -> None:
    assert engine.step is not None
    engine.prefill(PROMPT)
    tokens = engine.decode(30).clone().cpu().tolist()
    reference = Checkpoint.open(folder).load_model(torch.float32)
    with torch.no_grad():
        logits_TV = reference(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 :]
    error = float((engine.step.logits_V.clone().cpu().float() - logits_TV[-1]).norm() / logits_TV[-1].norm())
    assert error < 0.01
    lost = logits_TV[:-1].max(-1).values - logits_TV[range(30), tokens]
    assert float(lost.max()) < 0.02 * float(logits_TV.abs().max())  # the best token, but for rounding


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokens_and_logits_are_transformers_at_every_length(
    tmp_path: Path, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr(step_module, "POSITIONS_TOGETHER", 16)  # so that 30 tokens see three widths
    folder = checkpoint(tmp_path / "model", model_type)
    engine, step = loaded(folder)
    said = engine.describe()["step"]
    assert (said["fused layers"], said["not fused"]) == ("2 of 2", {})
    assert said["trial, ms a token"].keys() == {PLAIN, FUSED}
    step.choose(FUSED)
    check_tokens_and_logits(engine, folder)


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("granite", {}, "it multiplies what its layers or its head put out"),
        ("olmo2", {}, "it has no attention_norm and no ffn_norm"),
        ("phi3", {}, "its rotary embedding does not turn whole heads"),
        ("glm4", {"head_dim": 64}, "its rotary embedding does not turn whole heads"),
        ("gemma", {"head_dim": 64}, "its activation is gelu_pytorch_tanh, and the operator's is SiLU"),
        (
            "gemma2",
            {"head_dim": 64, "query_pre_attn_scalar": 64},
            "it multiplies what its layers or its head",
        ),
        ("gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64}, "its attention has a window"),
        ("mistral", {"head_dim": 64, "sliding_window": 8}, "its attention has a window"),
        ("smollm3", {}, "its key differs by"),
    ],
)
def test_layers_of_another_kind_decode_as_transformers_has_them_and_say_why(
    tmp_path: Path, npu: types.ModuleType, model_type: str, options: dict[str, Any], reason: str
) -> None:
    folder = checkpoint(tmp_path / "model", model_type, **options)
    engine, step = loaded(folder)
    assert any(reason in why for why in engine.describe()["step"]["not fused"])
    if step.fused is not None and step.fused.fused:
        step.choose(FUSED)
    check_tokens_and_logits(engine, folder)


def test_attention_that_does_not_heed_the_mask_is_found(
    tmp_path: Path, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = npu.npu_fused_infer_attention_score

    def sees_everything(*given: Any, atten_mask: torch.Tensor, **options: Any) -> Any:
        return attend(*given, atten_mask=torch.zeros_like(atten_mask), **options)

    monkeypatch.setattr(npu, "npu_fused_infer_attention_score", sees_everything)
    engine, _ = loaded(checkpoint(tmp_path / "model"))
    said = engine.describe()["step"]
    assert said["layers"] == PLAIN
    assert "its output differs by" in str(said)


def test_a_layer_that_computes_something_else_stays_as_it_is_between_fused_ones(
    tmp_path: Path, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model", layers=3)
    made = fused_module.FusedLayer.__init__

    def with_another_scale(self: Any, layer: Any, roles: Any, cache: Any, by: Any) -> None:
        made(self, layer, roles, cache, by)
        if layer.self_attn.layer_idx == 1:
            self._scale *= 2

    monkeypatch.setattr(fused_module.FusedLayer, "__init__", with_another_scale)
    engine, step = loaded(folder)
    said = engine.describe()["step"]
    assert said["fused layers"] == "2 of 3"
    assert [reason for reason in said["not fused"] if reason.startswith("its output differs by")]
    step.choose(FUSED)
    check_tokens_and_logits(engine, folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden": 128}, "its heads are 32 wide, and the rotary operator takes (64, 128)"),
        ({"dtype": torch.float32}, "its dtype is torch.float32"),
    ],
)
def test_a_model_that_the_operators_do_not_take_decodes_as_it_is_and_says_why(
    tmp_path: Path, npu: types.ModuleType, options: dict[str, Any], reason: str
) -> None:
    engine, _ = loaded(checkpoint(tmp_path / "model", **options))
    said = engine.describe()["step"]
    assert (said["layers"], said["fused layers"], said["not fused"]) == (
        PLAIN,
        "0 of 2",
        {reason: "2 layers"},
    )


def test_an_operator_that_fails_is_said_and_done_without(
    tmp_path: Path, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("error code is 561103\nand much more")

    monkeypatch.setattr(npu, "npu_fused_infer_attention_score", fails)
    folder = checkpoint(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        engine, _ = loaded(folder)
    said = engine.describe()["step"]
    assert (said["layers"], said["failed"][FUSED]) == (PLAIN, "error code is 561103")
    assert "decoding goes on without fused: error code is 561103" in caplog.text
    check_tokens_and_logits(engine, folder)


def test_logits_that_differ_though_no_layer_does_are_found_out(tmp_path: Path, npu: types.ModuleType) -> None:
    engine, step = loaded(checkpoint(tmp_path / "model"))
    engine.model.register_forward_hook(lambda model, inputs, out: setattr(out, "logits", out.logits / 8))
    step.prepare()
    said = step.describe()
    assert (said["layers"], said["fused layers"]) == (PLAIN, "2 of 2")
    assert "the logits differ from transformers' by 7" in said["failed"][FUSED]  # times eight
