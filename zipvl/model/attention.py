"""The attention layer: where ZipVL happens, and where any other selection method plugs in.

 x [T, C]
   |  project keys of all tokens, RoPE at original positions
   v
 k [T, G, D] ----------------------------------------------------------.
   |                                                                    |
   |  1 probe     rows = policy.probe(view)      [P], about 128         |
   |  2 score     mass [H, T], seen [T]          causal softmax of those rows, a block at a time
   |  3 select    plan = policy.plan(view)       attend [K], cache [K'] or [G, K'], stream [K'']
   v                                                                    v
   4 attend    q, v of `attend` only; one      5 compact   k, v of `cache`, copied into a cache of
   |           packed call for the batch                   exactly that size (engine/cache.py)
   v
 out [T, C]    rows outside `attend`: zero, so only the residual passes them

Letters: T tokens of a sequence, H query heads, G key/value heads, D head size, C model width,
P probe rows, K kept tokens, B sequences of a batch. `sum T` rows of a packed batch lie one sequence
after the other. Keys are projected for all tokens because scores need them; queries for probes and
kept tokens, values for kept and cached ones, the output projection for kept ones only. The paper
projects everything; the result is the same (tests/test_attention.py).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..engine.cache import Cache
from ..engine.stats import Clock, LayerStats
from ..policy import Plan, Policy, View
from .kernels import Attend, Spans, attend_kept, attend_row
from .linear import Linear
from .pack import Pack
from .rope import project, rotate
from .scores import count_seen, probe_mass
from .tokens import compact, join, lookup, needed, spread


class Attention(nn.Module):
    """Self-attention of Llama, Mistral and Qwen2 (transformers: models/*/modeling_*.py)."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        C, H, G, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.layer = config, layer
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, G * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, G * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.rotate = rotate

    def queries(self, x: Tensor, pack: Pack, rows: Tensor | slice) -> Tensor:
        """Rotated queries [rows, H, D] of x [sum T, C]."""
        cos, sin = pack.cos[rows], pack.sin[rows]
        return project(self.q_proj, x[rows], cos, sin, pack.chunk, self.rotate)

    def keys(self, x: Tensor, pack: Pack) -> Tensor:
        """Rotated keys [sum T, G, D]."""
        return project(self.k_proj, x, pack.cos, pack.sin, pack.chunk, self.rotate)

    def values(self, x: Tensor, pack: Pack, needs: list[Tensor | None]) -> tuple[Tensor, Spans]:
        """Values of the `needs` tokens of each sequence, [sum needed, G, D], and their spans."""
        if all(need is None for need in needs):
            return self.v_proj(x).unflatten(-1, (-1, self.config.head_dim)), pack.spans
        spans = pack.spans
        rows = [
            torch.arange(n, device=x.device) + s if need is None else need + s
            for need, n, s in zip(needs, spans.lengths, spans.starts, strict=True)
        ]
        v = self.v_proj(x[join(rows)]).unflatten(-1, (-1, self.config.head_dim))
        return v, Spans([len(r) for r in rows], x.device)

    def prefill(
        self, x: Tensor, pack: Pack, policy: Policy, attend: Attend, room: int | None, clock: Clock
    ) -> tuple[Tensor, list[Plan], Cache | None, LayerStats]:
        """One layer over a packed batch: x [sum T, C] -> attention output [sum T, C].

        `room` is how many new tokens the cache must hold; None builds no cache.
        """
        with clock("rest"):
            k = self.keys(x, pack)  # [sum T, G, D]
        plans = [self.plan(x, k, pack, b, policy, clock) for b in range(len(pack.spans))]
        with clock("rest"):
            needs = [plan.attend if room is None else needed(plan) for plan in plans]
            v, v_spans = self.values(x, pack, needs)  # [sum needed, G, D]
        with clock("attend"):
            vs = [
                lookup(v[b], need, plan.attend)
                for b, need, plan in zip(v_spans.slices(), needs, plans, strict=True)
            ]
            out = self.attend(x, k, vs, pack, plans, attend)
        with clock("rest"):
            cache = None
            if room is not None:
                cache = compact(k, v, v_spans, needs, pack, plans, room, policy.storage)
        return out, plans, cache, LayerStats.of(pack.spans.lengths, plans, cache, clock.pop())

    def plan(self, x: Tensor, k: Tensor, pack: Pack, b: int, policy: Policy, clock: Clock) -> Plan:
        """Steps 1 to 3 for sequence number `b` of the batch."""
        at = pack.spans.slices()[b]
        view = View(
            layer=self.layer,
            num_layers=self.config.num_layers,
            k=k[at].transpose(0, 1),
            positions=pack.positions[at],
            is_visual=pack.is_visual[at],
            project_q=lambda: self.queries(x, pack, at).transpose(0, 1),
            project_v=lambda: (
                self.v_proj(x[at]).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)
            ),
            state=pack.state[b],
        )
        with clock("probe"):
            rows = policy.probe(view)
            if rows is not None:
                rows = rows.to(x.device)
                q = self.queries(x, pack, rows + at.start)  # [P, H, D]
                view = replace(
                    view, mass=probe_mass(q, k[at], rows), seen=count_seen(rows, view.length)
                )
        with clock("select"):
            return policy.plan(view)

    def attend(self, x: Tensor, k: Tensor, vs: list[Tensor], pack: Pack, plans: list[Plan],
               attend: Attend) -> Tensor:  # fmt: skip
        """Step 4: causal attention among the kept tokens of each sequence, [sum T, C]."""
        if all(p.attend is None for p in plans):
            q = self.queries(x, pack, slice(None))
            return self.o_proj(attend(q, k, join(vs), pack.spans, pack.spans).flatten(1))
        lengths = pack.spans.lengths
        kept = [
            torch.arange(n, device=x.device) if p.attend is None else p.attend
            for p, n in zip(plans, lengths, strict=True)
        ]
        rows = join([i + s for i, s in zip(kept, pack.spans.starts, strict=True)])  # [sum K]
        spans = Spans([len(i) for i in kept], x.device)
        if any(p.fill == "own" for p in plans):
            q = self.queries(x, pack, slice(None))
            parts = [
                attend_kept(q[at], k[at][i], v, i).flatten(1)
                for at, v, i in zip(pack.spans.slices(), vs, kept, strict=True)
            ]
            parts = [
                o if p.fill == "own" else spread(o[i], i, len(o), p.fill)
                for o, i, p in zip(parts, kept, plans, strict=True)
            ]
            return self.o_proj(join(parts))
        q = self.queries(x, pack, rows)  # [sum K, H, D]
        o = self.o_proj(attend(q, k[rows], join(vs), spans, spans).flatten(1))  # [sum K, C]
        parts = [
            spread(o[at], i, n, p.fill)
            for at, i, n, p in zip(spans.slices(), kept, lengths, plans, strict=True)
        ]
        return join(parts)

    def decode(self, x: Tensor, pack: Pack, cache: Cache, policy: Policy,
               attend: Attend) -> Tensor:  # fmt: skip
        """A new token per sequence: x [B, C] -> [B, C]; the cache grows."""
        q, k = self.queries(x, pack, slice(None)), self.keys(x, pack)  # [B, H, D], [B, G, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.config.head_dim))  # [B, G, D]
        cache.append(k, v, pack.positions)
        k, v, spans = cache.read()
        rows = spans.slices()
        probs: list[Tensor | None] = [None] * len(x)
        if policy.watch_decode:
            both = [attend_row(q[b], k[at], v[at]) for b, at in enumerate(rows)]
            o, probs = torch.stack([o for o, _ in both]), [p.mean(1) for _, p in both]
        else:
            o = attend(q, k, v, pack.spans, spans)
        self.evict(cache, policy, probs)

        def precise(b: int, newest: int) -> Tensor | None:
            mass = attend_row(q[b], k[rows[b]], v[rows[b]])[1].flatten(0, 1)  # [H, n]
            return policy.precise(self.layer, mass[:, -newest:], cache.state[b])

        cache.settle(precise)
        return self.o_proj(o.flatten(1))

    def evict(self, cache: Cache, policy: Policy, probs: list[Tensor | None]) -> None:
        for b, p in enumerate(probs):
            slots = policy.evict(self.layer, cache.spans.lengths[b], cache.state[b], p)
            if slots is not None:
                cache.keep(b, slots)
