"""A fixed ratio against the adaptive one, same scores, same mean ratio (paper, table 3).

`profile` is in between: each layer keeps the share that zipvl keeps there on average, whatever the
prompt. It tells whether adapting to layers or to prompts matters. On text decoders losses are
compared window by window, and there is one more rival: one ratio of the same attention work, which
is larger, because work is the mean of squares.
"""

from dataclasses import replace

import numpy as np

from . import clips, draw, stats
from .runner import Job, Record
from .tau import tau
from .text import TAIL, records

TAUS = (0.5, 0.7, 0.85, 0.95)


def rivals(found: list[Record], method: str) -> tuple[str, str]:
    """fixed and profile methods with the mean ratio of `method` over all its records."""
    layers = np.mean([r["ratios"] for r in found if r["method"] == method], axis=0)
    profile = "/".join(f"{x:.3f}" for x in layers)
    return f"fixed:ratio={layers.mean():.3f}", f"ideas.py:Profile:ratios={profile}"


def run(job: Job) -> None:
    table = []
    for n in job.frames:  # each length has rivals of its own, so records of its own
        out = job.out if len(job.frames) == 1 else job.out / f"{n}"
        table += compared(replace(job, frames=(n,), out=out), n)
    columns = {
        "frames": "frames", "tau": "tau", "questions": "questions", "adaptive_kept": "kept share",
        "adaptive": "adaptive (95 %)", "fixed": "fixed", "profile": "by layer",
        "gain_fixed": "adaptive - fixed (95 %)", "gain_profile": "adaptive - by layer (95 %)",
        "adaptive_work": "work, adaptive", "fixed_work": "work, fixed",
    }  # fmt: skip
    job.finish(table, columns)
    figure(job, table)


def compared(job: Job, frames: int) -> list[Record]:
    """A row for each tau: accuracy, kept shares and work of the three, and paired differences."""
    adaptive = [f"zipvl:tau={t}" for t in TAUS]
    first = clips.records(job, adaptive)
    pairs = {m: rivals(first, m) for m in adaptive}
    found = clips.records(job, [m for a in adaptive for m in (a, *pairs[a])])
    table = []
    for a, others in pairs.items():
        row: Record = {"frames": frames, "tau": a.split("=")[1], "questions": job.samples}
        for name, m in zip(("adaptive", "fixed", "profile"), (a, *others), strict=True):
            mine = [r for r in found if r["method"] == m]
            row[name] = stats.share([r["ok"] for r in mine])
            row[f"{name}_kept"] = clips.average(mine, "ratios")
            row[f"{name}_work"] = clips.average(mine, "work")
            row[f"{name}_layers"] = np.mean([r["ratios"] for r in mine], axis=0).tolist()
            row[f"gain_{name}"] = clips.difference(found, a, m)
        table.append(row)
    return table


def figure(job: Job, table: list[Record]) -> None:
    with draw.panels(1, 2) as (fig, (left, right)):
        series = [(n, name) for n in job.frames for name in ("fixed", "profile")]
        for i, (n, name) in enumerate(series):
            mine = [r for r in table if r["frames"] == n]
            x = [100 * r["adaptive_kept"] + 0.8 * (i - (len(series) - 1) / 2) for r in mine]
            what = {"fixed": "one ratio", "profile": "a ratio by layer"}[name]
            draw.curve(left, x, [r[f"gain_{name}"] for r in mine],
                       f"adaptive less {what}, {n} frames", 100, ls="")  # fmt: skip
        left.axhline(0, color="black", lw=0.8)
        for row in [r for r in table if r["frames"] == job.frames[-1]]:
            shown = [100 * x for x in row["adaptive_layers"]]
            [line] = right.plot(shown, marker=".", label=f"adaptive, tau {row['tau']}")
            right.axhline(100 * row["fixed_kept"], color=line.get_color(), ls=":", lw=1)
        left.set(
            xlabel="tokens kept, % (mean over layers)",
            ylabel="difference in exact answers, points (95 %)",
        )
        right.set(xlabel="layer (dotted: fixed ratio)", ylim=(0, 118),
                  ylabel=f"tokens kept, %, {job.frames[-1]} frames")  # fmt: skip
        left.margins(y=0.4)  # room for the legend
        left.legend(loc="lower right")
        right.legend(ncols=2)
        fig.suptitle(clips.title(job, "fixed against adaptive"))
        fig.savefig(job.out / "figure.png")


# --- on text --------------------------------------------------------------------------------------

LEFT_OUT = {"zipvl": "zero", "zipvl+": "previous"}
TEXT_METHODS = [f"{name}:always=last,tau={t}" for name in LEFT_OUT for t in (0.9, 0.95, 0.975)]
RIVALS = {
    "fixed": "one ratio, same mean",
    "profile": "a ratio by layer, same mean",
    "work": "one ratio, same attention work",
}


def text_rivals(found: list[Record], method: str) -> dict[str, str]:
    """RIVALS as methods, from all records of `method`; left-out tokens get what it gives them."""
    layers = np.mean([r["ratios"] for r in found if r["method"] == method], axis=0)
    work = np.mean([r["work"] for r in found if r["method"] == method])
    profile = "/".join(f"{x:.4f}" for x in layers)
    rest = f"always=last,fill={LEFT_OUT[method.split(':')[0]]}"
    return {
        "fixed": f"fixed:ratio={layers.mean():.4f},{rest}",
        "profile": f"ideas.py:Profile:ratios={profile},{rest}",
        "work": f"fixed:ratio={np.sqrt(work):.4f},{rest}",
    }


def text_row(found: list[Record], adaptive: str, others: dict[str, str]) -> Record:
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


def run_text(job: Job) -> None:
    adaptive = job.methods or TEXT_METHODS
    first = records(job, ["dense", *adaptive])
    others = {m: text_rivals(first, m) for m in adaptive}
    found = records(job, ["dense", *(m for a in adaptive for m in (a, *others[a].values()))])
    table = [{"method": m.split(":")[0], "tau": tau(m)} | text_row(found, m, others[m])
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
    text_figure(job, table)


def text_figure(job: Job, table: list[Record]) -> None:
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
