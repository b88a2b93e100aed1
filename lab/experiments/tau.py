"""Accuracy or loss, and kept share, against tau (paper, figure 5).

On clips by kind of question; on a real text decoder against attention work, by what left-out tokens
get. Text has no visual tokens, so `always=last` everywhere there: with `always=text` nothing would
be sparse.
"""

from typing import Any

import numpy as np

from . import clips, draw, stats
from .runner import Job, Record
from .text import TAIL, records

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
    job.finish(table, clips.COLUMNS, by_kind=clips.shares(kinds),
               by_need=clips.rows(found, "needs"), knee=knees)  # fmt: skip
    figure(job, swept, kinds)


def figure(job: Job, swept: dict[int, list[Record]], kinds: list[Record]) -> None:
    """Curves over the values of tau, evenly spaced (they crowd near 1), and tables by kind."""
    taus = sorted({tau_of(r["method"]) for some in swept.values() for r in some})
    names = [f"{t:g}" for t in taus]
    mapped = sorted({job.frames[0], job.frames[-1]})
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
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # on no line
        heats[-1].set_visible(len(mapped) > 1)
        for axes, n in zip(heats, mapped, strict=False):
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


# --- on text --------------------------------------------------------------------------------------

TEXT_GRID = (0.9, 0.95, 0.975, 0.99)
FILLS = {
    "zipvl": "left out: nothing (paper)",
    "zipvl+": "left out: nearest earlier output",
    "own": "left out: own query on kept keys",
}
NAMED = {  # classes of ideas.py, as figures call them
    "ValueNorm": "score x norm of value",
    "HeadMax": "score: largest of any head",
    "Pooled": "score pooled over 5 neighbours",
    "FirstDense": "first 2 layers dense",
    "KeepRecent": "last 64 and first 4 stay",
    "QuestionProbes": "question tokens as probes",
    "FullCache": "sparse attention, full cache",
    "CacheOnly": "dense attention, small cache",
}
TEXT_METHODS = [
    "dense",
    *(f"zipvl:always=last,tau={t}" for t in TEXT_GRID),
    *(f"zipvl+:always=last,tau={t}" for t in TEXT_GRID),
    *(f"zipvl:always=last,fill=own,tau={t}" for t in (0.8, *TEXT_GRID[:3])),
    "zipvl+:always=last,divisor=none,tau=0.95",
    *(f"ideas.py:{name}:always=last,tau=0.95" for name in
      ("ValueNorm", "HeadMax", "Pooled", "FirstDense", "KeepRecent", "FullCache", "CacheOnly")),
]  # fmt: skip
LOSS_COLUMNS = {
    "method": "method", "windows": "windows", "extra": "extra loss, nats (95 %)",
    "change": "change from zipvl+ at this tau (95 %)",
    "kept": "kept share", "work": "attention work", "cached": "cached share",
}  # fmt: skip


def loss_rows(found: list[Record]) -> list[Record]:
    """One row a method: extra loss against dense on the same windows."""
    by: dict[str, list[Record]] = {}
    for r in found:
        by.setdefault(r["method"], []).append(r)
    dense = [r["loss"] for r in by["dense"]]
    plus = {m: [r["loss"] for r in some] for m, some in by.items() if family(m) == "zipvl+"}
    return [
        {
            "method": method,
            "windows": len(some),
            "loss": stats.mean([r["loss"] for r in some]),
            "change": against(some, plus.get(f"zipvl+:always=last,tau={tau(method)}")),
            "extra": stats.mean([r["loss"] - d for r, d in zip(some, dense, strict=True)]),
            "kept": float(np.mean([r["ratios"] for r in some])),
            "kept_per_layer": np.mean([r["ratios"] for r in some], axis=0).tolist(),
            "work": float(np.mean([r["work"] for r in some])),
            "cached": float(np.mean([r["cached"] for r in some])),
        }
        for method, some in by.items()
    ]


def against(some: list[Record], other: list[float] | None) -> dict[str, float] | None:
    """Mean difference in loss from another method on the same windows."""
    pairs = zip(some, other or [], strict=bool(other))
    return stats.mean([r["loss"] - x for r, x in pairs]) if other else None


def tau(method: str) -> str:
    return method.partition("tau=")[2]


def family(method: str) -> str | None:
    """Which curve a method belongs to; None for the single variants."""
    if method.startswith("ideas.py") or "divisor" in method or method == "dense":
        return None
    return "own" if "fill=own" in method else method.split(":")[0]


def text_figure(job: Job, table: list[Record]) -> None:
    model = job.settings()["model"]
    singles = [r | {"choice": short(r["method"])} for r in table
               if family(r["method"]) is None and r["change"]]  # fmt: skip
    with draw.panels(1, 2 + bool(singles), 4.5) as (fig, (left, *middle, right)):
        for name, what in FILLS.items():
            if not (some := [r for r in table if family(r["method"]) == name]):
                continue
            draw.curve(left, [100 * r["work"] for r in some], [r["extra"] for r in some], what)
        left.set(xlabel="attention work, % of dense", ylabel="extra loss, nats a token (95 %)")
        left.axhline(0, color="black", lw=0.8)
        left.legend()
        for axes in middle:
            label = "loss less that of zipvl+ at this tau, nats (95 %)"
            draw.bars(axes, singles, "change", label, 1.0)
            axes.axvline(0, color="black", lw=0.8)
        for row in table:
            if family(row["method"]) == "zipvl+":
                label = f"zipvl+, tau {tau(row['method'])}"
                right.plot([100 * k for k in row["kept_per_layer"]], label=label)
        right.set(xlabel="layer", ylabel="tokens kept, %", ylim=(0, 102))
        right.legend()
        fig.suptitle(f"{model}: {table[0]['windows']} windows of {job.tokens[0]} tokens of prompt, "
                     f"loss on the {TAIL} after it")  # fmt: skip
        fig.savefig(job.out / "figure.png")


def short(method: str) -> str:
    return NAMED.get(method.split(":")[1]) or f"no divisor (Eq. 7 off), tau {tau(method)}"


def run_text(job: Job) -> None:
    methods: list[Any] = [*(job.methods or TEXT_METHODS)]
    table = loss_rows(records(job, ["dense", *(m for m in methods if m != "dense")]))
    job.finish(table, LOSS_COLUMNS)
    text_figure(job, table)
