"""TidalDecode (arXiv 2410.05076): what one layer chooses to read is what later layers read.

Layers before `first` read the whole cache. Layer `first` does, too, and chooses the `budget` slots
of the largest logits, which is all that later layers read; the layer at the share `again` of the
depth reads everything and chooses anew. Recent tokens get no special treatment.
Phase: reading, while decoding. What leaves: nothing.
Source: paper and code: layers 2 and 13 of 32 (whose reference computes all logits and hides some).
Deviations: slots are chosen by key/value head, by the largest logit of its query heads or by their
mean (theirs has as many key heads); with few layers `again` is the one behind `first`.
"""

from dataclasses import dataclass

from ..policy import Plan, Policy, StepView, check, choice

VOTES = ("max", "mean")


@dataclass(repr=False)
class TidalDecode(Policy):
    """Layers read 256 slots, as in the authors' demo; up to 4096 in their LongBench runs."""

    budget: int = 256
    first: int = 2
    again: float = 0.4  # of the layers
    heads: str = "max"  # how the query heads of a key/value head vote

    def __post_init__(self) -> None:
        check(self.budget >= 1, f"budget is {self.budget}: give 1 slot or more")
        check(self.first >= 0, f"first is {self.first}: give a layer's number, from 0")
        check(0 <= self.again <= 1, f"again is {self.again}: give a share of the layers, 0 to 1")
        choice("heads", self.heads, VOTES)

    def step(self, view: StepView) -> Plan:
        if view.layer < self.first or view.length <= self.budget:
            return Plan()
        again = max(self.first + 1, round(self.again * view.num_layers))
        if view.layer not in (self.first, again):
            return Plan(attend=view.notes["read"])
        votes = view.logits.unflatten(0, (len(view.k), -1))  # [G, H/G, n]
        votes = votes.amax(1) if self.heads == "max" else votes.mean(1)
        view.notes["read"] = votes.topk(self.budget).indices.sort().values  # [G, K]
        return Plan()
