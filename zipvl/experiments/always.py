"""Item 8: which tokens must stay. Do the dropped queries cost accuracy, or the dropped keys?

With `fill=own` every token still looks at the kept keys, so what is lost then is lost by keys.
"""

import numpy as np

from . import clips, draw
from .job import Job

ALWAYS, FILLS, TAUS = ("text", "last", "none"), ("zero", "own", "previous"), (0.8, 0.975)
NAMES = {"zero": "nothing (paper)", "own": "own query, kept keys", "previous": "earlier output"}


def run(job: Job) -> None:
    named = {(t, a, f): f"zipvl:always={a},fill={f},tau={t}"
             for t in TAUS for a in ALWAYS for f in FILLS}  # fmt: skip
    found = clips.records(job, list(named.values()))
    table, kinds = clips.rows(found), clips.rows(found, "kind")
    job.finish(table, clips.COLUMNS, by_kind=kinds)
    last = job.frames[-1]
    whole = {r["method"]: r["accuracy"] for r in table if r["frames"] == last}
    cells = {(r["method"], r["kind"]): r["accuracy"]["value"] for r in kinds if r["frames"] == last}
    names = list(dict.fromkeys(r["kind"] for r in kinds))
    with draw.panels(1, 2, 5.6) as (fig, (left, right)):
        for i, fill in enumerate(FILLS):
            bars = [whole[named[TAUS[-1], a, fill]] for a in ALWAYS]
            values, spread = draw.spread(bars, 100)
            left.bar(np.arange(len(ALWAYS)) + 0.27 * (i - 1), values, 0.25, yerr=spread,
                     capsize=2, label=f"left out: {NAMES[fill]}")  # fmt: skip
        left.axhline(100 * whole["dense"]["value"], color="black", lw=1, ls="--")
        left.set_xticks(range(len(ALWAYS)), [f"always={a}" for a in ALWAYS])
        left.set(ylabel=f"exact answers, % (95 %), {last} frames, tau {TAUS[-1]}", ylim=(0, 118))
        left.legend(loc="upper center", ncols=2)
        shown = [("dense", "dense")] + [
            (f"{a}, {f}", named[TAUS[-1], a, f]) for a in ALWAYS for f in ("zero", "own")
        ]
        grid = [[100 * cells[m, k] for k in names] for _, m in shown]
        draw.heat(right, grid, [label for label, _ in shown], names,
                  f"exact answers, %, by kind, tau {TAUS[-1]}")  # fmt: skip
        fig.suptitle(clips.title(job, "always kept"))
        fig.savefig(job.out / "figure.png")
