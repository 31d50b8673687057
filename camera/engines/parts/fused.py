"""One decoded token by the operators that a device has for whole parts of a decoder layer.

A layer as transformers has it is some forty small operators, and where the host launches them one by one that is the time
of a token. A pre-norm layer (norm, attention with rotary embedding, residual, norm, gated feed-forward network, residual)
needs eleven: a residual sum and the norm behind it are one, and the sum behind the last branch is left to the next layer's
norm. Whether a layer is of that kind is read from its family and its modules, and then tried.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from camera.engines.parts.attention import GrowingCache, GrowingLayer
from camera.engines.parts.fusion import Member
from camera.engines.parts.graph import FAILURES
from camera.engines.parts.operators import OPERATORS, Norm, Operators, Place
from camera.models import Family
from camera.models.gguf import SILU, window_of

_STEPS_OFF, _LOGITS_OFF = 16, 0.25
"""How far a layer's branches may be off, in steps of the dtype, and how far the logits, of their norm: rounding adds up."""
_TRIED_TOKEN = 1
"""Not 0, whose row of the embedding is zeros where it pads."""
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long the context is."""


class Unfit(Exception):
    """Why a layer cannot be fused."""


class Stream(NamedTuple):
    """The residual stream, [1, 1, H], and what is still to be added to it."""

    residual: torch.Tensor
    branch: torch.Tensor | None = None

    def sum(self) -> torch.Tensor:
        return self.residual if self.branch is None else self.residual + self.branch

    def normed(self, norm: Norm, by: Operators) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and the sum normed."""
        if self.branch is None:
            return self.residual, by.norm(self.residual, norm)
        return by.add_norm(self.residual, self.branch, norm)


class FusedLayer:
    """A decoder layer's weights, computed by a device's operators."""

    def __init__(self, layer: nn.Module, roles: dict[str, str], cache: GrowingLayer, by: Operators) -> None:
        """Args:
        layer: the decoder layer.
        roles: paths in it of norms and linear layers, by role; or of the module with all experts, by `experts`.
        cache: the layer's, filled once.
        by: the device's.

        Raises:
            Unfit: if its modules are of another kind.
        """
        self.by, self.cache = by, cache
        if missing := {"query", "key", "value", "output", "attention_norm", "ffn_norm"} - roles.keys():
            raise Unfit(f"it has no {' and no '.join(sorted(missing))}")
        if further := {role for role in roles if role.endswith("_post_norm")}:
            raise Unfit(f"it has also {' and '.join(sorted(further))}")
        self._qkv, self._sizes = _joined(layer, roles, "query", "key", "value")
        self._output = layer.get_submodule(roles["output"])
        self._norms = [_norm(layer, roles[role]) for role in ("attention_norm", "ffn_norm")]
        self._head_norms = [_norm(layer, roles[role]) for role in ("query_norm", "key_norm") if role in roles]
        self._scale = _scale(layer.get_submodule(roles["query"].rpartition(".")[0]))
        width = cache.rows[0].shape[-1]
        if width not in by.head_dims:
            raise Unfit(f"its heads are {width} wide, and the rotary operator takes {by.head_dims}")
        if any(norm.weight.shape != (width,) for norm in self._head_norms):
            raise Unfit("its queries are normed over all heads together")
        self._feed_forward: Callable[[torch.Tensor], torch.Tensor] = (
            layer.get_submodule(roles["experts"]) if "experts" in roles else self._gated(layer, roles)
        )

    def _gated(self, layer: nn.Module, roles: dict[str, str]) -> Callable[[torch.Tensor], torch.Tensor]:
        gate_and_up, _ = _joined(layer, roles, "gate", "up")
        down = layer.get_submodule(roles["down"])
        return lambda x: down(self.by.gated(gate_and_up(x)))

    def __call__(self, stream: Stream, place: Place) -> Stream:
        attention_norm, ffn_norm = self._norms
        residual, x = stream.normed(attention_norm, self.by)
        residual, x = Stream(residual, self._attention(x, place)).normed(ffn_norm, self.by)
        return Stream(residual, self._feed_forward(x))

    def _attention(self, x_11H: torch.Tensor, place: Place) -> torch.Tensor:
        keys_1SMD, values_1SMD = self.cache.rows
        query, key, value = (
            part.view(1, 1, -1, keys_1SMD.shape[-1])
            for part in self._qkv(x_11H).split_with_sizes(self._sizes, -1)
        )
        if self._head_norms:
            query, key = map(self.by.norm, (query, key), self._head_norms)
        query, key = self.by.rotate(query, key, place)
        self.by.write(keys_1SMD, key, place)
        self.by.write(values_1SMD, value, place)
        heads_11ND = self.by.attend(
            query, (keys_1SMD[:, : place.visible], values_1SMD[:, : place.visible]), self._scale, place
        )
        attended: torch.Tensor = self._output(heads_11ND.view(1, 1, -1))
        return attended


