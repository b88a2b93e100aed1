"""SnapKV (arXiv 2404.14469): the prompt's last `window` tokens vote for what stays in the cache.

Prefill is dense. Attention from the window is summed over its rows and pooled along the prompt, so
that neighbours of a heavy token stay too; each key/value head keeps the window and its best others.
Nothing is evicted while decoding.
Phase: the cache, once, behind a dense prefill. What leaves: tokens, by key/value head.
Source: the authors' code. Deviations: the query heads that share a key/value head vote by their
mean, and the cache holds G heads (the authors' code first repeats keys to H).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View, check, choice

POOLS: dict[str, Callable[..., Tensor]] = {"max": F.max_pool1d, "avg": F.avg_pool1d}


@dataclass(repr=False)
class SnapKV(Policy):
    """The last 32 tokens vote, max-pooled over 7, for 1024 a layer: the LongBench setting."""

    budget: int = 1024
    window: int = 32
    kernel: int = 7
    pool: str = "max"
    summary: int = 0  # each run of so many others stays as one slot, their mean

    def __post_init__(self) -> None:
        budget, window, kernel = self.budget, self.window, self.kernel
        check(window >= 1, f"window is {window}: give 1 or more")
        check(budget >= window, f"budget is {budget}: it must hold the window of {window}")
        check(kernel >= 1 and kernel % 2 == 1, f"kernel is {kernel}: give an odd number of tokens")
        choice("pool", self.pool, tuple(POOLS))
        check(self.summary >= 0, f"summary is {self.summary}: give tokens a slot, or 0 for none")

    def plan(self, view: View) -> Plan:
        if view.length <= self.budget:
            return Plan()
        old = view.length - self.window
        window = torch.arange(old, view.length, device=view.k.device)
        votes = view.by_group(view.mass(window)[:, :old])  # [G, old]
        votes = POOLS[self.pool](votes, self.kernel, 1, self.kernel // 2)
        best = votes.topk(self.budget - self.window).indices.sort().values
        kept = torch.cat((best, window.expand(len(best), -1)), dim=1)
        return Plan(cache=kept, summary=self.summary)
