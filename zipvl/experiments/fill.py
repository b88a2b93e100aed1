"""Item 9 on visual tokens: what left-out tokens receive, and other cheap changes."""

from . import clips, draw, stats
from .job import Job, Record
from .text_tau import FILLS, family, short, tau

GRID = (0.3, 0.5, 0.7, 0.9, 0.975)
METHODS = (
    *(f"zipvl:tau={t}" for t in GRID),
    *(f"zipvl+:tau={t}" for t in GRID),
    *(f"zipvl:fill=own,tau={t}" for t in GRID),
    "zipvl+:divisor=none,tau=0.5",
    *(f"ideas.py:{name}:tau=0.5" for name in
      ("ValueNorm", "HeadMax", "Pooled", "FirstDense", "QuestionProbes", "FullCache",
       "CacheOnly")),
)  # fmt: skip


def run(job: Job) -> None:
    found = clips.records(job, job.methods or METHODS)
    table = clips.rows(found)
    variants = paired(found, job.frames[-1])
    job.finish(table, clips.COLUMNS, variants=variants)
    last = [r for r in table if r["frames"] == job.frames[-1]]
    with draw.panels(1, 2, 5.4) as (fig, (left, right)):
        for name, what in FILLS.items():
            some = [r for r in last if family(r["method"]) == name]
            draw.curve(left, [100 * r["work"] for r in some], [r["accuracy"] for r in some], what,
                       100)  # fmt: skip
        dense = next(r for r in last if r["method"] == "dense")
        left.axhline(100 * dense["accuracy"]["value"], color="black", ls="--", lw=0.8)
        left.set(xlabel="attention work, % of dense", ylabel="exact answers, % (95 %)")
        left.legend()
        if variants:
            label = "accuracy less that of zipvl+ at the same tau, points (95 %)"
            draw.bars(right, variants, "change", label)
        right.axvline(0, color="black", lw=0.8)
        fig.suptitle(clips.title(job, f"what left-out tokens receive, {job.frames[-1]} frames"))
        fig.savefig(job.out / "figure.png")


def paired(found: list[Record], frames: int) -> list[Record]:
    """The single variants against zipvl+ at the same tau, question by question."""
    right = {(r["unit"], r["method"]): float(r["ok"]) for r in found if r["frames"] == frames}
    units = list(dict.fromkeys(unit for unit, _ in right))
    out = []
    for method in dict.fromkeys(m for _, m in right):
        base = f"zipvl+:tau={tau(method)}"
        if family(method) is None and (units[0], base) in right:
            change = stats.mean([right[u, method] - right[u, base] for u in units])
            out.append({"method": method, "choice": short(method), "change": change})
    return out
