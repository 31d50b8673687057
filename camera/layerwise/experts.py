"""The experts of one decoder layer: routed tokens alone, matrices straight from the checkpoint's files.

transformers holds the experts of a layer as one tensor and looks up the function that computes them in a table. Ours
leaves that tensor without memory and takes an expert's three matrices as they lie in the file, where the page cache holds
them, when its turn comes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from camera.devices import free_memory_bytes
from camera.layerwise.statistics import gather_channels

IMPLEMENTATION = "camera"
"""Name of our function in transformers' table."""
_ROWS = 16
"""Matrix products get a multiple of so many rows, filled up with zeros. Few rows go through a product of their own, which sums
in another order: so what a token becomes does not depend on which others are there. And oneDNN keeps half a megabyte for
every number of rows that it has seen, up to a thousand of them."""
_SHARE_OF_FREE = 0.5


class Matrices(NamedTuple):
    """Of one gated feed-forward network, on the device it computes on."""

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor


class Routing(NamedTuple):
    """What the router made of tokens."""

    hidden_TH: torch.Tensor
    """The normed hidden states that it read, and that the experts read."""
    index_TK: torch.Tensor
    """int64, the experts that each token goes to."""
    weight_TK: torch.Tensor
    """What each output is multiplied by."""


class Experts:
    """The experts of a layer, as transformers' module calls them.

    Attributes:
        watch: given the routing in place of computing anything; None to compute.
    """

    def __init__(
        self, read: Callable[[int], Matrices], act: Callable[[torch.Tensor], torch.Tensor], count: int
    ) -> None:
        """Args:
        read: gives an expert's matrices on the device.
        act: the activation of the gate.
        count: how many experts there are.
        """
        self._read = read
        self.act = act
        self.count = count
        self.watch: Callable[[Routing], None] | None = None
        self._held: dict[int, Matrices] = {}

    def matrices(self, expert: int) -> Matrices:
        """Of one expert. On an accelerator they stay for the next batch, as far as half of its free memory goes."""
        found = self._held.get(expert)
        if found is None:
            found = self._read(expert)
            device = found.down_HF.device
            size = sum(matrix.nbytes for matrix in found)
            if device.type != "cpu" and size <= _SHARE_OF_FREE * free_memory_bytes(device):
                self._held[expert] = found
        return found

    def replace(self, expert: int, matrices: Matrices) -> None:
        """Let an expert compute with other numbers, for instance those that are stored in 4 bits."""
        self._held[expert] = matrices

    def __call__(self, routing: Routing) -> torch.Tensor:
        """What the experts make of tokens [T, hidden]."""
        out_TH = torch.zeros_like(routing.hidden_TH)
        if self.watch is not None:
            self.watch(routing)
            return out_TH
        for expert, token_N, weight_N in routed(routing, self.count):
            matrices = self.matrices(expert)
            act_NF = activations(gather_rows(routing.hidden_TH, token_N), matrices, self.act)
            add_output(out_TH, token_N, act_NF, matrices.down_HF, weight_N)
        return out_TH


def routed(routing: Routing, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of each expert that any token goes to: its number, int64 [N] the tokens in order, [N] their weights."""
    chosen = routing.index_TK.shape[1]
    flat = routing.index_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=count).tolist()
    weights = routing.weight_TK.reshape(-1)
    for expert, slots_N in enumerate(order.split(counts)):
        if len(slots_N):
            yield expert, slots_N // chosen, weights[slots_N]


def activations(
    hidden_NH: torch.Tensor, matrices: Matrices, act: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What enters the down projection, [N, F]."""
    hidden_NH, rows = _filled(hidden_NH)
    gate_NF = act(nn.functional.linear(hidden_NH, matrices.gate_FH))
    return gate_NF.mul_(nn.functional.linear(hidden_NH, matrices.up_FH))[:rows]


def output(act_NF: torch.Tensor, down_HF: torch.Tensor, weight_N: torch.Tensor | None) -> torch.Tensor:
    """[N, hidden], multiplied by the weight of each token; None is 1."""
    act_NF, rows = _filled(act_NF)
    out_NH = nn.functional.linear(act_NF, down_HF)[:rows]
    return out_NH if weight_N is None else out_NH * weight_N[:, None]


def add_output(
    total_TH: torch.Tensor,
    token_N: torch.Tensor,
    act_NF: torch.Tensor,
    down_HF: torch.Tensor,
    weight_N: torch.Tensor | None,
) -> None:
    """Add to the rows of some tokens what an expert puts out for them."""
    out_NH = output(act_NF, down_HF, weight_N)
    total_TH.index_add_(0, token_N.to(total_TH.device), out_NH.to(total_TH))


def gather_rows(values_TH: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Rows [N, H] of a matrix; on the CPU half floats are gathered as integers, which is faster."""
    rows_N = rows_N.to(values_TH.device)
    if values_TH.device.type != "cpu" or values_TH.itemsize != 2:
        return values_TH.index_select(0, rows_N)
    return values_TH.view(torch.int16).index_select(0, rows_N).view(values_TH.dtype)


def narrowed(
    matrices: Matrices, kept_K: torch.Tensor, new: Mapping[str, torch.Tensor], *, inner: bool
) -> Matrices:
    """Of the kept channels alone.

    Args:
        matrices: of all channels.
        kept_K: int64 [K].
        new: `gate`, `up` or `down` of these channels, where they are not slices.
        inner: whether gate and up are wanted so, or as they are.
    """
    gate_FH, up_FH, down_HF = matrices
    device_K = kept_K.to(down_HF.device)
    if inner:
        gate_FH = new["gate"].to(gate_FH) if "gate" in new else gate_FH.index_select(0, device_K)
        up_FH = new["up"].to(up_FH) if "up" in new else up_FH.index_select(0, device_K)
    return Matrices(
        gate_FH, up_FH, new["down"].to(down_HF) if "down" in new else gather_channels(down_HF, device_K)
    )


def _filled(rows_NH: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A multiple of `_ROWS` rows, and how many are real."""
    count = len(rows_NH)
    missing = -count % _ROWS
    return (nn.functional.pad(rows_NH, (0, 0, 0, missing)) if missing else rows_NH), count


def attach(module: nn.Module, experts: Experts) -> None:
    """Let transformers' module of all experts compute with ours."""
    module.__dict__["camera"] = experts  # not as a submodule, which it is not


def attached(module: nn.Module) -> Experts:
    """What was attached to it."""
    experts: Experts = module.__dict__["camera"]
    return experts


def detach(module: nn.Module) -> None:
    """Forget what was attached to it."""
    del module.__dict__["camera"]


def install() -> None:
    """Put our function into transformers' table; once is enough."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # heavy; only computing needs it

    def compute(
        module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        return attached(module)(Routing(hidden_TH, index_TK, weight_TK))

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, compute)
