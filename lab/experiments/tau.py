"""Item 1: accuracy and kept share against tau (paper, figure 5), by kind of question."""

from typing import Any

from . import clips, draw
from .job import Job, Record

GRID = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.96, 0.975, 0.99, 0.995, 1.0)
SEVERAL = ("after", "before", "count", "list")  # kinds that need more than one object
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
    found = [r | {"needs": "several objects" if r["kind"] in SEVERAL else "one object"}
             for r in found]  # fmt: skip
    table, kinds = clips.rows(found), clips.rows(found, "kind")
    swept = {n: [r for r in table if r["frames"] == n and "tau=" in r["method"]]
             for n in job.frames}  # fmt: skip
    knees = {str(n): knee(some) for n, some in swept.items()}
    job.finish(table, clips.COLUMNS, by_kind=kinds, by_need=clips.rows(found, "needs"), knee=knees)
    figure(job, swept, kinds)


def figure(job: Job, swept: dict[int, list[Record]], kinds: list[Record]) -> None:
    """Curves over the values of tau, evenly spaced (they crowd near 1), and tables by kind."""
    taus = sorted({tau_of(r["method"]) for some in swept.values() for r in some})
    names = [f"{t:g}" for t in taus]
    with draw.panels(2, 2, 6.2, 3.7) as (fig, ((accuracy, kept), heats)):
        for i, (n, some) in enumerate(swept.items()):
            x = [taus.index(tau_of(r["method"])) for r in some]
            draw.curve(accuracy, x, [r["accuracy"] for r in some], f"{n} frames", 100)
            for key, style, what in (("visual", "-", "visual tokens kept"),
                                     ("work", ":", "attention work")):  # fmt: skip
                kept.plot(x, [100 * r[key] for r in some], style, marker="o", ms=3,
                          color=f"C{i}", label=f"{what}, {n} frames")  # fmt: skip
        accuracy.set(ylabel="exact answers, % (95 %)", ylim=(0, 102))
        kept.set(ylabel="% of dense", ylim=(0, 102))
        for axes in (accuracy, kept):
            axes.set_xticks(range(len(taus)), names, rotation=45)
            axes.set(xlabel="tau (1: dense)")
            axes.legend()
        for axes, n in zip(heats, (job.frames[0], job.frames[-1]), strict=True):
            by_kind(axes, [r for r in kinds if r["frames"] == n and "tau=" in r["method"]], n)
        fig.suptitle(clips.title(job, "zipvl over tau"))
        fig.savefig(job.out / "figure.png")


def by_kind(axes: Any, some: list[Record], frames: int) -> None:
    shares = {(r["kind"], tau_of(r["method"])): 100 * r["accuracy"]["value"] for r in some}
    names, taus = sorted({kind for kind, _ in shares}), sorted({t for _, t in shares})
    cells = [[shares[kind, t] for t in taus] for kind in names]
    count = min(r["samples"] for r in some)
    draw.heat(axes, cells, names, [f"{t:g}" for t in taus],
              f"exact answers, %, {frames} frames, {count} a kind")  # fmt: skip
    axes.set(xlabel="tau (1: dense)")
