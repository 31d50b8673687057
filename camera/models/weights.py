"""The weights that families are made of: attention, dense feed-forward networks, experts, and what is around them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from camera.models.block import GATE_UP
from camera.models.weight import LAYER, Weight, When

GGUF = "blk.{layer}."
"""Start of the names of one decoder layer's tensors in a GGUF file."""

Biases = Mapping[str, When | None]
"""Roles of linear layers that have a bias, with the condition, None for always."""


def decoder_weights(biases: Biases, *, norms: tuple[Weight, ...] = ()) -> tuple[Weight, ...]:
    """The weights of a Llama-like decoder whose layers are all dense.

    Args:
        biases: roles of the linear layers that have a bias, with the condition.
        norms: of query and key.
    """
    return decoder(*attention_weights(biases, norms=norms), FFN_NORM, *dense_weights(biases))


def decoder(*layer: Weight, head: tuple[Weight, ...] = ()) -> tuple[Weight, ...]:
    """The weights of a decoder: embedding, those of every layer, final norm, and a head if it is not the embedding.

    Args:
        layer: weights of a decoder layer, norms apart from those before attention and feed-forward part included.
        head: further weights behind the last layer.
    """
    vocabulary = ("vocab_size", "hidden_size")
    untied = When("tie_word_embeddings", default=False, expected=False)
    return (
        Weight("model.embed_tokens.weight", "embedding", vocabulary, "token_embd.weight"),
        *layer,
        Weight("model.norm.weight", "norm", ("hidden_size",), "output_norm.weight"),
        Weight("lm_head.weight", "head", vocabulary, "output.weight", untied),
        *head,
    )


def attention_weights(
    biases: Biases, *, norms: tuple[Weight, ...] = (), before: tuple[Weight, ...] | None = None
) -> tuple[Weight, ...]:
    """Query, key, value and output of grouped-query attention, and norms.

    Args:
        biases: as of `decoder_weights`.
        norms: of query and key, and what else is behind.
        before: the norm of what it reads; None for the usual one.
    """
    stream = "normed stream"
    return (
        *((ATTENTION_NORM,) if before is None else before),
        *linear("query", "self_attn.q_proj", "attn_q", ("query_size", "hidden_size"), stream, biases),
        *linear("key", "self_attn.k_proj", "attn_k", ("key_size", "hidden_size"), stream, biases),
        *linear("value", "self_attn.v_proj", "attn_v", ("key_size", "hidden_size"), stream, biases),
        *linear("output", "self_attn.o_proj", "attn_output", ("hidden_size", "query_size"), "heads", biases),
        *norms,
    )


def dense_weights(
    biases: Biases | None = None,
    *,
    width: str = "intermediate_size",
    layers: Literal["all", "dense"] = "all",
) -> tuple[Weight, ...]:
    """Gate, up and down of a dense layer.

    Args:
        biases: as of `decoder_weights`.
        width: the key of config.json for the channels.
        layers: `dense` in a family whose other layers have experts.
    """
    found: tuple[Weight, ...] = ()
    for role, shape, reads in _gated(width):
        found += linear(role, f"mlp.{role}_proj", f"ffn_{role}", shape, reads, biases)
    return only(found, layers=layers, block="dense")


def fused_attention_weights() -> tuple[Weight, ...]:
    """Norm, query, key and value as one matrix, and output. The family knows the size `qkv_size`."""
    return (
        ATTENTION_NORM,
        *linear(
            "query_key_value", "self_attn.qkv_proj", "attn_qkv", ("qkv_size", "hidden_size"), "normed stream"
        ),
        *linear("output", "self_attn.o_proj", "attn_output", ("hidden_size", "query_size"), "heads"),
    )


def fused_dense_weights() -> tuple[Weight, ...]:
    """Gate above up in one matrix, and down, of a dense layer; llama.cpp has them so too."""
    width = "intermediate_size"
    gate_up = linear(
        GATE_UP, "mlp.gate_up_proj", "ffn_up", (f"{width}_twice", "hidden_size"), "normed branch"
    )
    down = linear("down", "mlp.down_proj", "ffn_down", ("hidden_size", width), "channels")
    return only((*gate_up, *down), block="dense")


