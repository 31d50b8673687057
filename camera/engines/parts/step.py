"""One decoded token as work of fixed shapes, which a device can be given whole, as a graph, or compiled.

A step reads its token and position from tensors and leaves the next ones there, so that nothing of it waits for the
host, and steps can be queued one after another. Attention sees a number of positions that is rounded up, with a mask;
for each such number there is one graph.
"""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from camera.devices import release_memory, synchronize
from camera.engines.parts.attention import GrowingCache
from camera.engines.parts.fused import FusedModel
from camera.engines.parts.graph import FAILURES, GRAPHS, Graph, compile_many_shapes
from camera.engines.parts.launches import launches_of
from camera.errors import CameraError

log = logging.getLogger(__name__)

POSITIONS_TOGETHER = 256
"""The least by which the number of visible positions grows."""
_MOST_GRAPHS = 8
"""Of one model; a longer capacity grows in larger strides."""
PLAIN, FUSED = "plain", "fused"
"""Ways of computing a step: transformers' layers as they are, and a device's operators for whole parts of them."""
_TUNED = "compiled with products"
COMPILERS: dict[str, dict[str, dict[str, Any]]] = {
    "cuda": {"compiled": {}, _TUNED: {"options": {"coordinate_descent_tuning": True}}}
}
"""Ways of compiling decoder layers that are tried on each kind of device: arguments of torch.compile, by their names. The
second also makes matrix products of one token, fused with what surrounds them; it tunes for minutes, and only where a
layer has a linear layer in 16 bits."""
_TRIED_STEPS, _TRIAL_SECONDS = 20, 120.0


