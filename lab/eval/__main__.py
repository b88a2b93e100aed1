"""Accuracy of methods, with what each keeps and stores.

    python -m lab.eval --method dense,zipvl:tau=0.975,fixed:ratio=0.4 --frames 16,64 --out DIR

Clips and questions come from the demo world (lab/demo), generated here and the same for every
method; `--task niah` hides one frame in a long video instead. Any loadable model can be measured,
the demo model is the default.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from tqdm import tqdm

from zipvl.engine.engine import Engine, Result
from zipvl.engine.load import load
from zipvl.errors import UsageError, ZipvlError
from zipvl.policies import load_policy

from ..raw import rounded, write_json
from .report import Answer, heat_map, markdown, table
from .tasks import LARGEST, Item, same_answer, split_methods, task_items


def measure(engine: Engine, items: list[Item], methods: list[str], tokens: int,
            suffix: str) -> Iterator[Answer]:  # fmt: skip
    """Every method's answer to every item; a clip is rendered and encoded once."""
    side = min(2 * engine.config.media.size, LARGEST)
    for item in tqdm(items, desc=f"{items[0].frames} frames", disable=not sys.stderr.isatty()):
        video = item.video(side).numpy()
        inputs = engine.prepare(item.question + suffix, video=video, frames=item.frames)
        engine.encode(inputs)
        for method in methods:
            out = cast(Result, engine.generate(inputs, method, max_new_tokens=tokens))
            yield Answer(
                method=method,
                frames=item.frames,
                group=item.group,
                question=item.question,
                right=item.answer,
                given=out.text,
                ok=same_answer(out.text, item.answer),
                chance=item.chance,
                prompt_tokens=out.stats.prompt_tokens,
                ratios=[round(layer["ratio"], 4) for layer in out.stats.layers],
                kv_bytes=out.stats.kv_bytes,
                prefill_seconds=out.stats.seconds["prefill"],
                decode_seconds=out.stats.seconds["decode"],
            )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", help="folder or hub id (default: the bundled demo model)")
    add("--method", default="dense,zipvl:tau=0.975", help="methods with options, comma between")
    add("--task", default="all", help="all, niah, or one kind of question (default: %(default)s)")
    add("--frames", default="16,64", help="frames of a clip, comma between (default: %(default)s)")
    add("--samples", type=int, default=200, help="questions a frame count (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--max-new-tokens", type=int, default=32)
    add("--suffix", default="", help="text after every question, such as ' Answer in two words.'")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--out", type=Path, help="folder for results.json, answers.jsonl, table.md and heat maps")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    methods = split_methods(args.method)
    for method in methods:
        load_policy(method)  # a typing mistake should not cost the minutes before it
    try:
        lengths = [int(n) for n in args.frames.split(",")]
    except ValueError:
        raise UsageError(f"--frames {args.frames!r}: give whole numbers, as in 16,64") from None
    if min(lengths) < 1 or args.samples < 1:
        raise UsageError("--frames and --samples must be 1 or more")
    work = [task_items(args.task, n, args.samples, args.seed) for n in lengths]
    engine = load(args.model, device=args.device, dtype=args.dtype)
    answers = [
        answer
        for items in work
        for answer in measure(engine, items, methods, args.max_new_tokens, args.suffix)
    ]
    rows = table(answers)
    print(markdown(rows), end="")
    if args.out:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        write_json(args.out / "results.json", rounded({"options": options, "rows": rows}))
        each = "".join(json.dumps(asdict(a)) + "\n" for a in answers)
        (args.out / "answers.jsonl").write_text(each, "utf-8")
        (args.out / "table.md").write_text(markdown(rows), "utf-8")
        if args.task == "niah":
            for n, method in enumerate(methods):
                heat_map(rows, method, args.out / f"niah-{n}.png")


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except ZipvlError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