def expert_weights(
    width: str,
    *,
    module: str = "mlp",
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str | None = None,
    correction: str | None = None,
) -> tuple[Weight, ...]:
    """Router, experts, and what they share, of a layer that routes its tokens.

    Args:
        width: the key of config.json for the channels of an expert.
        module: where all of them are in the decoder layer, as the checkpoint names it.
        router: the router's linear layer in it.
        names: of gate, up and down of an expert.
        shared: the network in it that sees every token.
        correction: what is added to each expert's score where experts are chosen, and not where they are weighted.
    """
    found = [
        Weight(
            f"{LAYER}{module}.{router}.weight",
            "router",
            ("experts", "hidden_size"),
            f"{GGUF}ffn_gate_inp.weight",
            layers="sparse",
            exact=True,
        )
    ]
    if correction is not None:
        name, stored = f"{LAYER}{module}.{correction}", f"{GGUF}exp_probs_b.bias"
        found.append(Weight(name, "correction", ("experts",), stored, layers="sparse", exact=True))
    for (role, shape, _), name in zip(_gated(width), names, strict=True):
        found.append(
            Weight(
                f"{LAYER}{module}.experts.{{expert}}.{name}.weight",
                role,
                shape,
                f"{GGUF}ffn_{role}_exps.weight",
                layers="sparse",
                block="expert",
            )
        )
    if shared is not None:
        for role, shape, reads in _gated("shared_width"):
            reads = "channels of the shared" if role == "down" else reads
            matrix = linear(role, f"{module}.{shared}.{role}_proj", f"ffn_{role}_shexp", shape, reads)
            found += only(matrix, layers="sparse", block="shared")
    return tuple(found)


def linear(
    role: str, module: str, gguf: str, shape: tuple[str, str], reads: str, biases: Biases | None = None
) -> tuple[Weight, ...]:
    """The matrix of a linear layer of every decoder layer, and its bias if the role has one.

    Args:
        role: of the matrix.
        module: path of the linear layer in the decoder layer.
        gguf: its name in a layer of a GGUF file.
        shape: names of the sizes of its outputs and inputs.
        reads: what enters it.
        biases: as of `decoder_weights`.
    """
    name, stored = f"{LAYER}{module}", f"{GGUF}{gguf}"
    matrix = Weight(f"{name}.weight", role, shape, f"{stored}.weight", reads=reads)
    if biases is None or role not in biases:
        return (matrix,)
    return matrix, Weight(f"{name}.bias", role, shape[:1], f"{stored}.bias", biases[role])


def only(weights: tuple[Weight, ...], **changes: Any) -> tuple[Weight, ...]:
    """The same weights with other fields: `layers`, `block`, `when`."""
    return tuple(replace(weight, **changes) for weight in weights)


def norm(role: str, module: str, gguf: str, size: str = "hidden_size", kind: str = "weight") -> Weight:
    """The weight, or bias, of a norm of every decoder layer."""
    return Weight(f"{LAYER}{module}.{kind}", role, (size,), f"{GGUF}{gguf}.{kind}")


def post_norms(
    attention: str = "post_attention_layernorm", feed_forward: str = "post_feedforward_layernorm"
) -> tuple[Weight, Weight]:
    """Norms of what attention and feed-forward part put out, before it is added."""
    return (
        norm("attention_post_norm", attention, "post_attention_norm"),
        norm("ffn_post_norm", feed_forward, "post_ffw_norm"),
    )


ATTENTION_NORM = norm("attention_norm", "input_layernorm", "attn_norm")
FFN_NORM = norm("ffn_norm", "post_attention_layernorm", "ffn_norm")
NORMS_OF_ALL_HEADS = (
    norm("query_norm", "self_attn.q_norm", "attn_q_norm", "query_size"),
    norm("key_norm", "self_attn.k_norm", "attn_k_norm", "key_size"),
)
"""Of query and key over all heads together."""
HEAD_NORMS = (
    norm("query_norm", "self_attn.q_norm", "attn_q_norm", "head_dim"),
    norm("key_norm", "self_attn.k_norm", "attn_k_norm", "head_dim"),
)
"""Of query and key in each head."""


def _gated(width: str) -> tuple[tuple[str, tuple[str, str], str], ...]:
    """Role, shape and input of gate, up and down."""
    return (
        ("gate", (width, "hidden_size"), "normed branch"),
        ("up", (width, "hidden_size"), "normed branch"),
        ("down", ("hidden_size", width), "channels"),
    )
