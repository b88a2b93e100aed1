"""The language model: Llama, Mistral, Qwen2 or Qwen3, over packed sequences.

Mirrors transformers' models/{llama,mistral,qwen2,qwen3}/modeling_*.py; parameter names are theirs.
`forward` is the dense model without a cache, differentiable, for training and tests; `prefill` and
`decode` are the two halves of generation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..errors import DAMAGED, ModelError
from ..linear import Embedding, GatedMLP, RMSNorm, chunked
from ..policy import Notes, Plan, Policy, PromptView, Trim, ask, ask_trim
from .attention import Attention, Observer
from .batch import Batch, Spans, join, sent
from .cache import Cache, store_as
from .kernels import Attend, attend_sdpa


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The second half of the layer; h is what attention adds to x."""
        x, h = self.post_attention_layernorm.add(x, h)
        return x + self.mlp(h)


@dataclass(frozen=True)
class Prefilled:
    """What a prefill leaves behind."""

    hidden: Tensor  # [sum T', C] after the last norm, of the tokens that reached the end
    batch: Batch  # where these tokens lie and what their positions are
    caches: list[Cache]  # one a layer; empty if none was asked for


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def blocks(self) -> Iterator[Block]:
        yield from cast(Iterable[Block], self.layers)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Dense hidden states [sum T, C] of packed embeddings x [sum T, C]."""
        positions = join([torch.arange(n, device=x.device) for n in lengths])
        text = torch.zeros_like(positions, dtype=torch.bool)
        batch = Batch.build(lengths, positions, text, self.config, x.dtype)
        return self.prefill(x, batch, Policy(), attend_sdpa).hidden

    def prefill(self, x: Tensor, batch: Batch, policy: Policy, attend: Attend,
                room: int | None = None, chunk: int | None = None,
                observer: Observer | None = None, ends: bool = False) -> Prefilled:  # fmt: skip
        """All layers over packed embeddings x [sum T, C].

        `room`: new tokens each cache must hold, None for no caches. `chunk`: rows of projections,
        MLP and norms at a time, so that temporaries do not grow with T; None: all at once. `ends`:
        each sequence's last token is all that is wanted, so the last layer computes no other.
        """
        watch, batch = observer or Observer(), replace(batch, chunk=chunk)
        # 1 what builds the caches, in the form that the method stores them; one for all layers
        store = None if room is None else store_as(policy.storage, room)
        # 2 which tokens enter
        if policy.start is not None:
            x, batch = enter(x, batch, policy.start, bool(self.config.rope_sections))
        # 3 the layers
        caches: list[Cache] = []
        for i, block in enumerate(self.blocks()):
            h, entered = block.input_layernorm.chunked(x, chunk), batch.spans.lengths
            alone = ends and i + 1 == len(self.layers)
            h, plans, cache = block.self_attn.prefill(h, batch, policy, attend, store, watch, alone)
            if any(plan.stream is not None for plan in plans):
                rows, spans = batch.rows([plan.stream for plan in plans])
                x, batch = x[rows], batch.take(rows, spans)
                h = h if alone else h[rows]
            if alone:
                last = batch.spans.ends
                x, batch = finite(x)[last], batch.take(last, Spans([1] * len(plans), x.device))
            x = chunked(block.feed_forward, chunk, x, h)
            del h  # as long as the prompt
            caches += [] if cache is None else [cache]
            if policy.trim is not None and caches:
                trim(caches, i, batch.notes, policy.trim)
            watch.lap("rest")
            watch.layer(entered, plans, batch.spans.lengths, alone)
        return Prefilled(self.norm.chunked(x, chunk), batch, caches)

    def decode(self, x: Tensor, positions: Tensor, caches: Sequence[Cache], policy: Policy,
               attend: Attend, notes: list[Notes] | None = None) -> Tensor:  # fmt: skip
        """One token per sequence: embeddings x [B, C] at `positions` [B] -> hidden [B, C].

        `notes` are those of the prefill; None for a method that keeps none.
        """
        text = torch.zeros_like(positions, dtype=torch.bool)
        batch = Batch.build([1] * len(x), positions, text, self.config, x.dtype, notes)
        return self.step(x, batch, caches, policy, attend)

    def extend(self, x: Tensor, lengths: list[int], positions: Tensor, caches: Sequence[Cache],
               policy: Policy, attend: Attend, notes: list[Notes] | None = None,
               chunk: int | None = None) -> Tensor:  # fmt: skip
        """Tokens that follow what the caches hold, so many of each sequence: packed embeddings
        x [sum n, C] at `positions` [sum n] -> hidden [sum n, C], the same as decode() of one after
        the other. The caches must have room for them.

        As many at once as may: one where a method's step() looks at each, those until some leave
        full precision, at most `chunk` of a sequence."""
        text = torch.zeros_like(positions, dtype=torch.bool)
        batch = Batch.build(lengths, positions, text, self.config, x.dtype, notes)
        out, left = torch.empty_like(x), list(lengths)
        while any(left):
            most = 1 if policy.step is not None else chunk or len(x)
            strides = zip(*(cache.stride() for cache in caches), strict=True)
            some = [min(n, most, *free) for n, free in zip(left, strides, strict=True)]
            assert any(some), "the caches are full"
            firsts = [stop - n for stop, n in zip(accumulate(lengths), left, strict=True)]
            rows = join([torch.arange(s, s + n) for s, n in zip(firsts, some, strict=True)])
            rows, spans = sent(rows, x.device), Spans(some, x.device)
            out[rows] = self.step(x[rows], batch.take(rows, spans), caches, policy, attend)
            left = [n - took for n, took in zip(left, some, strict=True)]
        return out

    def step(self, x: Tensor, batch: Batch, caches: Sequence[Cache], policy: Policy,
             attend: Attend) -> Tensor:  # fmt: skip
        """One pass over new tokens x [sum n, C] with what the batch knows already made."""
        for block, cache in zip(self.blocks(), caches, strict=True):
            h = block.input_layernorm(x)
            x = block.feed_forward(x, block.self_attn.decode(h, batch, cache, policy, attend))
        return self.norm(x)


def enter(x: Tensor, batch: Batch, start: Callable[[PromptView], Plan],
          apart: bool) -> tuple[Tensor, Batch]:  # fmt: skip
    """The rows and the batch of those tokens that start() lets into the model; x may change. Their
    angles stay where rotary ids are no positions (`apart`): a picture's rows and columns do."""
    some = zip(batch.spans.slices(), batch.notes, strict=True)
    plans = [ask(start, PromptView(x[at], batch.is_visual[at], notes)) for at, notes in some]
    chosen, counted = [plan.stream for plan in plans], []
    for plan, at, notes in zip(plans, batch.spans.slices(), batch.notes, strict=True):
        if plan.x is not None:
            x[at] = plan.x
        notes.entered = index = plan.stream if plan.renumber else None
        # those that are renumbered take the places 0, 1, .. of a prompt's first tokens
        first = None if index is None else torch.arange(len(index), device=x.device)
        counted.append(plan.stream if first is None else first)
        notes.ahead += at.stop - at.start - len(index) if apart and index is not None else 0
    (rows, spans), (places, _) = batch.rows(chosen), batch.rows(counted)
    entered = replace(batch.take(rows, spans), positions=batch.positions[places])
    if not apart:
        entered = replace(entered, cos=batch.cos[places], sin=batch.sin[places])
    return x[rows], entered


def trim(caches: list[Cache], layer: int, notes: list[Notes], decide: Trim) -> None:
    """Behind `layer`: of the caches so far, those that trim() names hold the slots it names."""
    heads = caches[0].places(0).shape[1]
    lengths = [[len(cache.places(b)) for cache in caches] for b in range(len(notes))]
    both = zip(notes, lengths, strict=True)
    slots = [ask_trim(decide, layer, mine, held, heads) for mine, held in both]
    for i in {i for mine in slots for i in mine}:
        caches[i] = caches[i].trim([mine.get(i) for mine in slots])


def finite(x: Tensor) -> Tensor:
    """x, hidden states of all tokens: a token that is no number may have been left out blindly.
    Raises ModelError."""
    if not is_finite(x):
        raise ModelError(f"the model's hidden states {DAMAGED}")
    return x


def is_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity, without a tensor of its size."""
    return bool(torch.isfinite(torch.linalg.vector_norm(x.flatten(), torch.inf)))
