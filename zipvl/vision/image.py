"""Pictures and frames to crops, uint8 throughout, by Pillow as the models' own training did it.

plain   frames, LLaVA-1.5           one crop: centre crop (CLIP) or squashed (SigLIP)
pad     LLaVA-1.5, several at once  one crop: padded to a square first
anyres  NeXT, OneVision, LongVA     the whole picture squashed, then the tiles of a canvas it fits
"""

import math
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import MediaConfig
from ..errors import MediaError
from .source import check_size, opened_image

BICUBIC = Image.Resampling.BICUBIC
EXACT_SIDE = 8192  # past it (aspect over 24:1) a shortcut bounds memory and moves some greys


@dataclass(frozen=True)
class Geometry:
    """What merging must know of a picture: its size in pixels and its tiles, 0 x 0 if plain."""

    height: int
    width: int
    rows: int = 0
    cols: int = 0
    padded: bool = False  # to a square, and then one crop

    @property
    def crops(self) -> int:
        """The whole picture and its tiles."""
        return 1 + self.rows * self.cols


def open_image(source: str | PathLike[str] | Image.Image) -> Image.Image:
    """RGB picture, first frame, turned as its EXIF says, 16-bit shades scaled, on white where it is
    transparent.

    Raises MediaError for whatever is no readable picture: missing, a folder, text, cut short,
    empty, of another format than FORMATS, of more than MAX_PIXELS, of shades without a known white.
    """
    with opened_image(source) as (image, name):
        image.load()
        check_size(image, name)  # some formats learn it only now
        deep = image.mode.startswith("I;16") or (
            image.mode == "I" and image.format in ("PNG", "PPM")
        )
        if image is source:
            image = ImageOps.exif_transpose(image)
        else:  # ours: no copy
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image, deep, name)


def _rgb(image: Image.Image, deep: bool, name: str) -> Image.Image:
    if deep:  # convert() would clip nearly all of it to white
        grey = np.asarray(image)
        shades = (grey >> 8).astype(np.uint8)
        shades[grey == image.info.get("transparency", -1)] = 255
        return Image.fromarray(shades).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaError(
            f"{name} has 32-bit shades, and which of them is white is not known: save it with 8 or "
            "16 bits"
        )
    if image.mode not in ("RGBA", "LA"):
        if image.mode not in ("PA", "RGBa", "La") and "transparency" not in image.info:
            return image if image.mode == "RGB" else image.convert("RGB")
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image)  # no copy on the way: pictures may fill half a gigabyte
    return ground


def fit_frame(frame: np.ndarray, media: MediaConfig) -> np.ndarray:
    """The plain processor: uint8 [h, w, 3] -> uint8 [S, S, 3]."""
    return np.array(_fit(Image.fromarray(frame), media))


def crops(image: Image.Image, media: MediaConfig, alone: bool) -> tuple[np.ndarray, Geometry]:
    """uint8 [n, S, S, 3] and what merging needs; the whole picture first, then tiles row by row.

    `alone` is False when the prompt holds several pictures (OneVision pads those to squares).
    """
    size, geometry = media.size, plan(image.height, image.width, media, alone)
    if geometry.crops == 1:
        one = _square(image, media) if geometry.padded else image
        return np.array(_fit(one, media))[None], geometry
    rows, cols = geometry.rows, geometry.cols
    canvas = np.asarray(_letterbox(image, rows * size, cols * size))
    tiles = canvas.reshape(rows, size, cols, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    whole = np.asarray(image.resize((size, size), BICUBIC))
    return np.concatenate([whole[None], tiles]), geometry


def plan(height: int, width: int, media: MediaConfig, alone: bool) -> Geometry:
    """How `crops` cuts a picture of this size; enough to count its tokens."""
    padded = media.image == "pad" or (media.several == "pad" and not alone)
    if padded or media.image != "anyres":
        return Geometry(height, width, padded=padded)
    high, wide = best_canvas(height, width, media.pinpoints)
    return Geometry(height, width, high // media.size, wide // media.size)


def best_canvas(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(height, width) that keeps most of the picture's pixels, then wastes least, then is first.

    LLaVA-NeXT: mm_utils.py, select_best_resolution.
    """

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=rank)


def normalise(
    crops: Tensor, media: MediaConfig, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """uint8 [n, S, S, 3] -> [n, 3, S, S] in `dtype` on `device`; the arithmetic is fp32."""
    mean = torch.tensor(media.mean, device=device)
    std = torch.tensor(media.std, device=device)
    return ((crops.to(device).float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)


def _fit(image: Image.Image, media: MediaConfig) -> Image.Image:
    """One crop of side S: squashed, or the shorter side to S and the middle of the longer one."""
    size, (w, h) = media.size, image.size
    if media.resize == "squash":
        return image.resize((size, size), BICUBIC)
    wide, high = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = (wide - size) // 2, (high - size) // 2
    box = (left, top, left + size, top + size)
    if max(wide, high) <= EXACT_SIDE:
        return image.resize((wide, high), BICUBIC).crop(box)
    x, y = w / wide, h / high
    return image.resize((size, size), BICUBIC, (box[0] * x, box[1] * y, box[2] * x, box[3] * y))


def _square(image: Image.Image, media: MediaConfig) -> Image.Image:
    """The picture in the middle of a square of the mean colour (LLaVA: expand2square)."""
    if max(image.size) > EXACT_SIDE:
        image = ImageOps.contain(image, (EXACT_SIDE, EXACT_SIDE), BICUBIC)
    side, (w, h) = max(image.size), image.size
    colour = tuple(int(m * 255) for m in media.mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square


def _letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture as large as fits, in the middle of black (LLaVA: resize_and_pad_image)."""
    scale = min(width / image.width, height / image.height)
    w, h = min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize((w, h), BICUBIC), ((width - w) // 2, (height - h) // 2))
    return canvas
