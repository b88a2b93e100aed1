"""Elastic Cache (arXiv 2407.18121): what leaves is merged into the nearest token that stays.

Scores are column sums over all prompt rows, mean over heads. The first token, the last one and the
best others, the anchors, are `ratio` of the prompt in every layer; an anchor's key and value become
the mean of all tokens nearest to it, the first and the last token take in none.
Phase: the cache, behind a dense prefill and while decoding: it may grow to `ratio` of the tokens
seen; once it has one more, the slot `distance` before the end of the prompt's part leaves.
What leaves: tokens, the same for all heads; of a prompt's part shorter than `distance` the middle.
Source: paper and code (which takes argsort for ranks, merges the wrong tokens, and says by `ratio`
what leaves: not copied).
Deviations: original positions; `text` keeps all text of the prompt, unmerged and while decoding,
which the letter lets leave; a cache then grows to the share of the tokens seen that it kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import Plan, Policy, StepView, View, check


@dataclass(repr=False)
class Elastic(Policy):
    """Half of the cache stays in every layer."""

    ratio: float = 0.5
    distance: int = 25
    merge: bool = True
    text: bool = False

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(self.distance >= 1, f"distance is {self.distance}: give 1 or more")

    def plan(self, view: View) -> Plan:
        T, index, notes = view.length, view.every, view.notes
        always = (index == 0) | (index == T - 1)
        always = always | ~view.is_visual if self.text else always
        score = view.mass().mean(0).masked_fill(always, torch.inf)
        least = min(T, max(2, round(self.ratio * T)))
        best = index < always.sum().clamp(min=least)  # from the best to the worst
        kept = torch.empty_like(best).scatter_(0, score.argsort(descending=True), best)
        notes[view.layer] = always, 0, 0
        merge = (nearest(kept & ~always, always), torch.ones_like(score)) if self.merge else None
        room = max(math.ceil(self.ratio * (T + notes.new - 1)), least) - least + 1
        return Plan(cache=kept, merge=merge, room=None if self.text else room)

    def step(self, view: StepView) -> Plan:
        n, T, (always, kept, made) = view.length, view.notes.prompt, view.notes[view.layer]
        kept, made = kept or n - 1, made + 1  # of the prompt, and of the answer
        view.notes[view.layer] = always, kept, made
        share = max(self.ratio, kept / T) if self.text else self.ratio
        if n - share * (T + made) < 1 - 1e-9:
            return Plan()
        at = max(1, kept - self.distance if kept > self.distance else kept // 2)
        places, order = view.positions[0].sort()
        far = (4 * torch.arange(n, device=order.device) - 4 * at + 1).abs()  # the earlier of two
        if self.text:
            far += 4 * n * ((places < T) & always[places.clamp(max=T - 1).long()])
        return Plan(leave=order[far.argmin(0, keepdim=True)])


def nearest(anchors: Tensor, always: Tensor) -> Tensor:
    """Masks [T] -> [T]: the nearest anchor, of two the left one; -1 for who joins none."""
    T, index = len(anchors), torch.arange(len(anchors), device=anchors.device)
    left = torch.where(anchors, index, -T).cummax(0).values
    right = torch.where(anchors, index, 2 * T).flip(0).cummin(0).values.flip(0)
    into = torch.where(index - left <= right - index, left, right)
    return into.masked_fill(always | (into < 0) | (into >= T), -1)
