"""Probe scores, norm, gate and rotation as Triton kernels: the GPU's counterparts of readable code.

Each function means what the one it is named after does (tests/test_fused.py). This file needs
Triton, so it is imported by those who ask for it alone. A kernel runs on the current device, which
the caller makes that of the tensors; nothing waits for it. Block sizes are fixed: they suit an
H100, and no time goes into trying others.

Letters as in attention.py. R = H / G query heads share a key/value head. N and M are the rows of
blocks, W is a width rounded up to a power of two.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- probe scores ---------------------------------------------------------------------------------
#
#     1 lse   [P, H]   log of the sum of exp(logit) over the tokens that a row sees
#     2 mass  [H, T]   sum over the rows of exp(logit - lse)
#
# Logits are computed twice and stored never. All is in base 2, the hardware's own: `scale` holds
# log2(e) / sqrt(D). Few rows would keep few of a GPU's processors busy in step 1, so tokens are cut
# into parts, whose sums a third kernel merges.

PARTS = 64  # at most
PROGRAMS = 1584  # are wanted in step 1: four rounds of three on each of 132 processors


@triton.jit
def products(a, b, a_in, b_in, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
             W: tl.constexpr):  # fmt: skip
    """[N, M] float32: rows of D numbers at a [N] times those at b [M]; zero outside a_in, b_in.

    W of D at a time: without tensor cores, in float32, operands are held in registers."""
    even: tl.constexpr = D % W == 0
    total = tl.zeros([N, M], tl.float32)
    for first in tl.static_range(0, D, W):
        d = first + tl.arange(0, W)[None, :]
        x_in = a_in[:, None] if even else a_in[:, None] & (d < D)
        y_in = b_in[:, None] if even else b_in[:, None] & (d < D)
        x = tl.load(a[:, None] + d, mask=x_in, other=0.0)
        y = tl.load(b[:, None] + d, mask=y_in, other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["P", "T", "per"])
def lse_kernel(q, k, rows, part, P, T, per, scale, q_p, q_h, k_t, k_g,
               G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
               N: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """A block of part [S, P, H]: N pairs of a row and a head of group g over `per` tokens."""
    g, first = tl.program_id(0) % G, tl.program_id(0) // G * N
    pair = first + tl.arange(0, N)  # the heads of a row lie side by side, so rows keep their order
    p, h, inside = pair // R, g * R + pair % R, pair < P * R
    queries = q + p.to(tl.int64) * q_p + h * q_h
    row = tl.load(rows + p, mask=inside, other=-1).to(tl.int32)
    start = tl.program_id(1) * per
    top = tl.full([N], -float("inf"), tl.float32)
    total = tl.zeros([N], tl.float32)  # of 2^(logit - top)
    for t in range(start, tl.minimum(start + per, tl.max(row, 0) + 1), M):
        token = t + tl.arange(0, M)
        keys = k + token.to(tl.int64) * k_t + g * k_g
        logits = products(queries, keys, inside, token < T, N, M, D, W)
        logits = tl.where(token[None, :] <= row[:, None], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1) * scale)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that has seen nothing yet
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits * scale - base[:, None]), 1)
        top = higher
    at = part + (tl.program_id(1) * P + p) * (G * R) + h
    tl.store(at, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["n", "S"])
def merge_kernel(part, lse, n, S, MOST: tl.constexpr, N: tl.constexpr):
    """lse [n] of part [S, n]."""
    i, s = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, MOST)
    inside = (s < S)[:, None] & (i < n)[None, :]
    x = tl.load(part + s[:, None] * n + i[None, :], mask=inside, other=-float("inf"))
    top = tl.max(x, 0)  # finite: every row sees token 0
    tl.store(lse + i, top + tl.log2(tl.sum(tl.exp2(x - top[None, :]), 0)), mask=i < n)


@triton.jit(do_not_specialize=["P", "T"])
def mass_kernel(q, k, rows, lse, mass, P, T, scale, q_p, q_h, k_t, k_g,
                G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
                N: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """A block of mass [H, T]: M tokens of head h. Programs that share keys run side by side."""
    h, t = tl.program_id(0) % (G * R), tl.program_id(0) // (G * R) * M
    token = t + tl.arange(0, M)
    keys = k + token.to(tl.int64) * k_t + h // R * k_g
    start = 0  # behind the blocks of rows that see none of these tokens
    for first in tl.range(0, P, N, num_stages=1):
        p = first + tl.arange(0, N)
        newest = tl.max(tl.load(rows + p, mask=p < P, other=-1), 0)
        start = tl.where((start == first) & (newest < t), first + N, start)
    total = tl.zeros([M], tl.float32)
    for first in range(start, P, N):
        p = first + tl.arange(0, N)
        row = tl.load(rows + p, mask=p < P, other=-1).to(tl.int32)
        base = tl.load(lse + p * (G * R) + h, mask=p < P, other=0.0)
        queries = q + p.to(tl.int64) * q_p + h * q_h
        logits = products(keys, queries, token < T, p < P, M, N, D, W)  # summed along its rows:
        share = tl.exp2(logits * scale - base[None, :])  # these lie in few threads
        total += tl.sum(tl.where(token[:, None] <= row[None, :], share, 0.0), 1)
    tl.store(mass + h.to(tl.int64) * T + token, total, mask=token < T)


def probe_mass(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """attention.probe_mass: q [P, H, D], k [T, G, D], rows [P] -> [H, T] float32.

    Strides are free but for D's. Rows may lie in any order; where they are sorted, what none of a
    block sees is skipped. Temporaries hold [PARTS + 1, P, H] numbers."""
    (P, H, D), (T, G), rows = q.shape, k.shape[:2], rows.contiguous()
    assert q.stride(2) == k.stride(2) == 1
    float32 = q.dtype == torch.float32
    sizes = {"G": G, "R": H // G, "D": D, "num_warps": 8 if float32 else 4, "num_stages": 2}
    sizes["W"] = 16 if float32 else max(16, triton.next_power_of_2(D))  # 16: least of a product
    held = read = 64  # rows of the block that stays, and of those that pass
    scale, strides = math.log2(math.e) / math.sqrt(D), (*q.stride()[:2], *k.stride()[:2])
    blocks, steps = G * triton.cdiv(P * H // G, held), triton.cdiv(T, read)
    per = read * triton.cdiv(steps, max(1, min(PARTS, PROGRAMS // blocks)))
    S = triton.cdiv(T, per)
    part, lse, mass = (q.new_empty(s, dtype=torch.float32) for s in ((S, P, H), (P, H), (H, T)))
    lse_kernel[blocks, S](q, k, rows, part, P, T, per, scale, *strides, N=held, M=read, **sizes)
    merge_kernel[(triton.cdiv(P * H, 32),)](part, lse, P * H, S, MOST=PARTS, N=32)
    mass_kernel[(H * triton.cdiv(T, held),)](
        q, k, rows, lse, mass, P, T, scale, *strides, N=read, M=held, **sizes
    )
    return mass


# --- norm, gate and rotation ----------------------------------------------------------------------
#
# PyTorch runs each as several kernels that read and write all rows; these pass over them once. They
# round where PyTorch does.


@triton.jit
def norm_kernel(x, h, weight, total, out, eps, x_n, h_n, C: tl.constexpr, W: tl.constexpr,
                ADD: tl.constexpr):  # fmt: skip
    """A row of out [n, C], the norm of x or, with ADD, of total [n, C] = x + h."""
    n, c = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    dtype = out.dtype.element_ty
    inside = c < C
    wide = tl.load(x + n * x_n + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(h + n * h_n + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + n * C + c, wide.to(dtype), mask=inside)
        wide = wide.to(dtype).to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / C + eps)).to(dtype).to(tl.float32)
    unit *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * C + c, unit.to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """decoder.rms_norm of x [n, C], weight [C] of the same dtype."""
    return norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + h and its norm, all [n, C]."""
    return norm(x, h, weight, eps)


