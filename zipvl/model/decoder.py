"""The language model: Llama, Mistral or Qwen2, over packed sequences.

Mirrors transformers' models/{llama,mistral,qwen2}/modeling_*.py; parameter names are theirs.
`forward` is the dense model without a cache, differentiable, for training and tests; `prefill` and
`decode` are the two halves of generation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..engine.cache import Cache
from ..engine.stats import Clock, LayerStats
from ..policy import Policy
from .attention import Attention, Pack
from .kernels import Attend, attend_sdpa
from .linear import Linear, gated
from .tokens import join


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in float32 and cast back before the weight."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps
        self.compute = rms_norm  # model/compiled.py puts other forms here, as below

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Prefilled:
    """What a prefill leaves behind."""

    hidden: Tensor  # [sum T', C] after the last norm, of the tokens that reached the end
    pack: Pack  # where these tokens lie and what their positions are
    caches: list[Cache]  # one a layer; empty if none was asked for
    layers: list[LayerStats]


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def blocks(self) -> Iterator[Block]:
        yield from cast(Iterable[Block], self.layers)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Dense hidden states [sum T, C] of packed embeddings x [sum T, C]."""
        positions = join([torch.arange(n, device=x.device) for n in lengths])
        pack = Pack.build(lengths, positions, torch.zeros_like(positions) > 0, self.config, x.dtype)
        return self.prefill(x, pack, Policy(), attend_sdpa).hidden

    def prefill(
        self,
        x: Tensor,
        pack: Pack,
        policy: Policy,
        attend: Attend,
        room: int | None = None,
        chunk: int | None = None,
        progress: Callable[[LayerStats], object] | None = None,
    ) -> Prefilled:
        """All layers over packed embeddings x [sum T, C].

        `room`: new tokens each cache must hold, None for no caches. `chunk`: rows of projections,
        MLP and norms at a time, so that temporaries do not grow with T; None: all at once.
        """
        pack = replace(pack, chunk=chunk)
        caches, layers, clock = [], [], Clock(x.device)
        for block in self.blocks():
            with clock("rest"):
                h = chunked(block.input_layernorm, x, chunk)
            h, plans, cache, stats = block.self_attn.prefill(h, pack, policy, attend, room, clock)
            if any(plan.stream is not None for plan in plans):
                rows, lengths = stream_rows(plans, pack)
                x, h, pack = x[rows], h[rows], pack.take(rows, lengths)
            with clock("rest"):
                x = x + h
                del h  # as long as the prompt, and so is what comes
                x = chunked(block.feed_forward, x, chunk)
            stats.add_seconds(clock.pop())
            layers.append(stats)
            if cache is not None:
                caches.append(cache)
            if progress:
                progress(stats)
        return Prefilled(chunked(self.norm, x, chunk), pack, caches, layers)

    def decode(self, x: Tensor, positions: Tensor, caches: Sequence[Cache], policy: Policy,
               attend: Attend) -> Tensor:  # fmt: skip
        """One token per sequence: embeddings x [B, C] at `positions` [B] -> hidden [B, C]."""
        text = torch.zeros_like(positions, dtype=torch.bool)
        pack = Pack.build([1] * len(x), positions, text, self.config, x.dtype)
        return self.step(x, pack, caches, policy, attend)

    def step(self, x: Tensor, pack: Pack, caches: Sequence[Cache], policy: Policy,
             attend: Attend) -> Tensor:  # fmt: skip
        """The same with what the pack knows already made."""
        for block, cache in zip(self.blocks(), caches, strict=True):
            h = block.input_layernorm(x)
            x = x + block.self_attn.decode(h, pack, cache, policy, attend)
            x = block.feed_forward(x)
        return self.norm(x)


def chunked(function: Callable[[Tensor], Tensor], x: Tensor, rows: int | None) -> Tensor:
    """function(x) for a function that treats the rows of x [T, C] alone and keeps their width."""
    if rows is None or len(x) <= rows:
        return function(x)
    out = torch.empty_like(x)
    for part, into in zip(x.split(rows), out.split(rows), strict=True):
        into.copy_(function(part))
    return out


def stream_rows(plans: list, pack: Pack) -> tuple[Tensor, list[int]]:
    """Rows of the packed batch that go on to the next layer, and how many of each sequence."""
    kept = [
        torch.arange(s, s + n, device=pack.positions.device) if p.stream is None else p.stream + s
        for p, s, n in zip(plans, pack.spans.starts, pack.spans.lengths, strict=True)
    ]
    return join(kept), [len(i) for i in kept]
