"""Item 9 on visual tokens: what left-out tokens receive, and other cheap changes."""

import numpy as np

from . import clips, draw, stats
from .job import Job, Record
from .text_tau import FILLS, family, short, tau

Right = dict[tuple[str, str], float]  # 1 or 0 by question and method
GRID = (0.3, 0.5, 0.7, 0.9, 0.975)
TAU = 0.5  # of the single ideas: low, so that there is a loss to win back
METHODS = (
    *(f"zipvl:tau={t}" for t in GRID),
    *(f"zipvl+:tau={t}" for t in GRID),
    *(f"zipvl:fill=own,tau={t}" for t in GRID),
    f"zipvl+:divisor=none,tau={TAU}",
    *(f"ideas.py:{name}:tau={TAU}" for name in
      ("ValueNorm", "HeadMax", "Pooled", "FirstDense", "KeepRecent", "QuestionProbes",
       "FullCache", "CacheOnly")),
    *(f"ideas.py:{name}:tau={t}" for t in (0.7, 0.9) for name in ("HeadMax", "QuestionProbes")),
)  # fmt: skip


def run(job: Job) -> None:
    found = clips.records(job, job.methods or METHODS)
    table = clips.rows(found)
    variants = [row for n in job.frames for row in paired(found, n)]
    job.finish(table, clips.COLUMNS, variants=variants, halving=halving(found))
    with draw.panels(1, len(job.frames) + 1, 4.8) as (fig, (*curves, right)):
        for axes, n in zip(curves, job.frames, strict=True):
            some = [r for r in table if r["frames"] == n]
            for name, what in FILLS.items():
                mine = [r for r in some if family(r["method"]) == name]
                draw.curve(axes, [100 * r["work"] for r in mine], [r["accuracy"] for r in mine],
                           what, 100)  # fmt: skip
            axes.axhline(100 * some[0]["accuracy"]["value"], color="black", ls="--", lw=0.8)
            axes.set(xlabel="attention work, % of dense (dashed: dense)", title=f"{n} frames",
                     ylabel="exact answers, % (95 %)", ylim=(0, 102))  # fmt: skip
            axes.legend(loc="lower right")
        series = {f"{n} frames": [r for r in variants if r["frames"] == n] for n in job.frames}
        draw.points(right, series, "change", "points above zipvl+ at the same tau (95 %)")
        fig.suptitle(clips.title(job, "what left-out tokens receive, and other ideas"))
        fig.savefig(job.out / "figure.png")


def halving(found: list[Record]) -> list[Record]:
    """Accuracy that zipvl and zipvl+ lose, by tau and over those that text_tau has, too; for each
    frame count and all of them.

    `over_half`: the loss of zipvl+ less half that of zipvl; below 0, zipvl+ more than halves it.
    """
    right: Right = {(r["unit"], r["method"]): float(r["ok"]) for r in found}
    names = {r["method"] for r in found}
    taus = [t for t in dict.fromkeys(tau(r["method"]) for r in found)
            if {f"zipvl:tau={t}", f"zipvl+:tau={t}"} <= names]  # fmt: skip
    units = {n: list(dict.fromkeys(r["unit"] for r in some))
             for (n,), some in clips.grouped(found, "frames").items()}  # fmt: skip
    units["all"] = [u for some in units.values() for u in some]
    sets = {t: [t] for t in taus} | {"0.9 and more": [t for t in taus if float(t) >= 0.9]}
    return [compared(right, some, over) | {"frames": n, "tau": name}
            for n, some in units.items() for name, over in sets.items() if over]  # fmt: skip


def compared(right: Right, units: list[str], taus: list[str]) -> Record:
    """Losses of both methods on some questions, each the mean over `taus`."""

    def lost(method: str) -> np.ndarray:
        kept = [[right[u, f"{method}:tau={t}"] for t in taus] for u in units]
        return np.array([right[u, "dense"] for u in units]) - np.mean(kept, axis=1)

    paper, plus = lost("zipvl"), lost("zipvl+")
    return {
        "questions": len(units), "paper": stats.mean(paper), "plus": stats.mean(plus),
        "saved": stats.mean(paper - plus), "over_half": stats.mean(plus - paper / 2),
    }  # fmt: skip


def paired(found: list[Record], frames: int) -> list[Record]:
    """The single variants against zipvl+ at the same tau, question by question."""
    mine, out = [r for r in found if r["frames"] == frames], []
    names = list(dict.fromkeys(r["method"] for r in mine))
    for method in names:
        base = f"zipvl+:tau={tau(method)}"
        if family(method) is None and base in names:
            choice = f"{short(method).partition(', tau')[0]}, tau {tau(method)}"
            out.append({"frames": frames, "method": method, "choice": choice,
                        "change": clips.difference(mine, method, base)})  # fmt: skip
    return out
