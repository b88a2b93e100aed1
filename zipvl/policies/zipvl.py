"""ZipVL (arXiv 2410.08584) and what is made of its parts.

zipvl        version 2 (ICCV 2025): each layer keeps as many tokens as cover `tau` of its attention
             mass, attends among those only, and caches their keys and values only
zipvl+       ours: a token left out of a layer's attention receives the output of the nearest
             earlier kept token instead of nothing; same tokens, same attention work
zipvl-quant  version 1 (October 2024): nothing leaves the cache; kept tokens are stored at 4 bits,
             all others at 2, in ZipCache's form (model/cache_quant.py), and decoding attends over
             everything; after every `interval` new tokens the newest query sorts these the same
             way (Algorithm 1), until then they wait in full precision
fixed        one ratio for all layers: the paper's own ablation; `ratio=0.7,kv_bits=4/2` is that of
             its cache, ZipCache with a hand-set ratio
random       as many tokens as `fixed`, drawn at random: what any method that looks at attention has
             to beat

Where the paper is silent or is not followed:
  threshold  on probe rows the total mass is their number, so Eq. 6 compares with tau x the total;
             among new tokens with tau x their own mass, not tau x 100
  heads      one set a layer, from the mean over query heads
  always     the prompt's text tokens stay in every layer, because a token left out attends to
             nothing there, and the question must; `none` is the paper's letter
  divisor    nnz of Eq. 7 counts probe rows
  count      `ratio` is the share kept in all, the `always` set included, so that a ratio measured
             with `zipvl` can be given here; where that set alone is larger, it is what is kept
  steps      version 1's text on its quantiser is not public; the authors' earlier ZipCache, which
             its table names, is taken; each set of tokens has its own steps
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, inf

from ..model.batch import sent
from ..model.cache_quant import KVBits, as_bits, zipcache
from ..policy import FILLS, Plan, Policy, StepView, View, check, choice

ALWAYS, DIVISORS = ("text", "last", "none"), ("probes", "all", "none")


@dataclass(repr=False, kw_only=True)
class Selection(Policy):
    """Probe rows rank the tokens of each layer; a subclass says how many stay."""

    drops = True  # what is not kept leaves the cache; with two bit widths it stays, in fewer bits
    recent: int = 64  # probe rows: the most recent ones, and
    random: int = 64  # others drawn afresh in every layer, without replacement, by `seed`
    seed: int = 0
    always: str = "text"  # text: the prompt's text tokens stay, and the last; last: that; none
    divisor: str = "probes"  # what mass is divided by: the probe rows that see the token;
    #   all rows that see it (`all`, n - j, as the authors' ZipCache code does); 1 (`none`)
    fill: str = "zero"  # what left-out tokens receive (policy.py, Plan)
    kv_bits: KVBits = None  # 4: what is kept is stored at 4 bits; 4/2: nothing is dropped, kept
    #   tokens are stored at 4 bits, others at 2
    interval: int | None = 100  # new tokens that are quantised at a time; None without kv_bits
    summary: int = (
        0  # each run of so many tokens that leave the cache stays as one slot, their mean
    )

    def __post_init__(self) -> None:
        check(self.summary >= 0, f"summary is {self.summary}: give tokens a slot, or 0 for none")
        check(
            not (self.summary and self.kv_bits),
            "summary and kv_bits: summaries are held in full precision, give one of the two",
        )
        check(
            min(self.recent, self.random) >= 0 < self.recent + self.random,
            "recent + random must be 1 probe or more",
        )
        choice("always", self.always, ALWAYS)
        choice("divisor", self.divisor, DIVISORS)
        choice("fill", self.fill, FILLS)
        if self.kv_bits is None:
            self.interval = None
            return
        self.kv_bits, wait = as_bits(self.kv_bits), self.interval or 0
        check(wait >= 1, f"interval is {wait}: give 1 new token or more")
        self.storage, self.drops = zipcache(self.kv_bits, wait), len(self.kv_bits) == 1
        self.step = None if self.drops else self.sort_new

    def keeps_all(self) -> bool:
        return True

    def budget(self, view: View | StepView, mass: Tensor) -> int | Tensor:
        """How many tokens of the layer stay, by mass [T]; a tensor stays on its device."""
        return len(mass)

    def plan(self, view: View) -> Plan:
        if self.keeps_all():
            return Plan()
        rows = self.probe(view)
        mass = view.mass(rows).mean(0)  # [T]  Eq. 5, mean over heads
        p = self.budget(view, mass)  # Eq. 6
        score = self.score(view, mass, rows)  # [T]  Eq. 7
        return self.keep(view, score, p)  # Eq. 8

    def probe(self, view: View) -> Tensor:
        """Rows [P], sorted; all rows if T is no more than recent + random."""
        return probe_rows(view, self.recent, self.random, self.seed)

    def score(self, view: View, mass: Tensor, rows: Tensor) -> Tensor:
        """Eq. 7: mass [T] from `rows` over how many rows could look at each token, so that early
        tokens gain nothing by being seen often."""
        if self.divisor == "all":
            return mass / torch.arange(view.length, 0, -1, device=mass.device)
        return mass if self.divisor == "none" else mass / view.seen(rows).clamp(min=1)

    def forced(self, view: View) -> Tensor:
        """[T] bool: tokens that stay whatever their score."""
        keep = ~view.is_visual if self.always == "text" else torch.zeros_like(view.is_visual)
        if self.always != "none":
            keep[-1:] = True  # a slice: a number would be sent to the device
        return keep

    def keep(self, view: View, score: Tensor, p: int | Tensor) -> Plan:
        """Eq. 8: the p best by score [T], and those that stay anyway, as a mask [T]."""
        order = score.sort(descending=True, stable=True).indices
        best = torch.arange(len(score), device=score.device) < p
        kept = self.forced(view) | torch.empty_like(best).scatter_(0, order, best)
        if self.drops:
            return Plan(attend=kept, cache=kept, fill=self.fill, summary=self.summary)
        return Plan(attend=kept, precise=kept, fill=self.fill)

    def sort_new(self, view: StepView) -> Plan:
        """Eq. 6 and 8 for new tokens; the newest query sees them all, so Eq. 7 changes nothing."""
        if not view.due or self.keeps_all():
            return Plan()
        mass = view.mass()[:, -view.due :].mean(0)
        return Plan(precise=mass.topk(int(self.budget(view, mass))).indices.sort().values)


def probe_rows(view: View, recent: int, others: int, seed: int) -> Tensor:
    """The `recent` last rows of a view and `others` drawn by `seed`, the same on every device: [P],
    sorted."""
    old, chance = max(0, view.length - recent), random.Random(seed * 1000 + view.layer)
    some = sorted(chance.sample(range(old), min(old, others)))
    return sent(torch.tensor(some + list(range(old, view.length))), view.k.device)


@dataclass(repr=False)
class ZipVL(Selection):
    """The paper (v2): as many tokens a layer as hold tau of its attention; 64 + 64 probe rows."""

    tau: float = 0.975  # as in the paper's main results

    def __post_init__(self) -> None:
        check(
            0 < self.tau <= 1,
            f"tau is {self.tau}: give a share of the attention mass, above 0 and up to 1",
        )
        super().__post_init__()

    def keeps_all(self) -> bool:
        return self.tau >= 1

    def budget(self, view: View | StepView, mass: Tensor) -> Tensor:
        return covering(mass, self.tau)


def covering(mass: Tensor, tau: float) -> Tensor:
    """Eq. 6: the smallest p whose p largest masses [T] reach tau of the total, int64 []."""
    exact = torch.float32 if mass.device.type == "mps" else torch.float64  # MPS has no float64
    largest = mass.sort(descending=True).values.to(exact).cumsum(0)
    return ((largest < tau * largest[-1]).sum() + 1).clamp(max=len(mass))


@dataclass(repr=False, kw_only=True)
class ZipVLPlus(ZipVL):
    """As zipvl, and tokens left out receive the output of the nearest earlier kept token."""

    fill: str = field(default="previous", init=False)


@dataclass(repr=False, kw_only=True)
class ZipVLQuant(ZipVL):
    """The paper's version 1: nothing is dropped, kept tokens at 4 bits, others at 2."""

    kv_bits: KVBits = (4, 2)  # as published; one width is for all tokens

    def __post_init__(self) -> None:
        bits = as_bits(self.kv_bits)
        check(len(bits) > 0, "kv_bits is missing: give one or two bit widths, such as 4/2")
        self.kv_bits = (bits * 2)[:2]
        super().__post_init__()


