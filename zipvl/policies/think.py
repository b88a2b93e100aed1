"""ThinK (arXiv 2407.21018): older keys lose the channels that the newest queries hardly use.

Phase: prefill is dense; the cache is thinned when it is made, new tokens are stored whole.
What leaves: for each key/value head the key channels c of least |q_c| |k_c|, the size of their
share in the scores: q_c over the last `window` queries, k_c over the cached tokens. `ratio` is the
share KEPT, 1 - lambda of the paper; the last `window` tokens keep all channels, values stay whole.
With a `budget`, SnapKV (snapkv.py) first chooses the tokens.
Source: equation 6 and the authors' code, which thins what SnapKV has left. model/cache_thin.py
stores it: less memory, no less time.
Deviations: q_c^2 is the mean over the query heads that share a key/value head (the authors' code
repeats keys to all heads); SnapKV's pooling is that of snapkv.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.cache_thin import Thin
from ..policy import Plan, Policy, View, check
from .snapkv import SnapKV


@dataclass(repr=False)
class ThinK(Policy):
    """60 % of the key channels stay for all but the last 32 tokens: the authors' lambda of 0.4."""

    ratio: float = 0.6
    window: int = 32
    budget: int = 0  # tokens that SnapKV leaves in a layer; 0: all

    def __post_init__(self) -> None:
        ratio, window, budget = self.ratio, self.window, self.budget
        check(0 < ratio <= 1, f"ratio is {ratio}: give the share to keep, above 0 and up to 1")
        check(window >= 1, f"window is {window}: give 1 or more")
        check(budget >= 0, f"budget is {budget}: give tokens that stay, or 0 for all")
        self.tokens = SnapKV(budget, window) if budget else Policy()
        self.storage = self.thin = Thin(window, ratio)

    def plan(self, view: View) -> Plan:
        plan = self.tokens.plan(view)
        return replace(plan, channels=self.channels(view, plan.cache))

    def channels(self, view: View, cached: Tensor | None) -> Tensor:
        """[G, D'] the best of the keys' channels, in order, by the `cached` tokens [G, K]."""
        k = view.k
        if cached is not None:
            k = k.gather(1, cached[:, :, None].expand(-1, -1, k.shape[2]))
        squares = view.queries(view.every[-self.window :]).float().square().sum(1)  # [H, D]
        q = view.by_group(squares).sqrt()
        size = q * torch.linalg.vector_norm(k, dim=1, dtype=torch.float32)  # [G, D]
        return size.topk(self.thin.width(k.shape[2])).indices.sort().values
