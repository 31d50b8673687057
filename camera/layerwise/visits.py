"""Which tokens visit which expert of a sparse layer, known to the host after one read."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from camera.layerwise.experts import Routing


class Visit(NamedTuple):
    """A chunk of the tokens that visit a block."""

    token_N: torch.Tensor
    """int64, ascending."""
    weight_N: torch.Tensor | None
    counts: list[int]
    """How many of them are of each of the chunk's samples."""
    samples: range


class Visits:
    """The tokens of each expert.

    Attributes:
        tokens_E: int64 on the CPU, how many there are.
    """

    def __init__(self, routing: Routing, count: int, samples: int) -> None:
        """Args:
        routing: of all tokens.
        count: of experts.
        samples: that the tokens are of, equally many of each.
        """
        self._length = len(routing.index_TK) // samples
        chosen = routing.index_TK.shape[1]
        expert_N = routing.index_TK.reshape(-1)
        order_N = torch.argsort(expert_N, stable=True)
        sample_N = torch.arange(len(expert_N), device=expert_N.device) // (self._length * chosen)
        counts = torch.zeros(count * samples, dtype=torch.int64, device=expert_N.device)
        counts.scatter_add_(0, expert_N * samples + sample_N, torch.ones_like(expert_N))
        counts_ES = counts.view(count, samples).cpu()  # the one read
        self.tokens_E = counts_ES.sum(1)
        self._counts = counts_ES.tolist()
        sizes = self.tokens_E.tolist()
        self._tokens = (order_N // chosen).split(sizes)
        self._weights = routing.weight_TK.reshape(-1)[order_N].split(sizes)

    def of_expert(self, expert: int, rows: int) -> Iterator[Visit]:
        """Those of an expert, in chunks of whole samples and of about so many rows."""
        return _chunks(self._tokens[expert], self._weights[expert], self._counts[expert], rows)

    def of_all(self, weight_T: torch.Tensor | None, rows: int) -> Iterator[Visit]:
        """Those of a network that every token visits, with its weights."""
        samples = len(self._counts[0])
        token_T = torch.arange(samples * self._length, device=self._tokens[0].device)
        return _chunks(token_T, weight_T, [self._length] * samples, rows)


def _chunks(
    token_N: torch.Tensor, weight_N: torch.Tensor | None, counts: list[int], rows: int
) -> Iterator[Visit]:
    begun, first, size = 0, 0, 0
    for sample, count in enumerate([*counts, rows + 1]):  # the last closes the chunk before it
        if size and size + count > rows:
            part = slice(begun, begun + size)
            weights = None if weight_N is None else weight_N[part]
            yield Visit(token_N[part], weights, counts[first:sample], range(first, sample))
            begun, first, size = begun + size, sample, 0
        size += count
