"""Attention of a decode step as a Triton kernel: one row a sequence, its slots cut into parts.

FlashAttention's form for packed sequences does not cut the slots where each query head has a
key/value head of its own, and takes as long to merge parts as to make them. Here the number of
parts depends on the capacity alone and their size on `used`, which lies on the device: a CUDA graph
can hold it.

Letters as in attention.py; R = H / G query heads share a key/value head.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import Spans

PARTS, PROGRAMS = 64, 264  # at most so many parts; about so many programs: two on each of 132
TILE = 64  # slots at a time


@triton.jit
def part_kernel(q, k, v, edges, used, far, stand, out, lse, scale, q_b, q_h, k_t, k_g, v_t, v_g,
                B, S: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
                N: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
                MERGED: tl.constexpr):  # fmt: skip
    """out [S, B, H, D] and lse [S, B, H]: a key/value head of a sequence over one of S parts."""
    b, g, s = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    n, start = tl.load(used + b), tl.load(edges + b).to(tl.int64)
    per = (n + S * M - 1) // (S * M) * M
    first, end = s * per, tl.minimum(s * per + per, n)
    r, d = tl.arange(0, N), tl.arange(0, W)
    here = (r < R)[:, None] & (d < D)[None, :]
    queries = tl.load(q + b * q_b + (g * R + r)[:, None] * q_h + d[None, :], mask=here, other=0.0)
    top = tl.full([N], -float("inf"), tl.float32)
    total, sums = tl.zeros([N], tl.float32), tl.zeros([N, W], tl.float32)
    for t in range(first, end, M):
        slot = t + tl.arange(0, M)
        at, there = (start + slot)[:, None], (slot < end)[:, None] & (d < D)[None, :]
        keys = tl.load(k + at * k_t + g * k_g + d[None, :], mask=there, other=0.0)
        values = tl.load(v + at * v_t + g * v_g + d[None, :], mask=there, other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if MERGED:  # summaries stand for some tokens each
            weight = tl.load(stand + b) * 1.4426950408889634
            logits += tl.where(slot < tl.load(far + b), weight, 0.0)[None, :]
        logits = tl.where((slot < end)[None, :], logits, -float("inf"))
        new = tl.maximum(top, tl.max(logits, 1))  # finite: the tile has a slot
        shares, decay = tl.exp2(logits - new[:, None]), tl.exp2(top - new)
        total = total * decay + tl.sum(shares, 1)
        sums = sums * decay[:, None]
        sums += tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        top = new
    row = (s * B + b) * (G * R) + g * R + r
    mean = sums / tl.where(total > 0, total, 1.0)[:, None]  # a part may hold no slot
    tl.store(out + row[:, None] * D + d[None, :], mean, mask=here)
    tl.store(lse + row, top + tl.log2(total), mask=r < R)


@triton.jit
def join_kernel(part, lse, out, BH, S: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """A row of out [B H, D] from its parts [S, B H, D]."""
    i, s, d = tl.program_id(0), tl.arange(0, S), tl.arange(0, W)
    mass = tl.load(lse + s * BH + i)
    share = tl.exp2(mass - tl.max(mass, 0))
    rows = tl.load(part + (s * BH + i)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    mean = tl.sum(rows * (share / tl.sum(share, 0))[:, None], 0)
    tl.store(out + i * D + d, mean.to(out.dtype.element_ty), mask=d < D)


def attend_one(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """An Attend (kernels.py) for one row a sequence: q [B, H, D], k and v [slots, G, D] ->
    [B, H, D]. Softmax in float32. What unused slots hold does not matter."""
    (B, H, D), G, merged = q.shape, k.shape[1], k_spans.merged is not None
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    half, longest = q.dtype.itemsize == 2, triton.cdiv(max(k_spans.capacity), TILE)
    S = triton.next_power_of_2(min(PARTS, longest, triton.cdiv(PROGRAMS, B * G)))
    W, N = max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(H // G))
    part, out = q.new_empty(S, B, H, D, dtype=torch.float32), q.new_empty(B, H, D)
    lse = q.new_empty(S, B, H, dtype=torch.float32)
    far, stand = (k_spans.far, k_spans.stand) if merged else (k_spans.used, k_spans.used)
    part_kernel[B * G, S](
        q, k, v, k_spans.edges, k_spans.used, far, stand, part, lse,
        math.log2(math.e) / math.sqrt(D), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        B, S=S, G=G, R=H // G, D=D, N=N, M=TILE if half else 16, W=W,
        MERGED=merged, num_warps=4 if half else 8, num_stages=2,
    )  # fmt: skip
    join_kernel[(B * H,)](part, lse, out, B * H, S=S, D=D, W=W, num_warps=4)
    return out
