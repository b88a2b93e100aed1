"""zipvl-stream: ZipVL's threshold, and what a layer leaves out never comes back. Ours.

Each layer ranks the tokens that are still there as zipvl does (zipvl.py) and finds by its threshold
how many it needs. The others leave the stream: neither this layer nor a later one attends to them,
caches them or runs its MLP on them. So linear layers, attention and cache all shrink with depth,
where the paper's form leaves the linear layers whole. Positions stay the original ones, probe rows
are drawn among the tokens that are left. The prompt's text and its last token never leave, and
neither does its first: heads that look for nothing look at it (the attention sink, arXiv
2309.17453), but not yet in the first layers, which would let it go.

`tau` is the share of attention that is kept through all layers together: each of the L layers that
choose keeps tau ** (1 / L), so that one number means the same in models of any depth (0.7 is 0.956
a layer with 8 layers, 0.987 with 28). Half as many probe rows as the paper's draw as well here,
since every layer chooses among the choice of those before it.

Phase: prefill, all of it, and the caches. What leaves: tokens, for good.
A token that is gone does less harm than one that stays behind without its update: later layers read
its stale state (docs/experiments.md measures it). UniPrefill (arXiv 2605.06221) drops tokens for
the layers up to its next full-attention layer.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..policy import Plan, StepView, View, check, choice
from .zipvl import ZipVL, covering


@dataclass(repr=False)
class ZipVLStream(ZipVL):
    """Recommended: as zipvl, and what a layer leaves out is gone for all later ones, MLPs too."""

    tau: float = 0.7  # of all layers together
    first: int = 0  # layers before which nothing leaves
    floor: float = 0.0  # share of the prompt that every layer keeps at least
    sinks: int = 1  # first tokens of the prompt that never leave
    recent: int = field(default=32, kw_only=True)
    random: int = field(default=32, kw_only=True)
    fill: str = field(default="zero", init=False, repr=False)  # nobody is there to receive it

    def __post_init__(self) -> None:
        choice("always", self.always, ("text", "last"))
        check(self.first >= 0, f"first is {self.first}: give 0 layers or more")
        check(self.sinks >= 0, f"sinks is {self.sinks}: give 0 tokens or more")
        check(0 <= self.floor <= 1, f"floor is {self.floor}: give a share of the prompt, 0 to 1")
        super().__post_init__()

    def plan(self, view: View) -> Plan:
        return super().plan(view) if view.layer >= self.first else Plan()

    def budget(self, view: View | StepView, mass: Tensor) -> Tensor:
        return covering(mass, self.tau ** (1 / max(1, view.num_layers - self.first)))

    def forced(self, view: View) -> Tensor:
        return super().forced(view) | (view.positions < self.sinks)

    def keep(self, view: View, score: Tensor, p: int | Tensor) -> Plan:
        least = math.ceil(self.floor * view.notes.prompt)
        plan = super().keep(view, score, torch.as_tensor(p).clamp(min=least))
        return replace(plan, stream=plan.attend)
