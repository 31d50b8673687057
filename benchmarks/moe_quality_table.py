"""From the rows of `moe_quality.py` to its tables: perplexities, paired differences, goals."""

from math import exp, expm1
from typing import Any, NamedTuple

import torch
from common import met

JOINT, WHOLE, OURS = "CAMERA's joint mask", "whole experts", "auto, refit"
"""What the others are compared with, what else is to be beaten, and what the tool recommends."""
_RESAMPLES = 10_000


class Difference(NamedTuple):
    """How much higher a perplexity is than another on the same windows, as a share."""

    mean: float
    low: float
    high: float
    """The interval."""

    @classmethod
    def of(cls, loss_W: torch.Tensor, base_W: torch.Tensor) -> "Difference":
        """From the mean loss of every window, in nats."""
        difference_W = (loss_W - base_W).double()
        count = len(difference_W)
        generator = torch.Generator().manual_seed(0)
        drawn_RW = torch.randint(count, (_RESAMPLES, count), generator=generator)
        means_R = difference_W[drawn_RW].mean(1)
        low, high = torch.quantile(means_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(expm1(float(difference_W.mean())), expm1(low), expm1(high))

    def __str__(self) -> str:
        return f"{self.mean:+.2%} [{self.low:+.2%}, {self.high:+.2%}]"


def perplexities(row: dict[str, Any]) -> str:
    return " / ".join(f"{exp(sum(loss) / len(loss)):.2f}" for loss in row["loss"].values())


def difference(row: dict[str, Any], base: dict[str, Any], text: str) -> Difference:
    """Of two rows on one text."""
    return Difference.of(*(torch.tensor(each["loss"][text]) for each in (row, base)))


def lines_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table of one model."""
    lines = []
    for row in rows:
        gone = ", ".join(f"{share:.1%}" for share in row["gone"].values())
        line = [f"{row['ratio']:.0%}", row["way"], row["size"], gone]
        for text, loss in row["loss"].items():
            base = None if row["way"] in ("dense", JOINT) else _row(rows, row["ratio"], JOINT)
            line += [f"{exp(sum(loss) / len(loss)):.2f}", str(difference(row, base, text)) if base else ""]
        lines.append(line)
    return lines


def _row(rows: list[dict[str, Any]], ratio: float, way: str) -> dict[str, Any]:
    return next(row for row in rows if (row["ratio"], row["way"]) == (ratio, way))


def goals(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table of what is to be reached: at 40 % not above either, at 20 % within 1 % of the joint mask."""
    lines = []
    for ratio, base, allowed in ((0.4, JOINT, 0.0), (0.4, WHOLE, 0.0), (0.2, JOINT, 0.01)):
        if not {(ratio, base), (ratio, OURS)} <= {(row["ratio"], row["way"]) for row in rows}:
            continue
        ours, theirs = _row(rows, ratio, OURS), _row(rows, ratio, base)
        for text in ours["loss"]:
            found = difference(ours, theirs, text)
            lines.append(
                [f"{ratio:.0%}", base, text, str(found), f"≤ {allowed:+.0%}", met(found.mean <= allowed)]
            )
    return lines
