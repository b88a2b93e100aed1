"""Accuracy of methods, with what each keeps and stores.

    python -m lab.eval --method dense,zipvl:tau=0.975,fixed:ratio=0.4 --frames 16,64 --out DIR

Clips and questions come from the demo world (lab/demo), generated here and the same for every
method; `--task niah` hides one frame in a long video instead. Any loadable model can be measured,
the demo model is the default. DIR/answers.jsonl is written as answers are made: the same command
after an interruption, or one with more methods, samples or frames, asks only what is missing.
"""

import argparse
import re
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from zipvl.cli import split_methods
from zipvl.engine.inputs import Inputs
from zipvl.engine.load import load
from zipvl.engine.run import Result
from zipvl.policies import load_policy

from ..command import Parser, count, counts, ended, seed
from ..raw import rounded, write_json
from ..records import Record, measured
from .report import Answer, heat_map, markdown, table
from .tasks import LARGEST, Item, same_answer, task_items

SETTINGS = ("model", "task", "seed", "max_new_tokens", "suffix", "device", "dtype")  # of answers
FIELDS = [field.name for field in fields(Answer)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m lab.eval")
    add = parser.add_argument
    add("-m", "--model", help="folder or hub id (default: the bundled demo model)")
    add("--method", default="dense,zipvl:tau=0.975", help="methods with options, comma between")
    add("--task", default="all", help="all, niah, or one kind of question (default: %(default)s)")
    add("--frames", type=counts, default="16,64",
        help="frames of a clip, comma between (default: %(default)s)")  # fmt: skip
    add("--samples", type=count, default=200, help="questions a frame count (default: %(default)s)")
    add("--seed", type=seed, default=0)
    add("--max-new-tokens", type=count, default=32)
    add("--suffix", default="", help="text after every question, such as ' Answer in two words.'")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--out", type=Path, help="folder for results.json, answers.jsonl, table.md and heat maps")
    return parser.parse_args(argv)


def answers(args: argparse.Namespace, methods: list[str], path: Path) -> list[Answer]:
    """Every method's answer to every item, kept in `path`; a clip is rendered and encoded once."""
    items = {
        f"{n}/{number}": item
        for n in args.frames
        for number, item in enumerate(task_items(args.task, n, args.samples, args.seed))
    }
    settings = {key: getattr(args, key) for key in SETTINGS}
    engine = load(args.model, device=args.device, dtype=args.dtype)
    side = min(2 * engine.config.vision.media.size, LARGEST)

    def prepare(units: list[str]) -> tuple[Item, Inputs]:
        item = items[units[0]]
        video = item.video(side).numpy()
        inputs = engine.prepare(item.question + args.suffix, video=video, frames=item.frames)
        engine.encode(inputs)
        return item, inputs

    def measure(ready: tuple[Item, Inputs], method: str) -> list[Record]:
        item, inputs = ready
        out = cast(Result, engine.generate(inputs, method, max_new_tokens=args.max_new_tokens))
        return [{
            "frames": item.frames, "group": item.group, "question": item.question,
            "right": item.answer, "given": out.text, "ok": same_answer(out.text, item.answer),
            "chance": item.chance, "prompt_tokens": out.stats.prompt_tokens,
            "ratios": [round(layer["ratio"], 4) for layer in out.stats.layers],
            "kv_bytes": out.stats.kv_bytes, "prefill_seconds": out.stats.seconds["prefill"],
            "decode_seconds": out.stats.seconds["decode"],
        }]  # fmt: skip

    found = measured(path, settings, items, methods, prepare, measure)
    return [Answer(**{key: r[key] for key in FIELDS}) for r in found]


def work(argv: list[str] | None) -> None:
    args = parse(argv)
    methods = split_methods(args.method)
    for method in methods:
        load_policy(method)  # a typing mistake should not cost the minutes before it
    with TemporaryDirectory() as scratch:
        found = answers(args, methods, (args.out or Path(scratch)) / "answers.jsonl")
    rows = table(found)
    print(markdown(rows), end="")
    if args.out:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        write_json(args.out / "results.json", rounded({"options": options, "rows": rows}))
        (args.out / "table.md").write_text(markdown(rows), "utf-8")
        if args.task == "niah":
            for method in methods:
                heat_map(rows, method, args.out / f"niah-{file_name(method)}.png")


def file_name(method: str) -> str:
    """`zipvl:tau=0.975` -> `zipvl_tau=0.975`: what every file system takes."""
    return re.sub(r"[^\w.=+-]+", "_", method)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))
