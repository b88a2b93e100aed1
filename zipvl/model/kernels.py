"""The one door to attention kernels: packed sequences in, packed outputs out, on any device.

    attend(q, k, v, q_spans, k_spans)    q [rows, H, D]   k, v [slots, G, D]   ->   [rows, H, D]

Sequence b owns rows `q_spans[b]` and slots `k_spans[b]`. Causal, aligned at the end, "lower right":
its last row sees all its slots, the row before sees one less. One row per sequence is decoding, as
many rows as slots is prefill. The G key/value heads are never repeated to H. Slots that are
summaries (Spans.merged) get the logarithm of how many tokens they stand for added to their scores.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..policy import Plan, StepView
from .batch import Spans
from .cache import select

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
    rows, H, slots, G = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, G, slots, D] views
    if rows == 1:  # the H/G heads of a key/value head as rows: the cache is read once
        q = q.unflatten(2, (G, -1))[:, 0]  # [B, G, H/G, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)[:, None]
    if rows != slots or mask is not None:  # SDPA's own is_causal aligns at the start
        seen = torch.ones(rows, slots, dtype=torch.bool, device=q.device).tril(slots - rows)
        mask = seen if mask is None else torch.where(seen, mask, -torch.inf)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=G != H
    )
    return out.transpose(1, 2)


def attend_torch_flash(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """FlashAttention-2 as every CUDA build of PyTorch carries it: one varlen call for the batch.
    Slots are bounded by the capacity, which unlike lengths is the same at every step (a graph).
    The kernel adds nothing to scores, so summaries are a call of their own."""
    longest = max(q_spans.lengths), max(k_spans.capacity)
    flash = partial(torch.ops.aten._flash_attention_forward, q, k, v, q_spans.edges)
    if k_spans.merged is None:
        used = k_spans.used if k_spans.room else None
        return flash(k_spans.edges, *longest, 0.0, True, False, seqused_k=used)[0]
    merged, behind = k_spans.far, k_spans.edges + F.pad(k_spans.far, (0, 1))
    far, far_mass = flash(k_spans.edges, *longest, 0.0, False, False, seqused_k=merged)[:2]
    own, own_mass = flash(behind, *longest, 0.0, True, False, seqused_k=k_spans.used - merged)[:2]
    stand = k_spans.stand.masked_fill(merged == 0, -torch.inf)  # what is not there has no mass
    stand = stand.repeat_interleave(q_spans.used, output_size=len(q))  # [rows]
    far_mass = torch.where(stand == -torch.inf, stand, far_mass + stand)  # the kernel's is +inf
    return joined(own, own_mass, far, far_mass)


def joined(a: Tensor, a_mass: Tensor, b: Tensor, b_mass: Tensor) -> Tensor:
    """Attention over two sets of slots from that over each, [rows, H, D], and from the logarithms
    of their softmax's denominators [H, rows]."""
    share = torch.sigmoid(b_mass - a_mass).T[..., None]  # of b
    return torch.lerp(a.float(), b.float(), share).to(a.dtype)


def attend_flash_attn(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """The flash-attn package. Its varlen function knows no unused places, so a cache with room goes
    to the same kernel in PyTorch; so does one with summaries."""
    if k_spans.room or k_spans.merged:
        return attend_torch_flash(q, k, v, q_spans, k_spans)
    function = import_module("flash_attn").flash_attn_varlen_func
    longest = max(q_spans.lengths), max(k_spans.lengths)
    return function(q, k, v, q_spans.edges, k_spans.edges, *longest, causal=True)


def attend_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int = 512) -> Tensor:
    """All T queries of one sequence over the keys of its `kept` tokens [K], causal by index.

    q [T, H, D], k and v [K, G, D] -> [T, H, D]; a row before the first kept token gets zeros.
    Masks are [block, K], so nothing grows with T x T.
    """
    out = torch.zeros_like(q)
    for start in range(0, len(q), block):
        rows = torch.arange(start, min(start + block, len(q)), device=q.device)
        mask = kept[None, :] <= rows[:, None]  # [block, K]
        some = mask[:, 0].clone()  # a view would change with the next line
        mask[~some] = True  # a row without keys would divide by zero; it is zeroed below
        o = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
            attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        out[rows] = o[0].transpose(0, 1) * some[:, None, None]
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


BACKENDS: dict[str, Attend] = {
    "sdpa": attend_sdpa,
    "torch-flash": attend_torch_flash,
    "flash-attn": attend_flash_attn,
}


def usable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a backend can run for these tensors on this machine."""
    if name == "sdpa":
        return True
    half = dtype in (torch.bfloat16, torch.float16) and head_dim <= 256
    if device.type != "cuda" or not half or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if name == "torch-flash":
        return True
    try:
        import_module("flash_attn")
    except ImportError:
        return False
    return True


def pick(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend]:
    """The backend called `name`, or for "auto" the fastest one that is usable."""
    if name == "auto":
        order = ("flash-attn", "torch-flash", "sdpa")
        name = next(n for n in order if usable(n, device, dtype, head_dim))
    if name not in BACKENDS:
        raise UsageError(f"unknown attention backend {name!r}: use auto, {', '.join(BACKENDS)}")
    if not usable(name, device, dtype, head_dim):
        raise UsageError(
            f"attention backend {name!r} cannot run here (device {device}, dtype {dtype}, head "
            f"size {head_dim}): use --attn auto"
        )
    return name, BACKENDS[name]
