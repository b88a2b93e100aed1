"""The training logs of all seeds as one figure and one short log, for lab/results/demo.

    python -m lab.demo.curve [--cache build/demo] [--out lab/results/demo]

The short log has every 100th step, all tests and the released weights' hash, a line each.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import palette
from ..command import Parser, ended
from ..experiments import draw
from .train import TESTS

EVERY, LOGGED = 50, 100  # steps: of the figure's means, of the short log


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def short(stage: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of a log is worth keeping."""
    kept = [r for r in records if "released" in r or r["step"] % LOGGED == 0]
    return [{"stage": stage} | r for r in kept]


def figure(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Losses, each point the mean of EVERY steps, and tests of the decoder."""
    with draw.panels(1, 2, 6.2, 3.7) as (fig, (losses, right)):
        for i, (name, log) in enumerate(logs.items()):
            steps = [r for r in log if "step" in r]
            at = np.arange(EVERY, len(steps) + 1, EVERY)
            for what, style in (("loss", "-"), ("memory", "--"), ("lookup", ":")):
                mean = [np.mean([r[what] for r in steps[n - EVERY : n]]) for n in at]
                losses.plot(at, mean, style, color=f"C{i}", label=f"{name}, {what}")
            for (frames, _), mark in zip(TESTS, "os^v", strict=True):
                key = f"{frames} frames"
                tested = [(r["step"], 100 * r[key]["all"]) for r in steps if key in r]
                right.plot(*zip(*tested, strict=True), "-" + mark, color=f"C{i}", ms=4,
                           label=f"{name}, {key}")  # fmt: skip
        losses.set(xlabel="step", ylabel="loss", yscale="log")
        right.set(xlabel="step", ylabel="exact answers, mean of the kinds, %", ylim=(0, 102))
        for axes in (losses, right):
            axes.legend(fontsize=7)
        fig.suptitle("The demo model's decoder in training")
        fig.savefig(path)
    palette.shrink(path)


def work(argv: list[str] | None) -> None:
    parser: argparse.ArgumentParser = Parser(__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("lab/results/demo"))
    a = parser.parse_args(argv)
    logs = {p.parent.name: lines(p) for p in sorted(a.cache.glob("seed-*/decoder.jsonl"))}
    kept = short("tower", lines(a.cache / "tower.jsonl"))
    for name, log in logs.items():
        kept += short(name, log)
    text = "".join(json.dumps(record) + "\n" for record in kept)
    (a.out / "training.jsonl").write_text(text, encoding="utf-8")
    figure(logs, a.out / "training.png")


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
