"""zipvl-stream: ZipVL's threshold, and what a layer leaves out never comes back. Ours.

Each layer ranks the tokens that are still there as zipvl does (zipvl.py) and finds by `tau` how
many it needs. The others leave the stream: no later layer projects, attends to or caches them, and
none runs its MLP on them. So linear layers, attention and cache all shrink with depth, where the
paper's form leaves the linear layers whole. Positions stay the original ones, probe rows are drawn
among the tokens that are left, the prompt's text and its last token never leave (`always`).

Why it harms less (docs/experiments.md): a token that stays behind without its update has a stale
state, which every later layer reads; one that is gone is missing, no more. Since each layer keeps
tau of what is left, tau must be higher than the paper's for the same share.
UniPrefill (arXiv 2605.06221) drops across sublayers up to its next full-attention layer.
"""

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..policy import Plan, View, check, choice
from .zipvl import ZipVL


@dataclass(repr=False)
class ZipVLStream(ZipVL):
    """As zipvl, and what a layer leaves out is gone for all later layers, MLPs included."""

    tau: float = 0.99
    first: int = 0  # layers before which nothing leaves
    floor: float = 0.0  # share of the prompt that every layer keeps at least
    fill: str = field(default="zero", init=False, repr=False)  # nobody is there to receive it

    def __post_init__(self) -> None:
        choice("always", self.always, ("text", "last"))
        check(self.first >= 0, f"first is {self.first}: give 0 layers or more")
        check(0 <= self.floor <= 1, f"floor is {self.floor}: give a share of the prompt, 0 to 1")
        super().__post_init__()

    def plan(self, view: View) -> Plan:
        return super().plan(view) if view.layer >= self.first else Plan()

    def keep(self, view: View, score: Tensor, p: int) -> Plan:
        plan = super().keep(view, score, max(p, math.ceil(self.floor * view.notes.prompt)))
        return replace(plan, stream=plan.attend)
