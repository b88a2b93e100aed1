"""What stays of a prompt: per layer, the kept keys and values, contiguous, G heads wide.

    slots   | a0 a1 a2 a3 . . | b0 b1 . . |        one tensor [slots, G, D] for the whole batch
              kept     room     kept  room         sequence b owns `spans` b: its kept tokens, then
                                                   room for the tokens it will generate
It is allocated after the layer has selected, at the size it needs, and written in place from then
on. Each slot remembers the position its token had in the prompt; a new token's position is given by
the caller and never derived from a cache length.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..model.kernels import Spans


class Cache(Protocol):
    """What the attention layer needs of a cache, whatever it stores."""

    spans: Spans
    state: list[dict]

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None: ...
    def read(self) -> tuple[Tensor, Tensor, Spans]: ...
    def view(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]: ...
    def settle(self, choose: Callable[[int, int], Tensor | None]) -> None: ...
    def keep(self, sequence: int, slots: Tensor) -> None: ...
    def drop(self, keep: list[int]) -> "Cache": ...
    def sequence_bytes(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...


class LayerCache:
    """Keys and values of one layer for a batch of sequences."""

    def __init__(self, k: list[Tensor], v: list[Tensor], positions: list[Tensor], room: int,
                 state: list[dict]):  # fmt: skip
        """k, v: one [K, G, D] per sequence; positions: one [K] or [K, G] each; `room` new tokens;
        `state`: the policy's notes, one dict a sequence, which all layers share."""
        self.spans = Spans([len(t) for t in k], k[0].device, room)
        shape = (self.spans.total, *k[0].shape[1:])
        self.k, self.v = k[0].new_zeros(shape), v[0].new_zeros(shape)  # attend_masked reads all
        self.positions = positions[0].new_full(shape[:2], -1)  # [slots, G]
        self.state = state
        for at, *new in zip(self.spans.slices(), k, v, positions, strict=True):
            self._write(at, *new)

    def _write(self, at: slice | Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self.k[at], self.v[at] = k, v
        self.positions[at] = positions if positions.ndim == 2 else positions[:, None]

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """One new token per sequence: k, v [B, G, D], positions [B]."""
        at = self.spans.edges[:-1] + self.spans.used  # [B]
        self._write(at, k, v, positions)
        self.spans.grow()

    def read(self) -> tuple[Tensor, Tensor, Spans]:
        """k, v [slots, G, D] of all sequences and where each lies, no copy."""
        return self.k, self.v, self.spans

    def settle(self, choose: Callable[[int, int], Tensor | None]) -> None:
        """What is to be done after each step: nothing (QuantCache quantises)."""

    def view(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [n, G, D] and positions [n, G] of one sequence, no copy."""
        at = self.spans.slices()[sequence]
        return self.k[at], self.v[at], self.positions[at]

    def keep(self, sequence: int, slots: Tensor) -> None:
        """Only `slots` [N] or [G, N] of a sequence stay, in that order."""
        k, v, positions = (select(t, slots) for t in self.view(sequence))
        start, lengths = self.spans.starts[sequence], list(self.spans.lengths)
        self._write(slice(start, start + len(k)), k, v, positions)
        lengths[sequence] = len(k)
        self.spans.shrink(lengths)

    def drop(self, keep: list[int]) -> "LayerCache":
        """The cache of the sequences in `keep`, when others have finished."""
        k, v, positions = zip(*(self.view(i) for i in keep), strict=True)
        free = min(self.spans.capacity[i] - self.spans.lengths[i] for i in keep)
        state = [self.state[i] for i in keep]
        return LayerCache(list(k), list(v), list(positions), free, state)

    def sequence_bytes(self) -> list[int]:
        """Bytes of each sequence's slots, filled and free; they add up to `nbytes`."""
        slot = 2 * self.k.shape[1] * self.k.shape[2] * self.k.element_size()
        return [places * slot for places in self.spans.capacity]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values occupy in storage, room for new tokens included."""
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()


def select(x: Tensor, index: Tensor | None) -> Tensor:
    """Tokens `index` of x [T, G, ...]: None all, [K] the same for all heads, [G, K] per head."""
    if index is None:
        return x
    if index.ndim == 1:
        return x[index]
    heads = torch.arange(x.shape[1], device=x.device)
    return x[index.T, heads]  # [K, G, ...]
