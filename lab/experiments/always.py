"""Item 8: which tokens must stay. Do the dropped queries cost accuracy, or the dropped keys?

With `fill=own` every token still looks at the kept keys, so what is lost then is lost by keys.
"""

from typing import Any

import numpy as np

from . import clips, draw
from .job import Job, Record

ALWAYS, FILLS, TAUS = ("text", "last", "none"), ("zero", "own", "previous"), (0.8, 0.975)
SHOWN = TAUS[-1]
NAMES = {"zero": "nothing (paper)", "own": "own query, kept keys", "previous": "earlier output"}


def run(job: Job) -> None:
    named = {(t, a, f): f"zipvl:always={a},fill={f},tau={t}"
             for t in TAUS for a in ALWAYS for f in FILLS}  # fmt: skip
    found = clips.records(job, list(named.values()))
    table, kinds = clips.rows(found), clips.rows(found, "kind")
    contrasts = [c for n in (job.frames if len(job.frames) > 1 else ()) for c in
                 compared([r for r in found if r["frames"] == n], named, n)]  # fmt: skip
    contrasts += compared(found, named, "all")
    job.finish(table, clips.COLUMNS, by_kind=kinds, contrasts=contrasts)
    with draw.panels(1, len(job.frames) + 1, 5) as (fig, (*bars, heat)):
        for axes, n in zip(bars, job.frames, strict=True):
            whole = {r["method"]: r["accuracy"] for r in table if r["frames"] == n}
            for i, fill in enumerate(FILLS):
                values, spread = draw.spread([whole[named[SHOWN, a, fill]] for a in ALWAYS], 100)
                axes.bar(np.arange(len(ALWAYS)) + 0.27 * (i - 1), values, 0.25, yerr=spread,
                         capsize=2, label=f"left out: {NAMES[fill]}")  # fmt: skip
            axes.axhline(100 * whole["dense"]["value"], color="black", lw=1, ls="--", label="dense")
            axes.set_xticks(range(len(ALWAYS)), [f"always={a}" for a in ALWAYS])
            axes.set(ylabel="exact answers, % (95 %)", ylim=(0, 128), yticks=range(0, 101, 20),
                     title=f"{n} frames, tau {SHOWN}")  # fmt: skip
            axes.legend(loc="upper center", ncols=2)
        by_kind(heat, [r for r in kinds if r["frames"] == job.frames[-1]], named)
        fig.suptitle(clips.title(job, "which tokens always stay"))
        fig.savefig(job.out / "figure.png")


def compared(found: list[Record], named: dict[tuple[float, str, str], str],
             frames: int | str) -> list[Record]:  # fmt: skip
    """What more text, own queries and earlier outputs change, question by question."""
    pairs = ((("text", "zero"), ("last", "zero")), (("text", "own"), ("text", "zero")),
             (("text", "previous"), ("text", "zero")), (("none", "own"), ("text", "own")),
             (("none", "previous"), ("none", "zero")))  # fmt: skip
    out = []
    for t in TAUS:
        chosen = [(named[t, *a], named[t, *b]) for a, b in pairs]
        for a, b in [*chosen, (named[t, "none", "own"], "dense")]:
            change = clips.difference(found, a, b)
            out.append({"frames": frames, "method": a, "against": b, "change": change})
    return out


def by_kind(axes: Any, some: list[Record], named: dict[tuple[float, str, str], str]) -> None:
    cells = {(r["method"], r["kind"]): r["accuracy"]["value"] for r in some}
    names = list(dict.fromkeys(r["kind"] for r in some))
    shown = {f"{a}, {NAMES[f].split(' (')[0]}": named[SHOWN, a, f]
             for a in ALWAYS for f in ("zero", "own")}  # fmt: skip
    grid = [[100 * cells[m, k] for k in names] for m in ("dense", *shown.values())]
    what = f"{some[0]['frames']} frames, {min(r['samples'] for r in some)} a kind"
    draw.heat(axes, grid, ["dense", *shown], names, f"exact answers, %, {what}")
