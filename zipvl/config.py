"""What a model is, as frozen records. layouts.py fills them from the two kinds of checkpoint folder.

Hub files leave out every value that equals a class default, so the defaults stand here too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError


TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, rms_norm_eps=1e-6, rope_theta=1e4),
    "mistral": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1e4,
                    sliding_window=4096),
    "qwen2": dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=1e4),
}  # fmt: skip
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 image_size=224, patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu"),
    "siglip": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                   image_size=224, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
}  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """Llama, Mistral or Qwen2 decoder; they differ in the bias of q, k, v and in defaults only."""

    kind: str  # llama | mistral | qwen2
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float = 1.0  # linear scaling: positions are divided by it
    qkv_bias: bool = False
    tied: bool = False  # lm_head shares the embedding
    sliding_window: int | None = None


@dataclass(frozen=True)
class VisionConfig:
    """CLIP or SigLIP tower. `take` lists the hidden states used (0 = embeddings, n = after block n)."""

    kind: str  # clip | siglip
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str  # quick_gelu | gelu | gelu_pytorch_tanh
    take: tuple[int, ...]
    drop_cls: bool  # CLIP's class token leaves before the projector

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Features of one crop: its patches, and CLIP's class token where it is kept."""
        return self.grid**2 + (self.kind == "clip" and not self.drop_cls)


@dataclass(frozen=True)
class MediaConfig:
    """How pictures and videos become crops, and how the crops' features become tokens."""

    size: int  # side of one crop in pixels
    resize: str  # crop: shortest side to `size`, centre crop | squash: both sides to `size`
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image: str  # crop: one plain crop | pad: padded to a square first | anyres: base crop + tiles
    pinpoints: tuple[tuple[int, int], ...] = ()  # any-resolution canvases, (height, width), in order
    merge: str = "flat"  # flat | spatial | spatial_unpad (newline column) | tiles (LongVA: tile by tile)
    max_tiles: int | None = None  # OneVision: bilinear reduction to about this many tiles of tokens
    round_unpad: bool = True  # HF rounds the unpadded side to 7 digits before truncating
    several: str = "same"  # pad: two or more pictures in a prompt are padded squares, one crop each
    pool: str = "none"  # 2x2 pooling of video frames: none | average | max | bilinear
    stride: int = 2
    pool_first: bool = False  # pool before the projector (HF NeXT-Video) instead of after it
    video_newline: str = "none"  # none | one (at the end) | frame | grid (every row)


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig
    media: MediaConfig
    family: str  # llava | llava_next | llava_next_video | llava_onevision | longva
    layout: str  # hf | original
    projector: str  # linear | mlpNx_gelu | identity
    projector_bias: bool
    newline: bool  # the checkpoint holds an `image_newline` vector
    image_token: int  # placeholder id of a picture's tokens (original layout: -200, in no vocabulary)
    video_token: int
    tower: str | None = None  # folder or hub id that may hold the tower's weights (original layout)
    max_length: int | None = None  # context the checkpoint was trained for, for a warning only


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`, or one sentence about why not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a checkpoint folder needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ModelError(f"{path} is not readable JSON ({e}): download the file again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object: download the file again")
    return data


def _number(raw: dict, key: str, where: str, kind: type = int, least: float = 1) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e12:
        raise ModelError(f"{where}: {key} is {value!r}, expected a number of at least {least}")
    return kind(value)


def read_text(raw: dict, kind: str, tied: bool, where: str) -> TextConfig:
    """Decoder config from HF keys; `raw` may be written by transformers 4 or 5."""
    if kind not in TEXT_DEFAULTS:
        raise ModelError(f"{where}: decoder {kind!r} is not supported (llama, mistral, qwen2 are)")
    c = TEXT_DEFAULTS[kind] | raw
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ModelError(f"{where}: rope type {rope_type!r} is not supported (default, linear are)")
    if c.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where}: hidden_act {c['hidden_act']!r} is not supported (silu is)")
    heads = _number(c, "num_attention_heads", where)
    width = _number(c, "hidden_size", where)
    c["num_key_value_heads"] = c.get("num_key_value_heads") or heads
    kv_heads = _number(c, "num_key_value_heads", where)
    c["head_dim"] = c.get("head_dim") or width // heads
    if width % heads and "head_dim" not in raw or heads % kv_heads:
        raise ModelError(
            f"{where}: hidden_size {width}, {heads} heads and {kv_heads} key/value heads do not divide"
        )
    window = c.get("sliding_window")
    if kind == "llama" or (kind == "qwen2" and not c.get("use_sliding_window")):
        window = None
    return TextConfig(
        kind=kind,
        vocab_size=_number(c, "vocab_size", where),
        hidden_size=width,
        intermediate_size=_number(c, "intermediate_size", where),
        num_layers=_number(c, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_number(c, "head_dim", where),
        rms_norm_eps=_number(c, "rms_norm_eps", where, float, 0),
        rope_theta=_number(rope if "rope_theta" in rope else c, "rope_theta", where, float),
        rope_factor=_number(rope, "factor", where, float, 0) if rope_type == "linear" else 1.0,
        qkv_bias=kind == "qwen2",
        tied=tied,
        sliding_window=window,
    )


def read_vision(raw: dict, layers: list[int] | None, strategy: str, where: str) -> VisionConfig:
    """Tower config from a CLIP/SigLIP config dict (a full CLIP config holds it under `vision_config`).

    `layers` are hidden-state indices as configs write them (-2: before the last block); None means
    the original SigLIP rule: all blocks but the last.
    """
    raw = raw.get("vision_config") or raw
    kind = str(raw.get("model_type", "")).removesuffix("_vision_model").removesuffix("_model")
    if kind not in VISION_DEFAULTS:
        raise ModelError(f"{where}: vision tower {kind!r} is not supported (clip, siglip are)")
    c = VISION_DEFAULTS[kind] | raw
    count = _number(c, "num_hidden_layers", where)
    take = tuple(i if i >= 0 else count + 1 + i for i in layers or [count - 1])
    if not all(0 <= i <= count for i in take):
        raise ModelError(f"{where}: vision_feature_layer {layers} does not fit {count} layers")
    heads, width = _number(c, "num_attention_heads", where), _number(c, "hidden_size", where)
    size, patch = _number(c, "image_size", where), _number(c, "patch_size", where)
    if width % heads or size < patch:
        raise ModelError(f"{where}: width {width}, {heads} heads, image {size}, patch {patch} do not fit")
    if c["hidden_act"] not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise ModelError(f"{where}: vision hidden_act {c['hidden_act']!r} is not supported")
    return VisionConfig(
        kind=kind,
        hidden_size=width,
        intermediate_size=_number(c, "intermediate_size", where),
        num_layers=count,
        num_heads=heads,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=_number(c, "layer_norm_eps", where, float, 0),
        hidden_act=c["hidden_act"],
        take=take,
        drop_cls=kind == "clip" and strategy in ("default", "patch"),
    )
