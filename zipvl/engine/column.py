"""One sequence's keys, or values, in few bits: packed parts, then a tail in full precision."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .quant import Packed, Scheme, channel_scale, quantise

Sets = list[tuple[int, Tensor | None]]  # bits, and the tokens stored at so many; None: all


@dataclass(frozen=True)
class Side:
    """How keys, or values, are stored: the tail passes on whole blocks and holds the rest."""

    scheme: Scheme
    block: int  # tokens quantised at a time
    hold: int = 0  # newest tokens that are always in full precision

    def due(self, waiting: int) -> int:
        """How many of `waiting` tokens are to be quantised, the oldest ones."""
        return max(0, waiting - self.hold) // self.block * self.block


@dataclass(frozen=True)
class Split:
    """The bits of tokens that a policy calls precise, and of the others."""

    high: int
    low: int

    @property
    def mixed(self) -> bool:
        return self.high != self.low

    def sets(self, n: int, precise: Tensor | None) -> Sets:
        """`n` tokens by bits, the precise ones [K] first; None: all are."""
        if precise is None or not self.mixed:
            return [(self.high, None)]
        others = torch.ones(n, dtype=torch.bool, device=precise.device)
        others[precise] = False
        return [(self.high, precise), (self.low, others.nonzero()[:, 0])]

    def ordered(self, x: Tensor, precise: Tensor | None) -> Tensor:
        """x [n, ...] in the order in which sets() stores it."""
        return torch.cat([x if i is None else x[i] for _, i in self.sets(len(x), precise)])


class Column:
    """The keys, or the values, of one sequence in one layer."""

    def __init__(self, side: Side, tail: Tensor):
        self.side, self.tail = side, tail  # [places, G, D]
        self.waiting = 0  # tokens in the tail
        self.parts: list[Packed] = []

    @classmethod
    def build(cls, side: Side, x: Tensor, count: int, sets: Sets, room: int) -> "Column":
        """A prompt x [n, G, D], its first `count` tokens quantised, and `room` new tokens."""
        places = min(side.block + side.hold, len(x) - count + room)
        column = cls(side, x.new_empty(places, *x.shape[1:]))
        column.store(x[:count], sets)
        column.push(x[count:])
        return column

    def push(self, x: Tensor) -> None:
        """Tokens x [m, G, D] join the tail."""
        self.tail[self.waiting : self.waiting + len(x)] = x
        self.waiting += len(x)

    def release(self, count: int, sets: Sets) -> None:
        """The oldest `count` tokens of the tail are quantised."""
        self.store(self.tail[:count], sets)
        self.waiting -= count
        self.tail[: self.waiting] = self.tail[count : count + self.waiting].clone()

    def store(self, x: Tensor, sets: Sets) -> None:
        scheme = self.side.scheme
        scale = channel_scale(x) if scheme.scaled and len(x) else None
        for bits, index in sets:
            some = x if index is None else x[index]
            if len(some):
                self.add(quantise(some, bits, scheme, scale))

    def add(self, part: Packed) -> None:
        last = self.parts[-1] if self.parts else None
        if last and last.joins(part):
            self.parts[-1] = last.join(part)
        else:
            self.parts.append(part)

    def into(self, out: Tensor) -> None:
        """All tokens as numbers, in order, to out [n, G, D]."""
        at = 0
        for part in self.parts:
            part.into(out[at : at + len(part)])
            at += len(part)
        out[at:] = self.tail[: self.waiting]

    def tensors(self) -> list[Tensor]:
        return [self.tail, *(t for part in self.parts for t in part.tensors())]


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
