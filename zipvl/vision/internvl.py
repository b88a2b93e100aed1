"""InternVL3 and InternVL3.5 in the Hugging Face layout: pictures to tokens.

cut      a picture is squashed to a canvas of tiles near its own shape; where these are several,
         the whole picture is a crop too. A frame is squashed to one crop
encode   InternViT without its class token; s x s patches become one token, then the projector
place    <img> tokens </img>; of a video the same for each frame, behind "Frame1: " and so on

Crops are held as everywhere here, the whole picture first, then its tiles row by row; their tokens
come as the model was trained, the whole picture last. transformers: models/internvl, and got_ocr2.
Its video processor takes the middles of intervals and resizes tensors; here frames are chosen as
for all families (vision/video.py), and Pillow resizes them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..config import Section
from ..linear import Linear, RMSNorm
from .encoder import ACTIVATIONS, MLP, received
from .family import CLIP_MEAN, CLIP_STD, Family, Geometry, Media, Placed, normalise

BICUBIC = Image.Resampling.BICUBIC
CROP_TOKENS, CROPS, PIXELS, TOKENS = 2**14, 2**8, 2**26, 2**18  # patches of a crop; of one picture
NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


@dataclass(frozen=True)
class InternConfig:
    """What config.json and the processor's settings say of pictures."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    image_size: int  # side of a crop in pixels
    patch_size: int
    attention_bias: bool  # of q, k and v
    qk_norm: bool  # over the whole width, before heads are parted
    norm_type: str  # layer_norm | rms_norm
    layer_norm_eps: float
    hidden_act: str
    blocks: int  # of the tower that are used
    last_norm: bool  # behind them
    shrink: int  # side of a block of patches that make one token
    min_tiles: int  # of a picture
    max_tiles: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.patch_size


def read(file: Section, pre: Section) -> InternConfig:
    """Of config.json and the processor's settings `pre`. Raises ModelError for a bad value.

    `crop_to_patches` is not read: transformers' InternVLProcessor cuts pictures whatever it says,
    and the public checkpoints have it false.
    """
    c = file.section("vision_config")
    c = c.holding({"layer_norm_eps": 1e-6} | c.raw)
    file.choice("vision_feature_select_strategy", ("default",), "default")
    file.choice("projector_hidden_act", ("gelu",), "gelu")
    layers = c.number("num_hidden_layers", most=1000, usual=24)
    most = pre.number("max_patches", most=CROPS, usual=12)
    layer = file.number("vision_feature_layer", -layers, layers, usual=-1)
    if layer == 0:
        raise file.wrong("vision_feature_layer", layer, "and in front of all blocks is no feature")
    config = InternConfig(
        hidden_size=c.number("hidden_size", usual=1024),
        intermediate_size=c.number("intermediate_size", usual=4096),
        num_heads=c.number("num_attention_heads", usual=16),
        image_size=_side(c, "image_size", 448),
        patch_size=_side(c, "patch_size", 14),
        attention_bias=c.flag("attention_bias"),
        qk_norm=c.flag("use_qk_norm"),
        norm_type=c.choice("norm_type", tuple(NORMS), "layer_norm"),
        layer_norm_eps=c.positive("layer_norm_eps"),
        hidden_act=c.choice("hidden_act", tuple(ACTIVATIONS), "gelu"),
        blocks=layer % (layers + 1),
        last_norm=layer == -1 and not c.flag("use_mean_pooling", True),
        shrink=_shrink(file),
        min_tiles=pre.number("min_patches", most=most, usual=1),
        max_tiles=most,
        mean=pre.colours("image_mean", CLIP_MEAN),
        std=pre.colours("image_std", CLIP_STD),
    )
    side, patch, grid, shrink = config.image_size, config.patch_size, config.grid, config.shrink
    if config.hidden_size % config.num_heads or not grid or grid % shrink:
        raise c.fault(
            f"width {config.hidden_size}, {config.num_heads} heads, image {side}, patch {patch} "
            f"and blocks of {shrink} x {shrink} patches do not fit"
        )
    if grid**2 > CROP_TOKENS or most * grid**2 > TOKENS or most * side**2 > PIXELS:
        raise c.fault(
            f"image {side}, patch {patch} and max_patches {most} are too much: zipvl makes up to "
            f"{CROP_TOKENS:,} patches of a crop, {TOKENS:,} and {PIXELS:,} pixels of a picture"
        )
    size = pre.get("size", {"height": side, "width": side})
    if size != {"height": side, "width": side}:
        raise pre.wrong("size", size, f"expected the height and width of {side} in config.json")
    return config


