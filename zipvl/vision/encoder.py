"""The vision towers (CLIP, SigLIP) and the projector: crops in, one feature a patch out.

Parameter names are those of the checkpoints, misspelling included. A tower owns the blocks its
features need and nothing behind them: LLaVA reads CLIP before its last block, SigLIP before its
last norm.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VisionConfig
from ..errors import ModelError
from ..linear import Embedding, Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class VisionTower(nn.Module):
    """CLIP or SigLIP image encoder (transformers: models/clip and models/siglip).

    pixels [F, 3, S, S] in the tower's dtype -> features [F, N, C * len(take)], the hidden states
    listed in `config.take` side by side on channels. N counts CLIP's class token only if kept.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.drop_cls, width = config.drop_cls, config.hidden_size
        self.embeddings = Embeddings(config)
        self.pre_layrnorm: nn.Module = nn.Identity()
        if config.kind == "clip":
            self.pre_layrnorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.encoder = Encoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return features[:, 1:] if self.drop_cls else features

    def received(self, pixels: Tensor) -> Tensor:
        """Attention that patches receive in the first and in the last block, [F, N, 2] float32:
        from the class token, or the mean over all patches; summed over heads."""
        x, seen = self.pre_layrnorm(self.embeddings(pixels)), []
        asks = slice(None if self.embeddings.class_embedding is None else 1)  # rows
        for n, block in enumerate(cast(Iterable[Block], self.encoder.layers)):
            if n in (0, len(self.encoder.layers) - 1):
                seen.append(block.self_attn.received(block.layer_norm1(x), asks))
            x = block(x)
        scores = torch.stack([seen[0], seen[-1]], dim=-1)
        return scores[:, 1:] if self.drop_cls else scores


class Embeddings(nn.Module):
    """Patches by a strided convolution, plus learned positions; CLIP puts a class token first.

    Pixels that do not fill a patch are dropped at the right and bottom (SigLIP: 384 = 27 * 14 + 6).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        clip, width = config.kind == "clip", config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width)) if clip else None
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=not clip
        )
        self.position_embedding = Embedding(config.grid**2 + clip, width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [F, N, C]
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class Encoder(nn.Module):
    """The blocks up to the last hidden state used; only the states that are used are held."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.take = config.take
        self.layers = nn.ModuleList(Block(config) for _ in range(max(config.take)))

    def forward(self, x: Tensor) -> Tensor:
        states = {0: x}
        for n, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if n in self.take:
                states[n] = x
        return torch.cat([states[n] for n in self.take], dim=-1)


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Every patch of a crop sees every other: no mask, no rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [F, H, N, D]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def received(self, x: Tensor, asks: slice) -> Tensor:
        """[F, N] attention that the patches receive from those that ask."""
        q, k = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for p in (self.q_proj, self.k_proj))  # fmt: skip
        return received(q, k, asks)


def received(q: Tensor, k: Tensor, asks: slice) -> Tensor:
    """[F, N] attention that keys k [F, H, N, D] receive from those queries of q that ask: the mean
    over these, summed over heads."""
    scores = q[:, :, asks].float() @ k.float().mT / math.sqrt(q.shape[-1])  # [F, H, rows, N]
    return scores.softmax(-1).mean(2).sum(1)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, inner), Linear(inner, width)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def projector(kind: str, vision_width: int, text_width: int, bias: bool) -> nn.Sequential:
    """Tower features -> decoder width; linear layers at indices 0, 2, .. as checkpoints name them.

    kind: `linear`, `mlpNx_gelu` (N linear layers, exact GELU between them) or `identity`
    (LLaVA: multimodal_projector/builder.py). Raises ModelError for any other.
    """
    depth = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if kind == "identity":
        if vision_width != text_width:
            raise ModelError(
                f"projector 'identity' cannot join tower width {vision_width} to decoder width "
                f"{text_width}: check mm_projector_type"
            )
        return nn.Sequential()
    if kind != "linear" and depth is None:
        raise ModelError(
            f"projector {kind!r:.60} is not supported (linear, mlp2x_gelu and the like, identity "
            "are): check mm_projector_type"
        )
    layers: list[nn.Module] = [Linear(vision_width, text_width, bias=bias)]
    for _ in range(int(depth[1]) - 1 if depth else 0):
        layers += [nn.GELU(), Linear(text_width, text_width, bias=bias)]
    return nn.Sequential(*layers)
