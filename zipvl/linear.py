"""Linear layers that read their weights at the memory's speed, and compute at the CPU's.

Decoding multiplies every weight by one row per sequence, so it is as fast as weights can be read.
PyTorch's F.linear on CPUs does not reach that speed for few rows; the same product written as
matrix-vector, or as W x^T, does (lab/results/: `bench.py linear`). Many rows are as fast as the
products are, and CPUs without 16-bit products take some eight times longer over those than over
float32 ones: there a block of W at a time is widened. Elsewhere this is nn.Linear.
"""

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 256  # rows up to which W x^T was faster
WIDEN = 3  # rows of 16 bits from which widening was faster
BLOCK = 512  # outputs whose weights are widened at a time: they stay in the CPU's cache


def emulates_half() -> bool:
    """Whether 16-bit products are emulated: an x86 CPU without AVX-512."""
    probe = getattr(torch.cpu, "_is_avx512_supported", None)
    return platform.machine() in ("x86_64", "AMD64") and probe is not None and not probe()


EMULATED = emulates_half()


class Embedding(nn.Embedding):
    """nn.Embedding. On the meta device, where a model waits for its weights, PyTorch would import
    its compiler to draw numbers that nobody reads: a second of every start."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """nn.Linear, x [.., in] -> [.., out], with faster forms on CPUs, which have no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        rows = x.numel() // self.in_features
        if EMULATED and x.dtype.itemsize == 2 and rows >= WIDEN:
            return widened(x, self.weight, self.bias)
        if x.ndim != 2 or rows > FEW:
            return F.linear(x, self.weight, self.bias)
        if rows == 1:
            out = torch.mv(self.weight, x[0])[None]
        else:  # x is laid out by columns where such a product made it: three times slower
            out = torch.mm(self.weight, x.contiguous().T).T
        return out if self.bias is None else out + self.bias


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., in], weight [out, in] -> [.., out] of the same dtype, summed in float32."""
    wide, out = x.float(), x.new_empty(*x.shape[:-1], len(weight))
    for a in range(0, len(weight), BLOCK):
        part = slice(a, a + BLOCK)
        out[..., part] = F.linear(
            wide, weight[part].float(), None if bias is None else bias[part].float()
        )
    return out


class SwiGLU(nn.Module):
    """silu(gate) * up, in the memory of `gate` where no gradient will ask for it again."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.silu(gate) * up
        return F.silu(gate, inplace=True).mul_(up)


class GatedMLP(nn.Module):
    """Gate, up, down."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.act: nn.Module = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in float32 and cast back before the weight."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def chunked(self, x: Tensor, rows: int | None) -> Tensor:
        """So many rows at a time, as it needs some times their memory."""
        return chunked(self, rows, x)

    def add(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x + h, and its norm."""
        x = x + h
        return x, self(x)


def chunked(
    function: Callable[..., Tensor], rows: int | None, x: Tensor, *others: Tensor
) -> Tensor:
    """function(x, *others) for a function that treats the rows of x [T, C] alone and keeps their
    width; of several tensors the last one's memory may hold the result."""
    if rows is None or len(x) <= rows:
        return function(x, *others)
    out = others[-1] if others else torch.empty_like(x)
    for into, *parts in zip(*(t.split(rows) for t in (out, x, *others)), strict=True):
        into.copy_(function(*parts))
    return out
