"""StreamingLLM (arXiv 2309.17453): the first few tokens, the "sinks", and a window of recent ones.

Prefill is dense; the cache holds sinks and window, and while decoding the window's oldest token
leaves for each new one. No scores.
Deviation: keys are cached after RoPE at original positions, as KVCache-Factory and kvpress do. The
authors rotate at every step by places inside the cache, which matters beyond the trained context.
"""

import torch
from torch import Tensor

from ..policy import Plan, Policy, View
from .selection import check


class StreamingLLM(Policy):
    """4 sinks and 1020 recent tokens, a cache of 1024 as in the paper's main setting."""

    def __init__(self, sinks: int = 4, window: int = 1020):
        check(sinks >= 0, f"sinks is {sinks}: give 0 or more")
        check(window >= 1, f"window is {window}: give 1 or more")
        self.sinks, self.window = sinks, window

    def plan(self, view: View) -> Plan:
        slots = self.ends(view.length)
        return Plan(cache=None if slots is None else slots.to(view.k.device))

    def evict(self, layer: int, slots: int, state: dict, probs: Tensor | None) -> Tensor | None:
        return self.ends(slots)

    def ends(self, count: int) -> Tensor | None:
        """Of `count` tokens in order, the sinks and the window; None if that is all of them."""
        if count <= self.sinks + self.window:
            return None
        return torch.cat((torch.arange(self.sinks), torch.arange(count - self.window, count)))
