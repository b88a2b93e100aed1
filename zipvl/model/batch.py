"""A packed batch: sequences one after the other, without padding; where each row lies, its place in
the prompt, and its angles.

Positions are a token's place in the whole prompt: causality, recency, caches and methods know no
other number. They never come from the length of a cache: after tokens were dropped the two differ,
and every later token would be turned by a wrong angle. What turns a token is its rotary id. Mostly
that is its position; where pictures have rows and columns of ids (M-RoPE), ids repeat, and those of
the text behind are ahead of its positions by one number a sequence, Notes.ahead.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..policy import Notes


def sent(data: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the `device`; through pinned memory where the processor else waits for it."""
    if device.type != "cuda" or data.device.type != "cpu":
        return data.to(device)
    return data.pin_memory().to(device, non_blocking=True)


class Spans:
    """Where each sequence of a packed batch lies: start and length, as ints and on the device."""

    def __init__(self, lengths: list[int], device: torch.device | str, room: int | list[int] = 0,
                 merged: list[int] | None = None, weights: list[float] | None = None):  # fmt: skip
        """`room` leaves that many unused places after each sequence, one number for all or each. Of
        a cache, the first `merged` slots of a sequence are summaries, of `weights` tokens each."""
        self.lengths = list(lengths)
        self.merged = merged if merged and any(merged) else None
        self.weights = weights or [1.0] * len(lengths)
        rooms = room if isinstance(room, list) else [room] * len(lengths)
        self.room = max(rooms)
        self.capacity = [n + places for n, places in zip(lengths, rooms, strict=True)]
        *self.starts, self.total = accumulate(self.capacity, initial=0)
        both = [*self.starts, self.total, *self.lengths]
        device_ints = sent(torch.tensor(both, dtype=torch.int32), torch.device(device))
        self.edges = device_ints[: len(lengths) + 1]  # [B + 1], cu_seqlens of FlashAttention
        self.used = device_ints[len(lengths) + 1 :]  # [B]
        if self.merged:  # on the device once: a CUDA graph must not copy them
            self.far = sent(torch.tensor(self.merged, dtype=torch.int32), self.used.device)  # [B]
            self.stand = sent(torch.tensor(self.weights).log(), self.used.device)  # [B]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> Tensor:
        """Where the last token of each sequence lies [B]."""
        return self.edges[:-1].long() + self.used - 1

    def free(self, sequences: Iterable[int] | None = None) -> int:
        """Places that every one of these sequences (None: of all) has left."""
        chosen = range(len(self)) if sequences is None else sequences
        return min(self.capacity[i] - self.lengths[i] for i in chosen)

    def slices(self) -> list[slice]:
        return [slice(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)]

    def own(self) -> list[slice]:
        """slices() without summaries: slots of one token each."""
        both = zip(self.slices(), self.merged or [0] * len(self), strict=True)
        return [slice(at.start + m, at.stop) for at, m in both]

    def bias(self, sequence: int, places: int, dtype: torch.dtype) -> Tensor | None:
        """What its scores over so many places get added, [1, 1, 1, places]; None: nothing."""
        if self.merged is None:
            return None
        out = torch.zeros(1, 1, 1, places, dtype=dtype, device=self.edges.device)
        out[..., : self.merged[sequence]] = math.log(self.weights[sequence])
        return out

    def next(self, new: "Spans") -> Tensor:
        """The places of `new` rows, so many of each sequence, behind those in use [sum n]."""
        places = self.edges[:-1] + self.used
        if all(n == 1 for n in new.lengths):
            return places
        shift = (places - new.edges[:-1]).repeat_interleave(new.used, output_size=new.total)
        return shift + torch.arange(new.total, device=shift.device)

    def grow(self, new: "Spans") -> None:
        """Every sequence takes as many more of its places as `new` has rows of it."""
        self.lengths = [n + more for n, more in zip(self.lengths, new.lengths, strict=True)]
        self.used += new.used

    def count(self) -> None:
        """What a replayed CUDA graph does not do of grow(), by one token each."""
        self.lengths = [n + 1 for n in self.lengths]

    def shrink(self, lengths: list[int]) -> None:
        self.lengths = list(lengths)
        self.used = sent(torch.tensor(self.lengths, dtype=torch.int32), self.used.device)


