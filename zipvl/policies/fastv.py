"""FastV (arXiv 2403.06764): past layer `after`, only visual tokens the last token looks at go on.

The prompt's last token, in the last dense layer (0-based after - 1), ranks the visual tokens by its
attention, mean over heads, as the authors' code does; the paper's text speaks of the attention from
all tokens. `ratio` is the share KEPT, 1 - R of the paper. Text stays, original positions stay.
  drop   the others leave the stream, so every later layer and its cache are smaller
  mask   the others stay, but later layers hide their keys: equal for the kept tokens, no faster
Phase: prefill behind layer `after`, and the caches there. What leaves: visual tokens.
Source: the authors' code. Deviations: in `mask` the set is chosen once, the ablation script chose
again for each new token; a visual mask instead of one stretch, so that several media work.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import Plan, Policy, View, check, choice

VARIANTS = ("drop", "mask")


@dataclass(repr=False)
class FastV(Policy):
    """Visual tokens leave the model after layer 2, half of them; the paper's defaults."""

    after: int = 2
    ratio: float = 0.5
    variant: str = "drop"

    def __post_init__(self) -> None:
        after, ratio = self.after, self.ratio
        check(after >= 1, f"after is {after}: a layer must rank the tokens first, give 1 or more")
        check(0 <= ratio <= 1, f"ratio is {ratio}: give the share to keep, from 0 to 1")
        choice("variant", self.variant, VARIANTS)

    def plan(self, view: View) -> Plan:
        if view.layer == self.after - 1:
            last = torch.arange(view.length - 1, view.length, device=view.k.device)
            kept = self.choose(view, view.mass(last).mean(0))
            if self.variant == "drop":
                return Plan(stream=kept)
            view.notes["kept"] = kept
        elif "kept" in view.notes:
            return Plan(attend=view.notes["kept"], cache=view.notes["kept"], fill="own")
        return Plan()

    def choose(self, view: View, score: Tensor) -> Tensor:
        """Mask [T] of all text tokens and the best of the visual ones, by score [T]."""
        order = score.masked_fill(~view.is_visual, -torch.inf).sort(descending=True, stable=True)
        rank = torch.arange(len(score), device=score.device)
        best = rank < (self.ratio * view.is_visual.sum()).round()
        kept = ~view.is_visual | torch.empty_like(best).scatter_(0, order.indices, best)
        kept[-1:] = True  # makes the first answer token, were it visual
        return kept
