"""SGL, "A Stitch in Time" (arXiv 2412.03324): a small model's whole answer ranks visual tokens.

The guide answers first, greedily. The attention that each visual token receives in all its layers
and heads, from the prompt behind the media and from every generated token, is added up. In the
model itself the `ratio` of the visual tokens with most of it go on into layer `depth` x layers, the
others are gone from there on. `guide` is the path of a smaller model with the same tokens, which
sees the pictures with its own tower. Without one the model guides itself: an oracle, which saves
nothing and says how good a guide can be.
Phase: prefill, and with it the cache of every later layer; nothing leaves while decoding.
What leaves: visual tokens, once. Text stays, original positions stay.
Source: paper and code; 0.4 and 0.4 are its script for InternVL2 2B and 26B.
Deviations: rows behind the last of several media; the early exit (SEE), which leaves the answer to
a guide that is sure, is not here: the published scripts run the large model always, too.
"""

from dataclasses import dataclass

from ..policy import Plan, Policy, StepView, View, check
from .pyramiddrop import best_visual
from .vlcache import behind


class Watcher(Policy):
    """Dense; notes the attention that each token of the prompt receives."""

    def plan(self, view: View) -> Plan:
        received = view.mass(behind(view, 1)).sum(0)  # [T]
        view.notes["received"] = view.notes.get("received", 0) + received
        return Plan()

    def step(self, view: StepView) -> Plan:
        view.notes["received"] += view.mass().sum(0)[: view.notes.prompt]
        return Plan()


@dataclass(repr=False)
class SGL(Policy):
    """40 % of the visual tokens from 40 % of the layers on; `guide` answers first, or the model."""

    ratio: float = 0.4
    depth: float = 0.4
    guide: str = ""

    scout = Watcher()

    def __post_init__(self) -> None:
        check(0 <= self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, from 0 to 1")
        check(0 <= self.depth < 1, f"depth is {self.depth}: give a share of the layers, below 1")

    def __repr__(self) -> str:
        return super().__repr__() if self.guide else super().__repr__().replace("guide=", "oracle")

    def plan(self, view: View) -> Plan:
        if view.layer != int(self.depth * view.num_layers):
            return Plan()
        count = (self.ratio * view.is_visual.sum()).floor()
        kept = best_visual(view.notes["received"], view.is_visual, count)
        return Plan(attend=kept, cache=kept, stream=kept)
