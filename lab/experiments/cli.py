"""The paper's experiments; docs/experiments.md says what each asks and what came out, and
docs/methods.md what the rivals did.

    python -m lab.experiments NAME [--model PATH] [--out DIR] [--samples N]

Writes records.jsonl (a second run continues there), result.json, table.md and figure.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from zipvl.cli import split_methods

from ..command import Parser, count, counts, ended, seed
from . import across, fixed, methods, niah, probes, rivals, stale, stays, summary, tau, turns
from .runner import Job, policy

Run = Callable[[Job], None]
EXPERIMENTS: dict[str, tuple[Run, str]] = {
    "tau": (tau.run, "accuracy and kept share against tau"),
    "fixed": (fixed.run, "a fixed ratio against the adaptive one"),
    "layers": (stays.run_layers, "kept tokens by layer and question; correlation with difficulty"),
    "methods": (methods.run, "every method: accuracy against prefill work and cache bytes"),
    "rivals": (rivals.run, "the whole catalogue at three budgets: lists and counts"),
    "text_rivals": (rivals.run_text, "the same on a text decoder: loss of 256 decoded tokens"),
    "stale": (stale.run, "text: tokens that are gone against tokens that stay without an update"),
    "summary": (summary.run, "means of what a cache evicts: divergence against bytes"),
    "text_summary": (summary.run_text, "the same on a text decoder: loss against bytes"),
    "text_methods": (methods.run_text, "every method: loss of a text decoder against the same"),
    "always": (stays.run_always, "tokens that always stay; dropped queries or dropped keys?"),
    "fill": (
        stays.run_fill,
        "what left-out visual tokens receive, and other cheap changes",
    ),
    "probes": (probes.run, "which probe rows find what all rows find, and what they answer"),
    "niah": (niah.run, "one frame in a long video, against length"),
    "turns": (turns.run, "what a session may reuse: the 1st, 2nd and 5th question about a clip"),
    "text_probes": (probes.run_text, "probe rows on a text decoder, against length"),
    "text_fixed": (fixed.run_text, "a fixed ratio against the adaptive one on a text decoder"),
    "text_tau": (tau.run_text, "loss of a text decoder against tau and attention work"),
    "across": (across.run, "text decoders, -m A,B: kept share by layer, work and loss against tau"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<12} {what}" for name, (_, what) in EXPERIMENTS.items())
    parser = Parser(__doc__, "python -m lab.experiments", f"experiments:\n{listed}")
    add = parser.add_argument
    add("name", choices=EXPERIMENTS, metavar="NAME")
    add("-m", "--model", help="folder or hub id (default: the bundled demo model)")
    add("--out", type=Path, help="folder for the results (default: results/NAME)")
    add("--samples", type=count, default=40, help="questions a frame count, or windows of text")
    add("--seed", type=seed, default=0)
    add("--method", help="methods instead of the experiment's own, comma between")
    add("--frames", type=counts, default="16,64",
        help="frames of a clip, comma between (default: %(default)s)")  # fmt: skip
    add("--tokens", type=counts, default="1024",
        help="prompt of a text window (default: %(default)s)")  # fmt: skip
    add("--device", default="auto")
    return parser.parse_args(argv)


def work(argv: list[str] | None) -> None:
    args = parse(argv)
    named = split_methods(args.method) if args.method else []
    for method in named:
        policy(method)
    out = args.out or Path("results") / args.name
    job = Job(args.name, out, args.model, args.samples, args.seed, tuple(named),
              tuple(args.frames), tuple(args.tokens), args.device)  # fmt: skip
    run, _ = EXPERIMENTS[args.name]
    run(job)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))
