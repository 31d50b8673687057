"""What the tools must know of a model family, as data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def _nothing_to_register() -> None:
    """transformers already knows the family."""


@dataclass(frozen=True)
class Family:
    """One decoder-only architecture with a gated feed-forward network (gate, up, down).

    Tensor names are those of the Hugging Face checkpoint; `{layer}` stands for the decoder layer's number.
    """

    model_type: str
    """`model_type` of config.json."""
    architecture: str
    """The class in `architectures` of config.json."""
    gguf_architecture: str
    """`general.architecture` of a GGUF file, as llama.cpp knows it."""
    permutes_rotary: bool = False
    """Whether llama.cpp stores q and k with each head's rotary halves interleaved."""
    attention_bias: Callable[[dict[str, Any]], tuple[str, ...]] = lambda config: ()
    """From config.json: which of q, k, v, o carry a bias."""
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Shell patterns of tensors that checkpoints hold and no loader needs."""
    register: Callable[[], None] = field(default=_nothing_to_register)
    """Makes transformers know the family; called before any Auto class is used."""

    def layer_prefix(self, layer: int) -> str:
        """Start of the names of one decoder layer's tensors."""
        return f"model.layers.{layer}."

    def ffn_names(self, layer: int) -> tuple[str, str, str]:
        """Names of the gate [F, H], up [F, H] and down [H, F] weights of one decoder layer."""
        prefix = self.layer_prefix(layer) + "mlp."
        return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"
