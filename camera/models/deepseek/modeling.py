"""DeepSeek-MoE-16B (V1) for transformers, natively: a Llama whose layers but the first have experts.

The published checkpoints carry code of their own; these classes read the same folders with none of it. Router: softmax
over all experts, the best K, renormalised only where the config says so (DeepSeekMoE, arXiv 2401.06066, section 3).
"""

from functools import cache

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from camera.models.native.llama_moe import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    LlamaMoeModel,
    MixtureOfExperts,
    register_experts,
)


class DeepseekConfig(LlamaMoeConfig):
    """config.json of DeepSeek-MoE-16B."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False

    def is_sparse(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class DeepseekMixture(MixtureOfExperts):
    """The best experts of all, and a shared one as wide as several of them."""

    shared_name = "shared_experts"

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config, (config.n_shared_experts or 0) * config.moe_intermediate_size)
        self.chosen, self.normed = config.num_experts_per_tok, config.norm_topk_prob

    def choose(self, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight_TK, index_TK = scores_TE.topk(self.chosen, dim=-1)
        if self.normed:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return index_TK, weight_TK


class DeepseekModel(LlamaMoeModel):
    """The decoder without a language-model head."""

    config_class = DeepseekConfig
    moe_class = DeepseekMixture


class DeepseekForCausalLM(LlamaMoeForCausalLM):
    """The decoder with its language-model head."""

    config_class = DeepseekConfig
    decoder_class = DeepseekModel


@cache
def register() -> None:
    """Make transformers' Auto classes know DeepSeek-MoE. Calling it again does nothing."""
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    register_experts(DeepseekConfig.model_type)
