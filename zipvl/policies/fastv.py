"""FastV (arXiv 2403.06764): past layer `after`, only visual tokens the last token looks at go on.

The prompt's last token, in the last dense layer (0-based after - 1), ranks the visual tokens by its
attention, mean over heads, as the authors' code does; the paper's text speaks of the attention from
all tokens. `ratio` is the share KEPT, 1 - R of the paper. Text stays, original positions stay.
  drop   the others leave the stream, so every later layer and its cache are smaller
  mask   the others stay, but later layers hide their keys: equal for the kept tokens, no faster
Deviations: in `mask` the set is chosen once, the authors' ablation script chose again for each new
token; a visual mask instead of one stretch, so that several pictures and videos work.
"""

import torch
from torch import Tensor

from ..policy import Plan, Policy, View
from .selection import check

VARIANTS = ("drop", "mask")


class FastV(Policy):
    """after 2 and ratio 0.5, the paper's defaults."""

    def __init__(self, after: int = 2, ratio: float = 0.5, variant: str = "drop"):
        check(after >= 1, f"after is {after}: a layer must rank the tokens first, give 1 or more")
        check(0 <= ratio <= 1, f"ratio is {ratio}: give the share to keep, from 0 to 1")
        check(variant in VARIANTS, f"variant is {variant!r}: use one of {', '.join(VARIANTS)}")
        self.after, self.ratio, self.variant = after, ratio, variant

    def probe(self, view: View) -> Tensor | None:
        """The last prompt token's row, in the layer before the cut."""
        return torch.tensor([view.length - 1]) if view.layer == self.after - 1 else None

    def plan(self, view: View) -> Plan:
        if view.mass is not None:
            kept = self.choose(view, view.mass.mean(0))
            if self.variant == "drop":
                return Plan(stream=kept)
            view.state["kept"] = kept
        elif "kept" in view.state:
            return Plan(attend=view.state["kept"], cache=view.state["kept"], fill="own")
        return Plan()

    def choose(self, view: View, score: Tensor) -> Tensor:
        """Sorted indices of all text tokens and the best of the visual ones, by score [T]."""
        visual = view.is_visual.nonzero()[:, 0]
        kept = ~view.is_visual
        kept[visual[score[visual].topk(round(self.ratio * len(visual))).indices]] = True
        kept[-1] = True  # makes the first answer token, were it visual
        return kept.nonzero()[:, 0]
