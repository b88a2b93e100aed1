"""LLaVA-1.5, NeXT, NeXT-Video, OneVision, LLaVA-Video and LongVA: pictures to tokens.

Crops, uint8 throughout, by Pillow as the models' own training did it:

plain   frames, LLaVA-1.5           one crop: centre crop (CLIP) or squashed (SigLIP)
pad     LLaVA-1.5, several at once  one crop: padded to a square first
anyres  NeXT, OneVision, LongVA     the whole picture squashed, then the tiles of a canvas it fits

Then tower, projector, and the features' way to tokens: pooling, merging tiles, newline vectors.
These are shapes and copies only, so the same code counts tokens.
"""

import math
import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..config import LlavaConfig, MediaConfig
from ..errors import ModelError
from .encoder import VisionTower, projector
from .family import Family, Geometry, Media, Placed, normalise

BICUBIC = Image.Resampling.BICUBIC
UNUSED = r".*embeddings\.position_ids|vision\.(tower\.(post_layernorm|head)\..*|newline)"
EXACT_SIDE = 8192  # past it (aspect over 24:1) a shortcut bounds memory and moves some greys


class Llava(Family):
    """The LLaVAs; they differ in their MediaConfig."""

    spellings: ClassVar = [
        (r"(?:.*\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"vision.tower.\1"),
        (r"(?:.*\.)?mm_projector\.(weight|bias)", r"vision.projector.0.\1"),
        (r"(?:.*\.)?mm_projector\.(.+)", r"vision.projector.\1"),
        (r"(?:.*\.)?multi_modal_projector\.linear_1\.(.+)", r"vision.projector.0.\1"),
        (r"(?:.*\.)?multi_modal_projector\.linear_2\.(.+)", r"vision.projector.2.\1"),
        (r"(?:.*\.)?image_newline", r"vision.newline"),
    ]

    def __init__(self, config: LlavaConfig, width: int):
        """`width`: the decoder's."""
        super().__init__()
        self.config, self.media, tower = config, config.media, config.tower
        self.frames = self.media.frames
        self.cuts = (replace(self.media, mean=(), std=()), tower.grid, tower.tokens)
        self.tower = VisionTower(tower)
        channels = tower.hidden_size * len(tower.take)
        self.projector = projector(config.projector, channels, width, config.projector_bias)
        self.newline = nn.Parameter(torch.zeros(width)) if config.newline else None

    def unused(self, name: str) -> bool:
        """Old buffers, the tower's last norm and pooling head; blocks behind the last one used."""
        block = re.match(r"vision\.tower\.encoder\.layers\.(\d+)\.", name)
        if block and int(block[1]) >= max(self.config.tower.take):
            return True
        return re.fullmatch(UNUSED, name) is not None

    def plan(self, height: int, width: int, alone: bool = True, frames: int = 0) -> Geometry:
        if frames:
            return Geometry(height, width, frames=frames)
        return plan(height, width, self.media, alone)

    def cut(self, image: Image.Image, geometry: Geometry) -> np.ndarray:
        return crops(image, self.media, geometry)

    def fit(self, frame: np.ndarray, geometry: Geometry) -> np.ndarray:
        return fit_frame(frame, self.media)

    def pixels(self, crops: Tensor) -> Tensor:
        """Crops as the tower takes them, [n, 3, S, S]."""
        return normalise(crops, self.media.mean, self.media.std, self.dtype, self.device)

    def features(self, crops: Tensor, geometry: Geometry) -> Tensor:
        media, grid = self.media, self.config.tower.grid
        x = self.tower(self.pixels(crops))  # [n, N, C_v]
        if geometry.frames and media.pool_first:
            return self.projector(pool_frames(x, media, grid))
        x = self.projector(x)
        return pool_frames(x, media, grid) if geometry.frames else x

    def join(self, features: Tensor, geometry: Geometry) -> Tensor:
        return self.merged(features, geometry, self.newline)

    def merged(self, x: Tensor, geometry: Geometry, newline: Tensor | None) -> Tensor:
        """Tokens [tokens, c] of a picture's features x [n, N, c], or of a video's pooled ones."""
        if geometry.frames:
            return merge_video(x, self.media, newline)
        return merge_image(x, geometry, self.media, self.config.tower.grid, newline)

    def place(self, medium: Media) -> Placed:
        """LLaVA-Video puts when the frames are behind a video (LLaVA-NeXT: LLaVA_Video_1003.md)."""
        clip = medium.clip
        if clip is None or not self.media.told:
            return [medium.tokens]
        at = ",".join(f"{time:.2f}s" for time in clip.times)
        return [
            medium.tokens,
            f"\nThe video lasts for {clip.duration:.2f} seconds, and {len(clip.times)} frames are "
            f"uniformly sampled from it. These frames are located at {at}.Please answer the "
            "following questions related to this video.",
        ]

    def grid(self, geometry: Geometry) -> tuple[int, int]:
        return self.config.tower.grid, self.config.tower.grid

    def patches(self, geometry: Geometry) -> int:
        return self.config.tower.tokens  # with CLIP's class token, where it is kept

    def spread(self, x: Tensor, geometry: Geometry, nowhere: Tensor) -> Tensor:
        x = pool_frames(x, self.media, self.config.tower.grid) if geometry.frames else x
        return self.merged(x, geometry, nowhere)

    def looked(self, crops: Tensor, geometry: Geometry) -> Tensor:
        return self.tower.received(self.pixels(crops))


# --- pictures and frames to crops ---------------------------------------------------------------


def fit_frame(frame: np.ndarray, media: MediaConfig) -> np.ndarray:
    """The plain processor: uint8 [h, w, 3] -> uint8 [S, S, 3]."""
    return np.array(_fit(Image.fromarray(frame), media))


def crops(image: Image.Image, media: MediaConfig, geometry: Geometry) -> np.ndarray:
    """uint8 [n, S, S, 3], cut as plan() said; the whole picture first, then tiles row by row."""
    size = media.size
    if geometry.crops == 1:
        one = _square(image, media) if geometry.padded else image
        return np.array(_fit(one, media))[None]
    rows, cols = geometry.rows, geometry.cols
    canvas = np.asarray(_letterbox(image, rows * size, cols * size))
    tiles = canvas.reshape(rows, size, cols, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    whole = np.asarray(image.resize((size, size), BICUBIC))
    return np.concatenate([whole[None], tiles])


def plan(height: int, width: int, media: MediaConfig, alone: bool) -> Geometry:
    """How `crops` cuts a picture of this size; enough to count its tokens.

    `alone` is False when the prompt holds several pictures (OneVision pads those to squares).
    """
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


# --- features to tokens --------------------------------------------------------------------------


def pool_frames(features: Tensor, media: MediaConfig, grid: int) -> Tensor:
    """[F, N, C] -> [F, N', C], each frame's grid x grid map pooled by `media.stride`.

    Average and max drop what does not fill a window, bilinear rounds up (27 -> 13, 13, 14).
    LLaVA-NeXT: llava_arch.py, get_2dPool. Raises ModelError when the grid cannot be pooled.
    """
    if media.pool == "none":
        return features
    maps, stride = _maps(features, grid), media.stride
    if stride > grid:
        raise ModelError(f"pooling stride {stride} is wider than the {grid} x {grid} patch grid")
    if media.pool == "average":
        maps = F.avg_pool2d(maps, stride)
    elif media.pool == "max":
        maps = F.max_pool2d(maps, stride)
    elif media.pool == "bilinear":
        side = math.ceil(grid / stride)
        maps = F.interpolate(maps, (side, side), mode="bilinear")
    else:
        raise ModelError(f"spatial pool mode {media.pool!r} is not one of average, max, bilinear")
    return maps.flatten(2).transpose(1, 2)


def merge_image(
    features: Tensor, geometry: Geometry, media: MediaConfig, grid: int, newline: Tensor | None
) -> Tensor:
    """Projected features [n, N, C] of one picture, whole first -> its tokens [T, C].

    `newline` [C] is needed by the `unpad` merges only: it ends every row of the merged tiles, or a
    lone crop. LLaVA-NeXT and LongVA: llava_arch.py, prepare_inputs_labels_for_multimodal.
    """
    unpad = newline if "unpad" in media.merge else None
    whole, tiles = features[0], features[1:]
    if geometry.crops == 1:
        return whole if unpad is None else torch.cat([whole, unpad[None]])
    if media.merge == "flat":
        return features.flatten(0, 1)
    if media.merge == "tiles":  # LongVA: a picture is a video of its tiles, the whole left out
        return pool_frames(tiles, media, grid).flatten(0, 1)
    rows, cols = geometry.rows, geometry.cols
    merged = _maps(tiles, grid).unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4)
    merged = merged.flatten(3, 4).flatten(1, 2)  # [C, rows * grid, cols * grid]
    if unpad is not None:
        merged = _reduce(_unpad(merged, geometry, media.round_unpad), media.max_tiles, grid)
        column = unpad[:, None, None].expand(-1, merged.shape[1], 1)
        merged = torch.cat([merged, column], dim=2)
    tokens = merged.flatten(1).transpose(0, 1)
    return tokens if "nobase" in media.merge else torch.cat([whole, tokens])


def merge_video(features: Tensor, media: MediaConfig, newline: Tensor | None) -> Tensor:
    """Pooled, projected frames [F, N, C] -> the video's tokens [T, C], in order of time.

    `media.video_newline` puts `newline` [C] nowhere, at the end, after each frame, or after each
    row of each frame (LLaVA-NeXT: llava_arch.py, mm_newline_position).
    """
    if newline is None or media.video_newline == "none":
        return features.flatten(0, 1)
    if media.video_newline == "one":
        return torch.cat([features.flatten(0, 1), newline[None]])
    side = math.isqrt(features.shape[1]) if media.video_newline == "grid" else 1
    rows = features.unflatten(1, (side, -1))  # [F, rows, tokens a row, C]
    column = newline.expand(*rows.shape[:2], 1, -1)
    return torch.cat([rows, column], dim=2).flatten(0, 2)


def _maps(features: Tensor, grid: int) -> Tensor:
    """[F, N, C] -> [F, C, grid, grid]; a class token among the features would shift every patch."""
    if features.shape[1] != grid * grid:
        raise ModelError(
            f"{features.shape[1]} features a crop do not form a {grid} x {grid} grid: "
            "the vision feature selection in config.json must drop the class token"
        )
    return features.transpose(1, 2).unflatten(2, (grid, grid))


def _unpad(merged: Tensor, geometry: Geometry, rounded: bool) -> Tensor:
    """[C, H, W] without the rows or columns that show the canvas's black bars only.

    HF rounds the kept side to 7 digits before truncating it, the original does not.
    """
    high, wide = merged.shape[1:]
    height, width = geometry.height, geometry.width
    flat = width / height > wide / high
    kept = height * (wide / width) if flat else width * (high / height)
    axis, side = (1, high) if flat else (2, wide)
    margin = (side - int(round(kept, 7) if rounded else kept)) // 2
    return merged.narrow(axis, margin, side - 2 * margin)


def _reduce(merged: Tensor, max_tiles: int | None, grid: int) -> Tensor:
    """OneVision: [C, H, W] shrunk to about `max_tiles` tiles of tokens if well above that."""
    high, wide = merged.shape[1:]
    ratio = math.sqrt(high * wide / (max_tiles * grid**2)) if max_tiles else 1.0
    if ratio <= 1.1:
        return merged
    size = (max(1, int(high // ratio)), max(1, int(wide // ratio)))
    return F.interpolate(merged[None], size, mode="bilinear")[0]
