"""Speed and memory of the decoder, next to transformers on the same weights in the same run.

    python bench.py prefill --tokens 2048,8192 --methods dense,fixed:ratio=0.3 --rival
    python bench.py decode  --tokens 2048,8192 --batch 1,8 --ratios 1,0.3 --rival
    python bench.py projections --tokens 8192 --ratios 1,0.3
    python bench.py linear

Weights are random, in the shape of a real model, so speed is real and answers are not. Every figure
is a median with its minimum and maximum over interleaved repeats; ratios are taken within a repeat,
because machines are noisy. `--out` writes the raw JSON.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from zipvl.benchmark.benches import (
    bench_decode,
    bench_linear,
    bench_prefill,
    bench_projections,
)
from zipvl.benchmark.model import DTYPES, SHAPES, Model
from zipvl.benchmark.timing import CLOCKS, machine, spread
from zipvl.engine.stats import peak_memory

BENCHES = {
    "prefill": bench_prefill,
    "decode": bench_decode,
    "projections": bench_projections,
    "linear": bench_linear,
}


def numbers(kind: type) -> Callable[[str], list]:
    return lambda text: [kind(item) for item in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=numbers(int), default=[2048])
    parser.add_argument("--batch", type=numbers(int), default=[1])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["dense"])
    parser.add_argument("--ratios", type=numbers(float), default=[1.0])
    parser.add_argument("--new", type=int, default=8, help="decode steps a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rival", action="store_true", help="transformers in the same run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--attn", default="auto")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: process time by thread, for shared CPUs",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    model = Model(args.shape, args.device, DTYPES[args.dtype], args.attn, args.layers)
    rows = BENCHES[args.bench](model, args)
    for row in rows:
        print(line(row))
    report = {"machine": machine(args), "shape": args.shape, "layers": model.config.num_layers,
              "dtype": args.dtype, "attention": model.backend, "rows": rows,
              "peak_memory": peak_memory(model.device)}  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def line(row: dict) -> str:
    """One row of the table on stdout."""
    size = (
        f"{row['tokens']:>7} tokens x {row['batch']}"
        if "tokens" in row
        else f"{row['rows']:>4} rows"
    )
    parts = [f"{row['bench']} {size}", f"{row['run']:<24}", f"{spread(row['seconds'])} s"]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:.1f} tokens/s")
    if "bandwidth_share" in row:
        speed = row["bandwidth_share"] * row["read_bandwidth"] / 1e9
        parts.append(f"{speed:.1f} GB/s = {row['bandwidth_share']:.0%} of read bandwidth")
    if "ratio" in row:
        probe = row["share"].get("probe", 0) + row["share"].get("select", 0)
        parts.append(f"ratio {row['ratio']:.2f}, work {row['work']:.3f}, probe+select {probe:.1%}")
    parts += [f"{value} faster than {base}" for base, value in row["faster_than"].items()]
    return " | ".join(parts)


if __name__ == "__main__":
    main()
