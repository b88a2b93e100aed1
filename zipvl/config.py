"""What a model is, as frozen records. layouts.py fills them from the two kinds of checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError


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
    """CLIP or SigLIP tower. `take` lists the hidden states used (0 embeddings, n after block n)."""

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
    pinpoints: tuple[tuple[int, int], ...] = ()  # any-resolution canvases (height, width), in order
    merge: str = "flat"  # flat | spatial | spatial_unpad (newline column) | tiles (LongVA: no rows)
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
    image_token: int  # placeholder id of a picture's tokens (original layout: -200, in no table)
    video_token: int
    tower: str | None = None  # folder or hub id that may hold the tower's weights (original layout)
    max_length: int | None = None  # context the checkpoint was trained for, for a warning only


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`, or one sentence about why not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a checkpoint folder needs it") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as e:  # ValueError: bad JSON, bad UTF-8, huge digits
        raise ModelError(f"{path} is not readable JSON ({e}): download the file again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object: download the file again")
    return data
