"""The forms of a matrix product with few rows, and what projecting kept tokens only saves."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zipvl.linear import EMULATED, widened
from zipvl.model.attention import Attention
from zipvl.model.batch import Batch

from .model import Model
from .timing import Factory, Row, interleaved, ratios

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": lambda w, x: F.linear(x, w),
    "mm(W, x.T).T": lambda w, x: torch.mm(w, x.T).T,
    "mv": lambda w, x: torch.mv(w, x[0]),
    "widened": lambda w, x: widened(x, w, None),
}


@torch.inference_mode()
def bench_linear(model: Model, args: argparse.Namespace) -> list[Row]:
    """The forms of a matrix product with few rows, over all linear layers of the model."""
    weights = [m.weight for m in model.decoder.modules() if isinstance(m, torch.nn.Linear)]
    moved = sum(w.nbytes for w in weights)
    rows = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        xs = {w.shape[1]: torch.randn(count, w.shape[1], dtype=model.dtype) for w in weights}
        left_out = {"mv"} if count > 1 else set()
        left_out |= set() if EMULATED and model.dtype.itemsize == 2 else {"widened"}
        forms = {name: form for name, form in FORMS.items() if name not in left_out}
        runs: dict[str, Factory] = {
            name: partial(every_product, form, weights, xs) for name, form in forms.items()
        }
        seconds = interleaved(model.device, args.clock, runs, args.repeats)
        rows += [
            {"bench": "linear", "rows": count, "run": name, "seconds": values,
             "bytes_per_second": moved / min(values), **ratios(seconds, name)}
            for name, values in seconds.items()
        ]  # fmt: skip
    return rows


def every_product(form: Callable, weights: list[Tensor], xs: dict[int, Tensor]) -> Callable:
    return lambda: [form(w, xs[w.shape[1]]) for w in weights]


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
        q = layer.rotated(layer.q_proj, x, batch, rows)
        layer.v_proj(x[rows])
        layer.o_proj(q.flatten(1))

    return work
