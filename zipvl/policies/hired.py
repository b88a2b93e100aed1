"""HiRED (arXiv 2408.10945): the vision tower's own attention says which visual tokens enter.

Each picture may bring `ratio` of the patches of its crops. The whole picture gets the share `alpha`
of these. Its tiles share the rest by where the patches lie that the class token prefers in the
tower's first block. Within a crop, the class token's attention in the last block used decides.
  quadrant   a patch speaks for the tile that covers its middle, which is the paper's intention
  reference  the authors' code: for one of as many bands of rows as there are tiles

Phase: before layer 0, so prefill and the caches of all layers.
What leaves: visual tokens, and all vectors that end a row. Text stays.
Source: the authors' repository, for LLaVA-1.5 and LLaVA-NeXT.
Deviations: original positions (`renumber` counts those that enter, as the authors do); a tower
without a class token votes with all its patches; of a video each frame keeps `ratio`, and so do the
tiles of a model that leaves the whole picture out; kept tokens stay in the model's order, row by
row across tiles; where the model cuts padding away or shrinks tiles, scores are treated alike, and
a tile with fewer tokens than its share keeps all.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import Plan, Policy, PromptView, check, choice

MODES = ("quadrant", "reference")


@dataclass(repr=False)
class HiRED(Policy):
    """20 % of a picture's patches enter, half of them of the whole picture, as published."""

    ratio: float = 0.2
    alpha: float = 0.5
    mode: str = "quadrant"
    renumber: bool = False

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(0 <= self.alpha <= 1, f"alpha is {self.alpha}: give a share from 0 to 1")
        choice("mode", self.mode, MODES)

    def start(self, prompt: PromptView) -> Plan:
        kept = ~prompt.is_visual
        kept[-1:] = True  # makes the first answer token, were it visual
        for (rows, cols), crops in zip(prompt.notes.origin.tiles, prompt.crops(), strict=True):
            first, last = prompt.notes.origin.received.T
            counts = [max(1, int(self.ratio * len(tokens))) for tokens in crops]
            if rows and len(crops[0]):
                counts = self.shares(first[crops[0]], rows, cols)
            for tokens, count in zip(crops, counts, strict=True):
                best = last[tokens].topk(min(count, len(tokens))).indices
                kept.index_fill_(0, tokens[best], True)
        return Plan(stream=kept, renumber=self.renumber)

    def shares(self, first: Tensor, rows: int, cols: int) -> list[int]:
        """How many tokens of the whole picture, whose N patches received `first` [N] in the first
        block, and of each of its tiles."""
        N, tiles, side = len(first), rows * cols, math.isqrt(len(first))
        total = int((1 + tiles) * N * self.ratio)
        whole = min(int(total * self.alpha), N)
        hot = first.topk(int(N * (1 - self.alpha))).indices
        row, col = (2 * (hot // side) + 1, 2 * (hot % side) + 1)  # of a middle, in half patches
        tile = row * rows // (2 * side) * cols + col * cols // (2 * side)
        if self.mode == "reference":
            tile = hot * tiles // N
        heat = torch.bincount(tile, minlength=tiles).tolist()
        rest = min(total - whole, tiles * N)
        return [whole, *(min(rest * h // max(1, len(hot)), N) for h in heat)]