@dataclass(repr=False)
class Fixed(Selection):
    """One ratio for all layers, 0.4, near the 42.1 % of the paper's ablation on Video-MME."""

    ratio: float = 0.4

    def __post_init__(self) -> None:
        check(
            0 < self.ratio <= 1,
            f"ratio is {self.ratio}: give the share to keep, above 0 and up to 1",
        )
        super().__post_init__()

    def keeps_all(self) -> bool:
        return self.ratio >= 1

    def budget(self, view: View | StepView, mass: Tensor) -> int:
        return max(1, round(self.ratio * len(mass)))

    def score(self, view: View, mass: Tensor, rows: Tensor) -> Tensor:
        return super().score(view, mass, rows).masked_fill(self.forced(view), inf)


@dataclass(repr=False, kw_only=True)
class Random(Fixed):
    """As many as fixed, drawn by fresh noise in every layer, the same for a seed and a length."""

    recent: int = field(default=64, init=False, repr=False)  # no probes, and nothing about them
    random: int = field(default=64, init=False, repr=False)
    divisor: str = field(default="none", init=False)
    kv_bits: KVBits = field(default=None, init=False)
    interval: int | None = field(default=100, init=False)

    def plan(self, view: View) -> Plan:
        if self.keeps_all():
            return Plan()
        chance = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
        noise = sent(torch.rand(view.length, generator=chance), view.k.device)
        score = noise.masked_fill(self.forced(view), inf)
        return self.keep(view, score, self.budget(view, noise))
