"""Rotary position embedding, rotate-half form, as Llama, Mistral and Qwen2 use it.

Positions are a token's place in the whole prompt. They never come from the length of a cache:
after tokens were dropped the two differ, and every later token would be turned by a wrong angle.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import TextConfig


def rope_table(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D/2] for `positions` [T], computed in float32, cast to `dtype`.

    Linear scaling divides the frequencies, as transformers' `rope_type: linear` does.
    """
    steps = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[:, None, None].float() / config.rope_theta**steps / config.rope_factor
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of x [T, heads, D] by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def project(linear: nn.Linear, x: Tensor, cos: Tensor, sin: Tensor, chunk: int | None,
            rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:  # fmt: skip
    """x [n, C] through `linear`, turned: [n, heads, D]; `chunk` rows at a time, None for all."""
    D = 2 * cos.shape[-1]
    if chunk is None or len(x) <= chunk:
        return rotate(linear(x).unflatten(-1, (-1, D)), cos, sin)
    out = x.new_empty(len(x), linear.out_features // D, D)
    parts = zip(*(t.split(chunk) for t in (out, x, cos, sin)), strict=True)
    for into, some, some_cos, some_sin in parts:
        into.copy_(project(linear, some, some_cos, some_sin, None, rotate))
    return out
