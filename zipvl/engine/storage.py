"""How a method's cache is stored: a Policy names one of these, and one is built for each layer."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .cache import Cache, LayerCache
from .cache_quant import QuantCache, Scratch, Stored
from .column import Column, Side, Split
from .quant import BITS, KEYS, VALUES, Scheme


class Storage(Protocol):
    """Builds the cache of one layer, and says how many bytes it takes."""

    def build(self, k: list[Tensor], v: list[Tensor], positions: list[Tensor],
              precise: list[Tensor | None], room: int, state: list[dict],
              scratch: Scratch) -> Cache:  # fmt: skip
        """k, v [n, G, D] and positions [n] or [n, G] of each sequence, with room for new tokens;
        `precise` [K]: which of these tokens deserve the better storage, None for all."""

    def nbytes(self, precise: int, others: int, room: int, G: int, D: int, item: int) -> int:
        """Bytes of one sequence's part by formula; `item` bytes a number of full precision."""


@dataclass(frozen=True)
class Full:
    """Full precision."""

    def build(self, k: list[Tensor], v: list[Tensor], positions: list[Tensor],
              precise: list[Tensor | None], room: int, state: list[dict],
              scratch: Scratch) -> Cache:  # fmt: skip
        return LayerCache(k, v, positions, room, state)

    def nbytes(self, precise: int, others: int, room: int, G: int, D: int, item: int) -> int:
        return 2 * (precise + others + room) * G * D * item


@dataclass(frozen=True)
class Quantised:
    """Two bit widths (or one), and the sides of the cache. The prompt is quantised `whole`, or by
    the blocks of the sides as new tokens are, which is possible with one bit width only."""

    split: Split
    keys: Side
    values: Side
    whole: bool = True

    def build(self, k: list[Tensor], v: list[Tensor], positions: list[Tensor],
              precise: list[Tensor | None], room: int, state: list[dict],
              scratch: Scratch) -> Cache:  # fmt: skip
        prompts = zip(k, v, positions, precise, strict=True)
        stored = [self.store(*prompt, room) for prompt in prompts]
        return QuantCache(self.split, stored, [len(t) for t in k], room, state, scratch)

    def store(self, k: Tensor, v: Tensor, positions: Tensor, precise: Tensor | None,
              room: int) -> Stored:  # fmt: skip
        """One prompt k, v [n, G, D]."""
        sets = self.split.sets(len(k), precise)
        keys, values = (
            Column.build(side, x, self.count(side, len(x)), sets, room)
            for side, x in ((self.keys, k), (self.values, v))
        )
        order = self.split.ordered(positions, precise)
        free = order.new_full((room, *order.shape[1:]), -1)
        return Stored(keys, values, torch.cat((order, free)).int())

    def count(self, side: Side, n: int) -> int:
        """How many of a prompt's n tokens are quantised."""
        return n if self.whole else side.due(n)

    def nbytes(self, precise: int, others: int, room: int, G: int, D: int, item: int) -> int:
        n, total = precise + others, 0
        for side in (self.keys, self.values):
            count, scheme = self.count(side, n), side.scheme
            sets = ((precise, self.split.high), (others, self.split.low))
            for m, bits in sets if self.split.mixed else ((count, self.split.high),):
                total += m * G * -(-D * bits // 8) + item * scheme.parameters(m, G, D)
            total += item * G * D if scheme.scaled and count else 0
            total += item * G * D * min(side.block + side.hold, n - count + room)
        return total


FULL = Full()
KVBits = int | str | tuple[int, ...] | None  # as an option of a method


def zipcache(bits: tuple[int, ...], interval: int) -> Quantised:
    """ZipCache's form, which ZipVL v1 uses: `interval` new tokens are quantised at a time."""
    split = Split(bits[0], bits[-1])
    return Quantised(split, Side(KEYS, interval), Side(VALUES, interval))


def kivi(bits: int, group: int, residual: int) -> Quantised:
    """KIVI's form (arXiv 2402.02750): steps are shared by `group` tokens of a key channel, by
    `group` channels of a value; keys leave the tail by `residual` tokens, values one by one."""
    keys, values = Side(Scheme(group, 1, 1), residual), Side(Scheme(1, 1, group), 1, residual)
    return Quantised(Split(bits, bits), keys, values, whole=False)


def as_bits(kv_bits: KVBits) -> tuple[int, ...]:
    """4 -> (4,); "4,2" or "4/2" -> (4, 2); None -> (). Raises ValueError."""
    if kv_bits is None:
        return ()
    parts = kv_bits if isinstance(kv_bits, tuple) else str(kv_bits).replace("/", ",").split(",")
    bits = tuple(int(p) if str(p).strip().isdecimal() else 0 for p in parts)
    if not 1 <= len(bits) <= 2 or not set(bits) <= set(BITS) or bits[0] < bits[-1]:
        raise ValueError(
            f"kv_bits is {kv_bits!r}: give 2, 4 or 8, or two of them as 4/2, the larger first"
        )
    return bits
