"""Features of crops to the decoder's visual tokens: pooling, merging tiles, newline vectors.

Shapes and copies only, so the same code counts tokens: it is run on meta tensors of width 1, and
the count cannot differ from what is merged.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MediaConfig, VisionConfig
from ..errors import ModelError
from .image import Geometry


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


def count_tokens_image(geometry: Geometry, media: MediaConfig, vision: VisionConfig) -> int:
    """Tokens `merge_image` makes of a picture."""
    features = torch.empty(geometry.crops, vision.tokens, 1, device="meta")
    return len(merge_image(features, geometry, media, vision.grid, features[0, 0]))


def count_tokens_video(frames: int, media: MediaConfig, vision: VisionConfig) -> int:
    """Tokens `pool_frames` and `merge_video` make of a video of `frames` frames."""
    features = torch.empty(frames, vision.tokens, 1, device="meta")
    return len(merge_video(pool_frames(features, media, vision.grid), media, features[0, 0]))


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
