"""H2O (arXiv 2306.14048): keep the heavy hitters, tokens that received most attention so far.

Prefill is dense. Scores are exact column sums over all prompt rows, computed blockwise: no [T, T]
tensor, but T x T work in each layer, more than the attention itself. Each decode step adds its row;
once `heavy` + `recent` slots are full, one token leaves for each new one. The budget is equal for
all layers and key/value heads, and each head keeps its own tokens.
Deviations: the query heads that share a key/value head vote by their mean (the paper has no GQA);
original positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View
from .selection import check


class H2O(Policy):
    """512 heavy hitters and 512 recent tokens; the paper uses equal halves."""

    watch_decode = True

    def __init__(self, heavy: int = 512, recent: int = 512):
        check(heavy >= 0, f"heavy is {heavy}: give 0 or more")
        check(recent >= 1, f"recent is {recent}: give 1 or more")
        self.heavy, self.recent = heavy, recent

    def probe(self, view: View) -> Tensor | None:
        return torch.arange(view.length)

    def plan(self, view: View) -> Plan:
        assert view.mass is not None
        score = view.mass.unflatten(0, (view.k.shape[0], -1)).mean(1)  # [G, T]
        return Plan(cache=self.best(score, view.layer, view.state))

    def evict(self, layer: int, slots: int, state: dict, probs: Tensor | None) -> Tensor | None:
        assert probs is not None
        return self.best(F.pad(state[layer], (0, 1)) + probs, layer, state)

    def best(self, score: Tensor, layer: int, state: dict) -> Tensor | None:
        """Slots [G, N] to keep by score [G, n], whose scores stay in `state`; None: all fit."""
        state[layer] = score
        if score.shape[1] <= self.heavy + self.recent:
            return None
        ranked = score.clone()
        ranked[:, -self.recent :] = torch.inf
        slots = ranked.topk(self.heavy + self.recent).indices.sort().values
        state[layer] = score.gather(1, slots)
        return slots
