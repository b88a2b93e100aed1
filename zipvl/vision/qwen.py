"""Qwen2-VL and Qwen2.5-VL: pictures in about their own size, frames two by two.

crops     whole blocks of 28 x 28 pixels, within a range of pixels
patches   14 x 14 pixels of two frames; a picture is a frame twice, an odd last one is repeated
tower     2-D rotary positions; Qwen2.5-VL looks in windows of 112 pixels, all over in some layers
merger    a block of 2 x 2 patches to one token

Two frames know nothing of the others, so a video is a batch [P, N, C] in the tower: P pairs, N
patches. Source: transformers, models/qwen2_vl and models/qwen2_5_vl.
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
from .family import Family, Geometry, Media, normalise

LONGEST = 200  # a longer side, in shorter ones
PIXELS, PATCHES = 2**24, 2**17  # of a crop
ROWS = 256  # of attention at a time, where somebody asks who received it
USUAL: dict[str, Any] = {  # as transformers' classes fill in what a file leaves out
    "depth": 32, "num_heads": 16, "hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
}  # fmt: skip
USUAL_2 = USUAL | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
USUAL_25 = USUAL | {
    "intermediate_size": 3420, "out_hidden_size": 3584, "hidden_act": "silu", "window_size": 112,
    "tokens_per_second": 4, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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

    Frames' sizes are those of the settings of videos. Hub folders of before transformers 4.52 have
    none: then 128 to 768 blocks of 28 x 28 pixels, what the models' own demo takes, where
    transformers takes the range of pictures, up to 16,384. Its ceiling on the pixels of a whole
    video (cap_pixels_per_frame, off by default) is not here.
    """
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
    keys = "depth", "num_heads", "patch_size", "spatial_merge_size"
    depth, heads, patch, merge = (c.number(key, most=1000) for key in keys)
    if width % (4 * heads):
        raise c.fault(f"width {width} and num_heads {heads} do not fit: 4 must divide each head")
    for key, only in (("temporal_patch_size", 2), ("in_channels", 3), ("in_chans", 3)):
        if (value := c.get(key, only)) != only:
            raise c.wrong(key, value, f"expected {only}")
    rope = c.holding({"rope_theta": 1e4} | c.section("rope_parameters").raw)
    return QwenConfig(
        depth, width, inner, heads, c.choice("hidden_act", acts), out, patch, merge,
        rope.positive("rope_theta"), pre.colours("image_mean", MEAN), pre.colours("image_std", STD),
        _read_range(pre, PICTURE, patch), _read_range(pre.section("video_processor"), FRAME, patch),
    )  # fmt: skip


def _read_range(pre: Section, usual: tuple[int, int], patch: int) -> tuple[int, int]:
    """The fewest and the most pixels of a crop, under any of their names."""
    size = pre.section("size").raw
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    edges = {name: size[edge] for name, edge in names.items() if edge in size}
    c = pre.holding(size | edges | {key: pre.get(key) for key in names if pre.get(key) is not None})
    least = c.number("min_pixels", most=PIXELS, usual=usual[0])
    return least, c.number("max_pixels", least, min(PIXELS, PATCHES * patch**2), usual[1])


