"""MInference (arXiv 2407.02490): each head attends along columns and diagonals of the prompt.

The last `rows` queries are attended in full; of their attention, sums along columns rank the
verticals and sums along diagonals, offsets i - j, rank the slashes. The first 30 columns and the
nearest 100 offsets come first. A head attends to the union: single columns, and of each slash, in
each block of 64 rows, the 64 columns that it crosses there. No token is left out of the cache.
Phase: prefill, as a mask: a reference of what is read, no faster. Decoding is dense.
What leaves: pairs of attention, never a token.
Source: the paper, and the pattern that its code takes for a model without a searched profile.
Deviations: one pattern for all heads (a profile names one for each); among equals the lower index
wins; the kernel's rounding up of neighbouring slashes to whole blocks is left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View, check

BLOCK = 64  # rows and columns of a block
FIRST, NEAR = 30, 100  # columns and offsets that come before all others
LEAST = (30, 50)  # columns and offsets that are always taken


@dataclass(repr=False)
class MInferenceRef(Policy):
    """1000 columns and 6096 diagonals a head: below some 10,000 tokens nearly everything."""

    vertical: int = 1000
    slash: int = 6096
    rows: int = 64

    def __post_init__(self) -> None:
        for name in ("vertical", "slash", "rows"):
            value = getattr(self, name)
            check(value >= 1, f"{name} is {value}: give 1 or more")

    def plan(self, view: View) -> Plan:
        vertical, slash = max(self.vertical, LEAST[0]), max(self.slash, LEAST[1])
        if view.length <= max(vertical, slash):
            return Plan()
        columns, diagonals = lines(view, self.rows)  # [H, T]
        columns[:, :FIRST] = diagonals[:, :NEAR] = torch.inf
        column, offsets = largest(columns, vertical), largest(diagonals, slash)
        # rows from `start` to start + 63 cross column j where an offset is in start - j + (0 .. 63)
        upto = F.pad(offsets.cumsum(1), (BLOCK, BLOCK - 1))  # [H, T + 127] offsets below each place
        upto[:, -BLOCK + 1 :] = upto[:, -BLOCK, None]
        crossed = upto[:, BLOCK:] > upto[:, :-BLOCK]  # [H, T + 63] by start - j, from -63 on

        def mask(rows: Tensor) -> Tensor:
            start = rows // BLOCK * BLOCK
            place = start[:, None] - view.every + BLOCK - 1  # [b, T], below 0 in the future
            return crossed[:, place.clamp(min=0)] | column[:, None]

        return Plan(mask=mask)


def lines(view: View, rows: int) -> tuple[Tensor, Tensor]:
    """The attention of the last `rows` queries, summed by column j and by offset i - j, [H, T]."""
    found: dict[int, Tensor] = {}
    for heads, some, logits in view.logits(view.every[-rows:]):
        probs = logits.softmax(dim=-1)  # [h, b, T]
        offset = (some[:, None] - view.every).clamp(min=0)  # the future has no attention
        at = offset.flatten().expand(len(probs), -1)
        slashes = torch.zeros_like(probs[:, 0]).scatter_add_(1, at, probs.flatten(1))
        both = torch.stack((probs.sum(1), slashes))  # [2, h, T]
        found[heads.start] = found[heads.start] + both if heads.start in found else both
    columns, diagonals = torch.cat(list(found.values()), dim=1)
    return columns, diagonals


def largest(score: Tensor, count: int | Tensor) -> Tensor:
    """Mask of the `count` largest, a number or [..., 1], of score [..., n]; of equals the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(score.shape[-1], device=score.device) < count
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))
