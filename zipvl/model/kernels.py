"""The one door to attention kernels: packed sequences in, packed outputs out, on any device.

    attend(q, k, v, q_spans, k_spans)    q [rows, H, D]   k, v [slots, G, D]   ->   [rows, H, D]

Sequence b owns rows `q_spans[b]` and slots `k_spans[b]`. Causal, aligned at the end, "lower right":
its last row sees all its slots, the row before sees one less. One row per sequence is decoding, as
many rows as slots is prefill. The G key/value heads are never repeated to H. Slots that are
summaries (Spans.merged) get the logarithm of how many tokens they stand for added to their scores.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..policy import Mask, Plan, StepView, select
from .batch import Spans

Attend = Callable[[Tensor, Tensor, Tensor, Spans, Spans], Tensor]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """PyTorch's scaled_dot_product_attention; runs everywhere. One call for sequences of equal
    lengths, else one each."""
    B = len(q_spans)
    bias = [k_spans.bias(b, n, q.dtype) for b, n in enumerate(k_spans.lengths)]
    if len(set(q_spans.lengths)) == len(set(k_spans.lengths)) == len(set(k_spans.capacity)) == 1:
        k, v = (t.unflatten(0, (B, -1))[:, : k_spans.lengths[0]] for t in (k, v))
        added = [x for x in bias if x is not None]
        mask = torch.cat(added) if added else None
        return sdpa(q.unflatten(0, (B, -1)), k, v, mask).flatten(0, 1)
    spans = zip(q_spans.slices(), k_spans.slices(), bias, strict=True)
    return torch.cat([sdpa(q[None, r], k[None, at], v[None, at], b)[0] for r, at, b in spans])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, rows, H, D], k and v [B, slots, G, D] -> [B, rows, H, D]; several rows are causal.
    `mask` [B | 1, 1, 1, slots]: which slots count, or what is added to their scores."""
    rows, slots, G = q.shape[1], k.shape[1], k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, G, slots, D] views
    if rows == 1:  # the H/G heads of a key/value head as rows: the cache is read once
        q = q.unflatten(2, (G, -1))[:, 0]  # [B, G, H/G, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)[:, None]
    if rows != slots or mask is not None:  # SDPA's own is_causal aligns at the start
        seen = torch.ones(rows, slots, dtype=torch.bool, device=q.device).tril(slots - rows)
        mask = seen if mask is None else torch.where(seen, mask, -torch.inf)
    return heads(q.transpose(1, 2), k, v, mask, mask is None).transpose(1, 2)


def heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """PyTorch's own form: q [B, H, rows, D], k and v [B, G, slots, D] -> [B, H, rows, D]. On
    CUDA only FlashAttention knows fewer key/value heads than query heads; where it cannot run
    PyTorch would hold all H x rows x slots scores, so the G heads are repeated: H x slots x D."""
    G, H, grouped = k.shape[1], q.shape[1], k.shape[1] != q.shape[1]
    if grouped and q.device.type == "cuda":
        grouped = mask is None and has_flash(q.device, q.dtype, q.shape[-1])
    if not grouped and G != H:
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's FlashAttention takes such tensors."""
    half = dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int = 512,
                more: Mask | None = None) -> Tensor:  # fmt: skip
    """All T queries of one sequence over the keys of its `kept` tokens [K], causal by index, and of
    those only where a method's mask says so, if there is `more`.

    q [T, H, D], k and v [K, G, D] -> [T, H, D]; a row that sees no key gets zeros.
    Masks are [block, K] or [H, block, K], so nothing grows with T x T.
    """
    out = torch.zeros_like(q)
    for start in range(0, len(q), block):
        rows = torch.arange(start, min(start + block, len(q)), device=q.device)
        mask = kept[None, :] <= rows[:, None]  # [block, K]
        mask = mask if more is None else mask & more(rows)
        some = mask.any(-1)  # [block], or [H, block]
        mask = mask | ~some[..., None]  # a row without keys would divide by zero; it is zeroed
        by_head = [t.transpose(0, 1)[None] for t in (q[rows], k, v)]
        o = heads(by_head[0], by_head[1], by_head[2], mask)
        out[rows] = (o[0] * some[..., None]).transpose(0, 1)
    return out


def attend_steps(views: list[StepView], plans: list[Plan], spans: Spans) -> Tensor | None:
    """A decode step's outputs [B, H, D] where a plan chooses slots, or masses are known and need
    not be computed again; None: it is a matter for any kernel. Views do not show summaries."""
    chosen = any(plan.attend is not None for plan in plans)
    if chosen and spans.merged:
        raise UsageError(
            "the method's step() chooses slots of a cache that holds summaries: make its plan() "
            "give none, or leave out its option summary"
        )
    if not chosen and (spans.merged or not any(view.mass_known for view in views)):
        return None
    both = zip(views, plans, strict=True)
    return torch.stack([attend_step(view, plan.attend) for view, plan in both])


def attend_step(view: StepView, slots: Tensor | None) -> Tensor:
    """A decode step's output [H, D] over `slots`, [K] or [G, K]; None: over all, by their mass."""
    if slots is None:
        probs = view.mass().unflatten(0, (len(view.k), -1))  # [G, H/G, n]
        return (probs.to(view.v.dtype) @ view.v).flatten(0, 1)
    k, v = (select(t.transpose(0, 1), slots) for t in (view.k, view.v))  # [K, G, D]
    return sdpa(view.q[None, None], k[None], v[None])[0, 0]
