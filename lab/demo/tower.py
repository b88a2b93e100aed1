"""First stage of training: the vision tower alone, on single pictures with dense labels.

Every patch says whether a sticker covers it, which and in what colour. The three linear heads are
thrown away afterwards; without this stage the tower starves behind the decoder.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backgrounds import window
from .things import KINDS, NAMES, RADIUS, ROAM, TILT, Placed, colour_rgb, draw


@dataclass(frozen=True)
class Batch:
    """Pictures and what covers each patch of the tower's grid (-1: nothing, or unclear)."""

    pixels: Tensor  # [n, 3, S, S], normalised to [-1, 1]
    kind: Tensor  # int64 [n, N]
    colour: Tensor  # int64 [n, N]
    covered: Tensor  # [n, N]: 1, 0, or -1 where a patch holds only a sticker's rim


def uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng) * (high - low) + low


def place(n: int, rng: torch.Generator) -> tuple[Placed, Tensor]:
    """Random stickers, their colours a little off the pure ones, and the colours' indices [n]."""
    colour = torch.randint(len(NAMES), (n,), generator=rng)
    rgb = colour_rgb(list(NAMES))[colour] + 0.03 * torch.randn(n, 3, generator=rng)
    placed = Placed(
        kind=torch.randint(len(KINDS), (n,), generator=rng),
        rgb=rgb.clamp(0, 1),
        x=uniform(n, 0.5 - ROAM, 0.5 + ROAM, rng),
        y=uniform(n, 0.5 - ROAM, 0.5 + ROAM, rng),
        radius=uniform(n, *RADIUS, rng),
        angle=uniform(n, -TILT, TILT, rng),
    )
    return placed, colour


def backgrounds(tiles: Tensor, n: int, side: int, rng: torch.Generator) -> Tensor:
    """Random windows of random tiles, mirrored half the time. # [n, 3, side, side]"""
    chosen = tiles[torch.randint(len(tiles), (n,), generator=rng)]
    x, y = uniform(n, -1, 1, rng), uniform(n, -1, 1, rng)
    zoom = uniform(n, 0.5, 1.0, rng)
    picture = window(chosen, x, y, zoom, side)
    mirror = (torch.rand(n, 1, 1, 1, generator=rng) < 0.5).float()
    return picture * mirror + picture.flip(3) * (1 - mirror)


def pictures(tiles: Tensor, n: int, side: int, grid: int, rng: torch.Generator) -> Batch:
    """n pictures, an eighth of them without a sticker."""
    picture, (placed, colour) = backgrounds(tiles, n, side, rng), place(n, rng)
    placed.kind[: n // 8] = -1
    picture, cover = draw(picture, placed)
    share = F.avg_pool2d(cover, side // grid).flatten(1)  # [n, N]
    clear = share > 0.15
    covered = torch.where(clear, 1.0, torch.where(share < 0.02, 0.0, -1.0))
    grain = uniform(n, 0, 0.03, rng).view(n, 1, 1, 1) * torch.randn(picture.shape, generator=rng)
    return Batch(
        pixels=(picture + grain).clamp(0, 1) * 2 - 1,
        kind=torch.where(clear, placed.kind[:, None], -1),
        colour=torch.where(clear, colour[:, None], -1),
        covered=covered,
    )


class Heads(nn.Module):
    """Linear readings of the tower's features, for training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS))
        self.colour = nn.Linear(width, len(NAMES))
        self.covered = nn.Linear(width, 1)

    def forward(self, features: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss and the share of right patches of features [n, N, C]."""
        on, known = batch.kind >= 0, batch.covered >= 0
        kind, colour = self.kind(features[on]), self.colour(features[on])
        covered = self.covered(features).squeeze(-1)[known]
        loss = (
            F.cross_entropy(kind, batch.kind[on])
            + F.cross_entropy(colour, batch.colour[on])
            + F.binary_cross_entropy_with_logits(covered, batch.covered[known])
        )
        right = {
            "kind": (kind.argmax(1) == batch.kind[on]).float().mean().item(),
            "colour": (colour.argmax(1) == batch.colour[on]).float().mean().item(),
            "covered": ((covered > 0).float() == batch.covered[known]).float().mean().item(),
        }
        return loss, right