def norm(x: Tensor, h: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    (n, C), add = x.shape, h is not None
    other = x if h is None else h
    out = x.new_empty(n, C)
    total = x.new_empty(n, C) if add else x
    assert x.stride(1) == other.stride(1) == weight.stride(0) == 1
    W, strides = triton.next_power_of_2(C), (x.stride(0), other.stride(0))
    warps = max(1, min(16, W // 1024))
    norm_kernel[(n,)](
        x, other, weight, total, out, eps, *strides, C=C, W=W, ADD=add, num_warps=warps
    )
    return total, out


@triton.jit
def swiglu_kernel(gate, up, gate_n, up_n, F: tl.constexpr, N: tl.constexpr):
    """N numbers of a row of gate [n, F]."""
    i, blocks = tl.program_id(0), (F + N - 1) // N
    n, f = (i // blocks).to(tl.int64), i % blocks * N + tl.arange(0, N)
    a = tl.load(gate + n * gate_n + f, mask=f < F, other=0.0)
    b = tl.load(up + n * up_n + f, mask=f < F, other=0.0).to(tl.float32)
    silu = (a.to(tl.float32) / (1.0 + tl.exp(-a.to(tl.float32)))).to(a.dtype)
    tl.store(gate + n * gate_n + f, (silu.to(tl.float32) * b).to(a.dtype), mask=f < F)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [n, F], in the memory of `gate`. They may be halves of wider rows."""
    (n, F), N = gate.shape, 2048
    assert gate.stride(1) == up.stride(1) == 1
    grid = (n * triton.cdiv(F, N),)
    swiglu_kernel[grid](gate, up, gate.stride(0), up.stride(0), F=F, N=N)
    return gate


@triton.jit
def rotate_kernel(x, cos, sin, out, x_n, x_h, cos_n, sin_n, H: tl.constexpr, N: tl.constexpr,
                  D: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A row of out [n, H, D]: halves a and b of all its heads."""
    n = tl.program_id(0).to(tl.int64)
    dtype = out.dtype.element_ty
    h, d = tl.arange(0, N)[:, None], tl.arange(0, W)[None, :]
    inside, half = (h < H) & (d < D // 2), D // 2
    c = tl.load(cos + n * cos_n + d, mask=d < half, other=0.0).to(tl.float32)
    s = tl.load(sin + n * sin_n + d, mask=d < half, other=0.0).to(tl.float32)
    here, there = x + n * x_n + h * x_h + d, out + n * (H * D) + h * D + d
    a = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(here + half, mask=inside, other=0.0).to(tl.float32)
    left = (a * c).to(dtype).to(tl.float32) - (b * s).to(dtype).to(tl.float32)
    right = (b * c).to(dtype).to(tl.float32) + (a * s).to(dtype).to(tl.float32)
    tl.store(there, left.to(dtype), mask=inside)
    tl.store(there + half, right.to(dtype), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """batch.Rotate: x [n, heads, D], cos and sin [n, 1, D/2] -> [n, heads, D], contiguous."""
    (n, H, D), strides = x.shape, (*x.stride()[:2], cos.stride(0), sin.stride(0))
    assert x.stride(2) == cos.stride(2) == sin.stride(2) == 1
    out, N, W = x.new_empty(n, H, D), triton.next_power_of_2(H), triton.next_power_of_2(D // 2)
    warps = max(1, min(8, N * W // 512))
    rotate_kernel[(n,)](x, cos, sin, out, *strides, H=H, N=N, D=D, W=W, num_warps=warps)
    return out
