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
        if shown := [r for r in variants if r["frames"] == job.frames[-1]]:
            label = f"points above zipvl+ at the same tau, {job.frames[-1]} frames (95 %)"
            draw.bars(right, shown, "change", label)
        right.axvline(0, color="black", lw=0.8)
        fig.suptitle(clips.title(job, "what left-out tokens receive, and other ideas"))
        fig.savefig(job.out / "figure.png")


def halving(found: list[Record]) -> list[Record]:
    """Accuracy that zipvl and zipvl+ lose at one tau, for each frame count and over everything.

    `over_half`: the loss of zipvl+ less half that of zipvl; below 0, zipvl+ more than halves it.
    """
    right: Right = {(r["unit"], r["method"]): float(r["ok"]) for r in found}
    names = {r["method"] for r in found}
    taus = [t for t in dict.fromkeys(tau(r["method"]) for r in found)
            if {f"zipvl:tau={t}", f"zipvl+:tau={t}"} <= names]  # fmt: skip
    units = {n: list(dict.fromkeys(r["unit"] for r in some))
             for (n,), some in clips.grouped(found, "frames").items()}  # fmt: skip
    one = [compared(right, some, [t]) | {"frames": n, "tau": t}
           for n, some in units.items() for t in taus]  # fmt: skip
    whole = compared(right, [u for some in units.values() for u in some], taus) if taus else {}
    return [*one, whole | {"frames": "all", "tau": "all"}]


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
    right: Right = {
        (r["unit"], r["method"]): float(r["ok"]) for r in found if r["frames"] == frames
    }
    units = list(dict.fromkeys(unit for unit, _ in right))
    out = []
    for method in dict.fromkeys(m for _, m in right):
        base = f"zipvl+:tau={tau(method)}"
        if family(method) is None and (units[0], base) in right:
            change = stats.mean([right[u, method] - right[u, base] for u in units])
            name = short(method).partition(", tau")[0]
            out.append({"frames": frames, "method": method, "change": change,
                        "choice": f"{name}, tau {tau(method)}"})  # fmt: skip
    return out
