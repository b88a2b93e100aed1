"""The objects of the demo world: eight shapes and ten digits in eight colours, as stickers.

A sticker is a filled mask with a thin outline, so that it stands out from any background. All
drawing is done in batches of frames with torch, at any resolution.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS
COLOURS = {
    "red": (0.88, 0.08, 0.10),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (1.00, 0.93, 0.10),
    "green": (0.05, 0.62, 0.15),
    "blue": (0.08, 0.20, 0.90),
    "pink": (1.00, 0.40, 0.80),
    "white": (1.00, 1.00, 1.00),
    "black": (0.03, 0.03, 0.03),
}
NAMES = tuple(COLOURS)
ROAM = 0.12  # a sticker's centre stays this near to the frame's centre (share of the side)
RADIUS = (0.30, 0.36)
TILT = 0.12  # radians
REACH = 0.8  # a mask image spans [-1, 1] in units of radius / REACH: the sticker fills 0.8 of it


@dataclass(frozen=True)
class Thing:
    """One object: what it is and its colour."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS


@dataclass(frozen=True)
class Placed:
    """A batch of stickers on n frames; centre and radius in fractions of the frame's side."""

    kind: Tensor  # int64 [n], index into KINDS, -1 for no sticker in this frame
    rgb: Tensor  # [n, 3]
    x: Tensor  # [n]
    y: Tensor  # [n]
    radius: Tensor  # [n]
    angle: Tensor  # [n], radians


def colour_rgb(names: list[str]) -> Tensor:
    """RGB in [0, 1] of colour names. # [n, 3]"""
    return torch.tensor([COLOURS[name] for name in names])


def _polygon(radii: tuple[float, ...], turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (r * math.cos(turn + i * step), r * math.sin(turn + i * step)) for i, r in enumerate(radii)
    ]


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of the shapes that are polygons, within the unit circle."""
    a = 0.34
    corners = {
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": _polygon((1.0, 1.0, 1.0)),
        "star": _polygon((1.0, 0.42) * 5),
        "cross": [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
                  (-1, a), (-1, -a), (-a, -a)],
    }  # fmt: skip
    if kind != "heart":
        return corners[kind]
    turns = [2 * math.pi * i / 90 for i in range(90)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
                             - math.cos(4 * t)) / 16) for t in turns
    ]  # fmt: skip


def _mask(kind: str, side: int) -> Image.Image:
    """A filled shape or digit, white on black."""
    image = Image.new("L", (side, side), 0)
    pen, half = ImageDraw.Draw(image), side / 2

    def disc(radius: float, fill: int, dx: float = 0.0) -> None:
        r, c = radius * REACH * half, half + dx * REACH * half
        pen.ellipse((c - r, half - r, c + r, half + r), fill=fill)

    if kind in DIGITS:
        font = ImageFont.load_default(size=side * 1.1)
        pen.text((half, half), kind, 255, font, anchor="mm", stroke_width=max(1, side // 28))
    elif kind in ("circle", "ring", "moon"):
        disc(1.0, 255)
        if kind == "ring":
            disc(0.5, 0)
        if kind == "moon":
            disc(0.85, 0, 0.55)
    else:
        pen.polygon(
            [(half + x * REACH * half, half + y * REACH * half) for x, y in _outline(kind)], 255
        )
    return image


@lru_cache(maxsize=4)
def atlas(side: int) -> Tensor:
    """Masks of every kind, fill alone and with the outline. # [kinds, 2, side, side]"""
    layers = []
    for kind in KINDS:
        big = _mask(kind, 4 * side)
        grown = big.resize((2 * side, 2 * side)).filter(ImageFilter.MaxFilter(side // 16 * 2 + 1))
        for mask in (big, grown):
            small = mask.resize((side, side), Image.Resampling.BOX)
            layers.append(torch.tensor(list(small.tobytes()), dtype=torch.float32) / 255)
    return torch.stack(layers).view(len(KINDS), 2, side, side)


def draw(background: Tensor, placed: Placed) -> tuple[Tensor, Tensor]:
    """Stickers on backgrounds [n, 3, S, S] in [0, 1] -> (pictures, covered share of each pixel).

    The outline is white, and black around light colours. # [n, 3, S, S], [n, 1, S, S]
    """
    n, side = len(background), background.shape[-1]
    masks = atlas(max(32, side * 2 // 3))
    scale = REACH / placed.radius / 2  # mask units per frame, frame spans [-1, 1]
    cos, sin = placed.angle.cos() * scale, placed.angle.sin() * scale
    cx, cy = 2 * placed.x - 1, 2 * placed.y - 1
    theta = torch.stack(
        [cos, sin, -(cos * cx + sin * cy), -sin, cos, sin * cx - cos * cy], dim=1
    ).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 2, side, side], align_corners=False)
    cover = F.grid_sample(masks[placed.kind.clamp(min=0)], grid, align_corners=False)
    cover = cover * (placed.kind >= 0).view(n, 1, 1, 1)
    fill, whole = cover[:, :1], cover[:, 1:]
    luma = (placed.rgb * torch.tensor([0.3, 0.59, 0.11])).sum(1)
    edge = torch.where(luma > 0.7, 0.1, 1.0).view(n, 1, 1, 1)
    picture = background * (1 - whole) + edge * whole
    picture = picture * (1 - fill) + placed.rgb.view(n, 3, 1, 1) * fill
    return picture.clamp(0, 1), whole
