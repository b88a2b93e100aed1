"""Prefill and decode, measured next to transformers on the same weights; ragged batches."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipvl.config import TextConfig
from zipvl.engine.run import Step
from zipvl.engine.speed import GraphStep, StaticStep
from zipvl.engine.stats import Counted, dense_work
from zipvl.linear import Linear

from .model import Model
from .rival import build_rival, rival_prefill, rival_steps
from .timing import Factory, Row, interleaved, product_peak, ratios, read_bandwidth, spread

STEPS = {"": Step, ", static": StaticStep, ", graph": GraphStep}  # of decoding


@torch.inference_mode()
def bench_prefill(model: Model, args: argparse.Namespace) -> list[Row]:
    """Time to the first token's logits, cache included."""
    rival, rows = build_rival(model) if args.rival else None, []
    peak = product_peak(model.device, model.dtype, args.clock)
    for tokens in args.tokens:
        ids = torch.randint(model.config.vocab_size, (tokens,), device=model.device)
        last: dict[str, Counted] = {}
        runs: dict[str, Factory] = {
            method: partial(our_prefill, model, ids, method, last) for method in args.methods
        }
        if rival is not None:
            runs["transformers"] = partial(rival_prefill, rival, ids)
        seconds = interleaved(model.device, args.clock, runs, args.repeats)
        for name, values in seconds.items():
            details = prefill_details(last[name], model.config) if name in last else {}
            rows.append({
                "bench": "prefill", "tokens": tokens, "batch": 1, "run": name, "seconds": values,
                "tokens_per_second": tokens / statistics.median(values),
                **details, **ratios(seconds, name),
            })  # fmt: skip
        add_bounds(rows[-len(seconds) :], model, tokens, peak)
    return rows


def add_bounds(rows: list[Row], model: Model, tokens: int, peak: float) -> None:
    """How near the rows of one length are to what bounds them: dense prefill to the peak of matrix
    products, sparse prefill to dense prefill if its attention took no time. The second is no strict
    bound, since tokens that a layer leaves out skip some projections, too."""
    c = model.config
    weights = sum(m.weight.numel() for m in model.decoder.modules() if isinstance(m, Linear))
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * tokens * (tokens + 1)
    flops = 2 * tokens * weights + attention + 2 * model.lm_head.weight.numel()
    dense = next((row for row in rows if row["run"] == "dense"), None)
    for row in rows:
        if row["run"] in ("dense", "transformers"):
            row["peak_flops"] = peak
            row["peak_share"] = flops / statistics.median(row["seconds"]) / peak
        elif dense:
            row["free_attention"] = 1 / (1 - dense["share"]["attend"])


def our_prefill(model: Model, ids: Tensor, method: str, last: dict) -> Callable[[], object]:
    def work() -> None:
        last[method] = model.prefill(ids, method, room=16)[1]

    return work


def prefill_details(out: Counted, config: TextConfig) -> Row:
    """Shares of the last run by stage, kept ratio, attention work, work of the whole prefill, bytes
    of the cache."""
    stages: dict[str, float] = {}
    for layer in out.layers:
        for stage, value in layer.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + value
    total = sum(stages.values())
    tokens = out.layers[0].tokens[0]
    return {
        "share": {stage: value / total for stage, value in stages.items()},
        "ratio": statistics.mean(layer.ratio for layer in out.layers),
        "work": statistics.mean(layer.pairs[0] / tokens**2 for layer in out.layers),
        "prefill_work": sum(layer.work[0] for layer in out.layers)
        / dense_work(config, tokens, True),
        "kv_bytes": sum(cache.nbytes for cache in out.caches),
    }


