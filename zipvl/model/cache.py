"""What stays of a prompt: per layer, the kept keys and values, contiguous, G heads wide.

    slots   | a0 a1 a2 a3 . . | b0 b1 . . |        one tensor [slots, G, D] for the whole batch
              kept     room     kept  room         sequence b owns `spans` b: its kept tokens, then
                                                   room for the tokens it will generate
It is allocated after the layer has selected, at the size it needs, and written in place from then
on. Each slot remembers the position its token had in the prompt; a new token's position is given by
the caller and never derived from a cache length. Where a method keeps summaries of what it leaves
out, they are a sequence's first slots, and stay; what chooses among slots does not see them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..policy import Plan, Storage, select
from .batch import Spans


@dataclass(frozen=True)
class Kept:
    """What stays of one sequence in one layer."""

    k: Tensor  # [K, G, D]
    v: Tensor  # [K, G, D]
    positions: Tensor  # [K], or [K, G] where heads keep different tokens
    precise: Tensor | None = None  # [m] slots that a mixed storage gives more bits; None: all
    merged: int = 0  # so many of the first slots are summaries,
    weight: float = 1.0  # of so many tokens each
    room: int | None = None  # for at most so many new tokens at a time; None: as many as come
    channels: Tensor | None = None  # [D'] or [G, D'] that a thinning storage holds of older keys

    @classmethod
    def of(cls, plan: Plan, k: Tensor, v: Tensor, positions: Tensor, chosen: bool) -> "Kept":
        """The tokens plan.cache of k [T, G, D] and `positions` [T]; v holds all tokens, or these
        only (`chosen`)."""
        index = plan.cache
        where = positions if index is None else positions[index if index.ndim == 1 else index.T]
        precise = plan.precise
        if precise is not None and index is not None:
            precise = torch.isin(index, precise).nonzero()[:, 0]
        if plan.merge is not None:
            k, v = (joined(x, *plan.merge) for x in (k, v))
        held = v if chosen else select(v, index)
        kept = cls(select(k, index), held, where, precise, room=plan.room, channels=plan.channels)
        if index is None or not plan.summary or index.shape[-1] == len(k):
            return kept
        return kept.behind(*summaries(k, v, positions, index, plan.summary), len(k))

    def behind(self, k: Tensor, v: Tensor, positions: Tensor, tokens: int) -> "Kept":
        """The same with summaries k, v [S, G, D] of the others of so many tokens in front."""
        places = positions if positions.ndim == self.positions.ndim else positions[:, 0]
        return Kept(
            torch.cat((k, self.k)), torch.cat((v, self.v)), torch.cat((places, self.positions)),
            merged=len(k), weight=(tokens - len(self.k)) / len(k), room=self.room,
        )  # fmt: skip


class Cache(Protocol):
    """What the attention layer and the decode loop need of a cache, whatever it stores."""

    spans: Spans

    def append(self, k: Tensor, v: Tensor, positions: Tensor, new: Spans) -> None: ...
    def stride(self) -> list[int]: ...
    def cut(self, first: int) -> bool: ...
    def copy(self) -> "Cache": ...
    def saved(self, first: int) -> dict[str, Tensor] | None: ...
    def read(self) -> tuple[Tensor, Tensor, Spans]: ...
    def places(self, sequence: int) -> Tensor: ...
    def due(self, sequence: int) -> int: ...
    def apply(self, plans: Sequence[Plan]) -> None: ...
    def view(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]: ...
    def drop(self, keep: list[int], room: int | None = None) -> "Cache": ...
    def trim(self, slots: Sequence[Tensor | None]) -> "Cache": ...
    def sequence_bytes(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...


Store = Callable[[list[Kept]], Cache]
Restore = Callable[[dict[str, Tensor]], Cache]


class LayerCache:
    """Keys and values of one layer for a batch of sequences, in full precision."""

    def __init__(self, kept: list[Kept], room: int | list[int]):
        """One `kept` a sequence; `room` new tokens, each or all, if a `kept` asks for no less."""
        like = kept[0].k
        lengths, merged = [len(one.k) for one in kept], [one.merged for one in kept]
        rooms = room if isinstance(room, list) else [room] * len(kept)
        rooms = [min(n, one.room or n) for n, one in zip(rooms, kept, strict=True)]
        self.spans = Spans(lengths, like.device, rooms, merged, [one.weight for one in kept])
        shape = (self.spans.total, *like.shape[1:])
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # a graph reads free places
        self.positions = kept[0].positions.new_full(shape[:2], -1)  # [slots, G]
        for at, one in zip(self.spans.slices(), kept, strict=True):
            self._write(at, one)

    def _write(self, at: slice | Tensor, new: Kept) -> None:
        self.k[at], self.v[at] = new.k, new.v
        places = new.positions
        self.positions[at] = places if places.ndim == 2 else places[:, None]

    def append(self, k: Tensor, v: Tensor, positions: Tensor, new: Spans) -> None:
        """`new` rows that follow in each sequence: k, v [sum n, G, D], positions [sum n]."""
        self._write(self.spans.next(new), Kept(k, v, positions))
        self.spans.grow(new)

    def stride(self) -> list[int]:
        """How many tokens of each sequence may follow at once."""
        return [self.spans.free([b]) for b in range(len(self.spans))]

    def before(self, first: int) -> int | None:
        """How many of a lone sequence's slots, its first ones, hold the tokens before position
        `first`, summaries included; None where others lie between them in some head."""
        late = self.places(0) >= first  # [n, G]
        stay = len(late) - int(late[:, 0].sum())
        last = torch.arange(len(late), device=late.device) >= stay
        if not torch.equal(late, last[:, None].expand_as(late)):
            return None
        return self.spans.lengths[0] - len(late) + stay

    def cut(self, first: int) -> bool:
        """Lets go of a lone sequence's tokens from position `first` on. Returns whether it can."""
        n = self.before(first)
        if n is not None:
            self.spans.shrink([n])
        return n is not None

    def saved(self, first: int) -> dict[str, Tensor] | None:
        """What restored() makes a cache of, that holds a lone sequence's tokens before position
        `first`; None where it cannot be."""
        n, spans = self.before(first), self.spans
        merged = [spans.merged[0] if spans.merged else 0, spans.weights[0]]
        k, v, at = (t[:n] for t in self.view(0))
        at = at[:, :1] if bool((at == at[:, :1]).all()) else at  # mostly, heads keep the same
        parts = {"k": k, "v": v, "positions": at, "merged": torch.tensor(merged).double()}
        return None if n is None else parts

    @classmethod
    def restored(cls, saved: dict[str, Tensor], room: int) -> "LayerCache":
        """The cache of one sequence that was saved, with `room` for new tokens."""
        m, weight = saved["merged"].tolist()
        at = saved["positions"].expand(-1, saved["k"].shape[1])
        return cls([Kept(saved["k"], saved["v"], at, merged=int(m), weight=weight)], room)

    def read(self) -> tuple[Tensor, Tensor, Spans]:
        """k, v [slots, G, D] of all sequences and where each lies, no copy."""
        return self.k, self.v, self.spans

    def places(self, sequence: int) -> Tensor:
        """Positions [n, G] of one sequence's slots, without summaries."""
        return self.positions[self.spans.own()[sequence]]

    def due(self, sequence: int) -> int:
        """How many of the newest slots leave full precision after this step."""
        return 0

    def apply(self, plans: Sequence[Plan]) -> None:
        """What a decode step decided, one plan a sequence: the slots plan.leave are let go, and of
        the newest ones those that stay move into their places."""
        if all(plan.leave is None for plan in plans):
            return
        lengths = list(self.spans.lengths)
        for b, (at, plan) in enumerate(zip(self.spans.own(), plans, strict=True)):
            if plan.leave is not None:
                both = moves(plan.leave, self.k.shape[1], at.stop - at.start)
                for t in (self.k, self.v, self.positions):
                    fill_up(t[at].transpose(0, 1), *both)
                lengths[b] -= plan.leave.shape[-1]
        self.spans.shrink(lengths)

    def view(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [n, G, D] and positions [n, G] of one sequence, summaries first, no copy."""
        at = self.spans.slices()[sequence]
        return self.k[at], self.v[at], self.positions[at]

    def chosen(self, sequence: int, slots: Tensor | None) -> Kept:
        """The tokens in `slots` of a sequence, None: all, and its summaries."""
        m = self.spans.merged[sequence] if self.spans.merged else 0
        k, v, at = (
            torch.cat((t[:m], select(t[m:], slots))) if m else select(t, slots)
            for t in self.view(sequence)
        )
        return Kept(k, v, at, merged=m, weight=self.spans.weights[sequence])

    def copy(self) -> "LayerCache":
        return self.drop(list(range(len(self.spans))))

    def drop(self, keep: list[int], room: int | None = None) -> "LayerCache":
        """The cache of the sequences in `keep`, with `room` for new tokens; None: what is left."""
        rooms = [self.spans.free([i]) if room is None else room for i in keep]
        return LayerCache([self.chosen(i, None) for i in keep], rooms)

    def trim(self, slots: Sequence[Tensor | None]) -> "LayerCache":
        """The cache of these slots of each sequence, None: all; the others' memory is freed."""
        rooms = [self.spans.free([b]) for b in range(len(slots))]
        return LayerCache([self.chosen(b, s) for b, s in enumerate(slots)], rooms)

    def sequence_bytes(self) -> list[int]:
        """Bytes of each sequence's slots, filled and free; they add up to `nbytes`."""
        slot = 2 * self.k.shape[1] * self.k.shape[2] * self.k.element_size()
        return [places * slot for places in self.spans.capacity]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values occupy in storage, room for new tokens included."""
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()


def store_as(storage: Storage | None, room: int) -> Store:
    """What builds the caches of one prefill as a method stores them, with `room` for new tokens."""
    return partial(LayerCache, room=room) if storage is None else storage.store(room)


def restore_as(storage: Storage | None, room: int) -> Restore:
    """The same for caches that were saved."""
    return partial(LayerCache.restored, room=room) if storage is None else storage.restore(room)


def moved(x: Tensor, leave: Tensor) -> Tensor:
    """What a cache does with x [G, n, ...], here of its n slots, when the slots `leave` [E] or
    [G, E] are let go: of the last E slots, those that stay take the free places in order. Returns
    [G, n - E, ...], a view of x, whose memory is overwritten: nothing else moves."""
    return fill_up(x, *moves(leave, *x.shape[:2]))


def moves(leave: Tensor, G: int, n: int) -> tuple[Tensor, Tensor]:
    """Of n slots, which slots [G, E] are written when `leave` are let go, and which are read."""
    E, device = leave.shape[-1], leave.device
    leave, tail = leave.expand(G, E), torch.arange(n - E, n, device=device)
    goes = torch.zeros(G, n, dtype=torch.bool, device=device).scatter_(1, leave, True)
    source = torch.where(goes[:, n - E :], n, tail).sort(dim=1).values  # as many as free places, n
    return leave, torch.where(source < n, source, leave)  # who leaves from the tail reads itself


def fill_up(x: Tensor, into: Tensor, source: Tensor) -> Tensor:
    """moved(), with moves() known."""
    heads = torch.arange(len(x), device=x.device)[:, None]
    x[heads, into] = x[heads, source]
    return x[:, : x.shape[1] - into.shape[1]]


def joined(x: Tensor, into: Tensor, weight: Tensor) -> Tensor:
    """x [T, G, D], each token that others join now the weighted mean of all that join it, as
    Plan.merge says, summed in float32."""
    T, G = x.shape[:2]
    heads = torch.arange(G, device=x.device)
    target = into.expand(G, T).T  # [T, G]
    row = (torch.where(target < 0, T, target) * G + heads).flatten()  # -1 joins a row of its own
    w = torch.where(target < 0, 0, weight.float().expand(G, T).T)
    total = x.new_zeros(((T + 1) * G, x.shape[2]), dtype=torch.float32)
    total.index_add_(0, row, (x.float() * w[..., None]).flatten(0, 1))
    share = total.new_zeros((T + 1) * G).index_add_(0, row, w.flatten())
    mean = (total / share[:, None]).unflatten(0, (T + 1, G))[:T]
    return torch.where(share.view(T + 1, G, 1)[:T] > 0, mean.to(x.dtype), x)


def summaries(k: Tensor, v: Tensor, positions: Tensor, index: Tensor,
              size: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the tokens of k, v [T, G, D] that are not in `index` [K] or [G, K]: means of runs of about
    `size`, in order, [S, G, D] each, and the position [S, G] of each run's last token. Runs of one
    cache differ by one token at most; means are summed in float32."""
    T, G = k.shape[:2]
    kept = index.to(k.device).expand(G, -1)
    out = torch.ones(G, T, dtype=torch.bool, device=k.device).scatter_(1, kept, False)
    left = out.nonzero()[:, 1].view(G, -1)  # [G, d]
    d, run = left.shape[1], torch.arange(-(-left.shape[1] // size), device=k.device)
    sizes = d // len(run) + (run < d % len(run)).long()  # [S]
    member = run.repeat_interleave(sizes)  # [d]
    means = []
    for x in (k, v):
        total = x.new_zeros(len(run), *x.shape[1:], dtype=torch.float32)
        total.index_add_(0, member, select(x, left).float())
        means.append((total / sizes[:, None, None]).to(x.dtype))
    return means[0], means[1], positions[left.T[sizes.cumsum(0) - 1]]
