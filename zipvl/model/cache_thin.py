"""A cache whose older keys hold some of their channels only (ThinK, arXiv 2407.21018).

    keys     | of the prompt, [n, G, D'] | its `window` newest and new ones, [., G, D] . . |
    values   | of all, [., G, D]                                                       . . |

A key without a channel adds nothing for it to a score: the score is that of the query's other
channels, still divided by the root of all D. So to attend, a layer's keys are spread with zeros
for the channels that are gone, and any kernel will do. These are the columns of cache_quant.py with
a tail that is never due, and a part of another kind in front; their scratch buffer serves all
layers. The price is theirs, too: a copy of keys and values in each step. This saves memory,
(1 - D'/D) / 2 of a long prompt's cache, and no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UsageError
from ..policy import select
from .cache import Kept, Restore, Store
from .cache_quant import Column, KVFormat, QuantCache, Scratch, Side, Stored
from .quant import KEYS, Scheme

WHOLE = Side(KEYS, block=1 << 62)  # more tokens than come: nothing is ever quantised
FORM = KVFormat(0, 0, WHOLE, WHOLE)


@dataclass(frozen=True)
class Thin:
    """All cached tokens of a prompt but the newest `window` keep `ratio` of their key channels."""

    window: int
    ratio: float

    def width(self, D: int) -> int:
        """Of D channels, how many are kept: the share that leaves is rounded down."""
        return max(1, D - int(D * (1 - self.ratio) + 1e-6))

    def store(self, room: int) -> Store:
        return partial(self.build, room, Scratch())

    def restore(self, room: int) -> Restore:
        return partial(ThinCache.restored, FORM, room, Scratch(), kinds=(Part, Part))

    def build(self, room: int, scratch: Scratch, kept: list[Kept]) -> "ThinCache":
        if any(one.merged for one in kept):
            raise UsageError("summaries keep all their channels: leave out summary, or channels")
        return ThinCache.of(kept, [len(one.k) - self.window for one in kept], room, scratch)

    def nbytes(self, precise: int, others: int, room: int, G: int, D: int, item: int) -> int:
        """Bytes of one sequence in one layer by formula, the numbers of the channels included."""
        n, width = precise + others, self.width(D)
        old = max(0, n - self.window)
        keys, values = old * width + (n - old + room) * D, (n + room) * D
        return item * G * (keys + values) + (8 * G * width if old else 0)


@dataclass(frozen=True)
class Part:
    """Keys without the channels that are not among `channels`."""

    k: Tensor  # [n, G, D']
    channels: Tensor  # [G, D']

    @classmethod
    def of(cls, x: Tensor, channels: Tensor) -> "Part":
        """Of keys x [n, G, D]."""
        channels = channels.expand(x.shape[1], -1).contiguous()
        return cls(x.gather(2, channels.expand(len(x), -1, -1)), channels)

    def saved(self) -> dict[str, Tensor]:
        return {"k": self.k, "channels": self.channels}

    @classmethod
    def restored(cls, saved: dict[str, Tensor], scheme: Scheme) -> "Part":
        return cls(saved["k"], saved["channels"])

    def __len__(self) -> int:
        return len(self.k)

    def into(self, out: Tensor) -> None:
        """To out [n, G, D], zeros where nothing is held."""
        out.zero_().scatter_(2, self.channels.expand(len(self), -1, -1), self.k)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.channels]


class ThinCache(QuantCache):
    """Keys and values of one layer for a batch of sequences; the same methods as LayerCache."""

    cannot = "a cache without some key channels cannot do: leave out one of the two"

    @classmethod
    def of(cls, kept: list[Kept], old: list[int], room: int, scratch: Scratch) -> "ThinCache":
        """What stays, one `kept` a sequence, of which the first `old` tokens are thinned."""
        stored = []
        for one, first in zip(kept, old, strict=True):
            first = 0 if one.channels is None else max(0, first)
            keys = Column.build(WHOLE, one.k[first:], 0, [], room)
            if first and one.channels is not None:
                keys.parts.append(Part.of(one.k[:first], one.channels))
            values = Column.build(WHOLE, one.v, 0, [], room)
            free = one.positions.new_full((room, *one.positions.shape[1:]), -1)
            stored.append(Stored(keys, values, torch.cat((one.positions, free)).int()))
        return cls(FORM, stored, [len(one.k) for one in kept], room, scratch)

    def trim(self, slots: Sequence[Tensor | None]) -> "ThinCache":
        """Where heads keep different numbers of thin tokens, the least of them stay thin; the
        others lie with the whole ones, zeros in the channels that are gone."""
        kept, old = [], []
        for b, (one, index) in enumerate(zip(self.stored, slots, strict=True)):
            k, v, places = (select(t, index) for t in self.view(b))
            thin = one.keys.parts[0] if one.keys.parts else None
            first = len(thin) if thin else 0
            old.append(first if index is None else int((index < first).sum(-1).min()))
            kept.append(Kept(k, v, places, channels=thin.channels if thin else None))
        return self.of(kept, old, self.spans.free(), self.scratch)
