"""Decoding in batches whose prompts differ in length: tokens a second against the batch."""

import argparse
import statistics
from functools import partial

import torch

from .benches import our_steps
from .model import Model
from .timing import Factory, Row, interleaved, read_bandwidth, spread


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
