"""Item 3 on a text decoder: a fixed ratio against the adaptive one, same scores, loss per window.

Rivals of an adaptive run: one ratio for all layers and windows, its mean; a ratio by layer; and one
ratio of the same attention work, which is larger, because work is the mean of squares.
"""

import numpy as np

from . import draw, stats
from .job import Job, Record
from .text import TAIL, records
from .text_tau import tau

FILLS = {"zipvl": "zero", "zipvl+": "previous"}
METHODS = [f"{name}:always=last,tau={t}" for name in FILLS for t in (0.9, 0.95, 0.975)]
RIVALS = {
    "fixed": "one ratio, same mean",
    "profile": "a ratio by layer, same mean",
    "work": "one ratio, same attention work",
}


def rivals(found: list[Record], method: str) -> dict[str, str]:
    """RIVALS as methods, from all records of `method`; left-out tokens get what it gives them."""
    layers = np.mean([r["ratios"] for r in found if r["method"] == method], axis=0)
    work = np.mean([r["work"] for r in found if r["method"] == method])
    profile = "/".join(f"{x:.4f}" for x in layers)
    rest = f"always=last,fill={FILLS[method.split(':')[0]]}"
    return {
        "fixed": f"fixed:ratio={layers.mean():.4f},{rest}",
        "profile": f"ideas.py:Profile:ratios={profile},{rest}",
        "work": f"fixed:ratio={np.sqrt(work):.4f},{rest}",
    }


def row(found: list[Record], adaptive: str, others: dict[str, str]) -> Record:
    """Extra loss of all four; the adaptive loss less that of each rival, window by window."""
    by: dict[str, list[Record]] = {}
    for r in found:
        by.setdefault(r["method"], []).append(r)
    mine = [r["loss"] for r in by[adaptive]]
    out: Record = {"windows": len(mine)}
    for name, method in {"adaptive": adaptive, **others}.items():
        some = by[method]
        pairs = zip(some, by["dense"], strict=True)
        out[name] = stats.mean([r["loss"] - d["loss"] for r, d in pairs])
        out[f"{name}_kept"] = float(np.mean([r["ratios"] for r in some]))
        out[f"{name}_work"] = float(np.mean([r["work"] for r in some]))
        if method != adaptive:
            gain = [m - r["loss"] for m, r in zip(mine, some, strict=True)]
            out[f"gain_{name}"] = stats.mean(gain)
    return out


def run(job: Job) -> None:
    adaptive = job.methods or METHODS
    first = records(job, ["dense", *adaptive])
    others = {m: rivals(first, m) for m in adaptive}
    found = records(job, ["dense", *(m for a in adaptive for m in (a, *others[a].values()))])
    table = [{"method": m.split(":")[0], "tau": tau(m)} | row(found, m, others[m])
             for m in adaptive]  # fmt: skip
    columns = {
        "method": "method", "tau": "tau", "windows": "windows", "adaptive_kept": "kept share",
        "adaptive_work": "work", "fixed_work": "work, one ratio",
        "adaptive": "extra loss, adaptive (95 %)", "fixed": "one ratio",
        "gain_fixed": "adaptive - one ratio (95 %)",
        "gain_profile": "adaptive - by layer (95 %)",
        "gain_work": "adaptive - one ratio of the same work (95 %)",
    }  # fmt: skip
    job.finish(table, columns)
    figure(job, table)


def figure(job: Job, table: list[Record]) -> None:
    names = list(dict.fromkeys(r["method"] for r in table))
    with draw.panels(1, len(names)) as (fig, all_axes):
        for axes, method in zip(np.atleast_1d(all_axes), names, strict=True):
            mine = [r for r in table if r["method"] == method]
            for i, (name, what) in enumerate(RIVALS.items()):
                x = [100 * r["adaptive_kept"] + (i - 1) / 2 for r in mine]
                draw.curve(axes, x, [r[f"gain_{name}"] for r in mine], what, ls="")
            axes.axhline(0, color="black", lw=0.8)
            axes.set(xlabel="tokens kept by the adaptive method, % (mean over layers)",
                     ylabel="adaptive loss less the rival's, nats (95 %)",
                     title=f"{method}: below 0 adaptive is better")  # fmt: skip
            axes.legend()
        fig.suptitle(f"fixed against adaptive ({job.settings()['model']}, {job.samples} windows of "
                     f"{job.tokens[0]} tokens, loss on the {TAIL} after)")  # fmt: skip
        fig.savefig(job.out / "figure.png")
