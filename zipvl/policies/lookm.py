"""LOOK-M (arXiv 2406.18139): text outranks every visual token; what leaves is merged into its like.

Scores are column sums over all prompt rows. By key/value head a share `recent` of the budget stays
for being the newest, then all text, then the best visual tokens; the budget is `ratio` of the
prompt, or more if that is what text and the newest take. Each token e that leaves joins the kept
token p whose key is most like its own by cosine; its value goes with it.
  pivot    p becomes the mean of itself and of (p + e) / 2 for each e that joins it
  average  p becomes the mean of itself and of all that join it
  none     nothing is merged
Phase: the cache, once, behind a dense prefill. What leaves: visual tokens.
Source: paper and code; the third variant, weighted by similarity, is not here.
Deviations: query heads of a key/value head vote by their mean; text is put first by a mask (theirs
adds an offset in half precision, which rounds visual scores away).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View, check, choice

MERGES = ("pivot", "average", "none")
BLOCK = 64 << 20  # bytes of similarities at a time


@dataclass(repr=False)
class LookM(Policy):
    """A tenth of the prompt, its newest, and a tenth, its best, as published."""

    ratio: float = 0.2
    recent: float = 0.5
    merge: str = "pivot"

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(0 <= self.recent <= 1, f"recent is {self.recent}: give a share, 0 to 1")
        choice("merge", self.merge, MERGES)

    def plan(self, view: View) -> Plan:
        T, budget = view.length, max(1, round(self.ratio * view.length))
        first = ~view.is_visual | (view.every >= T - round(self.recent * budget))
        if "first" not in view.notes:  # the same in all layers: the processor waits once
            view.notes["first"] = int(first.sum())
        count = max(budget, view.notes["first"])
        if count >= T:
            return Plan()
        order = view.by_group(view.mass()).masked_fill(first, torch.inf).argsort(descending=True)
        kept, gone = order[:, :count].sort().values, order[:, count:]  # [G, K], [G, T - K]
        if self.merge == "none":
            return Plan(cache=kept)
        return Plan(cache=kept, merge=self.joined(likes(view.k, kept, gone), gone, T))

    def joined(self, pivots: Tensor, gone: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Plan.merge of the tokens `gone` that join `pivots`, both [G, T - K]."""
        G, half = len(gone), 0.5 if self.merge == "pivot" else 1.0
        into = torch.arange(T, device=gone.device).repeat(G, 1).scatter_(1, gone, pivots)
        weight = torch.ones(G, T, device=gone.device).scatter_(1, gone, half)
        mine = torch.full(gone.shape, 1 - half, device=gone.device)  # 1 + m / 2 where m join
        return into, weight.scatter_add_(1, pivots, mine)


def likes(k: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
    """Of keys k [G, T, D]: for each of `gone` [G, T - K] the most alike of `kept` [G, K]."""
    unit = F.normalize(k.float(), dim=-1)
    stay, leave = (unit.gather(1, x[..., None].expand(-1, -1, k.shape[2])) for x in (kept, gone))
    blocks = leave.split(max(1, BLOCK // (4 * kept.numel())), dim=1)
    return kept.gather(1, torch.cat([(rows @ stay.mT).argmax(-1) for rows in blocks], dim=1))
