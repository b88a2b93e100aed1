"""StreamingLLM (arXiv 2309.17453): the first few tokens, the "sinks", and a window of recent ones.

Prefill is dense; the cache holds sinks and window, and while decoding the window's oldest token
leaves for each new one. No scores.
Phase: the cache, behind a dense prefill and at each decode step. What leaves: the middle.
Source: paper and code. Deviation: keys are cached after RoPE at original positions, as
KVCache-Factory and kvpress do. The authors rotate at every step by places inside the cache, which
matters beyond the trained context.
"""

from dataclasses import dataclass

import torch

from ..policy import Plan, Policy, StepView, View, check


@dataclass(repr=False)
class StreamingLLM(Policy):
    """The first 4 and the newest 1020 tokens stay in the cache, the paper's main setting."""

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        check(self.sinks >= 0, f"sinks is {self.sinks}: give 0 or more")
        check(self.window >= 1, f"window is {self.window}: give 1 or more")

    def plan(self, view: View) -> Plan:
        n, full = view.length, self.sinks + self.window
        if n <= full:
            return Plan(room=full - n + 1)
        return Plan(cache=torch.cat((view.every[: self.sinks], view.every[-self.window :])), room=1)

    def step(self, view: StepView) -> Plan:
        if view.length <= self.sinks + self.window:
            return Plan()
        old = view.positions.masked_fill(view.positions < self.sinks, torch.iinfo(torch.int32).max)
        return Plan(leave=old.argmin(dim=1, keepdim=True))
