"""What a method must beat: tokens that leave by a curve set beforehand, by a rule of one's choice;
a cache of random tokens.

python generate.py --method lab/experiments/controls.py:Schedule:kept=1/0.5,by=random -p "Why?"
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, inf

from zipvl.policies.zipvl import Selection
from zipvl.policy import Plan, Policy, View, check, choice

RULES = ("mass", "last", "knorm", "random")


@dataclass(repr=False, kw_only=True)
class Schedule(Selection):
    """Of the prompt, the shares `kept` go through layers from the first to the last, with slashes
    (spread evenly over the layers); who leaves is gone for all later layers, as in zipvl-stream.

    by    mass: as zipvl ranks, by probe rows; last: by the last token's attention alone (FastV,
          PyramidDrop); knorm: keys of large norm leave (arXiv 2406.11430), no probe; random
    after layers before which the rule is mass, whatever `by` is
    """

    kept: str = "1/0.5"
    by: str = "mass"
    after: int = 0
    sinks: int = 1  # as zipvl-stream's
    divisor: str = field(default="probes", init=False, repr=False)
    fill: str = field(default="zero", init=False, repr=False)

    def __post_init__(self) -> None:
        self.curve = [float(share) for share in str(self.kept).split("/")]
        check(all(0 < share <= 1 for share in self.curve), f"kept is {self.kept}: give shares")
        choice("by", self.by, RULES)
        choice("always", self.always, ("text", "last"))
        super().__post_init__()

    def plan(self, view: View) -> Plan:
        share = self.curve[view.layer * len(self.curve) // view.num_layers]
        p = round(share * view.notes.prompt)
        if p >= view.length:
            return Plan()
        rule = self.by if view.layer >= self.after else "mass"
        never = self.forced(view) | (view.positions < self.sinks)
        score = self.ranked(view, rule).masked_fill(never, inf)
        plan = self.keep(view, score, max(1, p))
        return replace(plan, stream=plan.attend)

    def ranked(self, view: View, rule: str) -> Tensor:
        """The score [T] of every token by a rule."""
        if rule == "random":
            chance = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
            return torch.rand(view.length, generator=chance).to(view.k.device)
        if rule == "knorm":
            return -view.k.norm(dim=-1).mean(0)
        if rule == "last":
            return view.mass(torch.tensor([view.length - 1])).mean(0)
        rows = self.probe(view)
        return self.score(view, view.mass(rows).mean(0), rows)


@dataclass(repr=False)
class RandomCache(Policy):
    """Dense prefill, then the first token, the prompt's text and random others stay, `ratio` in
    all: what any choice among cached tokens must beat."""

    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep")

    def plan(self, view: View) -> Plan:
        chance = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
        score = torch.rand(view.length, generator=chance).to(view.k.device)
        score = score.masked_fill(~view.is_visual | (view.positions == 0), inf)
        count = max(1, round(self.ratio * view.length))
        return Plan(cache=score.topk(count).indices.sort().values)
