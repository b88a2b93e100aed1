"""PrefixKV (arXiv 2412.03409): layers share one cache budget by how fast their attention adds up.

Layers rank tokens by column sums over all prompt rows, mean over heads. One share p of a layer's
attention, the same for all, is covered by as many tokens as the budget has. The paper bisects for
p; here the tokens of all layers that have least covered before them are taken.
Phase: the cache. Behind each layer of a dense prefill tokens leave that no later layer can bring
back, so at most the budget and one layer are held. While decoding a layer keeps its share of all
tokens: if it has one too many, the slot `distance` before the end of the prompt's part leaves.
What leaves: keys and values, the same for all heads; not `sinks` and, in prefill, the last token.
Source: paper and code; what always stays is part of the budget, beside as many as cover p.
Deviations: original positions (theirs follow layer 0's length); `text`, if told to, never leaves.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..policy import Notes, Plan, Policy, StepView, View, check
from .profile import counted, read_profile


@dataclass(repr=False)
class PrefixKV(Policy):
    """`ratio` of the cache stays, mean over layers; the authors' --ratio is what leaves."""

    ratio: float = 0.5
    profile: str = ""  # the authors' default: a file of shares that other prompts gave
    sinks: int = 1
    text: bool = False
    distance: int = 25
    shares: tuple[float, ...] = field(default=(), init=False, repr=False)  # of the profile

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(self.sinks >= 0, f"sinks is {self.sinks}: give 0 or more")
        check(self.distance >= 1, f"distance is {self.distance}: give 1 or more")
        self.shares = read_profile(self.profile, self.ratio) if self.profile else ()

    def plan(self, view: View) -> Plan:
        score, index = view.mass().mean(0), view.every
        always = (index < self.sinks) | (index == view.length - 1) | (~view.is_visual & self.text)
        order = score.masked_fill(always, torch.inf).sort(descending=True, stable=True).indices
        rank = index - always.sum()  # along `order`; below 0: those that stay anyway
        view.notes["layers"], view.notes["visual"] = view.num_layers, view.is_visual
        if self.profile:
            count = max(counted(self.shares, view, self.profile), min(view.length, self.sinks + 1))
            best = torch.empty_like(always).scatter_(0, order, (rank < 0) | (index < count))
            room = math.ceil(count * view.notes.new / view.length) + 1
            return Plan(cache=best, room=None if self.text else room)
        rest = score.sort().values.cumsum(0).flip(0)  # [T] received by the i-th best and all behind
        left = (rest / rest[0])[rank.clamp(min=0)].masked_fill(rank < 0, torch.inf)
        view.notes[view.layer] = order, left
        return Plan()

    def trim(self, layer: int, notes: Notes) -> dict[int, Tensor] | None:
        budget = round(self.ratio * notes.prompt * notes["layers"])
        if self.profile or (layer + 1) * notes.prompt <= budget:
            return None
        ranks, slots = [notes[i] for i in range(layer + 1)], {}
        left = torch.cat([part for _, part in ranks])
        first = left.argsort(descending=True, stable=True)[:budget]  # of all layers so far
        parts = left.isinf().index_fill(0, first, True).split([len(order) for order, _ in ranks])
        counts = torch.stack([part.sum() for part in parts]).tolist()
        for i, (n, (order, part)) in enumerate(zip(counts, ranks, strict=True)):
            if n < len(order):
                slots[i] = torch.searchsorted(order.sort().values, order[:n].sort().values)
                notes[i] = order[:n], part[:n]
        return slots

    def step(self, view: StepView) -> Plan:
        n, T, places, key = view.length, view.notes.prompt, view.positions[0], ("step", view.layer)
        kept, made = view.notes.get(key, (n - 1, 0))  # of the prompt, and of the answer
        view.notes[key] = kept, made + 1
        if n * T - kept * (T + made + 1) < T:  # n - kept / T of all tokens seen < 1
            return Plan()
        at = kept - self.distance if kept > self.distance else kept // 2
        text = (places < T) & ~view.notes["visual"][places.clamp(max=T - 1)] & self.text
        order, slots = places.masked_fill(text | (places < self.sinks), -1).topk(n - at)
        return Plan(leave=slots.gather(0, (order >= 0).sum()[None] - 1))  # the earliest of these
