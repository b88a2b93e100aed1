"""SCOPE (arXiv 2412.13649): the prompt's part of the cache is frozen, the answer's has a budget.

SnapKV (snapkv.py) chooses `budget` tokens of the prompt, which then stay. Of the answer's tokens
the `recent` newest stay and those others to which the newest one attends most, as many as
  slide          make `answer` tokens in all
  adaptive       have been made, divided by `delta`
  discontinuous  the same, and tokens leave at every `delta`-th step only
Phase: the cache, behind a dense prefill and while decoding; only answers longer than that notice.
What leaves: by key/value head, of the prompt what SnapKV lets go, then tokens of the answer.
Source: paper and code (whose count of steps is one for all layers and sequences: not copied).
Deviations: those of SnapKV; steps are counted from the prompt's end, and so is `delta`.
"""

from dataclasses import dataclass, replace

import torch

from ..policy import Plan, StepView, View, check, choice
from .snapkv import SnapKV

STRATEGIES = ("slide", "adaptive", "discontinuous")


@dataclass(repr=False)
class SCOPE(SnapKV):
    """2048 tokens of the prompt and 512 of the answer, 256 of them the newest, as published."""

    budget: int = 2048
    answer: int = 512
    recent: int = 256
    strategy: str = "slide"
    delta: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.recent >= 1, f"recent is {self.recent}: give 1 or more")
        check(self.answer >= self.recent, f"answer is {self.answer}: it must hold `recent` tokens")
        check(self.delta >= 1, f"delta is {self.delta}: give 1 step or more")
        choice("strategy", self.strategy, STRATEGIES)

    def plan(self, view: View) -> Plan:
        view.notes[view.layer] = 0
        last = max(0, view.notes.new - 1)  # the step before the last
        wait = self.delta if self.strategy == "discontinuous" else 1
        return replace(super().plan(view), room=self.most(last) + wait)

    def most(self, made: int) -> int:
        """Tokens of the answer that may stay when so many have been made."""
        return self.answer if self.strategy == "slide" else self.recent + made // self.delta

    def step(self, view: StepView) -> Plan:
        made = view.notes[view.layer] = view.notes[view.layer] + 1
        many = view.length - min(self.budget, view.notes.prompt) - self.most(made)
        if many <= 0 or (self.strategy == "discontinuous" and made % self.delta):
            return Plan()
        at, newest = view.positions, view.positions.amax(dim=1, keepdim=True)
        stays = (at < view.notes.prompt) | (at > newest - self.recent)
        score = view.by_group(view.mass()).masked_fill(stays, torch.inf)
        return Plan(leave=score.topk(many, largest=False).indices.sort().values)
