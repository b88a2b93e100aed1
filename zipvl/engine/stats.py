"""What a run did: seconds by stage, tokens kept and bytes cached by layer, peak memory."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from ..config import TextConfig
from ..model.attention import Observer
from ..model.decoder import Prefilled
from ..policy import Mask, Plan

Mark = float | torch.cuda.Event


class Clock:
    """Seconds by name. On CUDA a mark is an event on the device's stream, read when somebody asks
    for the seconds: nothing waits for a statistic before that."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def start(self) -> None:
        """What comes now counts, what came before does not."""
        self.marks: list[tuple[str, Mark]] = [("", self.mark())]

    def lap(self, stage: str) -> None:
        """The time since the last lap or start went into `stage`."""
        self.marks.append((stage, self.mark()))

    def split(self) -> list[tuple[str, Mark]]:
        """The marks since the start, for seconds(); what comes now starts at the last one."""
        marks, self.marks = self.marks, [("", self.marks[-1][1])]
        return marks

    def pop(self) -> dict[str, float]:
        return seconds(self.split())


def seconds(marks: list[tuple[str, Mark]]) -> dict[str, float]:
    """By stage, between marks; on CUDA waits for the last one."""
    out: dict[str, float] = {}
    if not isinstance(last := marks[-1][1], float):
        last.synchronize()
    for (_, before), (stage, after) in pairwise(marks):
        if isinstance(before, float) or isinstance(after, float):
            took = cast(float, after) - cast(float, before)
        else:
            took = before.elapsed_time(after) / 1000
        out[stage] = out.get(stage, 0.0) + took
    return out


@dataclass
class LayerStats:
    """One layer of one prefill; lists have one entry per sequence of the batch."""

    tokens: list[int]  # tokens that entered the layer
    attended: list[int]  # tokens in this layer's attention
    pairs: list[int]  # query-key pairs of that attention, before the causal half is left out
    seconds: dict[str, float]  # probe, select, attend, rest; of the whole batch
    cached: list[int]  # tokens whose keys and values stay
    kv_bytes: list[int]  # storage of the sequence's part of the cache, room for new tokens included
    chose: list[bool]  # whether the method said who takes part in attention
    work: list[int]  # multiply-adds, as layer_work() counts them, and what the method looked at

    @property
    def ratio(self) -> float:
        """Share of the tokens that took part in attention, over the batch."""
        return sum(self.attended) / max(1, sum(self.tokens))


class Recorder(Clock, Observer):
    """The LayerStats of a prefill, as it goes on."""

    def __init__(self, device: torch.device, config: TextConfig,
                 progress: Callable[[int], object] = lambda n: None):  # fmt: skip
        """`progress(1)` is called behind each layer."""
        super().__init__(device)
        self.config, self.progress = config, progress
        self.layers: list[LayerStats] = []
        self.taken: list[list[tuple[str, Mark]]] = []  # the marks of each layer
        self.looks: dict[int, int] = {}

    def looked(self, sequence: int, work: int) -> None:
        self.looks[sequence] = self.looks.get(sequence, 0) + work

    def layer(self, entered: list[int], plans: list[Plan], left: list[int], ends: bool) -> None:
        """`pairs` are those of a layer whose every token is wanted, `work` is what was done."""
        both = list(zip(entered, plans, strict=True))
        attended = [n if p.attend is None else len(p.attend) for n, p in both]
        asking = [n if p.fill == "own" else a for (n, p), a in zip(both, attended, strict=True)]
        pairs = [a * r if p.mask is None else masked_pairs(p.mask, n, self.device)
                 for (n, p), a, r in zip(both, attended, asking, strict=True)]  # fmt: skip
        work = [
            layer_work(
                self.config, n,
                n if p.summary or p.merge is not None or p.cache is not p.attend else a,
                1 if ends else r, m, a if ends else pairs[b] / 2,
            ) + self.looks.get(b, 0)
            for b, ((n, p), a, r, m) in enumerate(zip(both, attended, asking, left, strict=True))
        ]  # fmt: skip
        chose, none = [p.attend is not None or p.mask is not None for p in plans], [0] * len(plans)
        self.layers.append(LayerStats(list(entered), attended, pairs, {}, none, none, chose, work))
        self.taken.append(self.split())
        self.looks = {}
        self.progress(1)

    def counted(self, out: Prefilled) -> "Counted":
        """The prefill with its layers, and what their caches, if there are any, hold at its end."""
        for layer, marks in zip(self.layers, self.taken, strict=True):
            layer.seconds = seconds(marks)
        for layer, cache in zip(self.layers, out.caches, strict=False):
            layer.cached, layer.kv_bytes = list(cache.spans.lengths), cache.sequence_bytes()
        return Counted(out.hidden, out.batch, out.caches, self.layers)


