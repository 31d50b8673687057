"""Compensated rounding into exactly the 4-bit block formats: several scales round a block, and a row keeps the one that
loses least."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from camera.checkpoints.rows import Rows
from camera.formats import blocks
from camera.formats.blocks import Put
from camera.formats.parallel import map_chunks
from camera.quantization.compensation import Block, Loss, compensate
from camera.quantization.factor import Factor
from camera.quantization.method import Stored
from camera.quantization.q4 import HIGHEST, LOWEST, inverse, pack, to_fp16
from camera.registry import BLOCK_FORMATS

_SHRINK = (1.04, 0.98, 0.93, 0.88, 0.83, 0.77, 0.7, 0.62, 0.52, 0.4)
"""Scales to try, of the one that makes a block's largest weight an outermost code, of either end."""
_STRIP = 8
"""Columns whose errors move the rest of a block at once."""
_ROWS_OF_A_CORE = 512
"""Rows that a thread works on at once; they do not depend on each other. Fewer cost calls, more leave the cache."""
_ROWS_OF_A_DEVICE = 32768
"""On an accelerator every call costs its launch: all rows of the matrices that share an input, if they fit."""


class Rounded(NamedTuple):
    """What became of a matrix."""

    lost: Stored
    """Its weighted error is √(Δ·H·Δᵀ / w·H·wᵀ) over all rows, Δ = stored − w: of the output's RMS, exactly."""
    numbers: torch.Tensor | None
    """What is stored [rows, row_length], on the device of the factor, if asked for."""


def store_by_gptq(
    weights: Mapping[str, Rows],
    type: str,
    puts: Mapping[str, Put],
    factor: Factor,
    numbers_dtype: torch.dtype | None = None,
) -> dict[str, Rounded]:
    """Matrices that share an input to blocks, by error-compensated rounding.

    Args:
        weights: [rows, row_length] each, any floating dtype, by what to call them in messages.
        type: `q4_0` or `q4_0_64`.
        puts: take the bytes of each, see `blocks.store`.
        factor: of the second moments of the input; its device is where the work is done.
        numbers_dtype: of `Rounded.numbers`; None if they are not wanted.

    Returns:
        what is lost, by name. What a row becomes does not depend on how many threads there are.

    Raises:
        CameraError: as `blocks.quantize`.
    """
    device, width = factor.loss_I.device, len(factor.loss_I)
    form = BLOCK_FORMATS[type]
    lengths = {name: weight.shape[0] for name, weight in weights.items()}
    columns = [slice(at, at + form.block_length) for at in range(0, width, form.block_length)]
    numbers: dict[str, torch.Tensor] = {}
    if numbers_dtype is not None:
        for name, rows in lengths.items():
            numbers[name] = torch.empty(rows, width, dtype=numbers_dtype, device=device)

    def work(start: int) -> list[tuple[str, list[float]]]:
        parts = list(_parts(lengths, start, start + at_once))
        chunks = [weights[name][rows].detach() for name, rows in parts]
        for (name, _), chunk_RI in zip(parts, chunks, strict=True):
            blocks.quantize(chunk_RI, type, name=name)  # refuses what no block can hold
        chunk_RI = torch.cat([chunk_RI.to(device).float() for chunk_RI in chunks])
        rounding = Q4Rounding(len(chunk_RI), width, form.block_length, device)
        loss = compensate(chunk_RI, factor, columns, rounding)
        data = pack(rounding.codes_IR.T, rounding.scales_BR.T, type)
        losses, begun = [], 0
        for name, rows in parts:
            here = slice(begun, begun + rows.stop - rows.start)
            puts[name](rows.start, data[here])
            if numbers:
                numbers[name][rows] = rounding.numbers_RI(here)
            losses.append((name, [float(part_R[here].double().sum()) for part_R in loss]))
            begun = here.stop
        return losses

    at_once = _ROWS_OF_A_CORE if device.type == "cpu" else _ROWS_OF_A_DEVICE
    starts = range(0, sum(lengths.values()), at_once)
    found = map_chunks(work, starts) if device.type == "cpu" else [work(start) for start in starts]
    totals = dict.fromkeys(weights, [0.0] * len(Loss._fields))
    for name, losses in (part for parts in found for part in parts):
        totals[name] = [total + part for total, part in zip(totals[name], losses, strict=True)]
    return {name: Rounded(_stored(Loss(*total)), numbers.get(name)) for name, total in totals.items()}


def _stored(loss: Loss[float]) -> Stored:
    error = (max(loss.noise, 0.0) / loss.power) ** 0.5 if loss.power > 0 else 0.0
    return Stored(blocks.Squares(loss.squares, loss.squared_error), error)


def _parts(lengths: Mapping[str, int], start: int, stop: int) -> Iterator[tuple[str, slice]]:
    """Which rows of which matrix some rows are, of matrices that lie one below the other."""
    begin = 0
    for name, length in lengths.items():
        end = begin + length
        if begin < stop and start < end:
            yield name, slice(max(start, begin) - begin, min(stop, end) - begin)
        begin = end