class _PlainLayer:
    """A decoder layer as transformers has it, between fused ones."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, stream: Stream, place: Place) -> Stream:
        out: torch.Tensor = self._layer(
            stream.sum(),
            attention_mask=~place.hidden_111L,
            position_ids=place.position_1[None],
            position_embeddings=(place.cos_111D[0], place.sin_111D[0]),
            past_key_values=True,  # the layer has a cache of its own
            use_cache=True,
        )
        return Stream(out)


class FusedModel:
    """A model's step: from a token to the logits of the next."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        layers: Sequence[nn.Module],
        cache: GrowingCache,
        by: Operators,
    ) -> None:
        """Args:
        model: as a `DecodeStep` has it.
        family: the model's.
        layers: its decoder layers.
        cache: theirs, filled once.
        by: the device's.
        """
        self._by, self._cache, self._modules = by, cache, layers
        self.reasons: dict[int, str] = {}
        """Why a layer is not fused, by its number."""
        self._layers: list[FusedLayer | _PlainLayer] = [_PlainLayer(layer) for layer in layers]
        try:
            self._around(model, family)
        except Unfit as unfit:
            self.reasons = dict.fromkeys(range(len(layers)), str(unfit))
            return
        config = model.config.to_dict()
        for number, layer in enumerate(layers):
            try:
                roles = _roles(family, config, number)
                self._layers[number] = FusedLayer(layer, roles, cache.growing[number], by)
            except Unfit as unfit:
                self.reasons[number] = str(unfit)

    def _around(self, model: PreTrainedModel, family: Family) -> None:
        """What is before the first layer and behind the last."""
        if model.dtype not in self._by.dtypes:
            raise Unfit(f"its dtype is {model.dtype}")
        config = model.config.to_dict()
        if not family.scales.plain(config):
            raise Unfit("it multiplies what its layers or its head put out")
        if window_of(config):
            raise Unfit("its attention has a window")
        rules = family.gguf_rules.activation
        if config.get(rules.key, SILU[0]) not in SILU:
            raise Unfit(f"its activation is {config[rules.key]}, and the operator's is SiLU")
        rotary: Any = model.get_submodule(family.rotary_module)
        if getattr(rotary, "rope_type", "default") not in _FIXED_ROTATIONS:
            raise Unfit("its rotary embedding changes with the length of the context")
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._norm = _norm(model, family.name("norm").removesuffix(".weight"))
        self._positions_P = torch.arange(self._cache.growing[0].capacity, device=self._cache.device)
        like = self._embedding(torch.zeros((1, 1), dtype=torch.int64, device=self._cache.device))
        turned = rotary(like, position_ids=self._positions_P[None])
        if not isinstance(turned, tuple) or turned[0].shape[-1] != self._cache.growing[0].rows[0].shape[-1]:
            raise Unfit("its rotary embedding does not turn whole heads")
        self._turned_P2D = torch.stack(turned, dim=2)[0]

    @property
    def fused(self) -> int:
        """How many layers are."""
        return len(self._layers) - len(self.reasons)

    def place(self, position_1: torch.Tensor, visible: int) -> Place:
        """What the layers of a step at a position read."""
        cos_11D, sin_11D = self._turned_P2D.index_select(0, position_1).split(1, dim=1)
        hidden_L = self._positions_P[:visible] > position_1
        return Place(position_1, visible, hidden_L.view(1, 1, 1, -1), cos_11D[None], sin_11D[None])

    def __call__(self, token_11: torch.Tensor, position_1: torch.Tensor, visible: int) -> torch.Tensor:
        """The logits of the token after one at a position, [1, 1, V]; its key and value go to the cache."""
        place = self.place(position_1, visible)
        stream = Stream(self._embedding(token_11))
        for layer in self._layers:
            stream = layer(stream, place)
        logits_11V: torch.Tensor = self._head(stream.normed(self._norm, self._by)[1])
        return logits_11V

    def check(
        self, token_11: torch.Tensor, position_1: torch.Tensor, plain: Callable[[int], torch.Tensor]
    ) -> None:
        """Compare every layer with itself as transformers has it: the same input in the middle of a full cache, of
        which a mask hides the rest.

        Layers that are off, or fail, are plain from then on.

        Args:
            token_11, position_1: a step's own.
            plain: the logits of a step of transformers' layers that sees so many positions.

        Raises:
            Unfit: if no layer is left, or the logits are off though no layer is.
        """
        capacity = self._cache.growing[0].capacity
        _fill(self._cache)
        token_11.fill_(_TRIED_TOKEN)
        position_1.fill_(capacity // 2)
        with _passing(self._modules) as passed:
            expected = plain(capacity).float().cpu()
        for number, (before, after) in enumerate(passed):
            if number not in self.reasons and (reason := self._why_off(number, before, after, position_1)):
                self._layers[number], self.reasons[number] = _PlainLayer(self._modules[number]), reason
        if not self.fused:
            raise Unfit("; ".join(sorted(set(self.reasons.values()))))
        found = self(token_11, position_1, capacity).float().cpu()
        off = float((found - expected).norm() / expected.norm())
        if not off < _LOGITS_OFF:
            raise Unfit(f"the logits differ from transformers' by {off:.0%} though no layer does")

    def _why_off(
        self, number: int, before: torch.Tensor, after: torch.Tensor, position_1: torch.Tensor
    ) -> str | None:
        capacity = self._cache.growing[number].capacity
        rows = [rows_1SMD[:, capacity // 2] for rows_1SMD in self._cache.growing[number].rows]
        written = [row.float().cpu() for row in rows]
        for row in rows:
            row.zero_()
        try:
            out = self._layers[number](Stream(before), self.place(position_1, capacity)).sum()
        except FAILURES as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        step = torch.finfo(before.dtype).eps
        x, expected, found = (tensor.float().cpu() for tensor in (before, after, out))
        rounding = float(x.norm()) * step
        compared = [
            (name, row.float().cpu() - exact, exact, 0.0)
            for name, row, exact in zip(("its key", "its value"), rows, written, strict=True)
        ]
        for name, off, size, allowed in (*compared, ("its output", found - expected, expected - x, rounding)):
            if not float(size.norm()):
                return f"{name} is nothing but zeros, which compares nothing"
            if not float(off.norm()) <= _STEPS_OFF * step * float(size.norm()) + allowed:
                return f"{name} differs by {float(off.norm() / size.norm()):.1%} from transformers'"
        return None


def fuse(
    model: PreTrainedModel, family: Family, layers: Sequence[nn.Module], cache: GrowingCache
) -> FusedModel | None:
    """A model by the operators of its device; None if there are none for devices of that kind."""
    if (operators := OPERATORS.get(cache.device.type)) is None:
        return None
    return FusedModel(model, family, layers, cache, operators())


def _roles(family: Family, config: dict[str, Any], layer: int) -> dict[str, str]:
    """Paths in a decoder layer by role, as a FusedLayer reads them."""
    roles = family.outside_blocks(config, layer)
    if family.experts is not None and family.is_sparse(config, layer):
        return {**roles, "experts": family.experts.module}
    (block,) = family.blocks(config, layer)
    return {**roles, **{role: block.linear(role) for role in block.by_role}}


def _joined(layer: nn.Module, roles: dict[str, str], *names: str) -> tuple[nn.Module, list[int]]:
    """The linear layer that computes all of some roles, and how many outputs each has."""
    members = [layer.get_submodule(roles[name]) for name in names]
    one = members[0].fused if isinstance(members[0], Member) else None
    wanted = [(one, number) for number in range(len(names))]
    if one is None or [(each.fused, each.number) for each in members if isinstance(each, Member)] != wanted:
        raise Unfit(f"{', '.join(names)} are not one product")
    return one.linear, one.sizes


def _norm(module: nn.Module, path: str) -> Norm:
    norm: Any = module.get_submodule(path)
    eps = getattr(norm, "variance_epsilon", None)
    if eps is None or getattr(norm, "bias", None) is not None:
        raise Unfit(f"{path} is no root-mean-square norm")
    return Norm(norm.weight, float(eps))


def _scale(attention: Any) -> float:
    if getattr(attention, "sliding_window", None) is not None:
        raise Unfit("its attention has a window")
    return float(attention.scaling)


def _fill(cache: GrowingCache) -> None:
    """Numbers at every position, the same ones in every layer."""
    keys, values = cache.growing[0].keys, cache.growing[0].values
    assert keys is not None
    assert values is not None
    chance = torch.Generator().manual_seed(0)
    filled = [torch.randn(states.shape, generator=chance).to(states) for states in (keys, values)]
    for layer in cache.growing:
        for states, numbers in zip((layer.keys, layer.values), filled, strict=True):
            assert states is not None
            states.copy_(numbers)


@contextmanager
def _passing(layers: Sequence[nn.Module]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collects what enters and leaves each layer."""
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        passed.append((inputs[0].clone(), out.clone()))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()
