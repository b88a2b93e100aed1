"""Qwen2-VL and Qwen2.5-VL: pictures in about their own size, frames two by two.

crops     whole blocks of 28 x 28 pixels, within a range of pixels
patches   14 x 14 pixels of two frames; a picture is a frame twice, an odd last one is repeated
tower     2-D rotary positions; Qwen2.5-VL looks in windows of 112 pixels, all over in some layers
merger    a block of 2 x 2 patches to one token

Two frames know nothing of the others, so a video is a batch in the tower: P pairs. Source:
transformers, models/qwen2_vl and models/qwen2_5_vl.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..config import Section
from ..errors import MediaError, ModelError
from ..linear import GatedMLP, Linear, RMSNorm
from .encoder import ACTIVATIONS, MLP
from .family import CLIP_MEAN, CLIP_STD, Family, Geometry, Media, normalise

LONGEST, PIXELS, PATCHES = 200, 2**24, 2**17  # of a crop: longer by shorter side, and in all
ROWS = 256  # of attention at a time, where somebody asks who received it
USUAL: dict[str, Any] = {  # as transformers' classes fill in what a file leaves out
    "depth": 32, "num_heads": 16, "hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
}  # fmt: skip
USUAL_2 = USUAL | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
USUAL_25 = USUAL | {
    "intermediate_size": 3420, "out_hidden_size": 3584, "hidden_act": "silu", "window_size": 112,
    "tokens_per_second": 4, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
PICTURE, FRAME = (56 * 56, 1280 * 28 * 28), (128 * 28 * 28, 768 * 28 * 28)  # pixels


@dataclass(frozen=True)
class QwenConfig:
    depth: int
    width: int
    inner: int  # of the MLP
    heads: int
    act: str
    out: int  # the decoder's width
    patch: int  # pixels of a side
    merge: int  # patches of a block's side
    theta: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    picture: tuple[int, int]  # fewest and most pixels of a picture,
    frame: tuple[int, int]  # and of a video's frame
    window: int = 0  # blocks of a window's side; 0: no windows, and the layers of Qwen2-VL
    whole: tuple[int, ...] = ()  # numbers of the layers without
    pace: int = 0  # rotary ids a second of video; 0: one a pair of frames


def read(file: Section, pre: Section) -> QwenConfig:
    """Of Qwen2-VL's config.json and processor settings. Raises ModelError.

    Frames' sizes are those of the settings of videos. Older hub folders have none: then 128 to 768
    blocks of 28 x 28 pixels, as the models' own demo, where transformers takes the range of
    pictures, up to 16,384. A whole video has no ceiling (theirs, cap_pixels_per_frame, is off)."""
    c = file.holding(USUAL_2 | file.section("vision_config").raw)
    width, out = c.number("embed_dim"), c.number("hidden_size")
    return _read(c, pre, width, width * c.number("mlp_ratio", most=100), out, tuple(ACTIVATIONS))


def read_25(file: Section, pre: Section) -> QwenConfig:
    """As read(), of Qwen2.5-VL."""
    c = file.holding(USUAL_25 | file.section("vision_config").raw)
    width, inner, out = map(c.number, ("hidden_size", "intermediate_size", "out_hidden_size"))
    config, whole = _read(c, pre, width, inner, out, ("silu",)), c.get("fullatt_block_indexes")
    if not isinstance(whole, list) or not all(type(i) is int for i in whole):
        raise c.wrong("fullatt_block_indexes", whole, "expected numbers of layers")
    block = config.patch * config.merge
    window = c.number("window_size", least=block) // block
    pace = c.number("tokens_per_second", least=0)
    return replace(config, window=window, whole=tuple(whole), pace=pace)


def _read(c: Section, pre: Section, width: int, inner: int, out: int,
          acts: tuple[str, ...]) -> QwenConfig:  # fmt: skip
    """What both have."""
    depth, heads, patch = (c.number(k, most=1000) for k in ("depth", "num_heads", "patch_size"))
    merge = c.number("spatial_merge_size", most=2**12 // patch)
    if width % (4 * heads):
        raise c.fault(f"width {width} and num_heads {heads} do not fit: 4 must divide each head")
    for key, only in (("temporal_patch_size", 2), ("in_channels", 3), ("in_chans", 3)):
        c.number(key, only, only, only)
    rope = c.holding({"rope_theta": 1e4} | c.section("rope_parameters").raw)
    return QwenConfig(
        depth, width, inner, heads, c.choice("hidden_act", acts), out, patch, merge,
        rope.positive("rope_theta"), pre.colours("image_mean", CLIP_MEAN),
        pre.colours("image_std", CLIP_STD),
        _read_range(pre, PICTURE, patch, merge),
        _read_range(pre.section("video_processor"), FRAME, patch, merge),
    )  # fmt: skip


def _read_range(pre: Section, usual: tuple[int, int], patch: int, merge: int) -> tuple[int, int]:
    """The fewest and the most pixels of a crop, at least a block, under any of their names."""
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    size = {names.get(key, key): value for key, value in pre.section("size").raw.items()}
    own = {key: pre.get(key) for key in names.values() if pre.get(key) is not None}
    c = pre.holding(size | own)
    least = c.number("min_pixels", most=PIXELS, usual=usual[0])
    ceiling = min(PIXELS, PATCHES * patch**2)
    return least, c.number("max_pixels", max(least, (patch * merge) ** 2), ceiling, usual[1])


def resized(height: int, width: int, side: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Height and width in multiples of `side`, of about the same shape, within `pixels` as nearly
    as that goes (smart_resize). Raises MediaError."""
    sides, (least, most) = (height, width), pixels
    if max(sides) > LONGEST * min(sides):
        raise MediaError(
            f"{width} x {height} pixels are too long for this model, over {LONGEST} to 1: crop them"
        )
    high, wide = (round(x / side) * side for x in sides)
    if high * wide > most:
        by = math.sqrt(height * width / most)
        high, wide = (max(side, math.floor(x / by / side) * side) for x in sides)
    elif high * wide < least:
        by = math.sqrt(least / (height * width))
        high, wide = (math.ceil(x * by / side) * side for x in sides)
    return high, wide


