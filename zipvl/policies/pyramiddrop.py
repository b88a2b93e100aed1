"""PyramidDrop (arXiv 2410.17247): visual tokens leave the model in a few cuts, most of them late.

Before a quarter, half and three quarters of the layers the prompt's last token, the last of its
instruction, ranks the visual tokens that are left by its attention in the layer to come, mean over
heads; `lam`, its square and its cube of the prompt's visual tokens go on, rounded down. Text stays.
Phase: prefill, and with it the cache of every later layer; nothing leaves while decoding.
What leaves: visual tokens, before the layer that ranked them computes anything else of them.
Source: paper and code: before layers 8, 16 and 24 of 32, counted from 0. Elsewhere `cuts` + 1 equal
stages, a cut's layer rounded down; with fewer layers than stages the first stage is empty.
Deviations: original positions (the authors number anew what is left, each stage of its own while
decoding); a visual mask instead of one stretch, so that several pictures and videos work; the form
that is trained is not here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import Plan, Policy, View, check


@dataclass(repr=False)
class PyramidDrop(Policy):
    """All visual tokens, then 50, 25 and 12.5 % of them, as published."""

    lam: float = 0.5
    cuts: int = 3

    def __post_init__(self) -> None:
        check(0 <= self.lam <= 1, f"lam is {self.lam}: give the share that a cut keeps, 0 to 1")
        check(self.cuts >= 1, f"cuts is {self.cuts}: give 1 or more")

    def plan(self, view: View) -> Plan:
        if view.layer == 0:
            view.notes["visual"] = view.is_visual.sum()
        stage = self.stage(view.layer, view.num_layers)
        if not stage or stage == self.stage(view.layer - 1, view.num_layers):
            return Plan()
        count = (self.lam**stage * view.notes["visual"]).floor()
        kept = best_visual(view.mass(view.every[-1:]).mean(0), view.is_visual, count)
        return Plan(attend=kept, cache=kept, stream=kept)

    def stage(self, layer: int, layers: int) -> int:
        """Cuts before `layer` of so many and in front of it."""
        return sum(cut * layers // (self.cuts + 1) <= layer for cut in range(1, self.cuts + 1))


def best_visual(score: Tensor, is_visual: Tensor, count: Tensor) -> Tensor:
    """Mask [T] of all text, the last token, and the `count` visual ones of highest score [T]."""
    order = score.masked_fill(~is_visual, -torch.inf).sort(descending=True, stable=True).indices
    best = torch.arange(len(score), device=score.device) < count
    kept = ~is_visual | torch.empty_like(best).scatter_(0, order, best)
    kept[-1:] = True  # makes the first answer token, were it visual
    return kept