@torch.inference_mode()
def bench_decode(model: Model, args: argparse.Namespace) -> list[Row]:
    """Seconds a step of `--new` greedy steps over caches of random keys and values."""
    rival, rows = build_rival(model) if args.rival else None, []
    bandwidth = read_bandwidth(model.device, args.clock)
    models = {kind: model.packed(kind) for kind in args.weights}
    steps = ["", ", graph" if model.device.type == "cuda" else ", static"][: 1 + args.graph]
    c = model.config
    slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize
    for tokens in args.tokens:
        for batch in args.batch:
            ids = torch.zeros(batch, dtype=torch.long, device=model.device)
            kept = {
                f"ratio {ratio:g}" + f", {kind}" * (kind != "full") + step: (
                    int(tokens * ratio),
                    m,
                    STEPS[step],
                )
                for kind, m in models.items()
                for ratio in args.ratios
                for step in steps
            }
            runs: dict[str, Factory] = {
                name: partial(our_steps, m, [tokens] * batch, [slots] * batch, args.new, step)
                for name, (slots, m, step) in kept.items()
            }
            if rival is not None:
                runs["transformers"] = partial(rival_steps, model, rival, ids, tokens, args.new)
            seconds = interleaved(model.device, args.clock, runs, args.repeats)
            for name, values in seconds.items():
                spent = statistics.median(values) / args.new
                slots, m, _ = kept.get(name, (tokens, model, Step))
                moved = m.step_bytes(batch) + batch * slots * slot
                rows.append({
                    "bench": "decode", "tokens": tokens, "batch": batch, "run": name,
                    "seconds": values, "steps": args.new, "seconds_per_step": spent,
                    "tokens_per_second": batch / spent, "bytes_per_step": moved,
                    "weight_bytes": m.weight_bytes,
                    "packed_bytes": m.held_bytes - model.held_bytes,
                    "read_bandwidth": bandwidth, "bandwidth_share": moved / spent / bandwidth,
                    **ratios(seconds, name),
                })  # fmt: skip
    return rows


def our_steps(model: Model, prompts: list[int], kept: list[int], new: int,
              kind: type[Step] = Step) -> Callable[[], object]:  # fmt: skip
    """Greedy steps after `prompts` tokens a sequence, over caches of `kept` slots each, and two
    before them in which a graph is recorded."""
    step = model.stepper(kind, model.caches(kept, new + 2))
    ends = torch.tensor(prompts, device=model.device)

    def work(first: int = 2, steps: int = new) -> None:
        token = torch.zeros_like(ends)
        for n in range(first, first + steps):
            token = step(token, ends + n).argmax(-1)

    work(0, 2)
    return work


def ragged(tokens: int, batch: int) -> list[int]:
    """Prompt lengths from `tokens` down to about half of it, all different."""
    return [tokens - tokens * b // (2 * batch) for b in range(batch)]


@torch.inference_mode()
def bench_batch(model: Model, args: argparse.Namespace) -> list[Row]:
    """Seconds a step of `--new` greedy steps; all batches and ratios in one interleaved run."""
    bandwidth, rows = read_bandwidth(model.device, args.clock), []
    c = model.config
    slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize
    for tokens in args.tokens:
        cases = {
            f"batch {batch}, ratio {ratio:g}": (ragged(tokens, batch), ratio)
            for ratio in args.ratios
            for batch in args.batch
        }
        runs: dict[str, Factory] = {
            name: partial(our_steps, model, prompts, [int(n * ratio) for n in prompts], args.new)
            for name, (prompts, ratio) in cases.items()
        }
        seconds = interleaved(model.device, args.clock, runs, args.repeats)
        for name, (prompts, ratio) in cases.items():
            batch, step = len(prompts), statistics.median(seconds[name]) / args.new
            base = seconds[f"batch {args.batch[0]}, ratio {ratio:g}"]
            gains = [
                b / s * batch / args.batch[0] for b, s in zip(base, seconds[name], strict=True)
            ]
            moved = model.weight_bytes + slot * sum(int(n * ratio) for n in prompts)
            rows.append({
                "bench": "batch", "tokens": tokens, "batch": batch, "run": f"ratio {ratio:g}",
                "prompts": prompts, "seconds": seconds[name], "steps": args.new,
                "seconds_per_step": step, "tokens_per_second": batch / step,
                "bytes_per_step": moved, "read_bandwidth": bandwidth,
                "bandwidth_share": moved / step / bandwidth,
                "gain": {f"batch {args.batch[0]}": spread(gains) + "x"},
            })  # fmt: skip
    return rows
