"""A cache of few bits a number: packed parts in any order, then a tail in full precision.

    keys     | important, 4 bits | others, 2 bits | important | others | ... | tail . . |
    values   |                   |                |           |        |     |      . . |
               the prompt                           each `block` new tokens    the newest

Attention does not care about the order of its keys, as they carry their positions. Every token is
quantised once, from full precision, when its block leaves the tail. To attend, one layer at a time
is turned back into numbers in a scratch buffer that all layers of a run share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..model.kernels import Spans
from .column import Column, Split, storage_bytes


class Scratch:
    """A pair of buffers that the quantised caches of a run take turns to fill."""

    def __init__(self) -> None:
        self.k = self.v = torch.empty(0)

    def take(self, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [slots, G, D] of the kind of `like` [., G, D], with anything in them."""
        if len(self.k) < slots:
            self.k = self.v = torch.empty(0)  # let go of the old ones first
            self.k, self.v = (like.new_empty(slots, *like.shape[1:]) for _ in range(2))
        return self.k[:slots], self.v[:slots]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True)
class Stored:
    """One sequence in one layer."""

    keys: Column
    values: Column
    positions: Tensor  # int32 [n + room] or [n + room, G], in the order of the columns

    def tensors(self) -> list[Tensor]:
        return self.keys.tensors() + self.values.tensors()


class QuantCache:
    """Keys and values of one layer for a batch of sequences; the same methods as LayerCache."""

    def __init__(self, split: Split, stored: list[Stored], lengths: list[int], room: int,
                 state: list[dict], scratch: Scratch):  # fmt: skip
        """`stored`: one a sequence, of `lengths` tokens; `split` says which bits a block gets."""
        self.split, self.stored, self.state, self.scratch = split, stored, state, scratch
        self.spans = Spans(lengths, stored[0].keys.tail.device, room)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        for b, (one, n) in enumerate(zip(self.stored, self.spans.lengths, strict=True)):
            one.keys.push(k[b : b + 1])
            one.values.push(v[b : b + 1])
            one.positions[n] = positions[b]
        self.spans.grow()

    def settle(self, choose: Callable[[int, int], Tensor | None]) -> None:
        """Full blocks are quantised; `choose(sequence, count)` gives the precise tokens [K] of the
        newest `count`, None for all, and is asked only where it matters."""
        for b, (one, n) in enumerate(zip(self.stored, self.spans.lengths, strict=True)):
            due = one.keys.side.due(one.keys.waiting)
            precise = choose(b, due) if due and self.split.mixed else None
            for column in (one.keys, one.values):
                count = column.side.due(column.waiting)
                if count:
                    column.release(count, self.split.sets(count, precise))
            if precise is not None:
                one.positions[n - due : n] = self.split.ordered(one.positions[n - due : n], precise)

    def read(self) -> tuple[Tensor, Tensor, Spans]:
        k, v = self.scratch.take(self.spans.total, self.stored[0].keys.tail)
        for at, one in zip(self.spans.slices(), self.stored, strict=True):
            one.keys.into(k[at])
            one.values.into(v[at])
        return k, v, self.spans

    def view(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [n, G, D], overwritten by the next read of any layer, and positions [n, G]."""
        k, v, spans = self.read()
        at, n = spans.slices()[sequence], spans.lengths[sequence]
        places = self.stored[sequence].positions[:n]
        return k[at], v[at], places.view(n, -1).expand(n, k.shape[1])

    def keep(self, sequence: int, slots: Tensor) -> None:
        raise UsageError(
            "this method drops cached tokens while decoding, which a quantised cache cannot do: "
            "leave out its kv_bits"
        )

    def drop(self, keep: list[int]) -> "QuantCache":
        free = min(self.spans.capacity[i] - self.spans.lengths[i] for i in keep)
        lengths, state = [self.spans.lengths[i] for i in keep], [self.state[i] for i in keep]
        stored = [self.stored[i] for i in keep]
        return QuantCache(self.split, stored, lengths, free, state, self.scratch)

    def sequence_bytes(self) -> list[int]:
        return [storage_bytes(one.tensors()) for one in self.stored]

    @property
    def nbytes(self) -> int:
        return sum(self.sequence_bytes())
