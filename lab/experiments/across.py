"""zipvl and zipvl-stream over tau on several text decoders: kept share by layer, work and loss.

    python -m lab.experiments across -m FOLDER,FOLDER --samples 16

docs/architectures.md has the answer. Prompts are a film of text and a question (text.records), as
in text_methods; `always=last` is the paper's letter, in which the question may be left out, too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zipvl.errors import UsageError

from . import draw, methods
from .runner import Job, Record
from .text import TAIL, records

TAUS = {"zipvl": (0.9, 0.95, 0.975, 0.99, 0.995), "zipvl-stream": (0.5, 0.7, 0.8, 0.9)}
SHOWN = {"zipvl": "0.975", "zipvl-stream": "0.7"}  # tau of the curves over layers
METHODS = (
    *(f"{name}:tau={t}" for name, taus in TAUS.items() for t in taus),
    "zipvl:tau=0.975,always=last",
)
COLUMNS = {
    "model": "decoder", "method": "method", "windows": "windows", "kept": "kept share",
    "least": "least of a layer", "most": "most of a layer", "prefill": "prefill work",
    "cache": "cache bytes", "extra": "extra loss, nats (95 %)",
}  # fmt: skip


def run(job: Job) -> None:
    """`job.model` is one decoder or several, comma between; each has its records in OUT/NAME."""
    folders = [Path(part) for part in (job.model or "").split(",") if part]
    if len({folder.name for folder in folders}) < max(1, len(folders)):
        raise UsageError("across: give decoders of different names: -m FOLDER,FOLDER")
    rows: list[Record] = []
    for folder in folders:
        one = replace(job, model=str(folder), out=job.out / folder.name, loaded=[])
        found = records(one, ["dense", *(job.methods or METHODS)], methods.QUESTION)
        rows += [{"model": folder.name} | row for row in measures(found)]
    job = replace(one, out=job.out, model=",".join(f.name for f in folders))
    job.finish(rows, COLUMNS)
    figure(job, rows)


def measures(found: list[Record]) -> list[Record]:
    """methods.loss_table's rows of one decoder, shares by layer cut to three digits."""
    rows = methods.loss_table(found)
    for row in rows:
        share = row.pop("kept_per_layer")
        row |= {"least": min(share), "most": max(share), "spread": spread(found, row["method"]),
                "layers": [round(x, 3) for x in share]}  # fmt: skip
    return rows


def spread(found: list[Record], method: str) -> list[float]:
    """Smallest and largest mean kept share of a window."""
    shares = [float(np.mean(r["ratios"])) for r in found if r["method"] == method]
    return [round(min(shares), 3), round(max(shares), 3)]


def name(method: str) -> str | None:
    """Which sweep a method belongs to; None: it is no point of one."""
    kind, _, options = method.partition(":")
    return kind if kind in TAUS and options.startswith("tau=") and "," not in options else None


def figure(job: Job, rows: list[Record]) -> None:
    """Kept share by depth, then loss against the work of the whole prefill."""
    with draw.panels(1, 2, 5.2, 3.6) as (fig, (left, right)):
        for i, model in enumerate(dict.fromkeys(r["model"] for r in rows)):
            mine = [r for r in rows if r["model"] == model]
            for kind, style in zip(TAUS, ("-", "--"), strict=True):
                some = [r for r in mine if name(r["method"]) == kind]
                label: Any = {"color": f"C{i}", "ls": style, "label": f"{model}, {kind}"}
                for row in some:
                    if row["method"].endswith(f"tau={SHOWN[kind]}"):
                        depth = (np.arange(len(row["layers"])) + 0.5) / len(row["layers"])
                        left.plot(100 * depth, [100 * x for x in row["layers"]], **label)
                draw.curve(right, [100 * r["prefill"] for r in some], [r["extra"] for r in some],
                           **label)  # fmt: skip
        shown = ", ".join(f"{kind} at tau {t}" for kind, t in SHOWN.items())
        left.set(xlabel="depth of the layer, % of all", ylabel="tokens in attention, %",
                 ylim=(0, 102), title=shown)  # fmt: skip
        right.set(xlabel="work of the whole prefill, % of dense",
                  ylabel="extra loss, nats a token (95 %)", title="all tau")  # fmt: skip
        right.axhline(0, color="black", lw=0.8)
        right.legend()
        fig.suptitle(f"{rows[0]['windows']} windows of {job.tokens[0]} tokens of prompt, "
                     f"loss on the {TAIL} after it")  # fmt: skip
        fig.savefig(job.out / "figure.png")
