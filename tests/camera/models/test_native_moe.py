"""DeepSeek-MoE (V1) and openPangu-Pro-MoE in transformers, without the code that their checkpoints carry."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.formats.convert import convert_to_gguf
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import tiny_moe_checkpoint

NATIVE = ("PanguProMoE", "deepseek")
PREFIX = "model.layers.2.mlp."


def gated(x_H: torch.Tensor, tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    gate, up, down = (tensors[f"{PREFIX}{module}.{role}_proj.weight"] for role in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x_H) * (up @ x_H))


def pangu_token(x_H: torch.Tensor, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """The best expert of each group, by its score among all and its scale; then the shared one."""
    scores_E = (tensors[f"{PREFIX}gate.weight"] @ x_H).softmax(0)
    groups = config["num_experts_per_tok"]
    size = config["num_experts"] // groups
    out_H = gated(x_H, tensors, "shared_expert")
    for group in range(groups):
        expert = max(range(group * size, (group + 1) * size), key=lambda number: float(scores_E[number]))
        weight = scores_E[expert] * tensors[f"{PREFIX}router_scale"][0, expert]
        out_H = out_H + weight * gated(x_H, tensors, f"experts.{expert}")
    return out_H


def deepseek_token(
    x_H: torch.Tensor, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> torch.Tensor:
    """The experts of the best scores; renormalised if asked for; then the shared one."""
    scores_E = (tensors[f"{PREFIX}gate.weight"] @ x_H).softmax(0)
    ranked = sorted(range(config["n_routed_experts"]), key=lambda number: -float(scores_E[number]))
    chosen = ranked[: config["num_experts_per_tok"]]
    total = sum(scores_E[expert] for expert in chosen) if config["norm_topk_prob"] else 1.0
    out_H = gated(x_H, tensors, "shared_experts")
    for expert in chosen:
        out_H = out_H + scores_E[expert] / total * gated(x_H, tensors, f"experts.{expert}")
    return out_H


@pytest.mark.parametrize(
    ("model_type", "options", "token"),
    [
        ("PanguProMoE", {}, pangu_token),
        ("PanguProMoE", {"num_experts_per_tok": 4}, pangu_token),
        ("deepseek", {}, deepseek_token),
        ("deepseek", {"norm_topk_prob": True}, deepseek_token),
    ],
)
def test_a_token_becomes_what_the_plain_formula_makes_of_it(
    tmp_path: Path, model_type: str, options: dict[str, Any], token: Any
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, **options)
    tensors, config = load_file(folder / "model.safetensors"), read_json(folder / "config.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    hidden_BTH = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.model.layers[2].mlp(hidden_BTH)
    expected = torch.stack([token(x_H, tensors, config) for x_H in hidden_BTH.flatten(0, 1)])
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", NATIVE)
def test_a_saved_model_has_a_tensor_for_each_matrix_of_each_expert_and_computes_the_same(
    tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, shards=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == Checkpoint.open(folder).tensors.keys()
    )
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    Checkpoint.open(tmp_path / "again").check_shapes()


@pytest.mark.parametrize(
    ("model_type", "dense"),
    [("PanguProMoE", {"mlp_only_layers": [0, 1]}), ("deepseek", {"first_k_dense_replace": 2})],
)
def test_without_sparse_layers_it_is_a_llama(tmp_path: Path, model_type: str, dense: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_moe_checkpoint(tmp_path / "model", model_type, layers=2, **dense)
    )
    keys = {
        name: getattr(model.config, name) for name in LlamaConfig().to_dict() if hasattr(model.config, name)
    }
    llama = LlamaForCausalLM(LlamaConfig(**keys)).eval()
    llama.load_state_dict(model.state_dict())
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", NATIVE)
def test_any_function_of_transformers_table_computes_the_experts(tmp_path: Path, model_type: str) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    seen: list[tuple[int, ...]] = []

    def nothing(
        self: torch.nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        seen.append(tuple(index_TK.shape))
        return torch.zeros_like(hidden_TH)

    ALL_EXPERTS_FUNCTIONS.register("nothing", nothing)
    ids = torch.arange(3, 40)[None]
    logits = {}
    for name in ("eager", "grouped_mm", "nothing"):
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=name)
        with torch.no_grad():
            logits[name] = model(ids).logits
    torch.testing.assert_close(logits["eager"], logits["grouped_mm"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits["eager"], logits["nothing"], atol=1e-2)
    assert set(seen) == {
        (37, Checkpoint.open(folder).family.experts.chosen(read_json(folder / "config.json")))
    }  # type: ignore[union-attr]


@pytest.mark.parametrize("model_type", NATIVE)
def test_a_model_from_a_config_alone_has_random_experts_and_routers(tmp_path: Path, model_type: str) -> None:
    config = AutoConfig.from_pretrained(tiny_moe_checkpoint(tmp_path / "model", model_type))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "experts." in name or "gate.weight" in name:
            assert 0.05 < float(parameter.detach().std()) < 0.15, name
    assert set(AutoModel.from_config(config).state_dict()) == {
        name.removeprefix("model.") for name in model.state_dict() if name != "lm_head.weight"
    }


def test_experts_that_make_no_equal_groups_are_refused(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "PanguProMoE")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"num_experts_per_tok": 3})
    with pytest.raises(CameraError, match="8 experts cannot be in 3 groups of equally many"):
        Checkpoint.open(folder)


def test_deepseek_with_other_scores_than_softmax_is_refused(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "deepseek")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"scoring_func": "sigmoid"})
    with pytest.raises(CameraError, match="scoring_func is 'sigmoid'"):
        Checkpoint.open(folder)


def test_every_second_layer_of_deepseek_may_be_dense(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        tiny_moe_checkpoint(tmp_path / "model", "deepseek", layers=5, moe_layer_freq=2)
    )
    assert [checkpoint.is_sparse(layer) for layer in range(5)] == [False, False, True, False, True]
    checkpoint.check_shapes()


def test_pangu_s_tokenizer_is_the_embedded_models(tmp_path: Path) -> None:
    tokenizer = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", "PanguProMoE")).load_tokenizer()
    assert type(tokenizer).__name__ == "PanguTokenizer"


def test_pangu_has_no_architecture_in_llama_cpp_and_a_conversion_says_so(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "PanguProMoE")
    quantize_checkpoint(Checkpoint.open(folder), tmp_path / "packed", QuantizeOptions(type="q8_0"))
    with pytest.raises(CameraError, match=r"PanguProMoE, and llama\.cpp has no architecture"):
        convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")


@pytest.mark.parametrize("model_type", NATIVE)
def test_code_that_a_config_points_at_is_neither_run_nor_pointed_at_by_a_saved_copy(
    tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    assert "auto_map" in read_json(folder / "config.json")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model).__module__.startswith("camera.models.")
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in read_json(tmp_path / "again" / "config.json")


def test_a_phi_with_its_published_class_name_is_read(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "phimoe")
    keys = {
        "architectures": ["PhiMoEForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"},
    }
    write_json(folder / "config.json", read_json(folder / "config.json") | keys)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    assert type(checkpoint.load_model()).__name__ == "PhimoeForCausalLM"
