"""What every dense family must hold: pruned, packed and converted, its model computes what transformers computes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError
from camera.evaluation.head import log_likelihoods
from camera.evaluation.text_model import open_text_model
from camera.files import read_json, write_json
from camera.formats.convert import convert_to_gguf
from camera.formats.convertible import check_convertible
from camera.layerwise.runner import LayerRunner
from camera.loading import load_model
from camera.models import FAMILIES
from camera.options import CaptureOptions, PruneOptions, QuantizeOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.summary import Pruned
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import ALWAYS_TIED, DENSE_TYPES, tiny_checkpoint

CPU = torch.device("cpu")
TOKENS_ST = torch.randint(3, 350, (4, 48), generator=torch.Generator().manual_seed(0))
WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 8},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 8},
    "gemma2": {},
    "gemma3_text": {},
}
"""Of each family that knows sliding windows, what gives a tiny model one."""


@dataclass(frozen=True)
class Compressed:
    """A model of a family on its way."""

    source: Checkpoint
    pruned: Checkpoint
    kept: list[torch.Tensor]
    """Channels that stay of each layer."""
    gguf: Path


@pytest.fixture(scope="module", params=DENSE_TYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """Pruned from 192 to 128 channels by what the narrowed layers before put out, packed and converted in float32."""
    folder, kept = tmp_path_factory.mktemp(request.param), []
    tied = request.param in ALWAYS_TIED
    source = Checkpoint.open(tiny_checkpoint(folder / "source", request.param, vocab=384, tied=tied))

    def look(model: Path, pruned: Path) -> None:
        kept.extend(stays.kept[""] for stays in Pruned.open(pruned).stays())

    capture = CaptureOptions(device="cpu", batch_size=2)
    prune_checkpoint(source, TOKENS_ST, folder / "pruned", capture, PruneOptions(ratio=0.4), finish=look)
    pruned = Checkpoint.open(folder / "pruned")
    quantize_checkpoint(pruned, folder / "packed", QuantizeOptions(type="f32"))
    convert_to_gguf(folder / "packed", folder / "model.gguf", name="tiny")
    return Compressed(source, pruned, kept, folder / "model.gguf")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS_ST).logits
    return found


def test_a_pruned_model_computes_the_dense_one_without_those_channels(model: Compressed) -> None:
    dense = model.source.load_model()
    for layer, kept_K in enumerate(model.kept):
        (block,) = model.source.blocks(layer)
        gone_F = torch.ones(192, dtype=torch.bool)
        gone_F[kept_K] = False
        dense.get_parameter(block.down).data[:, gone_F] = 0
    assert model.pruned.ffn_width == 128
    torch.testing.assert_close(logits(model.pruned.load_model()), logits(dense), rtol=1e-4, atol=1e-4)


def test_its_gguf_file_is_read_back_as_it_was(model: Compressed) -> None:
    found = logits(load_model(model.gguf, dtype="float32", device="cpu"))
    torch.testing.assert_close(found, logits(model.pruned.load_model()), rtol=1e-4, atol=1e-4)


def test_llama_cpp_computes_its_gguf_file_as_transformers_the_model(model: Compressed) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    from tests.camera.formats.test_real_llama_cpp import expected, probabilities

    looked_up = model.source.family.model_type.startswith(
        "gemma"
    )  # ggml has GELU as a table of 16-bit floats
    torch.testing.assert_close(
        probabilities(model.gguf), expected(model.pruned.folder), rtol=0, atol=5e-3 if looked_up else 1e-4
    )


def test_the_torch_engine_decodes_what_transformers_generates(model: Compressed) -> None:
    prompt = TOKENS_ST[0, :20]
    engine = TorchEngine(model.pruned.folder, CPU, 64)
    engine.prefill(prompt.tolist())
    whole = model.pruned.load_model()
    with torch.inference_mode():
        generated = whole.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert engine.decode(20).tolist() == generated[0, 20:].tolist()


def test_measured_layer_by_layer_it_is_as_likely_as_in_memory(model: Compressed) -> None:
    streamed = open_text_model(model.pruned.folder, "float32", "cpu", layer_by_layer=True)
    hidden_STH = streamed.hidden(TOKENS_ST, 2, lambda windows: None)
    before_NH, next_N = hidden_STH[:, :-1].flatten(0, 1), TOKENS_ST[:, 1:].flatten()
    found_N, _ = log_likelihoods(streamed, before_NH, next_N, lambda tokens: None)
    expected_SV = logits(model.pruned.load_model())[:, :-1].double().log_softmax(-1)
    expected_N = expected_SV.gather(-1, TOKENS_ST[:, 1:, None]).flatten()
    torch.testing.assert_close(found_N, expected_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", WINDOWS)
def test_layers_see_the_window_that_transformers_gives_them(tmp_path: Path, model_type: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type, **WINDOWS[model_type])
    checkpoint = Checkpoint.open(folder)
    whole = checkpoint.load_model()
    runner = LayerRunner(checkpoint, CPU, torch.float32)
    hidden_STH, run = runner.embed(TOKENS_ST), runner.caller(48)
    with torch.inference_mode():
        for layer in range(checkpoint.layer_count):
            with runner.layer(layer) as module:
                hidden_STH = run(module, hidden_STH)
        expected = whole.model(TOKENS_ST).last_hidden_state
        torch.testing.assert_close(whole.model.norm(hidden_STH), expected, rtol=1e-4, atol=1e-4)
    engine = TorchEngine(folder, CPU, 64)
    engine.prefill(TOKENS_ST[0, :20].tolist())
    with torch.inference_mode():
        generated = whole.generate(TOKENS_ST[:1, :20], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert engine.decode(20).tolist() == generated[0, 20:].tolist()


@pytest.mark.parametrize("model_type", ["phi3", "glm4", "gemma2", "granite"])
@pytest.mark.parametrize("method", [{"method": "refit"}, {"method": "camera", "sparsity": 0.3}])
def test_other_methods_take_fused_matrices_and_norms_behind(
    tmp_path: Path, model_type: str, method: dict[str, Any]
) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "source", model_type))
    capture = CaptureOptions(device="cpu", batch_size=2)
    prune_checkpoint(source, TOKENS_ST, tmp_path / "pruned", capture, PruneOptions(ratio=0.4, **method))
    pruned = Checkpoint.open(tmp_path / "pruned").load_model()
    off = (logits(pruned) - logits(source.load_model())).norm() / logits(source.load_model()).norm()
    assert 0 < off < 1


@pytest.mark.parametrize("model_type", ["phi3", "gemma2", "granite"])
def test_gptq_is_nearer_than_rounding_to_the_nearest(tmp_path: Path, model_type: str) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "source", model_type, hidden=128))
    exact = logits(source.load_model())
    off = {}
    for method in ("rtn", "gptq"):
        options = QuantizeOptions(type="q4_0", method=method, dtype="float32", device="cpu")
        quantize_checkpoint(source, tmp_path / method, options, TOKENS_ST)
        off[method] = float((logits(load_model(tmp_path / method, "float32", "cpu")) - exact).norm())
    assert off["gptq"] < off["rtn"]


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2"])
def test_an_activation_that_llama_cpp_does_not_compute_is_refused_before_the_work(
    tmp_path: Path, model_type: str
) -> None:
    key = FAMILIES[model_type].gguf_rules.activation.key
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", model_type, tied=True, **{key: "relu"}))
    with pytest.raises(CameraError, match=f"{key} is 'relu', and it computes"):
        check_convertible(checkpoint)


def test_what_config_json_leaves_out_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "gemma3_text", tied=True)
    config = read_json(folder / "config.json")
    for key in ("max_position_embeddings", "tie_word_embeddings", "hidden_activation", "rms_norm_eps"):
        del config[key]
    write_json(folder / "config.json", config)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied
    assert checkpoint.config["max_position_embeddings"] == checkpoint.hf_config.max_position_embeddings
    check_convertible(checkpoint)


def test_phi_s_long_context_is_in_its_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    from tests.camera.formats.test_real_llama_cpp import converted, expected, probabilities

    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0] * 6,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
    }
    more = {"rope_parameters": rope, "original_max_position_embeddings": 256}
    source = tiny_checkpoint(tmp_path / "source", "phi3", vocab=384, **more)
    gguf = converted(source, tmp_path, "f32")
    torch.testing.assert_close(probabilities(gguf), expected(source), rtol=0, atol=1e-4)
    read_back = logits(load_model(gguf, "float32", "cpu"))
    torch.testing.assert_close(read_back, logits(Checkpoint.open(source).load_model()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_exaone_s_windows_and_layers_without_positions_are_in_its_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    from tests.camera.formats.test_real_llama_cpp import converted, expected, probabilities

    kinds = [*["sliding_attention"] * 3, "full_attention"] * 16
    more = {"num_hidden_layers": 64, "sliding_window": 8, "layer_types": kinds}
    source = tiny_checkpoint(tmp_path / "source", "exaone4", vocab=384, ffn=64, **more)
    gguf = converted(source, tmp_path, "f32")
    torch.testing.assert_close(probabilities(gguf), expected(source), rtol=0, atol=1e-3)
