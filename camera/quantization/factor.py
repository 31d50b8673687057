"""Second moments of a layer's inputs, factored so that rounding errors can be compensated.

Moments H = M·D·Mᵀ, M upper triangular with ones on the diagonal, D diagonal, hold what rounding must know: weights whose
stored numbers differ by Δ lose Σ_j D_j·(Δ·M)_j² of the output, so column j is best rounded towards w_j + Σ_{i<j} Δ_i·M_ij.
The columns of M are those of the inverse Cholesky factor of Frantar et al., GPTQ, 2022, up to an inversion that is not
needed (Chee et al., QuIP, 2023, theorem 6).

A square of a 7B model's moments takes 1.3 GB in float64, so it is factored where it lies: R with R·Rᵀ = H, R = M·√D,
in the upper triangle, while below the diagonal H stays, to begin again from with more damping.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from camera.errors import CameraError

_BLOCK = 512
"""Columns factored at once: so few that they cost little, so many that the rest are products of large matrices."""
_MOST_DAMPING = 10.0
_PROBES = 4
_MOST_ERROR = 0.1
"""Of probes that are multiplied by the moments and divided by their factor."""


class Factor(NamedTuple):
    """H + added on the diagonal = M·D·Mᵀ, in units of H's mean diagonal; all float32 on one device."""

    feedback_II: torch.Tensor
    """M: how far an error in the weight of one input (row) moves the best number for a later one (column)."""
    loss_I: torch.Tensor
    """D: what the square of a distance from that best number costs."""
    added_I: torch.Tensor
    """What damping has added."""

    @classmethod
    def identity(cls, width: int) -> "Factor":
        """Of inputs that are not correlated: compensates nothing."""
        return cls(torch.eye(width), torch.ones(width), torch.zeros(width))


def factor_moments(moments_II: torch.Tensor, damping: float, *, name: str = "the tensor") -> Factor:
    """Factor H + damping · mean(diag H) · I.

    A column whose input was never anything counts as an average one that is correlated with no other. Damping is
    raised tenfold as long as the matrix cannot be factored (which happens with fewer tokens than columns), or in its
    dtype the factor does not divide what the matrix has multiplied.

    Args:
        moments_II: [I, I], float64, or float32 where the device has no other; the sum of x·xᵀ over the inputs x of a
            layer. Its lower triangle is read, and all of it is overwritten.
        damping: share of the mean diagonal that is added to the diagonal; above 0.
        name: of the tensor, for messages.

    Returns:
        the factor, on the device of the moments.

    Raises:
        CameraError: if the moments are not finite, or no damping makes them invertible.
    """
    own_I = moments_II.diagonal().clone()
    mean = own_I.mean()
    if not mean.isfinite():  # whatever input is not finite makes its own moment so
        raise CameraError(
            f"{name}: the second moments of its inputs are not finite: calibrate in float32 (dtype)"
        )
    if mean <= 0:
        return Factor(*(part.to(moments_II.device) for part in Factor.identity(len(own_I))))
    moments_II /= mean
    own_I /= mean
    missing_I = (own_I == 0).to(own_I.dtype)
    while damping <= _MOST_DAMPING:
        added_I = missing_I + damping
        _begin(moments_II, own_I + added_I)
        if _factor(moments_II) and _error(moments_II, own_I + added_I) <= _MOST_ERROR:
            root_I = moments_II.diagonal().clone()
            return Factor(_float32(moments_II, root_I), root_I.square().float(), added_I.float())
        damping *= 10
    raise CameraError(f"{name}: the second moments of its inputs cannot be inverted: calibrate on more text")


def _blocks(width: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]


def _corners(matrix_II: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The blocks on the diagonal, last first."""
    for block in reversed(_blocks(len(matrix_II))):
        yield block, matrix_II[block, block]


def _begin(matrix_II: torch.Tensor, diagonal_I: torch.Tensor) -> None:
    """Make the matrix symmetric, from what is below its diagonal."""
    for block, corner in _corners(matrix_II):
        matrix_II[block, block.stop :] = matrix_II[block.stop :, block].T
        below = corner.tril(-1)
        corner.copy_(below + below.T + diagonal_I[block].diag())


def _factor(matrix_II: torch.Tensor) -> bool:
    """Put R into the upper triangle; False if there is none."""
    for block, corner in _corners(matrix_II):
        right = matrix_II[block, block.stop :]
        square = corner.triu() + corner.tril(-1) - right @ right.T
        lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
        if failed or not lower.isfinite().all():
            return False
        root = lower.flip(0, 1)
        corner.copy_(root + corner.tril(-1))
        above = matrix_II[: block.start, block]
        above.addmm_(matrix_II[: block.start, block.stop :], right.T, alpha=-1)
        above.copy_(torch.linalg.solve_triangular(root.T, above, upper=False, left=False))
    return True


def _error(matrix_II: torch.Tensor, diagonal_I: torch.Tensor) -> float:
    """How far random vectors are from what they were, multiplied by the matrix and divided by its factor."""
    generator = torch.Generator().manual_seed(0)
    probe_IP = torch.randn(len(matrix_II), _PROBES, generator=generator).to(matrix_II)
    product_IP = diagonal_I[:, None] * probe_IP
    for block, corner in _corners(matrix_II):
        left = matrix_II[block, : block.start]
        below = corner.tril(-1)
        product_IP[block] += left @ probe_IP[: block.start] + (below + below.T) @ probe_IP[block]
        product_IP[: block.start] += left.T @ probe_IP[block]
    divided_IP = torch.linalg.solve_triangular(matrix_II, product_IP, upper=True)
    divided_IP = torch.linalg.solve_triangular(matrix_II.T, divided_IP, upper=False)
    return float((divided_IP - probe_IP).norm() / probe_IP.norm())


def _float32(matrix_II: torch.Tensor, root_I: torch.Tensor) -> torch.Tensor:
    """M, of R: written over R, row by row, as it takes half the memory at most."""
    width = len(matrix_II)
    out_II = matrix_II.view(torch.float32).view(-1)[: width * width].view(width, width)
    for block in _blocks(width):
        rows = (matrix_II[block] / root_I).float().triu(block.start)
        rows[:, block].diagonal().fill_(1.0)
        out_II[block] = rows
    return out_II