def resized(height: int, width: int, side: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Height and width in multiples of `side`, of about the same shape, within `pixels` as nearly
    as that goes (smart_resize). Raises MediaError."""
    sides, (least, most) = (height, width), pixels
    if max(sides) > LONGEST * min(sides):
        raise MediaError(
            f"a picture of {width} x {height} pixels has a side over {LONGEST} times as long as "
            "the other, which this model does not take: crop it"
        )
    high, wide = (round(x / side) * side for x in sides)
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (max(side, math.floor(x / shrink / side) * side) for x in sides)
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(x * grow / side) * side for x in sides)
    return high, wide


class QwenVL(Family):
    """Names of the layers' parameters are those of the checkpoints."""

    spellings: ClassVar = [
        (r"(?:.*\.)?visual\.patch_embed\.proj\.(.+)", r"vision.patch.\1"),
        (r"(?:.*\.)?visual\.merger\.ln_q\.(.+)", r"vision.norm.\1"),
        (r"(?:.*\.)?visual\.merger\.mlp\.(.+)", r"vision.merger.\1"),
        (r"(?:.*\.)?visual\.(.+)", r"vision.\1"),
    ]

    def __init__(self, config: QwenConfig, width: int):
        """`width`: the decoder's. Raises ModelError."""
        super().__init__()
        if config.out != width:
            raise ModelError(f"the tower makes tokens of {config.out} numbers, text has {width}")
        self.config, size, block = config, (2, config.patch, config.patch), config.merge**2
        self.patch = nn.Conv3d(3, config.width, size, bias=False)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm, inner = norm(config), block * config.width
        self.merger = nn.Sequential(Linear(inner, inner), nn.GELU(), Linear(inner, width))

    @property
    def cuts(self) -> object:
        c = self.config
        return c.patch, c.merge, c.pace, c.picture, c.frame

    # pixels

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

    # tokens

    def tower(self, crops: Tensor, geometry: Geometry, seen: list[Tensor] | None = None) -> Tensor:
        """[P, rows, cols, C]; `seen` gets what the patches receive in the first and last layer."""
        x = F.linear(self.pixels(crops, geometry), self.patch.weight.flatten(1))
        c, (rows, cols), side = self.config, x.shape[1:3], self.config.window * self.config.merge
        D = c.width // c.heads
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
        x, m = self.norm(self.tower(crops, geometry)), self.config.merge
        return self.merger(parted(x, (m, m)).flatten(1)).unflatten(0, (-(-len(crops) // 2), -1))

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

    # where they come from

    def spread(self, x: Tensor, geometry: Geometry, nowhere: Tensor) -> Tensor:
        """Of a pair, what its first frame has."""
        x, m = x[::2].unflatten(1, self.grid(geometry)), self.config.merge
        return parted(x, (m, m)).mean(1)

    def looked(self, crops: Tensor, geometry: Geometry) -> Tensor:
        """From the mean over the patches of a window; both frames of a pair get the same."""
        seen: list[Tensor] = []
        self.tower(crops, geometry, seen)
        scores = torch.cat((seen[0], seen[-1]), dim=-1).flatten(1, 2)
        return scores.repeat_interleave(2, dim=0)[: len(crops)]


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
        self.num_heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def parts(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> Tensor:
        """Queries, keys and values of windows [3, windows, H, n, D] of x [P, rows, cols, C]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [P, rows, cols, 3, H, D]
        (a, b), cos, sin = qkv[..., :2, :, :].float().chunk(2, -1), angles.cos(), angles.sin()
        cos, sin = cos[:, :, None, None], sin[:, :, None, None]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
        qkv = torch.cat((turned, qkv[..., 2:, :, :]), dim=3).flatten(3)
        return parted(qkv, shape).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> Tensor:
        q, k, v = self.parts(x, angles, shape)
        mask = real(x, shape)[:, None, None] if q.shape[2] * len(q) > x[..., 0].numel() else None
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.proj(joined(y, x, shape))

    def received(self, x: Tensor, angles: Tensor, shape: tuple[int, int]) -> Tensor:
        """[P, rows, cols, 1] float32, the mean over the patches of a window, summed over heads."""
        (q, k, _), there = self.parts(x, angles, shape).float(), real(x, shape)
        total = torch.zeros_like(there, dtype=torch.float32)
        for some, asks in zip(q.split(ROWS, 2), there.split(ROWS, 1), strict=True):
            scores = some @ k.mT / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1)
            total += (scores * asks[:, None, :, None]).sum((1, 2))
        return joined((total / there.sum(1, keepdim=True))[..., None], x, shape)


def real(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which patches of x's windows are in the picture, [windows, n]."""
    return parted(torch.ones_like(x[..., :1]), shape)[..., 0] > 0