def put_into(data: np.ndarray) -> Put:
    """Puts rows of bytes into memory."""

    def put(start: int, part: np.ndarray) -> None:
        data[start : start + len(part)] = part

    return put


class Q4Rounding:
    """Rounds the blocks of some rows, with the scale of several that loses least, and holds their codes and scales.

    Attributes:
        codes_IR: int8, from −8 to 7.
        scales_BR: float32, numbers that fp16 holds.
    """

    def __init__(self, rows: int, width: int, length: int, device: torch.device) -> None:
        """Args:
        rows, width: of the matrix.
        length: of a block.
        device: where its weights are.
        """
        self.codes_IR = torch.empty(width, rows, dtype=torch.int8, device=device)
        self.scales_BR = torch.empty(width // length, rows, device=device)
        self._shrink_C = torch.tensor(
            [by / end for end in (LOWEST, HIGHEST) for by in _SHRINK], device=device
        )
        tried = len(self._shrink_C) * rows
        self._rest_LN = torch.empty(length, tried, device=device)
        self._squares_LN = torch.empty(length, tried, device=device)
        self._code_N = torch.empty(tried, device=device)

    def __call__(self, block: Block) -> torch.Tensor:
        """See `compensate`."""
        best_LR = block.best_LR
        length, rows = best_LR.shape
        highest_R, lowest_R = best_LR.amax(0), best_LR.amin(0)
        extreme_R = torch.where(highest_R > -lowest_R, highest_R, lowest_R)
        scale_CR = to_fp16(self._shrink_C[:, None] * extreme_R)
        errors_LCR = self._try(best_LR, scale_CR, block.inverse_LL)
        torch.mul(self._rest_LN, self._rest_LN, out=self._squares_LN)
        least_1R = (block.loss_L @ self._squares_LN).view(-1, rows).argmin(0, keepdim=True)
        scale_R = scale_CR.gather(0, least_1R)[0]
        errors_LR = errors_LCR.gather(1, least_1R.expand(length, 1, rows))[:, 0]
        # What was rounded: the best number of each column, moved by the errors of those before it in the block.
        moved_LR = torch.addmm(best_LR, block.inverse_LL.triu(1).T, errors_LR, alpha=-1)
        codes_LR = moved_LR.sub_(errors_LR).mul_(inverse(scale_R)).round_().clamp_(LOWEST, HIGHEST)
        scale_R = _suited(block, codes_LR, scale_R)
        self.codes_IR[block.columns] = codes_LR
        self.scales_BR[block.columns.start // length] = scale_R
        return codes_LR * scale_R

    def numbers_RI(self, rows: slice) -> torch.Tensor:
        """The numbers that codes and scales stand for, float32."""
        codes_BLR = self.codes_IR[:, rows].unflatten(0, (len(self.scales_BR), -1))
        numbers_BLR: torch.Tensor = codes_BLR * self.scales_BR[:, None, rows]
        return numbers_BLR.flatten(0, 1).T

    def _try(self, best_LR: torch.Tensor, scale_CR: torch.Tensor, inverse_LL: torch.Tensor) -> torch.Tensor:
        """Round a block column by column with each of several scales: errors [L, C, R]."""
        rest_LN, code_N = self._rest_LN, self._code_N
        rest_LCR = rest_LN.view(len(best_LR), *scale_CR.shape).copy_(best_LR[:, None])
        scale_N, inverse_N = scale_CR.flatten(), inverse(scale_CR).flatten()
        for start in range(0, len(best_LR), _STRIP):
            stop = start + _STRIP
            for column in range(start, stop):
                torch.mul(rest_LN[column], inverse_N, out=code_N).round_().clamp_(LOWEST, HIGHEST)
                error_N = rest_LN[column].addcmul_(code_N, scale_N, value=-1)
                near = slice(column + 1, stop)
                rest_LN[near].addr_(inverse_LL[column, near], error_N, alpha=-1)
            strip = slice(start, stop)
            rest_LN[stop:].addmm_(inverse_LL[strip, stop:].T, rest_LN[strip], alpha=-1)
        return rest_LCR


def _suited(block: Block, codes_LR: torch.Tensor, scale_R: torch.Tensor) -> torch.Tensor:
    """The scale that loses least with these codes, in fp16's numbers, if that is less than with theirs."""
    left_LR = torch.addmm(block.moved_LR, block.inner_LL.T, block.weight_LR)  # with all codes 0
    taken_LR = block.inner_LL.T @ codes_LR
    weighted_LR = block.loss_L[:, None] * taken_LR
    power_R = (weighted_LR * taken_LR).sum(0)
    suited_R = to_fp16(torch.where(power_R > 0, (weighted_LR * left_LR).sum(0) / power_R, scale_R))

    def loss(scale_R: torch.Tensor) -> torch.Tensor:
        return block.loss_L @ torch.addcmul(left_LR, taken_LR, scale_R, value=-1).square_()

    return torch.where(loss(suited_R) < loss(scale_R), suited_R, scale_R)
