"""Keyformer (arXiv 2403.09054): heavy hitters by a noisy softmax that flattens with the answer.

Scores are sums over all prompt rows of softmax((logits + Gumbel noise) / tau), noise afresh for
each element; each decode step adds its row. tau rises from 1 to 2 over the answer.
Phase: the cache, behind a dense prefill and at every `every`-th decode step.
What leaves: by key/value head, all but the newest, `recent` of the budget, and the best by score.
Source: paper and code, the form whose steps free memory (there scores of a batch are one sum).
Deviations: heads that share keys vote by their mean; tokens leave right behind the prompt (in that
form first at the eighth step); noise is a hash, the same on every device and in blocks of any size.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.cache import moved
from ..policy import Plan, Policy, StepView, View, check


@dataclass(repr=False)
class Keyformer(Policy):
    """60 % of the prompt stay, 30 % of them the newest, as published."""

    ratio: float = 0.6
    recent: float = 0.3
    every: int = 8
    noise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(0 <= self.recent <= 1, f"recent is {self.recent}: give a share, 0 to 1")
        check(self.every >= 1, f"every is {self.every}: give 1 step or more")

    def plan(self, view: View) -> Plan:
        sums: dict[int, Tensor] = {}  # by the first of some query heads, [h, T]
        for heads, rows, x in view.logits():
            lines = torch.arange(heads.start, heads.stop, device=x.device)[:, None] * view.length
            probs = self.softmax(view, x, lines + rows, 0)
            sums[heads.start] = sums.get(heads.start, 0) + probs.sum(1)
        score = view.by_group(torch.cat([sums[h] for h in sorted(sums)]))  # [G, T]
        count, recent = self.counts(view)
        old = score.masked_fill(view.every >= view.length - recent, torch.inf)
        kept = old.topk(count).indices.sort().values
        view.notes[view.layer] = score.gather(1, kept), 1
        return Plan(cache=kept, room=self.every)

    def step(self, view: StepView) -> Plan:
        (score, made), leave = view.notes[view.layer], None
        x, (count, recent) = view.logits, self.counts(view)
        probs = self.softmax(view, x, torch.arange(len(x), device=x.device), made)
        score = torch.nn.functional.pad(score, (0, 1)) + view.by_group(probs)  # [G, n]
        if made % self.every == 0:
            newest = view.positions.amax(dim=1, keepdim=True)
            old = score.masked_fill(view.positions > newest - recent, torch.inf)
            leave = old.topk(view.length - count, largest=False).indices.sort().values
            score = moved(score, leave)
        view.notes[view.layer] = score, made + 1
        return Plan(leave=leave)

    def counts(self, view: View | StepView) -> tuple[int, int]:
        """The budget, and how many of it are the newest."""
        count = max(1, round(self.ratio * view.notes.prompt))
        return count, round(self.recent * count)

    def softmax(self, view: View | StepView, x: Tensor, lines: Tensor, made: int) -> Tensor:
        """Of logits x [..., n] in rows numbered `lines` [...], `made` tokens into the answer."""
        if self.noise:
            keys = random.Random(f"{self.seed} {view.layer} {made}")
            columns = torch.arange(x.shape[-1], device=x.device) ^ keys.getrandbits(31)
            x = x + gumbel(lines ^ keys.getrandbits(31), columns)
        return (x / (1 + made / max(1, view.notes.new))).softmax(dim=-1)


def gumbel(lines: Tensor, columns: Tensor) -> Tensor:
    """[..., n] standard Gumbel noise, an element for each of the lines [...] and columns [n]."""
    bits = mixed(mixed(lines.int())[..., None] ^ mixed(columns.int())) >> 9 & 0x7FFFFF
    return ((bits.float() + 0.5) / 2**23).log_().neg_().log_().neg_()


def mixed(x: Tensor) -> Tensor:  # a hash of each int32
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        x = (x ^ (x >> shift & (1 << 32 - shift) - 1)) * factor
    return x
