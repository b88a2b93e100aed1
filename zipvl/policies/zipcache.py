"""ZipCache (arXiv 2405.14256): a fixed share of the tokens at 4 bits, the others at 2.

Prefill is dense and nothing is dropped. Salient tokens are the best by attention mass over the
number of probe rows that can see them; probes are the most recent `probes` of the prompt and as
many random rows. While decoding, after every `interval` new tokens the newest query sorts these.
Phase: the cache, behind a dense prefill and while decoding. What leaves: bits, no token.
Source: the authors' code. Deviations: one set for all key/value heads, as their tokenwise steps
span the heads; mass is divided by the count of probe rows, as their text says, not of all rows; a
token is quantised once, where theirs turns the whole cache back and quantises it again each time;
no random row is drawn twice.
"""

from dataclasses import dataclass

from torch import Tensor

from ..model.cache_quant import KVBits, as_bits, zipcache
from ..policy import Plan, Policy, StepView, View, check
from .zipvl import probe_rows


@dataclass(repr=False)
class ZipCache(Policy):
    """60 % of the tokens stored at 4 bits, the rest at 2; 5 % + 5 % probe rows, as published."""

    ratio: float = 0.6
    probes: float = 0.05
    interval: int = 100
    seed: int = 0
    kv_bits: KVBits = (4, 2)

    def __post_init__(self) -> None:
        ratio, probes, interval = self.ratio, self.probes, self.interval
        check(0 < ratio <= 1, f"ratio is {ratio}: give the share at the larger bits, up to 1")
        check(0 < probes <= 0.5, f"probes is {probes}: give a share of the rows, at most 0.5")
        check(interval >= 1, f"interval is {interval}: give 1 new token or more")
        self.kv_bits = as_bits(self.kv_bits)
        check(len(self.kv_bits) > 0, "kv_bits is missing: give one or two bit widths, such as 4/2")
        self.storage = zipcache(self.kv_bits, interval)

    def probe(self, view: View) -> Tensor:
        """Rows [P], sorted."""
        count = max(1, round(self.probes * view.length))
        return probe_rows(view, count, count, self.seed)

    def plan(self, view: View) -> Plan:
        rows = self.probe(view)
        return Plan(precise=self.best(view.mass(rows).mean(0) / view.seen(rows).clamp(min=1)))

    def step(self, view: StepView) -> Plan:
        if not view.due:
            return Plan()
        return Plan(precise=self.best(view.mass()[:, -view.due :].mean(0)))

    def best(self, score: Tensor) -> Tensor:
        """Sorted indices of the salient tokens by score [n]."""
        return score.topk(max(1, round(self.ratio * len(score)))).indices.sort().values
