"""Item 1: accuracy and kept share against tau (paper, figure 5), by kind of question."""

from . import clips, draw
from .job import Job, Record

GRID = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.96, 0.975, 0.99, 0.995, 1.0)
MARGIN = 0.02  # the knee loses no more than this


def tau_of(method: str) -> float:
    return float(method.split("tau=")[1].split(",")[0])


def knee(table: list[Record]) -> float | None:
    """The smallest tau from which on no accuracy is more than MARGIN below dense."""
    found = None
    for row in sorted(table, key=lambda r: tau_of(r["method"]), reverse=True):
        if row["change"]["value"] < -MARGIN:
            break
        found = tau_of(row["method"])
    return found


def run(job: Job) -> None:
    methods = job.methods or tuple(f"zipvl:tau={t}" for t in GRID)
    found = clips.records(job, methods)
    table, kinds = clips.rows(found), clips.rows(found, "kind")
    swept = {n: [r for r in table if r["frames"] == n and "tau=" in r["method"]]
             for n in job.frames}  # fmt: skip
    knees = {str(n): knee(some) for n, some in swept.items()}
    job.finish(table, clips.COLUMNS, by_kind=kinds, knee=knees)
    with draw.panels(1, 3, 4.4) as (fig, (accuracy, kept, by_kind)):
        for n, some in swept.items():
            x = [tau_of(r["method"]) for r in some]
            draw.curve(accuracy, x, [r["accuracy"] for r in some], f"{n} frames", 100)
            for key, style in (("visual", "-"), ("work", ":")):
                label = {"visual": "visual tokens kept", "work": "attention work"}[key]
                kept.plot(x, [100 * r[key] for r in some], style, marker="o", ms=3,
                          label=f"{label}, {n} frames")  # fmt: skip
        last = [r for r in kinds if r["frames"] == job.frames[-1] and "tau=" in r["method"]]
        shares = {(r["kind"], tau_of(r["method"])): 100 * r["accuracy"]["value"] for r in last}
        names, taus = sorted({kind for kind, _ in shares}), sorted({t for _, t in shares})
        cells = [[shares[kind, t] for t in taus] for kind in names]
        count = min(r["samples"] for r in last)
        draw.heat(by_kind, cells, names, [f"{t:g}" for t in taus],
                  f"exact answers, %, {job.frames[-1]} frames, {count} a kind")  # fmt: skip
        by_kind.set(xlabel="tau")
        accuracy.set(xlabel="tau", ylabel="exact answers, % (95 %)", ylim=(0, 102))
        kept.set(xlabel="tau", ylabel="% of dense", ylim=(0, 102))
        for axes in (accuracy, kept):
            axes.legend()
        fig.suptitle(clips.title(job, "zipvl over tau"))
        fig.savefig(job.out / "figure.png")
