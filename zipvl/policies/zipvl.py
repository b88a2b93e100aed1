"""ZipVL (arXiv 2410.08584 v2, ICCV 2025): each layer keeps as many tokens as cover `tau` of its
attention mass, attends among those only, and caches their keys and values only.

Letters: T tokens, H query heads, P probe rows, p kept tokens.
Where the paper is silent or is not followed:
  threshold  on probe rows the total mass is their number, so Eq. 6 compares with tau x the total
  heads      one set a layer, from the mean over query heads
  always     text keeps the prompt's text tokens in every layer (a token left out attends to nothing
             there, and the question must); last keeps the last token; none is the paper's letter
  divisor    nnz of Eq. 7 counts probe rows; `all` divides by n - j, as the authors' ZipCache code
`kv_bits=4` stores what is kept at 4 bits; `kv_bits=4/2` drops nothing: kept tokens are stored at 4
bits and the others at 2, which is the paper's first version (policies/zipvl_quant.py).
"""

import torch
from torch import Tensor

from ..engine.storage import FULL, KVBits, Storage, as_bits, zipcache
from ..policy import FILLS, Plan, Policy, View

ALWAYS = ("text", "last", "none")
DIVISORS = ("probes", "all", "none")


class ZipVL(Policy):
    """tau 0.975 as in the paper's main results; 64 most recent + 64 random probe rows. With
    kv_bits, `interval` new tokens at a time are quantised."""

    kv_bits: tuple[int, ...] = ()  # full precision
    interval = 100

    def __init__(self, tau: float = 0.975, recent: int = 64, random: int = 64, always: str = "text",
                 divisor: str = "probes", fill: str = "zero", seed: int = 0,
                 kv_bits: KVBits = None, interval: int = 100):  # fmt: skip
        check(tau > 0, f"tau is {tau}: give a share of the attention mass above 0")
        check(min(recent, random) >= 0 < recent + random, "recent + random must be 1 probe or more")
        check(always in ALWAYS, f"always is {always!r}: use one of {', '.join(ALWAYS)}")
        check(divisor in DIVISORS, f"divisor is {divisor!r}: use one of {', '.join(DIVISORS)}")
        check(fill in FILLS, f"fill is {fill!r}: use one of {', '.join(FILLS)}")
        self.tau, self.recent, self.random, self.seed = tau, recent, random, seed
        self.always, self.divisor, self.fill = always, divisor, fill
        if kv_bits is not None:
            self.kv_bits, self.interval = as_bits(kv_bits), interval
            check(interval >= 1, f"interval is {interval}: give 1 new token or more")

    @property
    def storage(self) -> Storage:
        return zipcache(self.kv_bits, self.interval) if self.kv_bits else FULL

    def probe(self, view: View) -> Tensor | None:
        """Rows [P]: the most recent and, fresh in every layer, random others; all if T is small."""
        if self.keeps_all():
            return None
        old = max(0, view.length - self.recent)
        chance = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
        some = torch.randperm(old, generator=chance)[: self.random].sort().values
        return torch.cat((some, torch.arange(old, view.length)))

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

    def precise(self, layer: int, mass: Tensor, state: dict) -> Tensor | None:
        """Eq. 6 and 8 for new tokens; the newest query sees them all, so Eq. 7 changes nothing."""
        if self.keeps_all():
            return None
        mass = mass.mean(0)
        return mass.topk(self.budget(mass)).indices.sort().values

    def keeps_all(self) -> bool:
        return self.tau >= 1

    def budget(self, mass: Tensor) -> int:
        """Eq. 6: the smallest p whose p largest masses reach tau of the total."""
        exact = torch.float32 if mass.device.type == "mps" else torch.float64  # MPS has no float64
        largest = mass.to(exact).sort(descending=True).values.cumsum(0)
        return min(len(mass), int((largest < self.tau * largest[-1]).sum()) + 1)

    def score(self, view: View, mass: Tensor) -> Tensor:
        """Eq. 7: mass [T] over `columns`, so that early tokens gain nothing by being seen often."""
        return mass / self.columns(view)

    def columns(self, view: View) -> Tensor:
        """[T]: how many rows could look at each token."""
        if self.divisor == "all":
            return torch.arange(view.length, 0, -1, device=view.k.device)
        if self.divisor == "none" or view.seen is None:
            return torch.ones_like(view.positions)
        return view.seen.clamp(min=1)

    def forced(self, view: View) -> Tensor:
        """[T] bool: tokens that stay whatever their score."""
        keep = torch.zeros_like(view.is_visual)
        if self.always == "text":
            keep = ~view.is_visual
        if self.always != "none":
            keep[-1] = True
        return keep


class ZipVLPlus(ZipVL):
    """ZipVL in which a token left out receives the output of the nearest earlier kept token."""

    def __init__(self, tau: float = 0.975, recent: int = 64, random: int = 64, always: str = "text",
                 divisor: str = "probes", seed: int = 0, kv_bits: KVBits = None,
                 interval: int = 100):  # fmt: skip
        super().__init__(tau, recent, random, always, divisor, "previous", seed, kv_bits, interval)


def check(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)