class QwenVL(Family):
    spellings: ClassVar = [(r"(?:.*\.)?visual\.(?:patch_embed\.|merger\.)?(.+)", r"vision.\1")]

    def __init__(self, config: QwenConfig, width: int):
        """`width`: the decoder's. Raises ModelError."""
        super().__init__()
        if config.out != width:
            raise ModelError(f"the tower makes tokens of {config.out} numbers, text has {width}")
        self.config, size, block = config, (2, config.patch, config.patch), config.merge**2
        self.proj = nn.Conv3d(3, config.width, size, bias=False)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.ln_q, inner = norm(config), block * config.width
        self.mlp = nn.Sequential(Linear(inner, inner), nn.GELU(), Linear(inner, width))

    @property
    def cuts(self) -> object:
        return [getattr(self.config, key) for key in ("patch", "merge", "pace", "picture", "frame")]

    def size(self, geometry: Geometry) -> tuple[int, int]:
        """Height and width of a crop. Raises MediaError."""
        c = self.config
        pixels = c.frame if geometry.frames else c.picture
        return resized(geometry.height, geometry.width, c.patch * c.merge, pixels)

    def plan(self, height: int, width: int, alone: bool = True, frames: int = 0) -> Geometry:
        geometry = Geometry(height, width, frames=frames)
        self.size(geometry)  # told before anything is read
        return geometry

    def cut(self, image: Image.Image, geometry: Geometry) -> np.ndarray:
        high, wide = self.size(geometry)
        return np.array(image.resize((wide, high), Image.Resampling.BICUBIC))[None]

    def fit(self, frame: np.ndarray, geometry: Geometry) -> np.ndarray:
        return self.cut(Image.fromarray(frame), geometry)[0]

    def grid(self, geometry: Geometry) -> tuple[int, int]:
        high, wide = self.size(geometry)
        return high // self.config.patch, wide // self.config.patch

    def pixels(self, crops: Tensor, geometry: Geometry) -> Tensor:
        """Crops two by two, cut to patches, [P, rows, cols, numbers of a patch]."""
        c, (rows, cols) = self.config, self.grid(geometry)
        x = normalise(crops, c.mean, c.std, self.dtype, self.device)
        x = torch.cat((x, x[-1:])) if len(x) % 2 else x
        x = x.reshape(-1, 2, 3, rows, c.patch, cols, c.patch)
        return x.permute(0, 3, 5, 2, 1, 4, 6).flatten(3)

    def tower(self, crops: Tensor, geometry: Geometry, seen: list[Tensor] | None = None) -> Tensor:
        """[P, rows, cols, C]; `seen` gets what the patches receive in the first and last layer."""
        x = F.linear(self.pixels(crops, geometry), self.proj.weight.flatten(1))
        (rows, cols), c = x.shape[1:3], self.config
        side, D = c.window * c.merge, c.width // c.heads
        steps = c.theta ** (torch.arange(D // 4, device=x.device) * 4 / D)
        down, across = (torch.arange(n, device=x.device)[:, None] / steps for n in (rows, cols))
        angles = torch.cat((down[:, None].expand(-1, cols, -1), across.expand(rows, -1, -1)), -1)
        for i, layer in enumerate(cast(Iterable[Layer], self.blocks)):
            shape = (side, side) if side and i not in c.whole else (rows, cols)
            if seen is not None and i in (0, c.depth - 1):
                seen.append(layer.attn.received(layer.norm1(x), angles, shape))
            x = layer(x, angles, shape)
        return x

    def features(self, crops: Tensor, geometry: Geometry) -> Tensor:
        x, m = self.ln_q(self.tower(crops, geometry)), self.config.merge
        return self.mlp(parted(x, (m, m)).flatten(1)).unflatten(0, (-(-len(crops) // 2), -1))

    def join(self, features: Tensor, geometry: Geometry) -> Tensor:
        return features.flatten(0, 1)

    def turn(self, medium: Media) -> Tensor:
        """Time, row and column of its blocks; of Qwen2.5-VL's videos time by the clock, in float32.

        Text goes on behind the largest of them, as when the models were trained and up to
        transformers 4.57; 5.x goes on behind rows and columns, and its first new token behind all:
        other ids where a video is longer than it is wide."""
        (rows, cols), m, clip = self.grid(medium.geometry), self.config.merge, medium.clip
        step = torch.tensor(1.0)
        if clip is not None and self.config.pace:
            step = self.config.pace * torch.tensor(2 * clip.span / medium.geometry.frames)
        time = (torch.arange(-(-medium.geometry.crops // 2)) * step).long()
        sides = time, torch.arange(rows // m), torch.arange(cols // m)
        return torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)

    def spread(self, x: Tensor, geometry: Geometry, nowhere: Tensor) -> Tensor:
        """Of a pair, what its first frame has."""
        x, m = x[::2].unflatten(1, self.grid(geometry)), self.config.merge
        return parted(x, (m, m)).mean(1)

    def looked(self, crops: Tensor, geometry: Geometry) -> Tensor:
        """From the mean over the patches of a window; both frames of a pair get the same."""
        seen: list[Tensor] = []
        self.tower(crops, geometry, seen)
        return (
            torch.cat((seen[0], seen[-1]), -1).flatten(1, 2).repeat_interleave(2, 0)[: len(crops)]
        )


# --- the tower ------------------------------------------------------------------------------------


def parted(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """x [P, rows, cols, c] cut to windows of this shape, [windows, patches of each, c]: pair by
    pair, row by row, zeros where one reaches over an edge."""
    high, wide = shape
    x = F.pad(x, (0, 0, 0, -x.shape[2] % wide, 0, -x.shape[1] % high))
    x = x.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def joined(x: Tensor, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """What parted() made of a tensor with the sides of `like`, in its place again."""
    (high, wide), (pairs, rows, cols, _) = shape, like.shape
    x = x.view(pairs, -(-rows // high), -(-cols // wide), high, wide, x.shape[-1])
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :cols]


class Layer(nn.Module):
    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        width, inner = config.width, config.inner
        self.norm1, self.norm2 = norm(config), norm(config)
        self.attn = Attention(config)
        self.mlp = GatedMLP(width, inner, True) if config.window else MLP(width, inner, config.act)

    def forward(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, shape)
        return x + self.mlp(self.norm2(x))


def norm(config: QwenConfig) -> nn.Module:
    return RMSNorm(config.width, 1e-6) if config.window else nn.LayerNorm(config.width, 1e-6)


class Attention(nn.Module):
    """Every patch of a window sees every other; angles [rows, cols, D/2] turn the first half of
    each head's pairs by rows, the others by columns."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.num_heads, width = config.heads, config.width
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def parts(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries, keys and values of windows [3, windows, H, n, D] of x [P, rows, cols, C]; which
        of the patches there are [windows, n]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [P, rows, cols, 3, H, D]
        (a, b), turn = qkv[..., :2, :, :].float().chunk(2, -1), angles[:, :, None, None]
        both = a * turn.cos() - b * turn.sin(), b * turn.cos() + a * turn.sin()
        qkv = torch.cat((torch.cat(both, -1).to(x.dtype), qkv[..., 2:, :, :]), 3).flatten(3)
        there = parted(torch.ones_like(x[..., :1]), shape)[..., 0] > 0
        qkv = parted(qkv, shape).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4), there

    def forward(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> Tensor:
        (q, k, v), there = self.parts(x, angles, shape)
        mask = there[:, None, None] if there.numel() > x[..., 0].numel() else None
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.proj(joined(y, x, shape))

    def received(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> Tensor:
        """[P, rows, cols, 1] float32, the mean over the patches of a window, summed over heads."""
        (q, k, _), there = self.parts(x, angles, shape)
        total = torch.zeros_like(there, dtype=torch.float32)
        for some, asks in zip(q.float().split(ROWS, 2), there.split(ROWS, 1), strict=True):
            scores = some @ k.float().mT / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1)
            total += (scores * asks[:, None, :, None]).sum((1, 2))
        return joined((total / there.sum(1, keepdim=True))[..., None], x, shape)
