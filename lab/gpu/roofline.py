"""What no run on this card can beat: two measured ceilings, and the work of a prefill.

    floor = sum over the layers of
              products and probes   the larger of FLOP / peak and weights / bandwidth
              attention             the larger of FLOP / peak and q, k, v, o / bandwidth
              rows                  bytes / bandwidth: hidden states read and written twice,
                                    what the layer keeps of keys and values written once
            + the head's weights / bandwidth

Attention is the causal half among kept tokens, at the peak of products, which no kernel with a
softmax in it reaches. What passes memory only because two kernels are not one is not counted.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from zipvl.config import TextConfig
from zipvl.engine.stats import LayerStats

from ..bench.timing import timed


class Ceilings(NamedTuple):
    bandwidth: float  # bytes a second of a copy on the device, read and written
    peak: float  # FLOP a second of a large matrix product

    def seconds(self, flops: float, moved: float) -> float:
        return max(flops / self.peak, moved / self.bandwidth)


def clocked(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work` after one warm-up; on CUDA by events, which launches do not
    lengthen."""
    work()
    if device.type != "cuda":
        return statistics.median(timed(device, "wall", work) for _ in range(repeats))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1000


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Random numbers, because some cards multiply zeros faster. Products go on for seconds, as a
    prefill does: a card draws less power than its first ones take."""
    cuda = device.type == "cuda"
    size, width, repeats = (2**30, 8192, 100) if cuda else (2**24, 256, 5)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = clocked(device, lambda: target.copy_(source), repeats)
    x, w, out = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(3))
    product = clocked(device, lambda: torch.mm(x, w, out=out), 1500 if cuda else repeats)
    return Ceilings(2 * size / copy, 2 * width**3 / product)


class Work(NamedTuple):
    """One layer over one sequence: FLOP, and bytes that it must move."""

    products: float  # FLOP of all linear layers, of which
    beside: float  # queries and outputs are timed with attention
    attention: float
    probes: float
    weights: float  # bytes
    heads: float  # queries, keys, values and outputs
    rows: float  # hidden states and the cache


def works(layers: list[LayerStats], config: TextConfig, item: int) -> list[Work]:
    """What a prefill that wants its last token alone did; `item` bytes a number."""
    width, ffn = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    found = []
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        n, kept = layer.tokens[0], layer.attended[0]
        asking, left = (kept, after.tokens[0]) if after else (1, 1)
        beside = 4 * width * asking * q
        products = 2 * width * ((n + kept) * kv + 3 * left * ffn) + beside
        attention = 4 * q * (kept**2 / 2 if after else kept)
        probes = max(0.0, 2 * layer.work[0] - products - attention)
        weights, heads = width * (2 * q + 2 * kv + 3 * ffn), 2 * (asking * q + kept * kv)
        moved = (item * x for x in (weights, heads, 4 * n * width + 2 * kept * kv))
        found.append(Work(products, beside, attention, probes, *moved))
    return found


def floor(layers: list[LayerStats], config: TextConfig, item: int, top: Ceilings) -> float:
    """Seconds below which this prefill cannot come."""
    total = top.seconds(0, item * config.hidden_size * config.vocab_size)
    for work in works(layers, config, item):
        total += top.seconds(work.products + work.probes, work.weights)
        total += top.seconds(work.attention, work.heads) + top.seconds(0, work.rows)
    return total


def allowed(spent: float, dense: list[LayerStats], sparse: list[LayerStats],
            config: TextConfig, item: int, top: Ceilings) -> float:  # fmt: skip
    """How many times as fast as dense, which took `spent` seconds, a run may be that only leaves
    out attention and products: attention as fast as dense was, products at the peak. What else
    shrinks, such as norms where tokens leave the stream, comes on top."""
    ours, theirs = works(sparse, config, item), works(dense, config, item)
    whole = sum(sum(layer.seconds.values()) for layer in dense)
    stage = spent * sum(layer.seconds.get("attend", 0.0) for layer in dense) / whole
    attention = max(0.0, stage - sum(w.beside for w in theirs) / top.peak)
    share = sum(w.attention for w in ours) / sum(w.attention for w in theirs)
    products = sum(w.products for w in theirs) - sum(w.products for w in ours)
    saved = attention * (1 - share) + products / top.peak
    return spent / max(spent - saved, floor(sparse, config, item, top))
