"""H2O (arXiv 2306.14048): keep the heavy hitters, tokens that received most attention so far.

Prefill is dense. Scores are exact column sums over all prompt rows, computed blockwise: no [T, T]
tensor, but T x T work in each layer, more than the attention itself. Each decode step adds its row;
once `heavy` + `recent` slots are full, one token leaves for each new one. The budget is equal for
all layers and key/value heads, and each head keeps its own tokens.
Deviations: the query heads that share a key/value head vote by their mean (the paper has no GQA);
original positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..model.cache import moved
from ..policy import Plan, Policy, StepView, View, check


@dataclass(repr=False)
class H2O(Policy):
    """512 heavy hitters and 512 recent tokens stay in the cache; the paper uses equal halves."""

    heavy: int = 512
    recent: int = 512
    summary: int = 0  # each run of so many others of the prompt stays as one slot, their mean

    def __post_init__(self) -> None:
        check(self.heavy >= 0, f"heavy is {self.heavy}: give 0 or more")
        check(self.recent >= 1, f"recent is {self.recent}: give 1 or more")
        check(self.summary >= 0, f"summary is {self.summary}: give tokens a slot, or 0 for none")

    def plan(self, view: View) -> Plan:
        n, full, score = view.length, self.heavy + self.recent, view.by_group(view.mass())  # [G, T]
        if n <= full:
            view.notes[view.layer] = score
            return Plan(room=full - n + 1)
        old = score.masked_fill(view.every >= n - self.recent, torch.inf)
        slots = old.topk(full).indices.sort().values
        view.notes[view.layer] = score.gather(1, slots)
        return Plan(cache=slots, room=1, summary=self.summary)

    def step(self, view: StepView) -> Plan:
        score = F.pad(view.notes[view.layer], (0, 1)) + view.by_group(view.mass())  # [G, n]
        view.notes[view.layer] = score
        if view.length <= self.heavy + self.recent:
            return Plan()
        newest = view.positions.amax(dim=1, keepdim=True)
        old = score.masked_fill(view.positions > newest - self.recent, torch.inf)
        leave = old.argmin(dim=1, keepdim=True)
        view.notes[view.layer] = moved(score, leave)
        return Plan(leave=leave)
