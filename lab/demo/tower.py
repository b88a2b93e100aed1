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

EMPTY = 3 / 8  # of the pictures have no sticker


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


def backgrounds(tiles: Tensor, n: int, side: int, rng: torch.Generator,
                widest: float = 1.0) -> Tensor:  # fmt: skip
    """Random windows of random tiles, up to `widest` tiles wide, mirrored half the time.

    # [n, 3, side, side]
    """
    chosen = tiles[torch.randint(len(tiles), (n,), generator=rng)]
    x, y = uniform(n, -1, 1, rng), uniform(n, -1, 1, rng)
    zoom = uniform(n, 0.5, widest, rng)
    picture = window(chosen, x, y, zoom, side)
    mirror = (torch.rand(n, 1, 1, 1, generator=rng) < 0.5).float()
    return picture * mirror + picture.flip(3) * (1 - mirror)


def cluttered(tiles: Tensor, n: int, side: int, rng: torch.Generator) -> Tensor:
    """Backgrounds that no photograph shows, half of them: what looks like a sticker, and is none.

    Tiles repeated, in strange colours, and blots of one over another, with hard edges.
    # [n, 3, side, side]
    """
    plain = backgrounds(tiles, n, side, rng)
    one, other = (strange(backgrounds(tiles, n, side, rng, widest=3.0), rng) for _ in range(2))
    cells = int(torch.randint(2, 10, (), generator=rng))
    cloud = torch.rand(n, 1, cells, cells, generator=rng)
    cloud = F.interpolate(cloud, size=(side, side), mode="bicubic")
    blots = ((cloud - uniform(n, 0.4, 0.8, rng).view(n, 1, 1, 1)) * 4 * side / cells).sigmoid()
    wild = one * (1 - blots) + other * blots
    return torch.where(torch.rand(n, 1, 1, 1, generator=rng) < 0.5, plain, wild)


def strange(picture: Tensor, rng: torch.Generator) -> Tensor:
    """Each picture [n, 3, S, S] with channels mixed, contrast and brightness changed."""
    n = len(picture)
    mix = torch.eye(3) + 0.6 * torch.randn(n, 3, 3, generator=rng)
    mix = mix * uniform(n, 0.3, 1.5, rng).view(n, 1, 1)
    middle = torch.rand(n, 3, 1, 1, generator=rng)
    return (torch.einsum("nij,njhw->nihw", mix, picture - 0.5) + middle).clamp(0, 1)


def pictures(tiles: Tensor, n: int, side: int, grid: int, rng: torch.Generator,
             clutter: bool = False) -> Batch:  # fmt: skip
    """n pictures, three eighths of them without a sticker."""
    picture = (cluttered if clutter else backgrounds)(tiles, n, side, rng)
    placed, colour = place(n, rng)
    placed.kind[: int(EMPTY * n)] = -1
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
        worst = self.covered(features[: int(EMPTY * len(features))]).amax(dim=(1, 2))
        loss = (
            F.cross_entropy(kind, batch.kind[on])
            + F.cross_entropy(colour, batch.colour[on])
            + F.binary_cross_entropy_with_logits(covered, batch.covered[known])
            + F.softplus(worst).mean()  # one patch taken for a sticker spoils a whole frame
        )
        right = {
            "kind": (kind.argmax(1) == batch.kind[on]).float().mean().item(),
            "colour": (colour.argmax(1) == batch.colour[on]).float().mean().item(),
            "covered": ((covered > 0).float() == batch.covered[known]).float().mean().item(),
        }
        return loss, right
