"""Tensors as small whole numbers: 2, 4 or 8 bits an element, really packed into bytes.

    x [n, G, D]   ~   (code * step + low) * scale          code = 0 .. 2^bits - 1

step, low   one of each for a group of elements, asymmetric: from the group's minimum to its maximum
scale       one for a channel, sqrt(max |x|) over its tokens, so that channels of very different
            size can share a step (ZipCache, arXiv 2405.14256, "channel-separable tokenwise")

What a group is, a Scheme says. Both numbers are stored in the dtype of x, rounded outward, so that
every element stays within half a step, also in bfloat16 (the published code rounds to nearest and
clips). Everything is computed in float32, some rows at a time, so temporaries stay small.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (2, 4, 8)
CHUNK = 1 << 20  # elements at a time: 4 MiB in float32


@dataclass(frozen=True)
class Scheme:
    """A group of x [n, G, D] is so many tokens x heads x channels; 0 means all there are."""

    tokens: int
    heads: int
    channels: int
    scaled: bool = False  # channels are divided by their scale first

    def parameters(self, n: int, G: int, D: int) -> int:
        """How many steps and lows go with x [n, G, D]; its scale is not among them."""
        both = zip((n, G, D), self.cut(), strict=True)
        return 2 * math.prod(-(-size // part) if part else min(1, size) for size, part in both)

    def cut(self) -> tuple[int, int, int]:
        return self.tokens, self.heads, self.channels


KEYS = Scheme(tokens=0, heads=1, channels=1)  # ZipCache: per channel, over the whole set
VALUES = Scheme(tokens=1, heads=0, channels=0, scaled=True)  # ZipCache: per token, all channels


@dataclass(frozen=True)
class Packed:
    """x [n, G, D] as codes and what turns them back."""

    codes: Tensor  # uint8 [n, G, ceil(D * bits / 8)]
    step: Tensor  # [groups of tokens, of heads, of channels]
    low: Tensor
    scale: Tensor | None  # [G, D]
    bits: int
    scheme: Scheme
    width: int  # D

    def __len__(self) -> int:
        return len(self.codes)

    def saved(self) -> dict[str, Tensor]:
        """What restored() makes the same of."""
        named = {"codes": self.codes, "step": self.step, "low": self.low, "scale": self.scale}
        size = torch.tensor([self.bits, self.width])
        return {"size": size} | {name: t for name, t in named.items() if t is not None}

    @classmethod
    def restored(cls, saved: dict[str, Tensor], scheme: Scheme) -> "Packed":
        bits, width = saved["size"].tolist()
        codes, step, low = (saved[name] for name in ("codes", "step", "low"))
        return cls(codes, step, low, saved.get("scale"), bits, scheme, width)

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [t for t in (self.codes, self.step, self.low, self.scale) if t is not None]

    def into(self, out: Tensor) -> None:
        """Writes the dequantised x to out [n, G, D]."""
        for rows in chunks(out, self.scheme):
            x = unpack(self.codes[rows], self.bits, self.width).float()
            x = torch.addcmul(self.spread(self.low, rows), x, self.spread(self.step, rows))
            out[rows] = x if self.scale is None else x.mul_(self.scale.float())

    def spread(self, numbers: Tensor, rows: slice) -> Tensor:
        """Steps or lows as float32 that broadcast against rows [m, G, D] of x."""
        tokens, _, channels = self.scheme.cut()
        if tokens:
            numbers = numbers[rows.start // tokens : -(-rows.stop // tokens)]
            numbers = numbers.repeat_interleave(tokens, 0)[: rows.stop - rows.start]
        if channels > 1:
            numbers = numbers.repeat_interleave(channels, 2)[..., : self.width]
        return numbers.float()

    def joins(self, other: "Packed") -> bool:
        """Whether `other`, of the same scheme, can follow in the same tensors."""
        group = self.scheme.tokens
        return (
            self.bits == other.bits
            and bool(group)
            and self.scale is None is other.scale
            and (len(self) % group == 0)
        )

    def join(self, other: "Packed") -> "Packed":
        """Both, one after the other."""
        mine, new = (self.codes, self.step, self.low), (other.codes, other.step, other.low)
        codes, step, low = (torch.cat(pair) for pair in zip(mine, new, strict=True))
        return replace(self, codes=codes, step=step, low=low)


def quantise(x: Tensor, bits: int, scheme: Scheme, scale: Tensor | None = None) -> Packed:
    """x [n, G, D] -> codes; a scaled scheme needs `scale` [G, D] (channel_scale)."""
    n, G, D = x.shape
    if n == 0:
        none = x.new_empty(0, G if scheme.heads else 1, D)
        codes = pack(torch.empty(0, G, D, dtype=torch.uint8, device=x.device), bits)
        return Packed(codes, none, none, scale, bits, scheme, D)
    step, low = grid(x, bits, scheme, scale)
    codes = torch.empty(n, G, -(-D * bits // 8), dtype=torch.uint8, device=x.device)
    packed = Packed(codes, step, low, scale, bits, scheme, D)
    for rows in chunks(x, scheme):
        low_rows, step_rows = packed.spread(low, rows), packed.spread(step, rows)
        above = (scaled(x[rows], scale) - low_rows) / step_rows.clamp(min=1e-38)
        codes[rows] = pack(above.round_().clamp_(0, 2**bits - 1).to(torch.uint8), bits)
    return packed


def channel_scale(x: Tensor) -> Tensor:
    """sqrt(max over tokens of |x|), [G, D]; 1 for a channel of zeros."""
    most = torch.maximum(x.amax(0), -x.amin(0)).float()
    return torch.where(most > 0, most.sqrt(), 1.0).to(x.dtype)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.float() if scale is None else x.float() / scale.float()


def grid(x: Tensor, bits: int, scheme: Scheme, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps and lows of all groups, [groups of tokens, of heads, of channels]."""
    lows, highs = [], []
    for rows in chunks(x, scheme):
        low = high = scaled(x[rows], scale)
        for dim, size in enumerate(scheme.cut()):
            low, high = fold(low, dim, size).amin(dim + 1), fold(high, dim, size).amax(dim + 1)
        lows.append(low)
        highs.append(high)
    low, high = torch.cat(lows), torch.cat(highs)
    if not scheme.tokens:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    rounded = round_up(-low, x.dtype).neg()
    return round_up((high - rounded.float()) / (2**bits - 1), x.dtype), rounded


