"""A bank of the frozen tower's features: thousands of single frames of every thing and of none.

The decoder's training clips are put together from it, so that no step renders or encodes pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from zipvl.vision.encoder import VisionTower

from .things import KINDS, NAMES, Thing, colour_rgb, draw
from .tower import backgrounds, place

EMPTY = len(KINDS) * len(NAMES)  # the row group of frames without a sticker


@dataclass(frozen=True)
class Bank:
    """Features of `each` frames of every thing, one group after another, then the empty ones."""

    features: Tensor  # float16 [rows, N, C]
    each: int
    empty: int

    def rows(self, groups: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A random row of each group. # int64, shape of `groups`"""
        size = np.where(groups == EMPTY, self.empty, self.each)
        return torch.from_numpy(groups * self.each + (rng.random(groups.shape) * size).astype(int))


def group(thing: Thing) -> int:
    return KINDS.index(thing.kind) * len(NAMES) + NAMES.index(thing.colour)


@torch.no_grad()
def build(tower: VisionTower, tiles: Tensor, each: int, side: int, rng: torch.Generator) -> Bank:
    """A bank over `tiles`; an eighth of the frames are drawn at double size and shrunk."""
    empty = 24 * each
    groups = torch.cat([torch.arange(EMPTY).repeat_interleave(each), torch.full((empty,), EMPTY)])
    parts = []
    for i, part in enumerate(tqdm(groups.split(256), desc="bank", mininterval=10)):
        size = 2 * side if i % 8 == 0 else side
        placed, _ = place(len(part), rng)
        kind = torch.where(part < EMPTY, part // len(NAMES), -1)
        rgb = colour_rgb(list(NAMES))[part % len(NAMES)]
        rgb = rgb + 0.03 * torch.randn(rgb.shape, generator=rng)
        placed.kind[:], placed.rgb[:] = kind, rgb.clamp(0, 1)
        picture, _ = draw(backgrounds(tiles, len(part), size, rng), placed)
        if size != side:
            picture = F.interpolate(picture, (side, side), mode="bicubic", antialias=True)
        grain = torch.rand(len(part), 1, 1, 1, generator=rng) * 0.03
        picture = picture + grain * torch.randn(picture.shape, generator=rng)
        parts.append(tower(picture.clamp(0, 1) * 2 - 1).half())
    return Bank(torch.cat(parts), each, empty)
