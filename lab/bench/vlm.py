"""A whole random model, tower and projector included, behind the real engine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch

from zipvl.config import LlavaConfig, MediaConfig, ModelConfig, Section
from zipvl.engine.engine import Engine
from zipvl.model import backends
from zipvl.model.chat import Chat
from zipvl.model.layouts import CLIP_L_336, SIGLIP_SO400M, read_vision
from zipvl.model.vlm import VLM
from zipvl.vision.family import CLIP_MEAN, CLIP_STD

from .model import fill, text_config

SMALL = CLIP_L_336 | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56,
}  # fmt: skip
TOWERS = {  # tower, and how a frame's features are pooled
    "qwen2-0.5b": (SIGLIP_SO400M, "bilinear"),  # as LLaVA-OneVision 0.5B: 196 tokens a frame
    "longva-7b": (CLIP_L_336, "average"),  # 144 tokens a frame
    "llava-1.5-7b": (CLIP_L_336, "none"),  # 576
    "llava-next-13b": (CLIP_L_336, "average"),  # 144, as LLaVA-NeXT-Video
    "tiny": (SMALL, "average"),  # 4
    "tiny-384": (SMALL | {"image_size": 384}, "bilinear"),  # 196
}


@dataclass(frozen=True)
class NoText:
    """Stands for the tokenizer of a random model: every token is one, none stops."""

    vocab_size: int
    stop_ids: frozenset[int] = frozenset()

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def vlm_config(shape: str, layers: int | None = None) -> ModelConfig:
    """A named decoder shape with the tower its family has."""
    raw, pool = TOWERS[shape]
    vision = read_vision(Section(raw, shape), -2, True)
    media = MediaConfig(
        vision.image_size, "squash", CLIP_MEAN, CLIP_STD, image="crop", pool=pool
    )  # fmt: skip
    eyes = LlavaConfig(vision, media, "mlp2x_gelu", projector_bias=True, newline=False)
    return ModelConfig(text_config(shape, layers), eyes, "llava", "hf", 0, 0)


def random_engine(
    shape: str, device: str, dtype: torch.dtype, attn: str, layers: int | None
) -> Engine:
    """An Engine over random weights; its answers are token numbers."""
    config = vlm_config(shape, layers)
    with torch.device("meta"):
        model = VLM(config)
    fill(model, device, dtype)
    if config.text.tied:
        model.lm_head.weight = model.text.embed_tokens.weight
    backend, attend = backends.pick(attn, model.device, dtype, config.text.head_dim)
    chat = cast(Chat, NoText(config.text.vocab_size))
    return Engine(model, chat, backend, attend)
