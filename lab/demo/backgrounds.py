"""Backgrounds of the demo world: square tiles of photographs and video frames, noise, gradients.

One small sheet of tiles lies beside this file (sources and licences: zipvl/demo/LICENSES.md), none
of which was used in training. A frame shows a window of a tile; in a clip the window wanders.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 128
SHEET = Path(__file__).parent / "backgrounds.webp"


def cut(sheet: Image.Image) -> Tensor:
    """Tiles of a sheet that holds them side by side, row by row. # uint8 [n, 3, SIDE, SIDE]"""
    pixels = torch.from_numpy(np.array(sheet.convert("RGB")))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    tiles = pixels.view(rows, SIDE, columns, SIDE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, SIDE, SIDE)


def noise(count: int, generator: torch.Generator) -> Tensor:
    """Cloudy colour noise of several octaves. # uint8 [count, 3, SIDE, SIDE]"""
    total = torch.zeros(count, 3, SIDE, SIDE)
    for cells in (2, 4, 8, 16, 32):
        weight = torch.rand(count, 1, 1, 1, generator=generator) * cells**-0.4
        octave = torch.rand(count, 3, cells, cells, generator=generator) - 0.5
        total += weight * F.interpolate(octave, size=(SIDE, SIDE), mode="bicubic")
    base = torch.rand(count, 3, 1, 1, generator=generator) * 0.6 + 0.2
    return ((base + total).clamp(0, 1) * 255).byte()


def gradients(count: int, generator: torch.Generator) -> Tensor:
    """Smooth blends of four corner colours. # uint8 [count, 3, SIDE, SIDE]"""
    corners = torch.rand(count, 3, 2, 2, generator=generator)
    return (F.interpolate(corners, size=(SIDE, SIDE), mode="bilinear") * 255).byte()


@lru_cache(maxsize=1)
def bundled() -> Tensor:
    """All tiles of the world as shipped: sheet, noise, gradients. # uint8 [n, 3, SIDE, SIDE]"""
    generator = torch.Generator().manual_seed(0)
    with Image.open(SHEET) as sheet:
        photos = cut(sheet)
    return torch.cat([photos, noise(6, generator), gradients(4, generator)])


def window(tiles: Tensor, x: Tensor, y: Tensor, zoom: Tensor, side: int) -> Tensor:
    """Windows of tiles [n, 3, SIDE, SIDE]: centre x, y in [-1, 1] of what fits, zoom = width share.

    # [n, 3, side, side] in [0, 1]
    """
    n, zero, room = len(tiles), torch.zeros_like(x), 1 - zoom
    theta = torch.stack([zoom, zero, x * room, zero, zoom, y * room], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    return F.grid_sample(tiles.float() / 255, grid, padding_mode="reflection", align_corners=False)
