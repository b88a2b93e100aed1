"""PrefixKV (arXiv 2412.03409): layers share one cache budget by how fast their attention adds up.

A layer ranks tokens by column sums over all prompt rows, mean over heads; going down the rank, more
and more of its attention is covered. One share p, the same for all layers, is covered by as many
tokens as the budget has. The paper bisects for p; here the tokens of all layers with least covered
before them are taken, which is what p gives.
Phase: the cache, behind each layer of a dense prefill: a token leaves as soon as no later layer can
bring it back, so at most the budget and one layer are held.
What leaves: keys and values, the same tokens for all heads; `sinks` and the last token never.
Source: paper and code: the tokens that always stay are part of the budget, and a layer keeps them
beside as many as cover p. `profile`: the authors' default, each layer's share is that of a few
other prompts (python -m lab.calibrate).
Deviations: original positions (theirs follow layer 0's length); `ratio` stays (theirs leaves);
`text` keeps all text, which the letter lets leave; nothing leaves while decoding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UsageError
from ..policy import Notes, Plan, Policy, View, check
from .profile import read_profile


@dataclass(repr=False)
class PrefixKV(Policy):
    """Half of the cache stays in the mean over layers."""

    ratio: float = 0.5
    profile: str = ""
    sinks: int = 1
    text: bool = False
    shares: tuple[float, ...] = field(default=(), init=False, repr=False)  # of the profile

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(self.sinks >= 0, f"sinks is {self.sinks}: give 0 or more")
        self.shares = read_profile(self.profile, self.ratio) if self.profile else ()

    def plan(self, view: View) -> Plan:
        score, index = view.mass().mean(0), torch.arange(view.length, device=view.k.device)
        always = (index < self.sinks) | (index == view.length - 1)
        always = always | ~view.is_visual if self.text else always
        order = score.masked_fill(always, torch.inf).sort(descending=True, stable=True).indices
        rank = index - always.sum()  # along `order`; below 0: those that stay anyway
        view.notes["layers"] = view.num_layers
        if self.profile:
            best = (rank < 0) | (index < round(self.share(view) * view.length))
            return Plan(cache=torch.empty_like(best).scatter_(0, order, best))
        rest = score.sort().values.cumsum(0).flip(0)  # [T] received by the i-th best and all behind
        left = (rest / rest[0])[rank.clamp(min=0)].masked_fill(rank < 0, torch.inf)
        view.notes[view.layer] = order, left
        return Plan()

    def trim(self, layer: int, notes: Notes) -> dict[int, Tensor] | None:
        """Of the layers so far, the budget's number of tokens with most left to cover."""
        budget = round(self.ratio * notes.prompt * notes["layers"])
        if self.profile or (layer + 1) * notes.prompt <= budget:
            return None
        ranks: list[tuple[Tensor, Tensor]] = [notes[i] for i in range(layer + 1)]
        left, slots = torch.cat([part for _, part in ranks]), {}
        first = left.sort(descending=True, stable=True).indices[:budget]
        best = left.isinf().index_fill(0, first, True)
        parts = best.split([len(part) for _, part in ranks])
        counts = torch.stack([part.sum() for part in parts]).tolist()
        for i, (n, (order, part)) in enumerate(zip(counts, ranks, strict=True)):
            if n < len(order):
                slots[i] = torch.searchsorted(order.sort().values, order[:n].sort().values)
                notes[i] = order[:n], part[:n]
        return slots

    def share(self, view: View) -> float:
        if len(self.shares) != view.num_layers:
            raise UsageError(
                f"profile {self.profile} has {len(self.shares)} layers, and the model "
                f"{view.num_layers}: make one of this model with python -m lab.calibrate"
            )
        return self.shares[view.layer]
