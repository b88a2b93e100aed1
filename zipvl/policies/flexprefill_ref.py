"""FlexPrefill (arXiv 2502.20766): each head finds its pattern and its budget by the last queries.

The last `block` queries attend in full. If pooled queries and keys guess what share each block of
columns gets (square root of the Jensen-Shannon divergence below `tau`), the head is query-aware:
each row of blocks keeps the fewest blocks whose pooled attention reaches `gamma`. Else it is
vertical-slash: the fewest columns, and diagonals, that reach `gamma` say how many blocks of them
it reads, the heaviest. The first columns and the main diagonal stay, of each at least `budget`.
Phase: prefill, as a mask: a reference of what is read, no faster. Decoding is dense.
What leaves: pairs of attention, never a token.
Source: the paper; where that is silent (from columns to blocks, `budget`), the authors' code.
Deviations: gamma holds in each row of blocks; per=head ranks those of a head together, as paper and
code do. The block that reaches gamma stays (the code drops it). Diagonals are blocked from the main
one on, and of a block that is not full only the tokens that are there are pooled.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View, check, choice
from .minference_ref import largest, lines


@dataclass(repr=False)
class FlexPrefillRef(Policy):
    """Nine tenths of a head's attention, at least 512 columns and diagonals: the authors' setup."""

    gamma: float = 0.9
    tau: float = 0.1
    budget: int = 512
    block: int = 128
    per: str = "row"

    def __post_init__(self) -> None:
        check(0 < self.gamma <= 1, f"gamma is {self.gamma}: give a share above 0 and up to 1")
        check(0 <= self.tau <= 1, f"tau is {self.tau}: give a divergence from 0 to 1")
        check(self.budget >= 0, f"budget is {self.budget}: give 0 tokens or more")
        check(self.block >= 1, f"block is {self.block}: give 1 token or more")
        choice("per", self.per, ("row", "head"))

    def plan(self, view: View) -> Plan:
        if self.gamma == 1 or view.length <= max(self.budget, self.block):
            return Plan()
        sums = torch.stack(lines(view, self.block)) / self.block  # [2, H, T] columns, diagonals
        heavy = self.total(sums)  # [2, H, N] of N blocks
        size = self.total(torch.ones_like(sums[0, :1]))[..., None]  # [1, N, 1] tokens
        q, k = (self.total(x.float().mT).mT / size for x in (view.q, view.k))  # [., N, D] pooled
        k = k.repeat_interleave(len(q) // len(k), dim=0).mT / math.sqrt(q.shape[-1])  # [H, D, N]
        last = view.q[:, -self.block :].float().mean(1, keepdim=True)  # [H, 1, D]
        aware = (distance((last @ k)[:, 0].softmax(-1), heavy[0]) < self.tau)[:, None, None]
        # what every head reads, and the vertical-slash ones as much as they need
        count = torch.where(aware[:, 0], 0, needed(sums, self.gamma) // self.block + 1)
        heavy[..., 0] = torch.inf
        columns, diagonals = largest(heavy, count.clamp(min=max(1, -(-self.budget // self.block))))
        place = torch.arange(len(size[0]), device=k.device)
        step = place[:, None] - place  # [N, N] from a row of blocks down to its columns
        guess = (q @ k).masked_fill(step < 0, -torch.inf).softmax(-1)  # [H, N, N]
        guess = guess if self.per == "row" else guess.flatten(1)
        near = largest(guess, needed(guess, self.gamma)).view(-1, *step.shape)
        kept = columns[:, None] | diagonals[:, step.clamp(min=0)] | (near & aware)
        return Plan(mask=lambda rows: kept[:, rows // self.block][..., view.every // self.block])

    def total(self, x: Tensor) -> Tensor:
        """Sums of x [..., T] by block, [..., N]."""
        return F.pad(x, (0, -x.shape[-1] % self.block)).unflatten(-1, (-1, self.block)).sum(-1)


def needed(mass: Tensor, gamma: float) -> Tensor:
    """How many of mass [..., n], the largest first, reach gamma of its sum, [..., 1]."""
    exact = torch.float32 if mass.device.type == "mps" else torch.float64  # MPS has no float64
    sums = mass.sort(dim=-1, descending=True).values.to(exact).cumsum(-1)
    return (sums < gamma * sums[..., -1:]).sum(-1, keepdim=True) + 1


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of p and q [..., n]."""
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    return ((p.xlogy(p / middle) + q.xlogy(q / middle)).sum(-1) / 2).clamp(min=0).sqrt()
