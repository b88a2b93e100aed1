"""Finished `text_tau` runs of several models in one figure.

    python -m lab.experiments.text_compare RUN RUN [...] OUT

Each RUN is a folder with the result.json of text_tau. Writes OUT/figure.png.
"""

import json
import sys
from pathlib import Path
from typing import Any

from zipvl.errors import UsageError

from ..command import ended
from . import draw
from .runner import Record
from .tau import FILLS, family, tau
from .text import TAIL

SHOWN = ("0.9", "0.975")  # tau of the curves over layers


def results(folder: Path) -> Record:
    """The result.json of a text_tau run. Raises UsageError."""
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if found["settings"]["experiment"] == "text_tau":
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{folder} holds no result.json of text_tau: run that first")


def layers(axes: Any, runs: list[Record]) -> None:
    """Kept share by relative depth, so that models of any number of layers share the axis."""
    for i, run in enumerate(runs):
        for row in run["rows"]:
            if family(row["method"]) == "zipvl" and tau(row["method"]) in SHOWN:
                kept = [100 * r for r in row["kept_per_layer"]]
                depth = [100 * (n + 0.5) / len(kept) for n in range(len(kept))]
                label = f"{run['settings']['model']}, tau {tau(row['method'])}"
                style = "-" if tau(row["method"]) == SHOWN[-1] else "--"
                axes.plot(depth, kept, style, color=f"C{i}", marker=".", label=label)
    axes.set(xlabel="depth of the layer, % of all layers", ylabel="tokens kept, %",
             ylim=(0, 102), title="zipvl, mean over windows")  # fmt: skip
    axes.legend()


def losses(axes: Any, runs: list[Record]) -> None:
    for i, run in enumerate(runs):
        for name in ("zipvl", "zipvl+"):
            some = [r for r in run["rows"] if family(r["method"]) == name]
            draw.curve(axes, [100 * r["work"] for r in some], [r["extra"] for r in some],
                       f"{run['settings']['model']}, {FILLS[name]}", color=f"C{i}",
                       ls="-" if name == "zipvl" else "--")  # fmt: skip
    axes.set(xlabel="attention work, % of dense", ylabel="extra loss, nats a token (95 %)",
             title="tau 0.9, 0.95, 0.975, 0.99")  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.legend()


def work(argv: list[str]) -> None:
    *folders, out = map(Path, argv) if argv else [Path()]
    if not folders:
        raise UsageError("give folders of text_tau runs, then one for the figure")
    runs = [results(f) for f in folders]
    out.mkdir(parents=True, exist_ok=True)
    with draw.panels(1, 2, 5.6, 4.2) as (fig, (left, right)):
        layers(left, runs)
        losses(right, runs)
        windows = {r["settings"]["model"]: r["settings"]["samples"] for r in runs}
        fig.suptitle("windows of text: " + ", ".join(f"{n} ({m})" for m, n in windows.items())
                     + f"; loss on the {TAIL} tokens after the prompt")  # fmt: skip
        fig.savefig(out / "figure.png")


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
