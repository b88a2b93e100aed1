"""The paper's experiments; docs/experiments.md says what each asks and what came out.

    python -m zipvl.experiments NAME [--model PATH] [--out DIR] [--samples N]

Writes records.jsonl (a second run continues there), result.json, table.md and figure.png.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from ..errors import UsageError, ZipvlError
from ..eval import split_methods
from .job import Job, policy

NAMES = {
    "text_tau": "loss of a text decoder against tau and attention work; what left-out tokens get",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<12} {what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m zipvl.experiments",
        description=__doc__,
        epilog=f"experiments:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", choices=NAMES, metavar="NAME")
    add("-m", "--model", help="folder or hub id (default: the bundled demo model)")
    add("--out", type=Path, help="folder for the results (default: results/NAME)")
    add("--samples", type=int, default=40, help="questions a frame count, or windows of text")
    add("--seed", type=int, default=0)
    add("--method", help="methods instead of the experiment's own, comma between")
    add("--frames", default="16,64", help="frames of a clip, comma between (default: %(default)s)")
    add("--tokens", type=int, default=1024, help="prompt of a text window (default: %(default)s)")
    add("--device", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        methods = split_methods(args.method) if args.method else []
        for method in methods:
            policy(method)
        try:
            frames = tuple(int(n) for n in args.frames.split(","))
        except ValueError:
            raise UsageError(f"--frames {args.frames!r}: give whole numbers, as in 16,64") from None
        if min(args.samples, args.tokens, *frames) < 1:
            raise UsageError("--samples, --tokens and --frames must be 1 or more")
        out = args.out or Path("results") / args.name
        job = Job(args.name, out, args.model, args.samples, args.seed, tuple(methods), frames,
                  args.tokens, args.device)  # fmt: skip
        import_module(f".{args.name}", __package__).run(job)
    except ZipvlError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
