"""TOVA (arXiv 2401.06104): when the cache is full, the token the newest one looks at least leaves.

Shows the decode-time verb of a method, step(), and a set that is the same for all heads (their
mean, as in the paper).
"""

from dataclasses import dataclass

import torch

from zipvl import Plan, Policy, StepView, View


@dataclass(repr=False)
class TOVA(Policy):
    """A cache of `budget` tokens a layer, chosen after prefill and kept at that size."""

    budget: int = 1024

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget is {self.budget}: give 1 or more")

    def plan(self, view: View) -> Plan:
        if view.length <= self.budget:
            return Plan(room=self.budget - view.length + 1)
        score = view.mass(torch.tensor([view.length - 1])).mean(0)  # [T]
        return Plan(cache=score.topk(self.budget).indices.sort().values, room=1)

    def step(self, view: StepView) -> Plan:
        if view.length <= self.budget:
            return Plan()
        return Plan(leave=view.mass().mean(0).argmin(keepdim=True))
