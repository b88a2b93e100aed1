"""TOVA (arXiv 2401.06104): when the cache is full, the token the newest one looks at least leaves.

Shows the decode-time verb of a method, step(), and a set that is the same for all heads (their
mean, as in the paper).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zipvl import Plan, Policy, StepView, View


@dataclass(repr=False)
class TOVA(Policy):
    """A cache of `budget` tokens a layer, chosen after prefill and kept at that size."""

    budget: int = 1024

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget is {self.budget}: give 1 or more")

    def plan(self, view: View) -> Plan:
        last = torch.tensor([view.length - 1])
        return Plan(cache=self.best(view.mass(last).mean(0)))

    def step(self, view: StepView) -> Plan:
        return Plan(cache=self.best(view.mass().mean(0)))

    def best(self, score: Tensor) -> Tensor | None:
        """Slots of the `budget` best by score [n], in order; None if all fit."""
        return score.topk(self.budget).indices.sort().values if len(score) > self.budget else None
