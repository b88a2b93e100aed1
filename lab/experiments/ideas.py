"""Variants of zipvl+ that cost about the same, to see which part of the method is worth changing.

    python generate.py --method lab/experiments/ideas.py:ValueNorm:tau=0.96 -p "What happens?"

Each class changes one thing. `fill=zero` gives the same change of the paper's method.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zipvl.policies.fixed import Fixed
from zipvl.policies.zipvl import ZipVL
from zipvl.policy import Plan, View


class Idea(ZipVL):
    """ZipVL with the options that the experiments vary."""

    def __init__(self, tau: float = 0.975, always: str = "text", fill: str = "previous",
                 divisor: str = "probes", recent: int = 64, random: int = 64):  # fmt: skip
        super().__init__(tau, recent, random, always, divisor, fill)


class ValueNorm(Idea):
    """Which tokens: mass x norm of the value, per head: what a token adds, not how often it is
    read (Guo et al. 2406.12335)."""

    def plan(self, view: View) -> Plan:
        if view.mass is None:
            return Plan()
        view.state["norms"] = view.v.float().norm(dim=-1)  # [G, T]
        view.state["heads"] = view.mass
        return super().plan(view)

    def score(self, view: View, mass: Tensor) -> Tensor:
        heads, norms = view.state["heads"], view.state["norms"]  # [H, T], [G, T]
        weighted = heads.unflatten(0, (len(norms), -1)) * norms[:, None]
        return super().score(view, weighted.flatten(0, 1).mean(0))


class HeadMax(Idea):
    """Which tokens: the largest mass of any head, so that a specialised head is heard."""

    def plan(self, view: View) -> Plan:
        if view.mass is not None:
            view.state["largest"] = view.mass.amax(0)
        return super().plan(view)

    def score(self, view: View, mass: Tensor) -> Tensor:
        return super().score(view, view.state["largest"])


class Pooled(Idea):
    """Which tokens: scores are max-pooled over 5 neighbours, as SnapKV does."""

    def score(self, view: View, mass: Tensor) -> Tensor:
        return F.max_pool1d(super().score(view, mass)[None], 5, 1, 2)[0]


class FirstDense(Idea):
    """The first two layers are dense, as in FastV."""

    first = 2

    def probe(self, view: View) -> Tensor | None:
        return super().probe(view) if view.layer >= self.first else None


class KeepRecent(Idea):
    """The last 64 tokens and the first 4 always stay."""

    def forced(self, view: View) -> Tensor:
        keep = super().forced(view)
        keep[:4] = keep[-64:] = True
        return keep


class QuestionProbes(Idea):
    """Probes are the prompt's tokens behind the last visual one: the question. No random rows."""

    def probe(self, view: View) -> Tensor | None:
        visual = view.is_visual.nonzero()
        if self.keeps_all() or not len(visual):
            return super().probe(view)
        return torch.arange(min(int(visual[-1]) + 1, view.length - 1), view.length)


class SqrtProbes(Idea):
    """As many probe rows as 128 at 1,024 tokens, growing with the square root of the prompt."""

    def probe(self, view: View) -> Tensor | None:
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


class Profile(Fixed):
    """A fixed ratio for each layer, `ratios` with slashes: adaptive to layers, not to prompts."""

    def __init__(self, ratios: str = "0.4", always: str = "text", fill: str = "zero"):
        self.ratios, self.kept = ratios, [float(r) for r in str(ratios).split("/")]
        super().__init__(sum(self.kept) / len(self.kept), always=always, fill=fill)

    def plan(self, view: View) -> Plan:
        ratio = self.kept[view.layer]
        return Fixed(ratio, always=self.always, divisor=self.divisor, fill=self.fill).plan(view)