@dataclass(frozen=True)
class Counted(Prefilled):
    """What a prefill leaves behind, and what it did."""

    layers: list[LayerStats]


def masked_pairs(mask: Mask, n: int, device: torch.device | None = None, block: int = 512) -> int:
    """The pairs of a masked layer of n tokens, mean over heads, in the same measure: all: n^2."""
    count = 0.0
    index = torch.arange(n, device=device)
    for rows in index.split(block):
        seen = mask(rows) & (index <= rows[:, None])  # [b, n] or [H, b, n]
        count += float(seen.sum()) / (len(seen) if seen.ndim == 3 else 1)
    return round(2 * count - n)


def layer_work(config: TextConfig, keys: int, values: int, asking: int, left: int,
               pairs: float) -> int:  # fmt: skip
    """Multiply-adds of one layer over one sequence: projections of `keys` and `values`, queries and
    outputs of the `asking` rows, the MLP of those that `left` the layer, two products for each of
    the query-key `pairs` (half a square where it is causal). Norms, softmax and RoPE are not
    counted, nor are the vision tower and the output head."""
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    linear = (keys + values) * config.num_kv_heads * config.head_dim + 2 * asking * heads
    mlp = 3 * left * config.intermediate_size
    return round(width * (linear + mlp) + 2 * heads * pairs)


def dense_work(config: TextConfig, tokens: int, ends: bool) -> int:
    """The same of all layers in dense attention; `ends`: the last one computes one row alone."""
    whole = layer_work(config, tokens, tokens, tokens, tokens, tokens**2 / 2)
    last = layer_work(config, tokens, tokens, 1, 1, tokens) if ends else whole
    return (config.num_layers - 1) * whole + last


@dataclass
class Stats:
    """One sequence of one run; `seconds` are those of the batch it ran in."""

    method: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    batch: int
    seconds: dict[str, float]  # video, vision, prefill, decode, first_token; prefill_probe, ...
    layers: list[dict[str, Any]]  # tokens, attended, cached, ratio, work, chose, kv_bytes
    work: int  # multiply-adds of the prefill: layers and what the method looked at
    work_dense: int  # the same under dense attention
    kv_bytes_dense: int  # what the same cache holds under dense attention
    peak_memory: int  # bytes: allocated on CUDA, resident set of the process elsewhere
    frames: list[dict[str, Any]] = field(default_factory=list)  # index and time of each video frame
    reused: int = 0  # prompt tokens that a session held; `layers` and `work` are its prefill's

    @property
    def kv_bytes(self) -> int:
        return sum(layer["kv_bytes"] for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Mean over layers of the share of prompt tokens in attention (the paper's "ratio")."""
        return sum(layer["ratio"] for layer in self.layers) / max(1, len(self.layers))

    @property
    def attention_work(self) -> float:
        """Pairs computed over dense pairs, summed over layers: the mean of r^2, not (mean r)^2."""
        return sum(layer["work"] for layer in self.layers) / max(1, len(self.layers))

    @property
    def prefill_work(self) -> float:
        """Multiply-adds of the whole prefill over those of dense attention (layer_work)."""
        return self.work / max(1, self.work_dense)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, this sequence's share of the batch."""
        return (self.prompt_tokens - self.reused) / max(1e-9, self.seconds.get("prefill", math.inf))

    @property
    def decode_rate(self) -> float:
        """New tokens a second of this sequence; the first comes out of the prefill."""
        return max(0, self.new_tokens - 1) / max(1e-9, self.seconds.get("decode", math.inf))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        derived = (
            "kv_bytes", "ratio", "attention_work", "prefill_work", "prefill_rate", "decode_rate",
        )  # fmt: skip
        return asdict(self) | {name: getattr(self, name) for name in derived}


def layer_rows(layers: list[LayerStats], sequence: int, prompt: int) -> list[dict[str, Any]]:
    """Stats.layers of one sequence; ratios are shares of its `prompt` tokens."""
    return [
        {
            "tokens": s.tokens[sequence],
            "attended": s.attended[sequence],
            "cached": s.cached[sequence],
            "ratio": s.attended[sequence] / prompt,
            "work": s.pairs[sequence] / prompt**2,
            "chose": s.chose[sequence],
            "kv_bytes": s.kv_bytes[sequence],
        }
        for s in layers
    ]


def restart_peak(device: torch.device) -> None:
    """Makes `peak_memory` count from now on, on CUDA and where Linux lets a process do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's peak resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
