"""A cache of few bits a number: packed parts in any order, then a tail in full precision.

    keys     | important, 4 bits | others, 2 bits | important | others | ... | tail . . |
    values   |                   |                |           |        |     |      . . |
               the prompt                           each `block` new tokens    the newest

Attention does not care about the order of its keys, as they carry their positions. Every token is
quantised once, from full precision, when its block leaves the tail. To attend, one layer at a time
is turned back into numbers in a scratch buffer that all layers of a run share.

A method names a KVFormat as its `storage`: zipcache() and kivi() make the published ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..policy import Plan
from .batch import Spans
from .cache import Kept, Restore, Store
from .quant import BITS, KEYS, VALUES, Packed, Scheme, channel_scale, quantise

Sets = list[tuple[int, Tensor | None]]  # bits, and the tokens stored at so many; None: all
KVBits = int | str | tuple[int, ...] | None  # as an option of a method


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
class KVFormat:
    """The bits of tokens that a policy calls precise and of the others, and the two sides of the
    cache. The prompt is quantised `whole`, or by the blocks of the sides as new tokens are, which
    is possible with one bit width only."""

    high: int
    low: int
    keys: Side
    values: Side
    whole: bool = True

    @property
    def mixed(self) -> bool:
        return self.high != self.low

    def store(self, room: int) -> Store:
        """What builds a layer's cache with `room` for new tokens. The layers of one prefill take
        turns to fill one scratch buffer."""
        return partial(QuantCache.build, self, room, Scratch())

    def restore(self, room: int) -> Restore:
        return partial(QuantCache.restored, self, room, Scratch())

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

    def count(self, side: Side, n: int) -> int:
        """How many of a prompt's n tokens are quantised."""
        return n if self.whole else side.due(n)

    def nbytes(self, precise: int, others: int, room: int, G: int, D: int, item: int) -> int:
        """Bytes of one sequence in one layer by formula; `item` bytes a full number."""
        n, total = precise + others, 0
        for side in (self.keys, self.values):
            count, scheme = self.count(side, n), side.scheme
            sets = ((precise, self.high), (others, self.low))
            for m, bits in sets if self.mixed else ((count, self.high),):
                total += m * G * -(-D * bits // 8) + item * scheme.parameters(m, G, D)
            total += item * G * D if scheme.scaled and count else 0
            total += item * G * D * min(side.block + side.hold, n - count + room)
        return total


def zipcache(bits: tuple[int, ...], interval: int) -> KVFormat:
    """ZipCache's form, which ZipVL v1 uses: `interval` new tokens are quantised at a time."""
    return KVFormat(bits[0], bits[-1], Side(KEYS, interval), Side(VALUES, interval))


def kivi(bits: int, group: int, residual: int) -> KVFormat:
    """KIVI's form (arXiv 2402.02750): steps are shared by `group` tokens of a key channel, by
    `group` channels of a value; keys leave the tail by `residual` tokens, values one by one."""
    keys, values = Side(Scheme(group, 1, 1), residual), Side(Scheme(1, 1, group), 1, residual)
    return KVFormat(bits, bits, keys, values, whole=False)


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


class Column:
    """The keys, or the values, of one sequence in one layer."""

    def __init__(self, side: Side, tail: Tensor):
        self.side, self.tail = side, tail  # [places, G, D]
        self.waiting = 0  # tokens in the tail
        self.parts: list[Any] = []  # Packed, or what else turns into numbers (cache_thin.py)

    @classmethod
    def build(cls, side: Side, x: Tensor, count: int, sets: Sets, room: int) -> "Column":
        """A prompt x [n, G, D], its first `count` tokens quantised, and `room` new tokens."""
        places = min(side.block + side.hold, len(x) - count + room)
        column = cls(side, x.new_empty(places, *x.shape[1:]))
        column.store(x[:count], sets)
        column.push(x[count:])
        return column

    @property
    def left(self) -> int:
        """How many tokens may join the tail until some are due."""
        return self.side.block + self.side.hold - self.waiting

    def push(self, x: Tensor) -> None:
        """Tokens x [m, G, D] join the tail."""
        self.tail[self.waiting : self.waiting + len(x)] = x
        self.waiting += len(x)

    def make_room(self, room: int) -> None:
        """The tail gets as many places as `room` more tokens can need."""
        places = min(self.side.block + self.side.hold, self.waiting + room)
        if places > len(self.tail):
            tail = self.tail.new_empty(places, *self.tail.shape[1:])
            tail[: self.waiting] = self.tail[: self.waiting]
            self.tail = tail

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

    def saved(self, name: str) -> dict[str, Tensor]:
        parts = [(f"{name}.{i}", part.saved()) for i, part in enumerate(self.parts)]
        named = {f"{at}.{field}": t for at, fields in parts for field, t in fields.items()}
        return named | {f"{name}.tail": self.tail[: self.waiting]}

    @classmethod
    def restored(cls, side: Side, saved: dict[str, Tensor], room: int, kind: Any) -> "Column":
        """Of what saved() gave, without its name; `kind` of parts: Packed, or another."""
        column = cls.build(side, saved["tail"], 0, [], room)
        for i in range(len({name.split(".")[0] for name in saved} - {"tail"})):
            column.parts.append(kind.restored(within(saved, f"{i}"), side.scheme))
        return column

    def copy(self) -> "Column":
        """The same tokens; parts are never written to and serve both."""
        twin = Column(self.side, self.tail.clone())
        twin.waiting, twin.parts = self.waiting, list(self.parts)
        return twin

    def tensors(self) -> list[Tensor]:
        return [self.tail, *(t for part in self.parts for t in part.tensors())]


def within(saved: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What is saved under `name`, by what follows it."""
    inside = [key for key in saved if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}."): saved[key] for key in inside}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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

    def copy(self) -> "Stored":
        return Stored(self.keys.copy(), self.values.copy(), self.positions.clone())

    def roomier(self, length: int, room: int) -> "Stored":
        """The same `length` tokens with places for `room` more."""
        for column in (self.keys, self.values):
            column.make_room(room)
        free = self.positions.new_full((room, *self.positions.shape[1:]), -1)
        return replace(self, positions=torch.cat((self.positions[:length], free)))


class QuantCache:
    """Keys and values of one layer for a batch of sequences; the same methods as LayerCache."""

    cannot: ClassVar[str] = "a quantised cache cannot do: leave out its kv_bits"

    def __init__(self, form: KVFormat, stored: list[Stored], lengths: list[int], room: int,
                 scratch: Scratch):  # fmt: skip
        """`stored`: one a sequence, of `lengths` tokens, with `room` for new ones."""
        self.form, self.stored, self.scratch = form, stored, scratch
        self.spans = Spans(lengths, stored[0].keys.tail.device, room)

    @classmethod
    def build(cls, form: KVFormat, room: int, scratch: Scratch, kept: list[Kept]) -> "QuantCache":
        """What stays of the prompts, one `kept` a sequence, quantised."""
        stored = []
        for one in kept:
            if one.merged:
                raise UsageError("summaries are held in full precision: leave out summary, or bits")
            n = len(one.k)
            sets = form.sets(n, one.precise)
            keys = Column.build(form.keys, one.k, form.count(form.keys, n), sets, room)
            values = Column.build(form.values, one.v, form.count(form.values, n), sets, room)
            order = form.ordered(one.positions, one.precise)
            free = order.new_full((room, *order.shape[1:]), -1)
            stored.append(Stored(keys, values, torch.cat((order, free)).int()))
        return cls(form, stored, [len(one.k) for one in kept], room, scratch)

    def append(self, k: Tensor, v: Tensor, positions: Tensor, new: Spans) -> None:
        sequences = zip(self.stored, self.spans.lengths, new.slices(), strict=True)
        for one, n, at in sequences:
            one.keys.push(k[at])
            one.values.push(v[at])
            places = one.positions[n : n + at.stop - at.start]
            places[:] = positions[at] if places.ndim == 1 else positions[at, None]
        self.spans.grow(new)

    def stride(self) -> list[int]:
        """Of each sequence, no more than fit until some leave full precision."""
        left = [min(column.left for column in (one.keys, one.values)) for one in self.stored]
        return [min(self.spans.free([b]), n) for b, n in enumerate(left)]

    def cut(self, first: int) -> bool:
        """Whether there is nothing to cut: what is packed stays as it is."""
        return not bool((self.places(0) >= first).any())

    def saved(self, first: int) -> dict[str, Tensor] | None:
        [one], [n] = self.stored, self.spans.lengths
        parts = one.keys.saved("keys") | one.values.saved("values")
        return parts | {"positions": one.positions[:n]} if self.cut(first) else None

    @classmethod
    def restored(cls, form: KVFormat, room: int, scratch: Scratch, saved: dict[str, Tensor],
                 kinds: tuple[Any, Any] = (Packed, Packed)) -> "QuantCache":  # fmt: skip
        keys = Column.restored(form.keys, within(saved, "keys"), room, kinds[0])
        values = Column.restored(form.values, within(saved, "values"), room, kinds[1])
        places = saved["positions"]
        free = places.new_full((room, *places.shape[1:]), -1)
        stored = Stored(keys, values, torch.cat((places, free)).int())
        return cls(form, [stored], [len(places)], room, scratch)

    def due(self, sequence: int) -> int:
        keys = self.stored[sequence].keys
        return keys.side.due(keys.waiting)

    def apply(self, plans: Sequence[Plan]) -> None:
        """Full blocks are quantised; plan.precise says which of the newest `due` tokens [K] get
        more bits, None: all."""
        for b, (one, n, plan) in enumerate(
            zip(self.stored, self.spans.lengths, plans, strict=True)
        ):
            if plan.leave is not None:
                self.refuse()
            due, precise = self.due(b), plan.precise
            for column in (one.keys, one.values):
                count = column.side.due(column.waiting)
                if count:
                    column.release(count, self.form.sets(count, precise))
            if due and precise is not None:
                one.positions[n - due : n] = self.form.ordered(one.positions[n - due : n], precise)

    def read(self) -> tuple[Tensor, Tensor, Spans]:
        k, v = self.scratch.take(self.spans.total, self.stored[0].keys.tail)
        for at, one in zip(self.spans.slices(), self.stored, strict=True):
            one.keys.into(k[at])
            one.values.into(v[at])
        return k, v, self.spans

    def places(self, sequence: int) -> Tensor:
        n, heads = self.spans.lengths[sequence], self.stored[0].keys.tail.shape[1]
        return self.stored[sequence].positions[:n].view(n, -1).expand(n, heads)

    def view(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [n, G, D], overwritten by the next read of any layer, and positions [n, G]."""
        k, v, spans = self.read()
        at = spans.slices()[sequence]
        return k[at], v[at], self.places(sequence)

    def refuse(self) -> None:
        raise UsageError(f"this method drops cached tokens while decoding, which {self.cannot}")

    def trim(self, slots: Sequence[Tensor | None]) -> "QuantCache":
        if any(s is not None for s in slots):
            self.refuse()
        return self

    def copy(self) -> "QuantCache":
        stored, lengths = [one.copy() for one in self.stored], self.spans.lengths
        return type(self)(self.form, stored, lengths, self.spans.free(), self.scratch)

    def drop(self, keep: list[int], room: int | None = None) -> "QuantCache":
        lengths, stored = [self.spans.lengths[i] for i in keep], [self.stored[i] for i in keep]
        free = self.spans.free(keep) if room is None else room
        if room is not None:
            stored = [one.roomier(n, room) for one, n in zip(stored, lengths, strict=True)]
        return type(self)(self.form, stored, lengths, free, self.scratch)

    def sequence_bytes(self) -> list[int]:
        return [storage_bytes(one.tensors()) for one in self.stored]

    @property
    def nbytes(self) -> int:
        return sum(self.sequence_bytes())
