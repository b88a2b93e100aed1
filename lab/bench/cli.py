"""Speed and memory of the decoder, next to transformers on the same weights in the same run.

    python bench.py prefill --tokens 2048,8192 --methods dense,fixed:ratio=0.3 --rival
    python bench.py decode  --tokens 2048,8192 --batch 1,8 --ratios 1,0.3 --rival
    python bench.py decode  --tokens 2048 --batch 1,2 --weights full,packed,int8,int4
    python bench.py projections --tokens 8192 --ratios 1,0.3
    python bench.py linear
    python bench.py methods --tokens 2048,8192 --layers 4
    python bench.py batch   --tokens 2048 --batch 1,2,4,8 --ratios 1,0.3
    python bench.py memory  --tokens 2048,8192 --methods dense,fixed:ratio=0.3
    python bench.py e2e     --frames 8,32 --methods dense,zipvl [--model PATH] [--video FILE]
    python bench.py frames  --frames 64,512 [--model PATH] [--video FILE]
    python bench.py sessions --frames 1024 --methods dense,zipvl [--model PATH] [--video FILE]

Weights are random, in the shape of a real model, so speed is real and answers are not. Every figure
is a median with its minimum and maximum over interleaved repeats; ratios are taken within a repeat,
because machines are noisy. `--out` writes the raw JSON, `--plot` draws it.
"""

import argparse
from pathlib import Path

from zipvl.cli import split_methods
from zipvl.engine.load import pick_device
from zipvl.engine.speed import check_kind
from zipvl.engine.stats import peak_memory
from zipvl.policies import load_policy

from ..command import Parser, count, counts, ended, shares
from ..raw import write_json
from .benches import bench_batch, bench_decode, bench_prefill
from .e2e import bench_e2e
from .frames import bench_frames
from .memory import bench_memory
from .methods import bench_methods
from .model import DTYPES, SHAPES, Model
from .plot import draw
from .projections import bench_linear, bench_projections
from .sessions import bench_sessions, shown
from .timing import CLOCKS, machine, spread

BENCHES = {
    "prefill": bench_prefill,
    "decode": bench_decode,
    "projections": bench_projections,
    "linear": bench_linear,
    "batch": bench_batch,
    "methods": bench_methods,
}
ALONE = {
    "memory": bench_memory,
    "e2e": bench_e2e,
    "frames": bench_frames,
    "sessions": bench_sessions,
}  # these make the models they need


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "bench.py")
    add = parser.add_argument
    add("bench", choices=[*BENCHES, *ALONE])
    add("--shape", choices=SHAPES, default="qwen2-0.5b")
    add("--layers", type=count, help="fewer layers than the shape has")
    add("--tokens", type=counts, default=[2048])
    add("--batch", type=counts, default=[1])
    add("--methods", type=split_methods, default=["dense"])
    add("--ratios", type=shares, default=[1.0])
    add("--frames", type=counts, default=[8], help="of the video (e2e, frames)")
    add("--video", type=Path, help="e2e: a file; default the bundled clip")
    add("--model", help="e2e: a checkpoint instead of a random model")
    add("--weights", type=lambda text: text.split(","), default=["full"],
        help="decode: full, packed, int8, int4; these beside the others in one run")  # fmt: skip
    add("--graph", action="store_true",
        help="decode: a CUDA graph (on a CPU its step) beside ordinary steps")  # fmt: skip
    add("--new", type=count, default=8, help="decode steps a run")
    add("--repeats", type=count, default=3)
    add("--rival", action="store_true", help="transformers in the same run")
    add("--device", default="cpu")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--attn", default="auto")
    add("--clock", choices=CLOCKS, default="wall",
        help="cpu: process time by thread, for shared CPUs")  # fmt: skip
    add("--out", type=Path, help="where the JSON goes")
    add("--plot", type=Path, metavar="DIR", help="where PNGs go (matplotlib)")
    return parser.parse_args(argv)


