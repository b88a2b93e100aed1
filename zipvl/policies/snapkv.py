"""SnapKV (arXiv 2404.14469): the prompt's last `window` tokens vote for what stays in the cache.

Prefill is dense. Attention from the window is summed over its rows and pooled along the prompt, so
that neighbours of a heavy token stay too; each key/value head keeps the window and its best others.
Nothing is evicted while decoding.
Deviations: the query heads that share a key/value head vote by their mean, and the cache holds G
heads (the authors' code first repeats keys to H); original positions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View
from .selection import check

POOLS: dict[str, Callable[..., Tensor]] = {"max": F.max_pool1d, "avg": F.avg_pool1d}


class SnapKV(Policy):
    """window 32, max-pooling over 7, 1024 tokens a layer: the authors' LongBench setting."""

    def __init__(self, budget: int = 1024, window: int = 32, kernel: int = 7, pool: str = "max"):
        check(window >= 1, f"window is {window}: give 1 or more")
        check(budget >= window, f"budget is {budget}: it must hold the window of {window}")
        check(kernel >= 1 and kernel % 2 == 1, f"kernel is {kernel}: give an odd number of tokens")
        check(pool in POOLS, f"pool is {pool!r}: use one of {', '.join(POOLS)}")
        self.budget, self.window, self.kernel, self.pool = budget, window, kernel, pool

    def probe(self, view: View) -> Tensor | None:
        if view.length <= self.budget:
            return None
        return torch.arange(view.length - self.window, view.length)

    def plan(self, view: View) -> Plan:
        if view.mass is None:
            return Plan()
        old = view.length - self.window
        votes = view.mass[:, :old].unflatten(0, (view.k.shape[0], -1)).mean(1)  # [G, old]
        votes = POOLS[self.pool](votes, self.kernel, 1, self.kernel // 2)
        best = votes.topk(self.budget - self.window).indices.sort().values
        recent = torch.arange(old, view.length, device=best.device).expand(len(best), -1)
        return Plan(cache=torch.cat((best, recent), dim=1))
