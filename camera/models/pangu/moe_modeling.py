"""openPangu-Pro-MoE (72B) for transformers, natively: attention with biases, and experts in groups.

The published checkpoints carry code that needs an NPU. These classes read the same folders with none of it. What they
compute is what the public vllm-ascend computes (vllm_ascend/models/pangu_moe.py at 082c258): softmax over all experts, the
best one of each of as many groups as a token has experts, times a scale of its own, not renormalised.
"""

from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from camera.models.native.llama_moe import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    LlamaMoeModel,
    MixtureOfExperts,
    register_experts,
)
from camera.models.pangu.modeling import PanguEmbeddedConfig, PanguTokenizer


class PanguProMoEConfig(PanguEmbeddedConfig, LlamaMoeConfig):
    """config.json of openPangu-Pro-MoE; `bias` (default true) as in the embedded models."""

    model_type = "PanguProMoE"

    moe_intermediate_size: int = 1344
    num_experts: int = 64
    num_experts_per_tok: int = 8
    shared_expert_intermediate_size: int = 5376
    mlp_only_layers: list[int] | None = None

    def is_sparse(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in (self.mlp_only_layers or ())

    def validate_architecture(self) -> None:
        """Experts must be in groups of equally many."""
        super().validate_architecture()  # type: ignore[no-untyped-call]
        if self.num_experts % self.num_experts_per_tok:
            raise ValueError(
                f"{self.num_experts} experts cannot be in {self.num_experts_per_tok} groups of equally many"
            )


class PanguMixture(MixtureOfExperts):
    """The best expert of each group, and a shared one of a width of its own."""

    shared_name = "shared_expert"

    def __init__(self, config: PanguProMoEConfig) -> None:
        super().__init__(config, config.shared_expert_intermediate_size)
        self.groups = config.num_experts_per_tok
        self.router_scale = nn.Parameter(torch.ones(1, config.num_experts))

    def choose(self, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = scores_TE.unflatten(-1, (self.groups, -1)).max(-1)
        size = scores_TE.shape[-1] // self.groups
        index_TK = best.indices + size * torch.arange(self.groups, device=scores_TE.device)
        return index_TK, best.values * self.router_scale[0][index_TK]


class PanguProMoEModel(LlamaMoeModel):
    """The decoder without a language-model head."""

    config_class = PanguProMoEConfig
    moe_class = PanguMixture


class PanguProMoEForCausalLM(LlamaMoeForCausalLM):
    """The decoder with its language-model head."""

    config_class = PanguProMoEConfig
    decoder_class = PanguProMoEModel


@cache
def register() -> None:
    """Make transformers' Auto classes know openPangu-Pro-MoE. Calling it again does nothing."""
    AutoConfig.register(PanguProMoEConfig.model_type, PanguProMoEConfig, exist_ok=True)
    AutoModel.register(PanguProMoEConfig, PanguProMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(PanguProMoEConfig, PanguProMoEForCausalLM, exist_ok=True)
    AutoTokenizer.register(PanguProMoEConfig, slow_tokenizer_class=PanguTokenizer, exist_ok=True)
    register_experts(PanguProMoEConfig.model_type)