def work(argv: list[str] | None) -> None:
    args = parse(argv)
    device = pick_device(args.device)  # mistakes should not cost the minutes before them
    for method in args.methods:
        load_policy(method)
    for kind in args.weights:
        check_kind(kind, device, DTYPES[args.dtype])
    report = measure(args)
    for row in report["rows"]:
        print(line(row))
    if args.out:
        write_json(args.out, report)
    if args.plot:
        draw([report], args.plot)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


def measure(args: argparse.Namespace) -> dict:
    """The benchmark's rows, and what they were measured on."""
    about = {"machine": machine(args), "shape": args.shape, "dtype": args.dtype}
    if args.bench in ALONE:
        rows = ALONE[args.bench](args)
        return about | {"layers": args.layers, "model": args.model, "rows": rows}
    model = Model(args.shape, args.device, DTYPES[args.dtype], args.attn, args.layers)
    rows = BENCHES[args.bench](model, args)
    return about | {"layers": model.config.num_layers, "attention": model.backend, "rows": rows,
                    "peak_memory": peak_memory(model.device)}  # fmt: skip


def line(row: dict) -> str:
    """One row of the table on stdout."""
    size = (
        f"{row['tokens']:>7} tokens x {row['batch']}"
        if "tokens" in row
        else f"{row['rows']:>4} rows"
    )
    parts = [f"{row['bench']} {size}", f"{row['run']:<24}"]
    if "seconds" in row:
        parts.append(f"{spread(row['seconds'])} s")
    if "stages" in row:
        parts += [f"{stage} {value:.3f}" for stage, value in row["stages"].items()]
        parts.append(f"sum {row['covered']:.1%} of all")
        parts.append(f"first token {spread(row['first_token'])} s")
    if "crops" in row:
        names = ("read", "encode", "crops", "features", "file_pixels")
        parts += [f"{name} {row[name] / 1e6:.0f} MB" for name in names]
    if "formula" in row:
        sizes = [f"{name} {value / 1e6:.0f}" for name, value in row["formula"].items()]
        parts.append(", ".join(sizes) + " MB")
    if "measured" in row:
        parts.append(
            f"measured {row['measured'] / 1e6:.0f} MB = {row['over_formula']:.2f} x formula"
        )
        parts.append(f"tensors {row['allocated'] / 1e6:.0f} MB")
    if "card" in row:
        parts.append(f"{row['share_of_card']:.0%} of {row['card'] / 1e9:.0f} GB")
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:.1f} tokens/s")
    if "bandwidth_share" in row:
        speed = row["bandwidth_share"] * row["read_bandwidth"] / 1e9
        parts.append(f"{speed:.1f} GB/s = {row['bandwidth_share']:.0%} of read bandwidth")
    if row.get("packed_bytes"):
        parts.append(f"packs {row['packed_bytes'] / 1e6:.0f} MB more")
    if "share" in row:
        probe = row["share"].get("probe", 0) + row["share"].get("select", 0)
        parts.append(f"ratio {row['ratio']:.2f}, work {row['work']:.3f}, probe+select {probe:.1%}")
    if "peak_share" in row:
        peak = row["peak_flops"] / 1e9
        parts.append(f"{row['peak_share']:.0%} of {peak:.0f} GFLOP/s, the peak of products")
    if "free_attention" in row:
        parts.append(f"dense would be {row['free_attention']:.2f}x faster were attention free")
    if "times_dense" in row:
        parts += [
            f"{part} {spread([s * 1e3 / row['steps'] for s in row[part]])} ms"
            for part in ("attention", "decide", "leave")
        ]
        parts += [f"{part} {value} dense" for part, value in row["times_dense"].items()]
    parts += shown(row) if "questions" in row else []
    parts += [f"{value} of {base}'s throughput" for base, value in row.get("gain", {}).items()]
    parts += [f"{value} as fast as {base}" for base, value in row.get("faster_than", {}).items()]
    return " | ".join(parts)
