"""Slow plain computations, without the code that is tested: transformers' own modules, numpy, loops."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaModel

from tests.real.checkpoint import HEADS, HIDDEN, KV_HEADS, LAYERS

Read = Callable[[str], torch.Tensor]
"""A tensor by its name."""
LINEARS = tuple(
    [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
    + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
)


def read(folder: Path, name: str, rows: slice | None = None) -> torch.Tensor:
    """A tensor of a checkpoint, or of a folder of packed ones; or only some of its rows."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], "pt") as file:
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


def reader(folder: Path) -> Read:
    """Of a checkpoint."""
    return partial(read, folder)


def embedded(read: Read, tokens_ST: torch.Tensor) -> torch.Tensor:
    """What enters the first layer: [samples, tokens, hidden]."""
    return read("model.embed_tokens.weight")[tokens_ST]


def layers(
    read: Read,
    width: int,
    hidden_STH: torch.Tensor,
    numbers: Iterable[int],
    see: Callable[[str, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The hidden states behind some layers, not normed, in the dtype of those before them.

    Args:
        read: gives the weights.
        width: of the feed-forward part.
        hidden_STH: what enters.
        numbers: of the layers.
        see: told (linear, its input) of every linear layer.
    """
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=1,
        attention_bias=True,
        rms_norm_eps=1e-5,
        rope_theta=16e6,
        max_position_embeddings=32768,
        vocab_size=1,
        pad_token_id=None,
    )
    with torch.device("meta"):
        module = LlamaModel(config)
    module = module.to_empty(device="cpu").to(hidden_STH.dtype)
    module.rotary_emb = type(module.rotary_emb)(config)
    module.norm = torch.nn.Identity()
    for layer in numbers:
        for name, parameter in module.layers[0].named_parameters():
            parameter.data = read(f"model.layers.{layer}.{name}").to(hidden_STH.dtype)
        hooks = [
            module.layers[0]
            .get_submodule(linear)
            .register_forward_pre_hook(lambda _, inputs, linear=linear: see(linear, inputs[0]))
            for linear in (LINEARS if see else ())
        ]
        with torch.inference_mode():
            hidden_STH = module(inputs_embeds=hidden_STH, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
    return hidden_STH


def linear_inputs(
    read: Read, width: int, hidden_STH: torch.Tensor, layer: int = 0
) -> dict[str, torch.Tensor]:
    """What enters each linear layer of a decoder layer: [samples · tokens, columns] by its name."""
    found: dict[str, torch.Tensor] = {}

    def see(linear: str, inputs: torch.Tensor) -> None:
        found[linear] = inputs.flatten(0, -2)

    layers(read, width, hidden_STH, [layer], see)
    return found


def log_probabilities(read: Read, width: int, tokens_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of every next token: float32 [tokens, vocabulary]."""
    hidden_TH = layers(read, width, embedded(read, tokens_T[None]).to(dtype), range(LAYERS))[0]
    norm_H = read("model.norm.weight").float()
    normed_TH = torch.nn.functional.rms_norm(hidden_TH.float(), (HIDDEN,), norm_H, 1e-5).to(dtype)
    head_VH = read("lm_head.weight")
    rows = 1 << 13
    logits = [normed_TH @ head_VH[at : at + rows].to(dtype).T for at in range(0, len(head_VH), rows)]
    return torch.cat(logits, 1).float().log_softmax(-1)


def mean_loss(log_p_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the first, in nats."""
    return -log_p_TV[:-1].gather(1, tokens_T[1:, None]).double().mean()


def importance(act_TF: torch.Tensor, down_HF: torch.Tensor, reduce_ratio: float) -> torch.Tensor:
    """CAMERA's E_c of every channel, in float64."""
    act_TF, down_HF = act_TF.double(), down_HF.double()
    energy_F = (1 - reduce_ratio) * (act_TF**2).sum(0) + reduce_ratio * (act_TF**2).amax(0)
    return (down_HF**2).sum(0) * energy_F


def q4(rows: np.ndarray, length: int) -> np.ndarray:
    """Rows of numbers in blocks of Q4_0 as ggml rounds them, one after the other."""
    out = []
    for row in rows.astype(np.float32):
        for block in row.reshape(-1, length):
            extreme = block[np.abs(block).argmax()]
            scale = np.float32(extreme / np.float32(-8))
            inverse = np.float32(1) / scale if scale else np.float32(0)
            codes = np.minimum(15, (block * inverse + np.float32(8.5)).astype(np.uint8))
            low, high = codes[: length // 2], codes[length // 2 :]
            out.append(np.concatenate([np.float16([scale]).view(np.uint8), low | high << 4]))
    return np.concatenate(out).reshape(len(rows), -1)


def unpack_q4(packed: np.ndarray, length: int) -> np.ndarray:
    """The numbers that blocks of Q4_0 hold: float32 [rows, columns]."""
    blocks = packed.reshape(len(packed), -1, 2 + length // 2)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).astype(np.float32)
    return ((codes - 8) * scales).reshape(len(packed), -1)


def gptq_rows(rows: np.ndarray, inputs_TI: torch.Tensor, damping: float) -> np.ndarray:
    """The numbers that GPTQ makes of rows with Q4_0's scales, one column after the other, in float64.

    Source: Frantar et al., 2022, algorithm 1, without its blocks: a block's scale is chosen when its first column comes.
    """
    products = inputs_TI.double().T @ inputs_TI.double()
    products.diagonal().add_(damping * products.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(products), upper=True).numpy()
    rest, out = rows.astype(np.float64), np.empty(rows.shape)
    for column in range(rows.shape[1]):
        if column % 32 == 0:
            block = rest[:, column : column + 32]
            extreme = np.take_along_axis(block, np.abs(block).argmax(1)[:, None], 1)[:, 0]
            scale = np.float16(extreme / -8).astype(np.float64)
        out[:, column] = scale * np.clip(np.round(rest[:, column] / scale), -8, 7)
        error = (rest[:, column] - out[:, column]) / upper[column, column]
        rest[:, column:] -= np.outer(error, upper[column, column:])
    return out
