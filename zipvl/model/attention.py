"""The attention layer: where ZipVL happens, and where any other selection method plugs in.

 x [T, C]
   |  project keys of all tokens, RoPE at original positions
   v
 k [T, G, D] ----------------------------------------------------------.
   |                                                                    |
   |  1 probe     queries of some rows           those that the policy asks for, view.mass(rows)
   |  2 score     mass [H, T]                    causal softmax of those rows, a block at a time
   |  3 select    plan = policy.plan(view)       attend [K], cache [K'] or [G, K'], stream [K'']
   v                                                                    v
   4 attend    q, k, v of `attend` only; one   5 compact   k, v of `cache`, copied into a cache of
   |           packed call for the batch                   exactly that size (model/cache.py)
   v
 out [T, C]    rows outside `attend`: zero, so only the residual passes them

Letters: T tokens of a sequence, H query heads, G key/value heads, D head size, C model width,
P probe rows, K kept tokens, B sequences of a batch. `sum T` rows of a packed batch lie one sequence
after the other. Keys are projected for all tokens because scores need them; queries for probes and
kept tokens only, and so is the output projection; values for kept tokens where those are what the
cache holds, else for all. The paper projects everything; the result is the same
(tests/test_attention.py).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..linear import Linear, RMSNorm
from ..policy import Plan, Policy, StepView, View, ask_all
from .batch import Batch, Rotate, Spans
from .cache import Cache, Kept
from .kernels import Attend, attend_kept, attend_steps

Rows = Tensor | slice
Store = Callable[[list[Kept]], Cache]  # builds a layer's cache of what its sequences keep
SCORE_BYTES = 64 << 20  # one block of probe rows x heads x tokens in float32


class Observer:
    """Is told how a prefill goes on; engine/stats.py counts seconds, tokens and work with one."""

    def lap(self, stage: str) -> None:
        """The time since the last call went into `stage`: probe, select, attend or rest."""

    def looked(self, sequence: int, work: int) -> None:
        """What a policy asked to see of a sequence took so many multiply-adds."""

    def layer(self, entered: list[int], plans: list[Plan], left: list[int], ends: bool) -> None:
        """A layer is done: how many tokens of each sequence entered and left it, what was planned,
        and whether the last token of each alone was computed."""


class Attention(nn.Module):
    """Self-attention of Llama, Mistral, Qwen2 and Qwen3 (transformers: models/*/modeling_*.py)."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        C, H, G, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.layer = config, layer
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, G * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, G * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.rotate: nn.Module = Rotate()
        self.probe_mass = probe_mass

    def heads(self, x: Tensor) -> Tensor:
        """[n, heads * D] -> [n, heads, D]."""
        return x.unflatten(-1, (-1, self.config.head_dim))

    def queries(self, x: Tensor, batch: Batch, rows: Rows = slice(None)) -> Tensor:
        """[n, H, D] of the n `rows` of x [sum T, C], RoPE included."""
        return self.rotated(self.q_proj, self.q_norm, x, batch, rows)

    def keys(self, x: Tensor, batch: Batch) -> Tensor:
        """[sum T, G, D], RoPE included."""
        return self.rotated(self.k_proj, self.k_norm, x, batch, slice(None))

    def rotated(self, project: Linear, norm: nn.Module, x: Tensor, batch: Batch,
                rows: Rows) -> Tensor:  # fmt: skip
        """Queries or keys: projected, where the model does so normed, and turned."""
        x, cos, sin = x[rows], batch.cos[rows], batch.sin[rows]
        if batch.chunk is None or len(x) <= batch.chunk:
            return self.rotate(norm(self.heads(project(x))), cos, sin)
        out = self.heads(x.new_empty(len(x), project.out_features))
        for into, *part in zip(*(t.split(batch.chunk) for t in (out, x, cos, sin)), strict=True):
            into.copy_(self.rotate(norm(self.heads(project(part[0]))), *part[1:]))
        return out

    def prefill(self, x: Tensor, batch: Batch, policy: Policy, kernel: Attend, store: Store | None,
                watch: Observer, ends: bool = False,
                ) -> tuple[Tensor, list[Plan], Cache | None]:  # fmt: skip
        """One layer over a packed batch: x [sum T, C] -> attention output [sum T, C], the plans of
        its sequences, and the cache that `store` builds (None: none is built).

        `ends`: the output of each sequence's last token is wanted and no other, [B, C]."""
        k = self.keys(x, batch)  # [sum T, G, D]
        watch.lap("rest")
        # 1 probe, 2 score and 3 select: the policy looks at each sequence and plans
        views = [self.view(x, k, batch, b, watch) for b in range(len(batch.spans))]
        plans = ask_all(policy.plan, views)
        watch.lap("select")
        # 4 attend: among the tokens each plan names
        rows, spans = batch.rows([plan.attend for plan in plans])  # [sum K]
        kept_only = store is None or all(
            plan.cache is plan.attend and not plan.summary and plan.merge is None for plan in plans
        )
        v = self.heads(self.v_proj(x[rows] if kept_only else x))  # [sum K or sum T, G, D]
        watch.lap("rest")
        attend = self.attend_ends if ends else self.attend
        out = attend(x, k, v if kept_only else v[rows], batch, plans, rows, spans, kernel)
        watch.lap("attend")
        # 5 compact: what a sequence keeps is copied, so that the prompt's k and v can be let go
        cache = None
        if store is not None:
            k_at, v_at = batch.spans.slices(), (spans if kept_only else batch.spans).slices()
            kept = [
                Kept.of(plan, k[at], v[mine], batch.positions[at], kept_only)
                for plan, at, mine in zip(plans, k_at, v_at, strict=True)
            ]
            cache = store(kept)
        watch.lap("rest")
        return out, plans, cache

    def view(self, x: Tensor, k: Tensor, batch: Batch, b: int, watch: Observer) -> View:
        """What the policy sees of sequence number `b`; scores are computed when it asks."""
        at = batch.spans.slices()[b]
        T, width = batch.spans.lengths[b], self.q_proj.out_features

        def score(rows: Tensor) -> Tensor:
            rows = rows.to(x.device)
            q = self.queries(x, batch, rows + at.start)  # 1 probe
            mass = self.probe_mass(q, k[at], rows)  # 2 score
            watch.looked(b, len(rows) * width * (x.shape[1] + T))
            watch.lap("probe")
            return mass

        def blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
            rows = rows.to(x.device)
            q = self.queries(x, batch, rows + at.start)
            watch.looked(b, len(rows) * width * (x.shape[1] + T))
            yield from logit_blocks(q, k[at], rows)

        def project_q(rows: Tensor | None) -> Tensor:
            watch.looked(b, (T if rows is None else len(rows)) * x.shape[1] * width)
            some = at if rows is None else rows.to(x.device) + at.start
            return self.queries(x, batch, some).transpose(0, 1)

        def project_v() -> Tensor:
            watch.looked(b, T * x.shape[1] * self.v_proj.out_features)
            return self.heads(self.v_proj(x[at])).transpose(0, 1)

        return View(
            layer=self.layer,
            num_layers=self.config.num_layers,
            k=k[at].transpose(0, 1),
            positions=batch.positions[at],
            is_visual=batch.is_visual[at],
            notes=batch.notes[b],
            project_q=project_q,
            project_v=project_v,
            score=score,
            blocks=blocks,
        )

    def attend(self, x: Tensor, k: Tensor, v: Tensor, batch: Batch, plans: list[Plan], rows: Rows,
               spans: Spans, kernel: Attend) -> Tensor:  # fmt: skip
        """Step 4: causal attention among the kept tokens of each sequence, [sum T, C].

        These tokens are `rows` of the batch, [sum K], at `spans`; v [sum K, G, D] is theirs.
        """
        masked = any(plan.mask is not None for plan in plans)
        if isinstance(rows, slice) and not masked:  # everybody attends
            q = self.queries(x, batch)
            return self.o_proj(kernel(q, k, v, spans, spans).flatten(1))
        rows = torch.arange(len(x), device=x.device) if isinstance(rows, slice) else rows
        parts = list(zip(batch.spans.slices(), spans.slices(), plans, strict=True))
        if masked or any(plan.fill == "own" for plan in plans):  # who is left out asks as well
            q = self.queries(x, batch)
            outs = [
                attend_kept(q[at], k[rows[mine]], v[mine], rows[mine] - at.start, more=plan.mask)
                for at, mine, plan in parts
            ]
            everybody = self.o_proj(torch.cat(outs).flatten(1))  # [sum T, C]
            o = everybody[rows]
        else:
            q = self.queries(x, batch, rows)  # [sum K, H, D]
            o = self.o_proj(kernel(q, k[rows], v, spans, spans).flatten(1))  # [sum K, C]
        out = x.new_zeros(len(x), o.shape[1]).index_copy_(0, rows, o)
        for at, mine, plan in parts:
            if plan.fill == "previous":
                nearest_earlier(o[mine], rows[mine] - at.start, out[at])
            elif plan.fill == "own":
                out[at] = everybody[at]
        return out

    def attend_ends(self, x: Tensor, k: Tensor, v: Tensor, batch: Batch, plans: list[Plan],
                    rows: Rows, spans: Spans, kernel: Attend) -> Tensor:  # fmt: skip
        """Step 4 for each sequence's last token alone, [B, C]: its row of what attend() gives."""
        if any(plan.mask is not None for plan in plans):
            return self.attend(x, k, v, batch, plans, rows, spans, kernel)[batch.spans.ends]
        last = asks = batch.spans.ends  # [B]
        if not isinstance(rows, slice):
            k, newest = k[rows], rows[spans.ends]  # the last token that is kept, if not `last`
            own = [plan.fill == "own" for plan in plans]
            asks = torch.stack([(last if o else newest)[b] for b, o in enumerate(own)])
        q = self.queries(x, batch, asks)  # [B, H, D]
        out = self.o_proj(kernel(q, k, v, Spans([1] * len(plans), x.device), spans).flatten(1))
        for b, plan in enumerate(plans):
            if plan.fill == "zero":
                out[b : b + 1].masked_fill_((asks != last)[b], 0)
        return out

    def decode(self, x: Tensor, batch: Batch, cache: Cache, policy: Policy,
               kernel: Attend) -> Tensor:  # fmt: skip
        """New tokens of each sequence: x [sum n, C] -> [sum n, C]; the cache grows. One of each at
        most, where a method has a step()."""
        q, k, v = self.newest(x, batch)
        cache.append(k, v, batch.positions, batch.spans)
        k, v, spans = cache.read()  # [slots, G, D]
        plans = [Plan()] * len(spans)
        if policy.step is None:
            o = kernel(q, k, v, batch.spans, spans)
        else:
            asked = [b for b, n in enumerate(batch.spans.lengths) if n]
            views = self.step_views(q, k, v, batch, cache, asked)
            answers = ask_all(policy.step, views)
            chosen = attend_steps(views, answers, spans)
            o = kernel(q, k, v, batch.spans, spans) if chosen is None else chosen
            for b, plan in zip(asked, answers, strict=True):
                plans[b] = plan
        cache.apply(plans)
        return self.o_proj(o.flatten(1))

    def newest(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Query [n, H, D], key and value [n, G, D] of new tokens x [n, C]."""
        return self.queries(x, batch), self.keys(x, batch), self.heads(self.v_proj(x))

    def step_views(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: Cache,
                   asked: list[int]) -> list[StepView]:  # fmt: skip
        """What the policy sees at a decode step of the sequences `asked`, q [len(asked), H, D]."""
        at = cache.spans.own()
        return [
            StepView(
                layer=self.layer,
                num_layers=self.config.num_layers,
                q=query,
                k=k[at[b]].transpose(0, 1),
                v=v[at[b]].transpose(0, 1),
                positions=cache.places(b).T,
                due=cache.due(b),
                notes=batch.notes[b],
            )
            for b, query in zip(asked, q, strict=True)
        ]


def probe_mass(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Eq. 5 on probe rows: attention that each token receives from them, [H, T] float32.

    q [P, H, D] are the queries at `rows` [P]; k [T, G, D]. Exact causal softmax of float32 logits,
    one key/value head and as many rows at a time as fit SCORE_BYTES: O(P T) work, never [T, T].
    """
    mass = torch.zeros(q.shape[1], len(k), dtype=torch.float32, device=q.device)
    for heads, _, logits in logit_blocks(q, k, rows):
        mass[heads] += logits.softmax(dim=-1).sum(1)
    return mass


def logit_blocks(q: Tensor, k: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The logits behind it: (heads, rows [b], logits [H/G, b, T]), -inf in the future."""
    P, H, D = q.shape
    T, G = k.shape[:2]
    index = torch.arange(T, device=q.device)
    blocks = torch.arange(P, device=q.device).split(max(1, SCORE_BYTES // (4 * H // G * T)))
    for g in range(G):
        columns = k[:, g].float().T / math.sqrt(D)  # [D, T]
        for block in blocks:
            queries = q[block].unflatten(1, (G, -1))[:, g].transpose(0, 1).float()  # [H/G, b, D]
            scores = (queries.flatten(0, 1) @ columns).unflatten(0, (-1, len(block)))
            future = index > rows[block, None]  # [b, T]
            heads = slice(g * H // G, (g + 1) * H // G)
            yield heads, rows[block], scores.masked_fill_(future, -math.inf)


def nearest_earlier(o: Tensor, index: Tensor, out: Tensor) -> None:
    """Each row of `out` [n, C] becomes the row of o [K, C], of tokens `index` [K], that is nearest
    and not behind it; zeros before the first. The output projection is linear: this may follow."""
    slot = torch.searchsorted(index, torch.arange(len(out), device=o.device), right=True) - 1
    torch.index_select(o, 0, slot.clamp(min=0), out=out)
    out.mul_((slot >= 0)[:, None])
