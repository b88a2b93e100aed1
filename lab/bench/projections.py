"""The forms of a matrix product with few rows, and what projecting kept tokens only saves."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zipvl.engine.speed import FEW_ROWS
from zipvl.linear import EMULATED, widened
from zipvl.model.attention import Attention
from zipvl.model.batch import Batch

from .model import Model
from .timing import Factory, Row, interleaved, product_peak, ratios, read_bandwidth

Form = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # once; a product


def as_it_is(w: Tensor) -> Tensor:
    return w


def blocks(w: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(w, FEW_ROWS)


def onednn(w: Tensor, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


FORMS: dict[str, Form] = {
    "F.linear": (as_it_is, lambda w, x: F.linear(x, w)),
    "mm(W, x.T).T": (as_it_is, lambda w, x: torch.mm(w, x.T).T),
    "mv": (as_it_is, lambda w, x: torch.mv(w, x[0])),
    "widened": (as_it_is, lambda w, x: widened(x, w, None)),
    "x W.T, transposed once": (lambda w: w.T.contiguous(), lambda w, x: x @ w),
    "oneDNN": (as_it_is, onednn),
    "oneDNN, packed once": (blocks, onednn),
}


def usable(name: str, dtype: torch.dtype) -> bool:
    """Whether this machine has the form, and it says something."""
    emulated = EMULATED and dtype.itemsize == 2
    prepare, product = FORMS[name]
    try:
        product(prepare(torch.ones(16, 16, dtype=dtype)), torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return emulated or name != "widened"


@torch.inference_mode()
def bench_linear(model: Model, args: argparse.Namespace) -> list[Row]:
    """The forms of a matrix product with few rows, over all linear layers of the model."""
    weights = [m.weight for m in model.decoder.modules() if isinstance(m, torch.nn.Linear)]
    moved, pairs = sum(w.nbytes for w in weights), sum(w.numel() for w in weights)
    bandwidth = read_bandwidth(model.device, args.clock)
    peak = product_peak(model.device, model.dtype, args.clock)
    names = [name for name in FORMS if usable(name, model.dtype)]
    laid = {name: list(map(FORMS[name][0], weights)) for name in names}
    rows = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        xs = [torch.randn(count, w.shape[1], dtype=model.dtype) for w in weights]
        runs: dict[str, Factory] = {
            name: partial(every_product, FORMS[name][1], laid[name], xs)
            for name in names if count == 1 or name != "mv"
        }  # fmt: skip
        seconds = interleaved(model.device, args.clock, runs, args.repeats)
        for name, values in seconds.items():
            spent = statistics.median(values)
            rows.append({
                "bench": "linear", "rows": count, "run": name, "seconds": values,
                "read_bandwidth": bandwidth, "bandwidth_share": moved / spent / bandwidth,
                "peak_flops": peak, "peak_share": 2 * count * pairs / spent / peak,
                **ratios(seconds, name),
            })  # fmt: skip
    return rows


def every_product(product: Callable, weights: list[Tensor], xs: list[Tensor]) -> Callable:
    return lambda: [product(w, x) for w, x in zip(weights, xs, strict=True)]


@torch.inference_mode()
def bench_projections(model: Model, args: argparse.Namespace) -> list[Row]:
    """One layer's query, value and output projections for all tokens, and for kept ones only."""
    layer = next(model.decoder.blocks()).self_attn
    rows = []
    for tokens in args.tokens:
        x = torch.randn(tokens, model.config.hidden_size, dtype=model.dtype, device=model.device)
        batch = model.batch(tokens)
        kept = {f"ratio {r:g}": int(tokens * r) for r in args.ratios}
        runs: dict[str, Factory] = {
            name: partial(
                some_projections, layer, x, batch, torch.randperm(tokens)[:count].sort()[0]
            )
            for name, count in kept.items()
        }
        seconds = interleaved(model.device, args.clock, runs, args.repeats)
        rows += [
            {"bench": "projections", "tokens": tokens, "batch": 1, "run": name, "seconds": values,
             **ratios(seconds, name)}
            for name, values in seconds.items()
        ]  # fmt: skip
    return rows


def some_projections(layer: Attention, x: Tensor, batch: Batch, rows: Tensor) -> Callable:
    def work() -> None:
        q = layer.queries(x, batch, rows)
        layer.v_proj(x[rows])
        layer.o_proj(q.flatten(1))

    return work
