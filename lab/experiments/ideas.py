"""Variants of zipvl+ that cost about the same, to see which part of the method is worth changing.

    python generate.py --method lab/experiments/ideas.py:ValueNorm:tau=0.96 -p "What happens?"

Each class changes one thing. `fill=zero` gives the same change of the paper's method.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zipvl.policies.zipvl import Fixed, ZipVL
from zipvl.policy import Plan, View


@dataclass(repr=False, kw_only=True)
class Idea(ZipVL):
    """ZipVL, with what helped most so far for left-out tokens."""

    fill: str = "previous"


class ByHeads(Idea):
    """Which tokens: by another score of the masses that the heads give them."""

    def plan(self, view: View) -> Plan:
        if self.keeps_all():
            return Plan()
        rows = self.probe(view)
        heads = view.mass(rows)  # [H, T]
        score = self.score(view, self.weigh(view, heads), rows)
        return self.keep(view, score, self.budget(view, heads.mean(0)))

    def weigh(self, view: View, heads: Tensor) -> Tensor:
        """[H, T] -> [T]."""
        return heads.mean(0)


class ValueNorm(ByHeads):
    """Which tokens: mass x norm of the value, per head: what a token adds, not how often it is
    read (Guo et al. 2406.12335)."""

    def weigh(self, view: View, heads: Tensor) -> Tensor:
        norms = view.v.float().norm(dim=-1)  # [G, T]
        weighted = heads.unflatten(0, (len(norms), -1)) * norms[:, None]
        return weighted.flatten(0, 1).mean(0)


class HeadMax(ByHeads):
    """Which tokens: the largest mass of any head, so that a specialised head is heard."""

    def weigh(self, view: View, heads: Tensor) -> Tensor:
        return heads.amax(0)


class Pooled(Idea):
    """Which tokens: scores are max-pooled over 5 neighbours, as SnapKV does."""

    def score(self, view: View, mass: Tensor, rows: Tensor) -> Tensor:
        return F.max_pool1d(super().score(view, mass, rows)[None], 5, 1, 2)[0]


class FirstDense(Idea):
    """The first two layers are dense, as in FastV."""

    first = 2

    def plan(self, view: View) -> Plan:
        return super().plan(view) if view.layer >= self.first else Plan()


class KeepRecent(Idea):
    """The last 64 tokens and the first 4 always stay."""

    def forced(self, view: View) -> Tensor:
        keep = super().forced(view)
        keep[:4] = keep[-64:] = True
        return keep


class QuestionProbes(Idea):
    """Probes are the prompt's tokens behind the last visual one: the question. No random rows."""

    def probe(self, view: View) -> Tensor:
        visual = view.is_visual.nonzero()
        if not len(visual):
            return super().probe(view)
        return torch.arange(min(int(visual[-1]) + 1, view.length - 1), view.length)


class SqrtProbes(Idea):
    """As many probe rows as 128 at 1,024 tokens, growing with the square root of the prompt."""

    def probe(self, view: View) -> Tensor:
        half = max(1, round(64 * math.sqrt(view.length / 1024)))
        rows = Idea(self.tau, recent=half, random=half)
        return rows.probe(view)


class FullCache(Idea):
    """Attention is sparse, but no token leaves the cache."""

    def plan(self, view: View) -> Plan:
        return replace(super().plan(view), cache=None)


class CacheOnly(Idea):
    """Attention is dense; only the kept tokens stay in the cache."""

    def plan(self, view: View) -> Plan:
        return replace(super().plan(view), attend=None)


@dataclass(repr=False, kw_only=True)
class Profile(Fixed):
    """A fixed ratio for each layer, `ratios` with slashes: adaptive to layers, not to prompts."""

    ratios: str = "0.4"
    ratio: float = field(default=0.4, init=False)  # their mean

    def __post_init__(self) -> None:
        self.kept = [float(r) for r in str(self.ratios).split("/")]
        self.ratio = sum(self.kept) / len(self.kept)
        super().__post_init__()

    def plan(self, view: View) -> Plan:
        one = Fixed(self.kept[view.layer], always=self.always, divisor=self.divisor, fill=self.fill)
        return one.plan(view)
