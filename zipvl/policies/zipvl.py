"""ZipVL (arXiv 2410.08584 v2, ICCV 2025): each layer keeps as many tokens as cover `tau` of its
attention mass, attends among those only, and caches their keys and values only.

Where the paper is silent or is not followed:
  threshold  on probe rows the total mass is their number, so Eq. 6 compares with tau x the total
  heads      one set a layer, from the mean over query heads
  always     the prompt's text tokens stay in every layer; `none` is the paper's letter
  divisor    nnz of Eq. 7 counts probe rows
policies/selection.py explains the options.
"""

import torch
from torch import Tensor

from ..engine.storage import KVBits
from ..policy import Plan, View
from .selection import Selection, check


class ZipVL(Selection):
    """tau 0.975 as in the paper's main results; 64 most recent + 64 random probe rows."""

    def __init__(self, tau: float = 0.975, recent: int = 64, random: int = 64, always: str = "text",
                 divisor: str = "probes", fill: str = "zero", seed: int = 0,
                 kv_bits: KVBits = None, interval: int = 100):  # fmt: skip
        check(tau > 0, f"tau is {tau}: give a share of the attention mass above 0")
        self.tau = tau
        super().__init__(recent, random, always, divisor, fill, seed, kv_bits, interval)

    def keeps_all(self) -> bool:
        return self.tau >= 1

    def probe(self, view: View) -> Tensor | None:
        return None if self.keeps_all() else super().probe(view)

    def plan(self, view: View) -> Plan:
        if self.keeps_all() or view.mass is None:
            return Plan()
        mass = view.mass.mean(0)  # [T]  Eq. 5, mean over heads
        p = self.budget(mass)
        best = self.score(view, mass).sort(descending=True, stable=True).indices[:p]  # [p]  Eq. 8
        kept = self.forced(view)
        kept[best] = True
        index = kept.nonzero()[:, 0]
        if len(self.kv_bits) == 2:
            return Plan(attend=index, precise=index, fill=self.fill)
        return Plan(attend=index, cache=index, fill=self.fill)

    def budget(self, mass: Tensor) -> int:
        """Eq. 6: the smallest p whose p largest masses reach tau of the total."""
        exact = torch.float32 if mass.device.type == "mps" else torch.float64  # MPS has no float64
        largest = mass.to(exact).sort(descending=True).values.cumsum(0)
        return min(len(mass), int((largest < self.tau * largest[-1]).sum()) + 1)

    def score(self, view: View, mass: Tensor) -> Tensor:
        """Eq. 7: mass [T] over `columns`, so that early tokens gain nothing by being seen often."""
        return mass / self.columns(view)

    def precise(self, layer: int, mass: Tensor, state: dict) -> Tensor | None:
        """Eq. 6 and 8 for new tokens; the newest query sees them all, so Eq. 7 changes nothing."""
        if self.keeps_all():
            return None
        mass = mass.mean(0)
        return mass.topk(self.budget(mass)).indices.sort().values
