"""TOVA (arXiv 2401.06104): when the cache is full, the token the newest one looks at least leaves.

Shows the two decode-time parts of a method: `watch_decode`, which hands each step's attention to
evict(), and a set that is the same for all heads (their mean, as in the paper).
"""

import torch
from torch import Tensor

from zipvl import Plan, Policy, View


class TOVA(Policy):
    """A cache of `budget` tokens a layer, chosen after prefill and kept at that size."""

    watch_decode = True

    def __init__(self, budget: int = 1024):
        if budget < 1:
            raise ValueError(f"budget is {budget}: give 1 or more")
        self.budget = budget

    def probe(self, view: View) -> Tensor:
        return torch.tensor([view.length - 1])

    def plan(self, view: View) -> Plan:
        assert view.mass is not None
        return Plan(cache=self.best(view.mass.mean(0)))

    def evict(self, layer: int, slots: int, state: dict, probs: Tensor | None) -> Tensor | None:
        assert probs is not None
        return self.best(probs.mean(0))

    def best(self, score: Tensor) -> Tensor | None:
        """Slots of the `budget` best by score [n], in order; None if all fit."""
        return score.topk(self.budget).indices.sort().values if len(score) > self.budget else None
