"""A mixture of experts pruned as one would write it first: the whole model in memory, masks, float64, plain sorting.

Experts are watched through transformers' own table of functions that compute them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from camera.checkpoints.checkpoint import Checkpoint
from camera.models import Block
from tests.camera.pruning import naive

FEW = 8
"""With fewer tokens an expert's channels are ranked by its weights."""


@dataclass
class Seen:
    """What entered one block's down projection."""

    act: list[torch.Tensor] = field(default_factory=list)
    """float64 [N, F] of each sample, multiplied by the router's weights."""
    energy: float = 0.0

    @property
    def act_NF(self) -> torch.Tensor:
        return torch.cat(self.act) if self.act else torch.zeros(0, 0, dtype=torch.float64)

    @property
    def tokens(self) -> int:
        return len(self.act_NF)


def compute_and_show(
    module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """The experts of a layer, one after the other, each on its own tokens."""
    out_TH = torch.zeros_like(hidden_TH)
    for expert in index_TK.unique().tolist():
        token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
        weight_N1 = weight_TK[token_N, slot_N][:, None]
        gate_NF, up_NF = (hidden_TH[token_N] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        act_NF = module.act_fn(gate_NF) * up_NF
        out_NH = (act_NF @ module.down_proj[expert].T) * weight_N1
        module.__dict__.get("show", lambda *of_expert: None)(
            expert, act_NF.double() * weight_N1.double(), out_NH
        )
        out_TH.index_add_(0, token_N, out_NH.to(out_TH))
    return out_TH


ALL_EXPERTS_FUNCTIONS.register("shown", compute_and_show)


class Reference:
    """A whole model that is masked layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.model = self.checkpoint.load_model(torch.float32)
        self.model.set_experts_implementation("shown")
        self.gone: dict[int, list[int]] = {}
        """Experts of each layer that the router may not choose."""

    def sparse(self, layer: int) -> Any:
        """The module of router, experts and what they share."""
        return next(each for each in self.model.model.layers[layer].modules() if hasattr(each, "experts"))

    def matrices(self, layer: int, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down of a block: views of the model's weights."""
        if block.expert is None:
            module = self.model.model.layers[layer].get_submodule(block.linear("down").rpartition(".")[0])
            return module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
        experts = self.sparse(layer).experts
        gate, up = experts.gate_up_proj[block.expert].chunk(2)
        return gate, up, experts.down_proj[block.expert]

    @contextmanager
    def routing_to_the_rest(self) -> Iterator[None]:
        """While the block runs, routers give experts that are gone a logit of −∞."""
        rows = {}
        for layer, gone in self.gone.items():
            for name, parameter in self.sparse(layer).named_parameters():
                if name in ("gate.weight", "gate.wg.weight", "router.weight"):
                    rows[parameter.data_ptr()] = gone
        linear = nn.functional.linear

        def without(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            out = linear(x, weight, bias)
            if gone := rows.get(weight.data_ptr()):
                out[..., gone] = -torch.inf
            return out

        nn.functional.linear = without
        try:
            yield
        finally:
            nn.functional.linear = linear

    def logits(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        """float32 [samples, tokens, vocabulary]."""
        with torch.no_grad(), self.routing_to_the_rest():
            return self.model(tokens_ST).logits

    def see(self, layer: int, tokens_ST: torch.Tensor) -> dict[str, Seen]:
        """Run all samples one by one and look at the blocks of a layer."""
        blocks = self.checkpoint.blocks(layer)
        seen = {block.label: Seen() for block in blocks}
        module = self.model.model.layers[layer]

        def show(expert: int, act_NF: torch.Tensor, out_NH: torch.Tensor) -> None:
            seen[f"experts.{expert}"].act.append(act_NF)
            seen[f"experts.{expert}"].energy += float(out_NH.double().square().sum())

        scale: list[torch.Tensor] = []
        hooks = []
        for name, gate in module.named_modules():
            if name.endswith("shared_expert_gate"):
                hooks.append(gate.register_forward_hook(lambda _, inputs, out: scale.append(out.sigmoid())))
        if blocks[-1].expert is None:
            linear = module.get_submodule(blocks[-1].linear("down"))
            acts = seen[blocks[-1].label].act
            hooks.append(
                linear.register_forward_pre_hook(
                    lambda _, inputs: acts.append(inputs[0].double().flatten(0, -2))
                )
            )
        if len(blocks) > 1:
            self.sparse(layer).experts.__dict__["show"] = show
        with torch.no_grad(), self.routing_to_the_rest():
            for sample_T in tokens_ST:
                self.model(sample_T[None])
        for hook in hooks:
            hook.remove()
        if len(blocks) > 1:
            del self.sparse(layer).experts.__dict__["show"]
        for act_TF, scale_BT1 in zip(acts if scale else (), scale, strict=True):
            act_TF *= scale_BT1.double().reshape(-1, 1)
        return seen

    def scores(self, layer: int, block: Block, seen: Seen, alpha: float) -> list[float]:
        """Importance of the channels; of an expert with few tokens the product of its vectors' squared norms."""
        gate_FH, up_FH, down_HF = (matrix.detach().double() for matrix in self.matrices(layer, block))
        if block.expert is not None and seen.tokens < FEW:
            return [
                float(gate.dot(gate) * up.dot(up) * down.dot(down))
                for gate, up, down in zip(gate_FH, up_FH, down_HF.T, strict=True)
            ]
        return naive.scores(seen.act_NF, down_HF, alpha)

    def mask(self, layer: int, kept: dict[str, list[int]]) -> None:
        """Zero the down projection's columns of all other channels."""
        for block in self.checkpoint.blocks(layer):
            if block.label in kept:
                down_HF = self.matrices(layer, block)[2]
                stays_F = torch.zeros(down_HF.shape[1], dtype=torch.bool)
                stays_F[kept[block.label]] = True
                with torch.no_grad():
                    down_HF[:, ~stays_F] = 0

    def drop(self, layer: int, kept: list[int]) -> Callable[[], None]:
        """Let the router choose no other experts; what is returned undoes it."""
        self.gone[layer] = [expert for expert in range(self.checkpoint.expert_count) if expert not in kept]
        state = self.sparse(layer).state_dict()
        biases = {name: tensor for name, tensor in state.items() if "correction" in name}
        before = {name: tensor.clone() for name, tensor in biases.items()}
        for tensor in biases.values():  # they choose too
            tensor[..., self.gone[layer]] = -torch.inf

        def undo() -> None:
            del self.gone[layer]
            for name, tensor in biases.items():
                tensor.copy_(before[name])

        return undo


@dataclass
class Naive:
    """What the reference found out about a layer."""

    seen: dict[str, Seen]
    """By block, as its channels were chosen."""
    routed: list[int]
    """Tokens of every expert before any was dropped."""
    experts: list[int]
    """Those that stay; empty in a dense layer."""
    scores: dict[str, list[float]]
    kept: dict[str, list[int]]


Counts = Callable[[Block, int], int]
"""From a block and its width to how many channels it keeps."""


def prune(
    model: Reference,
    tokens_ST: torch.Tensor,
    alpha: float,
    count: Counts,
    propagate: str,
    experts: int | None = None,
    groups: int = 1,
) -> list[Naive]:
    """Prune a model in place by masks, and tell what was done in every layer.

    Args:
        model: as loaded.
        tokens_ST: calibration.
        alpha: CAMERA's.
        count: how many channels of a block stay.
        propagate: `one-shot` or `sequential`.
        experts: how many of each sparse layer stay, equally many of each group; None for all.
        groups: of the router.
    """
    done: list[Naive] = []
    for layer in range(model.checkpoint.layer_count):
        blocks = {block.label: block for block in model.checkpoint.blocks(layer)}
        seen = model.see(layer, tokens_ST)
        routed = [seen[label].tokens for label, block in blocks.items() if block.expert is not None]
        stay = list(range(len(routed)))
        if routed and experts is not None:
            energy = [seen[label].energy for label, block in blocks.items() if block.expert is not None]
            size = len(routed) // groups
            stay = [
                group * size + best
                for group in range(groups)
                for best in naive.best(energy[group * size : (group + 1) * size], experts // groups)
            ]
            undo = model.drop(layer, stay)
            seen = model.see(layer, tokens_ST)  # of the tokens that they get once others are gone
            undo()
        left = {
            label: block for label, block in blocks.items() if block.expert is None or block.expert in stay
        }
        scores = {label: model.scores(layer, block, seen[label], alpha) for label, block in left.items()}
        kept = {label: naive.best(scores[label], count(left[label], len(scores[label]))) for label in left}
        done.append(Naive(seen, routed, stay, scores, kept))
        if propagate == "sequential":
            _apply(model, layer, done[-1])
    if propagate == "one-shot":
        for layer, found in enumerate(done):
            _apply(model, layer, found)
    return done


def _apply(model: Reference, layer: int, found: Naive) -> None:
    model.mask(layer, found.kept)
    if found.routed and len(found.experts) < len(found.routed):
        model.drop(layer, found.experts)