def fold(x: Tensor, dim: int, size: int) -> Tensor:
    """Axis `dim` cut into groups of `size`, 0: one; the last is filled with its last entry."""
    n = x.shape[dim]
    size = size or n
    if n % size:
        x = x.index_select(dim, torch.arange(n + -n % size, device=x.device).clamp(max=n - 1))
    return x.unflatten(dim, (-1, size))


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x as numbers of `dtype` that are not below it."""
    y = x.to(dtype)
    return torch.where(y.float() < x, y + y.abs() * torch.finfo(dtype).eps, y)


def chunks(x: Tensor, scheme: Scheme) -> Iterator[slice]:
    """Rows of x [n, G, D] to treat at a time, whole groups of tokens."""
    group = scheme.tokens or 1
    rows = max(1, CHUNK // max(1, x.shape[1] * x.shape[2]) // group) * group
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2^bits -> bytes [..., ceil(n * bits / 8)].

    In planes: with 4 bits, the first half of the codes are the low halves of the bytes.
    """
    planes = 8 // bits
    size = -(-codes.shape[-1] // planes)
    codes = F.pad(codes, (0, planes * size - codes.shape[-1]))
    out = codes[..., :size].clone()
    for i in range(1, planes):
        out |= codes[..., i * size : (i + 1) * size] << (i * bits)
    return out


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes [..., n] of `packed`."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=-1)[..., :n]
