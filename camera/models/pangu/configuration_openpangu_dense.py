"""config.json of openPangu-Embedded for programs that have the architecture and not its config, as vLLM.

This file is copied into a model's folder whose config.json names it and that lacks it. It needs transformers alone.
"""

from typing import Any

from transformers import LlamaConfig


class PanguEmbeddedConfig(LlamaConfig):
    """A Llama's, whose `bias` (default true) stands for biases of the four attention projections."""

    model_type = "PanguEmbedded"

    def __init__(self, bias: bool = True, **keys: Any) -> None:
        """Args:
        bias: whether the attention projections have one.
        keys: the others of config.json.
        """
        super().__init__(**{**keys, "attention_bias": bias})
        self.bias = bias