def _side(c: Section, key: str, usual: int) -> int:
    """A length in pixels: one number, or two that are equal."""
    value = c.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return c.holding({key: value}).number(key, most=10**4, usual=usual)


def _shrink(file: Section) -> int:
    """How many patches along one side of a block, of the share that is left of them."""
    ratio = file.holding({"downsample_ratio": 0.5} | file.raw).positive("downsample_ratio")
    if not 1 <= 1 / ratio <= 100 or (1 / ratio) % 1:
        raise file.wrong("downsample_ratio", ratio, "expected 1, 0.5 or another part of 1")
    return int(1 / ratio)


class InternVL(Family):
    """N: patches of a crop; M: its tokens, N / 4 where `shrink` is 2."""

    spellings: ClassVar = [
        (r"(?:.*\.)?vision_tower\.encoder\.layer\.(.+)", r"vision.tower.blocks.\1"),
        (r"(?:.*\.)?vision_tower\.(?:embeddings\.(?:patch_\w+\.)?)?(.+)", r"vision.tower.\1"),
        (r"(?:.*\.)?multi_modal_projector\.layer_norm\.(.+)", r"vision.projector.0.\1"),
        (r"(?:.*\.)?multi_modal_projector\.linear_1\.(.+)", r"vision.projector.1.\1"),
        (r"(?:.*\.)?multi_modal_projector\.linear_2\.(.+)", r"vision.projector.3.\1"),
    ]

    def __init__(self, config: InternConfig, width: int):
        """`width`: the decoder's."""
        super().__init__()
        self.config, c = config, config
        self.cuts = (c.image_size, c.grid, c.shrink, c.min_tiles, c.max_tiles)
        self.tower, channels = Tower(c), c.hidden_size * c.shrink**2
        self.projector = nn.Sequential(
            nn.LayerNorm(channels), Linear(channels, width), nn.GELU(), Linear(width, width)
        )

    def unused(self, name: str) -> bool:
        """Blocks behind the last one used, the norm behind them all, the mask of pre-training."""
        found = re.match(r"vision\.tower\.(?:blocks\.(\d+)\.|layernorm\.|mask_token)", name)
        return found is not None and float(found[1] or "inf") >= self.config.blocks

    def plan(self, height: int, width: int, alone: bool = True, frames: int = 0) -> Geometry:
        if frames:
            return Geometry(height, width, frames=frames)
        return Geometry(height, width, *best_tiles(height, width, self.config))

    def cut(self, image: Image.Image, geometry: Geometry) -> np.ndarray:
        size, rows, cols = self.config.image_size, geometry.rows, geometry.cols
        whole = np.array(image.resize((size, size), BICUBIC))[None]
        if geometry.crops == 1:
            return whole
        canvas = np.asarray(image.resize((cols * size, rows * size), BICUBIC))
        tiles = canvas.reshape(rows, size, cols, size, 3).swapaxes(1, 2)
        return np.concatenate([whole, tiles.reshape(-1, size, size, 3)])

    def fit(self, frame: np.ndarray, geometry: Geometry) -> np.ndarray:
        size = self.config.image_size
        return np.array(Image.fromarray(frame).resize((size, size), BICUBIC))

    def pixels(self, crops: Tensor) -> Tensor:
        """Crops as the tower takes them, [n, 3, S, S]."""
        return normalise(crops, self.config.mean, self.config.std, self.dtype, self.device)

    def features(self, crops: Tensor, geometry: Geometry) -> Tensor:
        x = self.blocks(self.tower(self.pixels(crops)))
        return self.projector(x.flatten(3).flatten(1, 2))  # [n, M, C]

    def blocks(self, x: Tensor) -> Tensor:
        """[n, N, c] -> [n, R, R, s, s, c]: the s x s patches of each of R x R tokens."""
        s, side = self.config.shrink, self.config.grid // self.config.shrink
        return x.unflatten(1, (side, s, side, s)).transpose(2, 3)

    def join(self, features: Tensor, geometry: Geometry) -> Tensor:
        return (features if geometry.frames else features.roll(-1, 0)).flatten(0, 1)

    def place(self, medium: Media) -> Placed:
        frames, tokens = medium.geometry.frames, medium.tokens
        if not frames:
            return ["<img>", tokens, "</img>"]
        placed: Placed = []
        for n in range(frames):
            placed += ["\n" * (n > 0) + f"Frame{n + 1}: <img>", tokens // frames, "</img>"]
        return placed

    def grid(self, geometry: Geometry) -> tuple[int, int]:
        return self.config.grid, self.config.grid

    def spread(self, x: Tensor, geometry: Geometry, nowhere: Tensor) -> Tensor:
        return self.join(self.blocks(x).mean((3, 4)).flatten(1, 2), geometry)

    def looked(self, crops: Tensor, geometry: Geometry) -> Tensor:
        return self.tower.received(self.pixels(crops))


def best_tiles(height: int, width: int, config: InternConfig) -> tuple[int, int]:
    """Rows and columns of the tiles shaped most like the picture, of several alike the most whose
    pixels are under twice its own; 0 x 0: one tile (upstream: get_optimal_tiled_canvas)."""
    counts = range(1, config.max_tiles + 1)
    shapes = [(cols, rows) for cols in counts for rows in counts
              if config.min_tiles <= rows * cols <= config.max_tiles]  # fmt: skip
    best, least = (0, 0), float("inf")
    for cols, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        off = abs(width / height - cols / rows)
        fine = 2 * height * width > config.image_size**2 * rows * cols
        if off < least or (off == least and fine):
            best, least = (rows, cols), off
    return best if best != (1, 1) else (0, 0)


# --- the tower ------------------------------------------------------------------------------------


class Tower(nn.Module):
    """InternViT, pre-norm blocks with layer scale: pixels [n, 3, S, S] in its dtype -> features
    [n, N, C] of patches."""

    def __init__(self, config: InternConfig):
        super().__init__()
        width, patch, eps = config.hidden_size, config.patch_size, config.layer_norm_eps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        self.projection = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.layernorm = nn.LayerNorm(width, eps) if config.last_norm else nn.Identity()

    def embed(self, pixels: Tensor) -> Tensor:
        """[n, 1 + N, C], the class token first."""
        x = self.projection(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.position_embeddings

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.layernorm(x)[:, 1:]

    def received(self, pixels: Tensor) -> Tensor:
        """Attention that patches receive from the class token in the first and in the last block,
        [n, N, 2] float32, summed over heads."""
        x, seen = self.embed(pixels), list[Tensor]()
        for block in cast(Iterable[Block], self.blocks):
            q, k, _ = block.attention.project(block.layernorm_before(x))
            seen.append(received(q, k, slice(1))[:, 1:])
            x = block(x)
        return torch.stack([seen[0], seen[-1]], dim=-1)


class Block(nn.Module):
    def __init__(self, config: InternConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layernorm_before, self.layernorm_after = (
            NORMS[config.norm_type](width, eps) for _ in range(2)
        )
        self.attention = Attention(config)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.lambda_1, self.lambda_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lambda_1 * self.attention(self.layernorm_before(x))
        return x + self.lambda_2 * self.mlp(self.layernorm_after(x))


class Attention(nn.Module):
    def __init__(self, config: InternConfig):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(width, width, bias=config.attention_bias) for _ in range(3)
        )
        self.q_norm, self.k_norm = (
            RMSNorm(width, 1e-6) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.projection_layer = Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [n, H, N, D] each."""
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.project(x))
        return self.projection_layer(y.transpose(1, 2).flatten(2))