class DecodeStep:
    """Greedy decoding of a model, one token a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        cache: GrowingCache,
        device: torch.device,
        fused: FusedModel | None = None,
    ) -> None:
        """Bind the model's layers to the cache; it must have been filled once, so that its memory is there.

        Args:
            model: with `use_packed_attention`.
            layers: its decoder layers.
            cache: the only one that it is used with from now on.
            device: where both are.
            fused: the same by the device's operators; None if it has none.
        """
        self.model, self.cache, self.device, self.fused = model, cache, device, fused
        self.capacity = cache.growing[0].capacity
        self.token_11 = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.fed_P = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        """The token at each position."""
        self.way = PLAIN
        """How a step is computed: plain, fused, or compiled by its name in COMPILERS."""
        self.problems: dict[str, str] = {}
        """What was tried and failed, with the reason."""
        self.milliseconds: dict[str, float] = {}
        """Of a token in the trial, by the way."""
        self.launches: dict[str, int] = {}
        """Operators of a token, by the way."""
        self._length = 0  # what position_1 holds, known without asking the device
        self._layers = [_BoundLayer(layer, cache, number) for number, layer in enumerate(layers)]
        self._graphs: dict[tuple[str, int], tuple[Graph, torch.Tensor]] = {}
        """By the way and how many positions are visible, with the logits that it leaves."""
        self.replays = True
        """Whether graphs are used where there are any."""
        stride = -(-self.capacity // (_MOST_GRAPHS * POSITIONS_TOGETHER)) * POSITIONS_TOGETHER
        self.visible = [min(end, self.capacity) for end in range(stride, self.capacity + stride, stride)]
        """How many positions attention can see, ascending."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON: whether steps are replayed as graphs, what layers are computed by, and what failed."""
        found = {
            "graph": any(way == self.way for way, _ in self._graphs),
            "layers": self.way,
            "trial, ms a token": self.milliseconds,
            "operators a token": self.launches,
            "failed": self.problems,
        }
        if self.fused is not None:
            reasons = Counter(self.fused.reasons.values())
            found["fused layers"] = f"{self.fused.fused} of {len(self._layers)}"
            found["not fused"] = {reason: f"{count} layers" for reason, count in reasons.items()}
        return found

    @torch.inference_mode()
    def begin(self, token_11: torch.Tensor, length: int) -> None:
        """Go on after a prefill: the token that it chose, and how many positions are filled."""
        self.token_11.copy_(token_11)
        self.position_1.fill_(length)
        self._length = length

    @torch.inference_mode()
    def decode(self, count: int) -> torch.Tensor:
        """Feed so many tokens, each the likeliest after those before it; returns them, int64 [count].

        Raises:
            CameraError: if the cache has no room for them.
        """
        start, self._length = self._length, self._length + count
        if self._length > self.capacity:
            raise CameraError(
                f"{self._length} positions do not fit a cache of {self.capacity}: load with more"
            )
        for length in range(start, self._length):
            visible = next(end for end in self.visible if length < end)
            if self.replays and (recorded := self._graphs.get((self.way, visible))) is not None:
                graph, self._logits_11V = recorded
                graph()
            else:
                self.run(visible)
        return self.fed_P[start : self._length].clone()

    @property
    def logits_V(self) -> torch.Tensor:
        """Of the last step."""
        return self._logits_11V[0, 0]

    @torch.inference_mode()
    def run(self, visible: int) -> None:
        """Launch one step in which attention sees so many positions."""
        self.cache.fix(self.position_1, visible)
        if self.way == FUSED and self.fused is not None:
            self._logits_11V = self.fused(self.token_11, self.position_1, visible)
        else:
            self._logits_11V = self._plain(visible)
        self.fed_P.index_copy_(0, self.position_1, self.token_11[0])
        torch.argmax(self._logits_11V, dim=-1, out=self.token_11)
        self.position_1.add_(1)

    def _plain(self, visible: int) -> torch.Tensor:
        """Logits by transformers' forward, whose layers may be compiled."""
        self.cache.fix(self.position_1, visible)
        logits_11V: torch.Tensor = self.model(
            input_ids=self.token_11,
            position_ids=self.position_1[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits_11V

    @torch.inference_mode()
    def prepare(self) -> None:
        """Find the fastest way of computing a step on this device, and record a graph for every length.

        What fails is logged, kept in `problems`, and done without.
        """
        if self.device.type not in GRAPHS:
            return
        compile_many_shapes()
        began, times = perf_counter(), {}
        for name in self._ways():
            if name != PLAIN and perf_counter() - began > _TRIAL_SECONDS:
                self.problems[name] = f"not tried: {_TRIAL_SECONDS:.0f} s were over"
                continue
            log.info("decoder layers are tried: %s", name)
            with _noting(self.problems, name):
                self.choose(name)
                if name == FUSED and self.fused is not None:
                    self.fused.check(self.token_11, self.position_1, self._plain)
                self.record(self.visible[:1])
                times[name] = self._time()
                self.milliseconds[name] = round(1000 * times[name], 3)
        self.choose(min(times, key=lambda name: times[name]) if times else PLAIN)
        self._graphs.clear()
        self.record(self.visible)
        self.cache.zero()  # what was tried may have left NaN, which a mask does not hide from a sum
        release_memory(self.device)

    def _ways(self) -> list[str]:
        """Those that are worth a trial, beginning with the layers as they are."""
        modules = (module for layer in self._layers for module in layer.layer.modules())
        has_products = any(type(module) is nn.Linear for module in modules)
        compilers = COMPILERS.get(self.device.type, {})
        fused = [FUSED] if self.fused is not None and self.fused.fused else []
        return [PLAIN, *fused, *(name for name in compilers if name != _TUNED or has_products)]

    @torch.inference_mode()
    def choose(self, way: str) -> None:
        """Compute steps in a way from now on, with graphs if they are recorded."""
        self.way = way
        for layer in self._layers:
            layer.choose(way, COMPILERS.get(self.device.type, {}).get(way))

    @torch.inference_mode()
    def record(self, visible: Sequence[int]) -> None:
        """Record graphs of the way chosen, for all of these numbers of visible positions or for none."""
        recorded: dict[tuple[str, int], tuple[Graph, torch.Tensor]] = {}
        pool = None
        with _noting(self.problems, f"a graph of {self.way} layers"):
            for end in visible:
                self.begin(self.token_11, 0)
                graph = Graph(functools.partial(self.run, end), self.device, pool)
                recorded[self.way, end], pool = (graph, self._logits_11V), graph.pool
            self._graphs.update(recorded)

    def _time(self) -> float:
        """Seconds of a step, after as many that do not count."""
        self.begin(self.token_11, 0)
        self.launches[self.way] = sum(launches_of(lambda: self.run(self.visible[0])).values())
        count = min(_TRIED_STEPS, self.visible[0])
        for _ in range(2):
            self.begin(self.token_11, 0)
            synchronize(self.device)
            start = perf_counter()
            self.decode(count)
            synchronize(self.device)
        return (perf_counter() - start) / count


class _BoundLayer:
    """A decoder layer that is handed its own part of a cache, so that all layers alike are compiled as one.

    transformers hands every layer the whole cache, of which it takes what its number says: code that is compiled for one
    number would be compiled again for each.
    """

    def __init__(self, layer: nn.Module, cache: GrowingCache, number: int) -> None:
        self.layer, self._own = layer, cache.growing[number]
        self._cache = Cache(layers=[self._own])
        self._plain = self._step = layer.forward
        self._compiled: dict[str, Any] = {}
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0  # type: ignore[assignment] # a number, of no parameter
        layer.forward = self

    def choose(self, way: str, options: dict[str, Any] | None) -> None:
        """Compile what a step runs; None for as it is. A prefill, whose shapes vary, is never compiled."""
        if options is not None and way not in self._compiled:
            self._compiled[way] = torch.compile(self._plain, **options)
        self._step = self._compiled.get(way, self._plain)

    def __call__(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        run = self._plain if self._own.position_1 is None else self._step
        return run(*args, past_key_values=self._cache, **kwargs)


class _noting(AbstractContextManager[None]):
    """Turn a failure into a log line and an entry of a dictionary."""

    def __init__(self, problems: dict[str, str], what: str) -> None:
        self._problems, self._what = problems, what

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, FAILURES):
            return False
        self._problems[self._what] = reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("decoding goes on without %s: %s", self._what, reason)
        return True
