"""Item 3: a fixed ratio against the adaptive one, same scores, same mean ratio (paper, table 3).

`profile` is in between: each layer keeps the share that zipvl keeps there on average, whatever the
prompt. It tells whether adapting to layers or to prompts matters.
"""

from dataclasses import replace

import numpy as np

from . import clips, draw, stats
from .job import Job, Record

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
