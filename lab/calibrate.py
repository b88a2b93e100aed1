"""A profile for PrefixKV: the share of a prompt that each layer keeps, mean over a few prompts.

    python -m lab.calibrate OUT.json --ratio 0.5 [--model PATH] [--frames 64 --samples 4 --seed 0]
    python generate.py --method prefixkv:ratio=0.5,profile=OUT.json ...

The prompts are clips and questions of the demo world, as in lab.eval; give a seed other than the
one that answers are counted with. Every prompt finds its own budget (zipvl/policies/prefixkv.py).
"""

import argparse
import sys
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from zipvl.engine.load import load
from zipvl.engine.run import Result
from zipvl.policies import load_policy
from zipvl.policies.profile import write_profile

from .command import Parser, count, ended, seed
from .eval.tasks import LARGEST, task_items


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m lab.calibrate")
    add = parser.add_argument
    add("out", type=Path, metavar="OUT.json")
    add("--ratio", type=float, default=0.5, help="share to keep (default: %(default)s)")
    add("-m", "--model", help="folder or hub id (default: the bundled demo model)")
    add("--frames", type=count, default=64, help="frames of a clip (default: %(default)s)")
    add("--samples", type=count, default=4, help="prompts (default: %(default)s)")
    add("--seed", type=seed, default=0)
    add("--device", default="auto")
    return parser.parse_args(argv)


def measured(args: argparse.Namespace) -> list[float]:
    """The share of its tokens that each layer keeps of a prompt, mean over prompts."""
    policy = load_policy("prefixkv", ratio=args.ratio)
    items = task_items("all", args.frames, args.samples, args.seed)
    engine = load(args.model, device=args.device)
    side, found = min(2 * engine.config.vision.media.size, LARGEST), []
    for item in tqdm(items, unit="prompt", disable=not sys.stderr.isatty()):
        video = item.video(side).numpy()
        inputs = engine.prepare(item.question, video=video, frames=item.frames)
        stats = cast(Result, engine.generate(inputs, policy, max_new_tokens=1)).stats
        found.append([layer["cached"] / stats.prompt_tokens for layer in stats.layers])
    return [round(share, 6) for share in np.mean(found, axis=0).tolist()]


def work(argv: list[str] | None) -> None:
    args = parse(argv)
    shares, model = measured(args), Path(args.model).name if args.model else "demo"
    made = {"model": model, "frames": args.frames, "samples": args.samples, "seed": args.seed}
    write_profile(args.out, args.ratio, shares, **made)
    print(f"{args.out}: " + " ".join(f"{share:.3f}" for share in shares))


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
