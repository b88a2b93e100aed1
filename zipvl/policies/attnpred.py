"""AttentionPredictor (arXiv 2502.04077): a step reads the blocks of keys that a history foretells.

Phase: decoding, fetch. The history is the last 64 attention rows of a layer and key/value head, of
every 16 slots the largest number. By the row it foretells, a step reads `sinks`, `local` and the
best blocks between, `budget` slots in all; of what it read, every `every` steps of all, the step's
own row joins the history. Layers below `dense` read all. What leaves: nothing, reads shrink.
Source: the authors' code, which masks. This is the baseline without training: the next row is the
last one, or with `ema` below 1 a mean, where a row weighs 1 - ema of the one behind it.
Deviations: query heads of a key/value head share a history, their mean; blocks are never cut.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Notes, Plan, Policy, StepView, View, check

ROWS, BLOCK = 64, 16  # of a history; slots that are one number of a row


@dataclass(repr=False)
class AttnPredLast(Policy):
    """Steps read 1024 slots, chosen by the row before: the paper's sizes, without training."""

    budget: int = 1024
    sinks: int = 64
    local: int = 64
    dense: int = 2
    every: int = 5
    ema: float = 1.0

    def __post_init__(self) -> None:
        sinks, least = self.sinks, self.sinks + self.local + BLOCK
        check(sinks in range(0, sinks + 1, BLOCK), f"sinks is {sinks}: give a multiple of {BLOCK}")
        for name, value, low in (("local", self.local, 1), ("budget", self.budget, least),
                                 ("dense", self.dense, 0), ("every", self.every, 1)):  # fmt: skip
            check(value >= low, f"{name} is {value}: give {low} or more")
        check(0 < self.ema <= 1, f"ema is {self.ema}: give a weight above 0 and up to 1")

    def plan(self, view: View) -> Plan:
        if view.layer >= self.dense:
            rows = defaultdict[int, list[Tensor]](list)
            for heads, _, logits in view.logits(view.every[-ROWS:]):
                rows[heads.start].append(pooled(logits.softmax(-1)))
            history = [torch.cat(some, dim=1) for some in rows.values()]
            view.notes[view.layer] = view.by_group(torch.cat(history))  # [G, 64, blocks]
        return Plan()

    def step(self, view: StepView) -> Plan:
        if view.layer < self.dense:
            return Plan()
        n, old = view.length, view.notes[view.layer]
        slots = None if n <= self.budget else self.slots(n, old, view.notes)
        if slots is None or (n - view.notes.prompt) % self.every == 0:
            row = view.mass()  # [H, n]
        else:
            mass = view.mass(slots)  # [H, m]
            at = slots.repeat_interleave(len(mass) // len(slots), dim=0)
            row = mass.new_zeros(len(mass), n).scatter_(1, at, mass)
        row = view.by_group(pooled(row))[:, None]  # [G, 1, blocks]
        old = F.pad(old, (0, row.shape[2] - old.shape[2]))  # a block may be new
        view.notes[view.layer] = torch.cat((old, row), dim=1)[:, -ROWS:]
        return Plan(attend=slots)

    def slots(self, n: int, history: Tensor, notes: Notes) -> Tensor:
        """[G, m] that a step reads of n, in order."""
        first, last = self.sinks // BLOCK, (n - self.local) // BLOCK  # the blocks between
        every = torch.arange(n, device=history.device).expand(len(history), -1)
        count = (self.budget - self.sinks - n) // BLOCK + last  # less sinks and what is behind last
        best = self.foretell(history[:, :, first:last], notes).topk(count).indices.sort().values
        some = every[0, self.sinks : last * BLOCK].view(-1, BLOCK)[best].flatten(1)
        return torch.cat((every[:, : self.sinks], some, every[:, last * BLOCK :]), dim=1)

    def foretell(self, history: Tensor, notes: Notes) -> Tensor:
        """The row [G, blocks] that follows `history` [G, rows, blocks]."""
        weight = (1 - self.ema) ** torch.arange(history.shape[1], device=history.device).flip(0)
        return (history * weight[:, None]).sum(1) / weight.sum()


def pooled(x: Tensor) -> Tensor:
    """x [..., n] -> [..., blocks]: the largest of every BLOCK slots, from slot 0 on."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1)
