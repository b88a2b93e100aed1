"""What a run did: seconds by stage, tokens kept and bytes cached by layer, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..policy import Plan
    from .cache import LayerCache


class Clock:
    """Seconds by name. On CUDA every reading waits for the device, so a stage pays for its own work."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def pop(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


@dataclass
class LayerStats:
    """One layer of one prefill; lists have one entry per sequence of the batch."""

    tokens: list[int]  # tokens that entered the layer
    attended: list[int]  # tokens in this layer's attention
    cached: list[int]  # tokens whose keys and values stay
    pairs: list[float]  # query-key pairs computed, in units of T^2 / 2
    kv_bytes: int  # storage of the layer's cache, the whole batch, room for new tokens included
    seconds: dict[str, float]  # probe, select, attend, rest

    @classmethod
    def of(cls, lengths: list[int], plans: "list[Plan]", cache: "LayerCache | None",
           seconds: dict[str, float]) -> "LayerStats":  # fmt: skip
        attended = [n if p.attend is None else len(p.attend) for n, p in zip(lengths, plans, strict=True)]
        own = [a if p.attend is None or p.fill != "own" else n
               for a, n, p in zip(attended, lengths, plans, strict=True)]  # fmt: skip
        cached = list(cache.spans.lengths) if cache else [0] * len(lengths)
        pairs = [float(a) * q for a, q in zip(attended, own, strict=True)]
        return cls(list(lengths), attended, cached, pairs, cache.nbytes if cache else 0, seconds)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @property
    def ratio(self) -> float:
        """Share of the tokens that took part in attention, over the batch."""
        return sum(self.attended) / max(1, sum(self.tokens))
