"""A Llama in which some layers route their tokens to experts, for transformers.

A family gives the class of its mixture-of-experts module, and its config says which layers have one. Experts are
transformers' own module, so whatever computes experts there computes these.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP


class LlamaMoeConfig(LlamaConfig):
    """What the classes here read: `num_experts`, `moe_intermediate_size`, `num_experts_per_tok`."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # would point a saved copy at remote code that nobody needs
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def is_sparse(self, layer: int) -> bool:
        """Whether a decoder layer routes its tokens to experts."""
        raise NotImplementedError


class Router(nn.Module):
    """One score for each expert, of all of them together 1."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 [T, E]."""
        return nn.functional.linear(hidden_TH.float(), self.weight.float()).softmax(-1)


class MixtureOfExperts(nn.Module):
    """Router, experts, and perhaps a network that every token visits."""

    shared_name: ClassVar[str]
    """What checkpoints call that network."""

    def __init__(self, config: LlamaMoeConfig, shared_width: int) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = DeepseekV2Experts(config)
        self.shared = shared_width > 0
        if self.shared:
            self.add_module(self.shared_name, Qwen2MoeMLP(config, shared_width))

    def choose(self, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, int64 [T, K], and what their outputs are multiplied by."""
        raise NotImplementedError

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        hidden_TH = hidden_BTH.flatten(0, 1)
        index_TK, weight_TK = self.choose(self.gate(hidden_TH))
        out_BTH: torch.Tensor = self.experts(hidden_TH, index_TK, weight_TK).view_as(hidden_BTH)
        return out_BTH + self.get_submodule(self.shared_name)(hidden_BTH) if self.shared else out_BTH


class _Sparse:
    """What both models below share."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the source of the class's own module

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Router | DeepseekV2Experts):
            scale: float = self.config.initializer_range  # type: ignore[attr-defined]
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=scale)


class LlamaMoeModel(_Sparse, LlamaModel):
    """The decoder without a language-model head."""

    moe_class: ClassVar[type[MixtureOfExperts]]

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            if config.is_sparse(number):
                layer.mlp = self.moe_class(config)  # type: ignore[call-arg]
        self.post_init()  # type: ignore[no-untyped-call]


class LlamaMoeForCausalLM(_Sparse, LlamaForCausalLM):
    """The decoder with its language-model head."""

    decoder_class: ClassVar[type[LlamaMoeModel]]

    def __init__(self, config: LlamaMoeConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


def register_experts(model_type: str) -> None:
    """Make transformers join the experts' matrices as it loads a family's checkpoints, and part them as it saves."""
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
