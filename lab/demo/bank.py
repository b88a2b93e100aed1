"""A bank of the frozen tower's features: thousands of single frames of every thing and of none.

The decoder's training clips are put together from it, so that no step renders or encodes pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from zipvl.vision.encoder import VisionTower

from .things import KINDS, NAMES, Thing, colour_rgb, draw
from .tower import backgrounds, cluttered, place

EMPTY = len(KINDS) * len(NAMES)  # the row group of frames without a sticker
HARD = EMPTY + 1  # and that of the empty ones that look most as if they had one
RARE = 240  # one empty frame in so many is hard


@dataclass(frozen=True)
class Bank:
    """Features of `each` frames of every thing, one group after another, then `empty` empty ones,
    then the hard ones."""

    features: Tensor  # float16 [rows, N, C]
    each: int
    empty: int

    def rows(self, groups: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A random row of each group. # int64, shape of `groups`"""
        starts = np.append(np.arange(HARD) * self.each, EMPTY * self.each + self.empty)
        sizes = np.diff(starts, append=len(self.features))
        return torch.from_numpy(
            starts[groups] + (rng.random(groups.shape) * sizes[groups]).astype(int)
        )


def group(thing: Thing) -> int:
    return KINDS.index(thing.kind) * len(NAMES) + NAMES.index(thing.colour)


@torch.no_grad()
def build(tower: VisionTower, covered: nn.Linear, tiles: Tensor, each: int, side: int,
          rng: torch.Generator, clutter: bool) -> Bank:  # fmt: skip
    """A bank over `tiles`; an eighth of the frames are drawn at double size and shrunk.

    `covered` is the head of tower.Heads that says where a sticker is: of each RARE empty frames
    the one where it is surest is a hard one. There are twice `each` of them.
    """
    groups = torch.cat(
        [torch.arange(EMPTY).repeat_interleave(each), torch.full((24 * each,), EMPTY)]
    )
    parts = []
    for i, part in enumerate(tqdm(groups.split(256), "bank", mininterval=10)):
        size = 2 * side if i % 8 == 0 else side
        parts.append(features(tower, part, tiles, size, side, rng, clutter))
    empty = torch.full((RARE,), EMPTY)
    for i in tqdm(range(2 * each), "hard", mininterval=10):
        size = 2 * side if i % 8 == 0 else side
        some = features(tower, empty, tiles, size, side, rng, clutter)
        surest = covered(some.float()).amax(dim=(1, 2)).argmax()
        parts.append(some[None, surest])
    return Bank(torch.cat(parts), each, 24 * each)


def features(tower: VisionTower, groups: Tensor, tiles: Tensor, size: int, side: int,
             rng: torch.Generator, clutter: bool) -> Tensor:  # fmt: skip
    """Features of a frame of each of `groups`, drawn at `size`. # float16 [n, N, C]"""
    placed, _ = place(len(groups), rng)
    rgb = colour_rgb(list(NAMES))[groups % len(NAMES)]
    rgb = rgb + 0.03 * torch.randn(rgb.shape, generator=rng)
    placed.kind[:], placed.rgb[:] = (
        torch.where(groups < EMPTY, groups // len(NAMES), -1),
        rgb.clamp(0, 1),
    )
    behind = (cluttered if clutter else backgrounds)(tiles, len(groups), size, rng)
    picture, _ = draw(behind, placed)
    if size != side:
        picture = F.interpolate(picture, (side, side), mode="bicubic", antialias=True)
    grain = torch.rand(len(groups), 1, 1, 1, generator=rng) * 0.03
    picture = picture + grain * torch.randn(picture.shape, generator=rng)
    return tower(picture.clamp(0, 1) * 2 - 1).half()
