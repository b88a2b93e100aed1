"""Kernels of a pretend CUDA device (pretend.py): arguments checked as CUDA's are, results by the book."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zipvl.engine.speed import attend_masked
from zipvl.linear import SwiGLU, rms_norm
from zipvl.model.attention import probe_mass
from zipvl.model.batch import Rotate

HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)


class Refused(RuntimeError):
    """What a real card would not do, or not well."""


def demand(true: bool, sentence: str) -> None:
    if not true:
        raise Refused(sentence)


def attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """q [.., H, n, D], k and v [.., G, m, D], `added` to scores -> output and log-sum-exp [.., n]."""
    k, v = (t.float().repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
    scores = q.float() @ k.mT / math.sqrt(q.shape[-1]) + added
    return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1)


def hidden(seen: Tensor) -> Tensor:
    """What a mask of what is seen adds to scores."""
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)


def flash(capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, q_edges: Tensor | None,
          k_edges: Tensor | None, q_most: int, k_most: int, dropout: float, causal: bool, debug: bool, *,
          seqused_k: Tensor | None = None) -> tuple:  # fmt: skip
    """_flash_attention_forward of packed sequences, with the checks of mha_varlen_fwd (flash_api.cpp):
    output [rows, H, D] and log-sum-exp [H, rows], which is +inf where there are no keys. Without
    edges (mha_fwd) sequences of equal lengths lie in q, k, v [1, rows, H, D]; here it is one."""
    if q_edges is None or k_edges is None:
        demand(q_edges is k_edges is seqused_k and len(q) == len(k) == 1, "half a packed batch")
        demand((q.shape[1], k.shape[1]) == (q_most, k_most), "wrong lengths")
        edges = [torch.tensor([0, n], dtype=torch.int32) for n in (q_most, k_most)]
        packed = (q[0], k[0], v[0], *edges, q_most, k_most, dropout, causal, debug)
        out, mass, *rest = flash(capability, *packed)
        return out[None], mass[None], *rest
    (rows, H, D), slots, B = q.shape, len(k), len(q_edges) - 1
    places = [q_edges, k_edges] if seqused_k is None else [q_edges, k_edges, seqused_k]
    demand(capability >= AMPERE, "not before Ampere")
    demand(q.dtype in HALF and q.dtype == k.dtype == v.dtype, f"not of {q.dtype}")
    demand(D % 8 == 0 and D <= 256 and k.shape == v.shape, f"no heads of {D}")
    demand(H % k.shape[1] == 0, f"{H} query heads for {k.shape[1]}")
    demand(all(t.stride(-1) == 1 for t in (q, k, v)), "the numbers of a head lie apart")
    demand(all(t.dtype == torch.int32 and t.is_contiguous() for t in places), "places are no int32")
    demand([len(t) for t in places] == [B + 1, B + 1, B][: len(places)], "places of another batch")
    demand(type(q_most) is type(k_most) is int, "the longest lengths are no ints")
    q_at, k_at, *rest = (t.tolist() for t in places)
    used = rest[0] if rest else [b - a for a, b in pairwise(k_at)]
    out, mass = torch.zeros_like(q), torch.full((H, rows), math.inf)
    for (a, b), s, n in zip(pairwise(q_at), k_at[:-1], used, strict=True):
        demand(b - a <= q_most and n <= k_most and b <= rows and s + n <= slots, "wrong lengths")
        if n:
            some = [t.transpose(0, 1) for t in (q[a:b], k[s : s + n], v[s : s + n])]
            seen = torch.ones(b - a, n, dtype=torch.bool).tril(n - (b - a) if causal else n)
            o, mass[:, a:b] = attention(*some, hidden(seen))
            out[a:b] = o.transpose(0, 1)
    return out, mass, None, None, None


def sdpa(capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
         dropout_p: float = 0.0, is_causal: bool = False, *, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Refuses what PyTorch leaves to its math kernel (check_* in sdp_utils.cpp)."""
    H, G, old = q.shape[-3], k.shape[-3], capability < AMPERE
    demand(enable_gqa or H == G, f"{H} heads for {G} without enable_gqa")
    demand(attn_mask is None or not is_causal, "a mask and is_causal")
    grouped = q.dtype in HALF and attn_mask is None and not old  # FlashAttention, and no other
    shown = f"{q.dtype}, {H} heads for {G}, {'no' if attn_mask is None else 'a'} mask"
    demand(H == G or grouped, f"the math kernel ({shown})")
    demand(q.dtype != torch.bfloat16 or not old, f"the math kernel before Ampere ({shown})")
    if attn_mask is None:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        attn_mask = attn_mask.tril() if is_causal else attn_mask
    added = hidden(attn_mask) if attn_mask.dtype == torch.bool else attn_mask
    return attention(q, k, v, added)[0]


KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": flash,
    "scaled_dot_product_attention": sdpa,
}
FUSED: dict[str, dict[str, Callable[..., Any]]] = {  # our Triton kernels by what they equal
    "zipvl.model.fused": {
        "rms_norm": rms_norm,
        "add_rms_norm": lambda x, h, weight, eps: (x + h, rms_norm(x + h, weight, eps)),
        "swiglu": SwiGLU(),
        "rotate": Rotate(),
        "probe_mass": probe_mass,
    },
    "zipvl.model.fused_decode": {"attend_one": attend_masked},
}