@dataclass(frozen=True)
class Batch:
    """What goes with the hidden states [sum T, C] of a packed batch through the layers."""

    spans: Spans
    positions: Tensor  # int32 [sum T] place of each token in its own prompt
    is_visual: Tensor  # [sum T] bool
    cos: Tensor  # [sum T, 1, D/2]
    sin: Tensor
    notes: list[Notes]  # one a sequence, for all layers
    chunk: int | None = None  # rows at a time where temporaries would grow with T; None: all

    @classmethod
    def build(cls, lengths: list[int], positions: Tensor, is_visual: Tensor, config: TextConfig,
              dtype: torch.dtype, notes: list[Notes] | None = None,
              turns: Tensor | None = None) -> "Batch":  # fmt: skip
        """positions, is_visual [sum T]; `notes` None: fresh ones. `turns`: rotary ids [3, sum T];
        None: those of text behind what is in the prompt."""
        notes = [Notes(n) for n in lengths] if notes is None else notes
        if turns is None:
            turns = moved(positions, ahead(notes, lengths, positions.device))
        cos, sin = rope_table(turns, config, dtype)
        places = positions.int()  # caches hold them for every layer and head
        return cls(Spans(lengths, positions.device), places, is_visual, cos, sin, notes)

    def rows(self, chosen: list[Tensor | None]) -> tuple[Tensor | slice, Spans]:
        """Rows [sum K] of the `chosen` tokens [K] of each sequence (None: all of them), and where
        each sequence lies among these rows."""
        if all(index is None for index in chosen):
            return slice(None), self.spans
        device = self.positions.device
        parts = [
            torch.arange(s, s + n, device=device) if index is None else index + s if s else index
            for index, s, n in zip(chosen, self.spans.starts, self.spans.lengths, strict=True)
        ]
        return join(parts), Spans([len(part) for part in parts], device)

    def take(self, rows: Tensor | slice, spans: Spans) -> "Batch":
        """The batch of `rows` [sum K''] only, at `spans`; positions stay the original ones."""
        return replace(
            self, spans=spans, positions=self.positions[rows], is_visual=self.is_visual[rows],
            cos=self.cos[rows], sin=self.sin[rows],
        )  # fmt: skip


def join(parts: list[Tensor]) -> Tensor:
    """One after the other; a lone part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def ahead(notes: list[Notes], lengths: list[int], device: torch.device) -> Tensor | None:
    """By how much rotary ids of text are ahead of its positions, [sum T]; None: they are these."""
    each = [n.ahead for n in notes]
    if not any(each):
        return None
    return sent(torch.tensor(each).repeat_interleave(torch.tensor(lengths)), device)


def moved(positions: Tensor, by: Tensor | None) -> Tensor:
    """Rotary ids of text at `positions`."""
    return positions if by is None else positions + by


def rope_table(turns: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D/2] for rotary ids `turns` [T], computed in float32, cast to `dtype`; or
    for [3, T], time, row and column, of which each turns its section of the D/2 pairs (Qwen2-VL).

    In the order in which transformers does it (modeling_rope_utils.py), so that its angles come out
    to the last bit; linear scaling divides the frequencies.
    """
    steps = torch.arange(0, config.head_dim, 2, device=turns.device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**steps / config.rope_factor
    by_pair = turns[:, None]  # [T, 1]
    if turns.ndim == 2:
        rows = [row for row, pairs in enumerate(config.rope_sections) for _ in range(pairs)]
        by_pair = torch.stack([turns[row] for row in rows], dim=1)  # [T, D/2]
    angles = by_pair[:, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Rotate(nn.Module):
    """Rotary position embedding, rotate-half form, as Llama, Mistral and Qwen2 use it."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns each pair (x[i], x[i + D/2]) of x [T, heads, D] by its position's angle."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
