"""Item 3: a fixed ratio against the adaptive one, same scores, same mean ratio (paper, table 3).

`profile` is in between: each layer keeps the share that zipvl keeps there on average, whatever the
prompt. It tells whether adapting to layers or to prompts matters.
"""

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
    adaptive = [f"zipvl:tau={t}" for t in TAUS]
    first = clips.records(job, adaptive)
    pairs = {m: rivals(first, m) for m in adaptive}
    found = clips.records(job, [m for a in adaptive for m in (a, *pairs[a])])
    right = {(r["unit"], r["method"]): float(r["ok"]) for r in found}
    units = list(dict.fromkeys(r["unit"] for r in found))
    table = []
    for a, others in pairs.items():
        row: Record = {"tau": a.split("=")[1], "questions": len(units)}
        for name, m in zip(("adaptive", "fixed", "profile"), (a, *others), strict=True):
            mine = [r for r in found if r["method"] == m]
            row[name] = stats.share([r["ok"] for r in mine])
            row[f"{name}_kept"] = clips.average(mine, "ratios")
            row[f"{name}_work"] = clips.average(mine, "work")
            row[f"{name}_layers"] = np.mean([r["ratios"] for r in mine], axis=0).tolist()
            row[f"gain_{name}"] = stats.mean([right[u, a] - right[u, m] for u in units])
        table.append(row)
    columns = {
        "tau": "tau", "questions": "questions", "adaptive_kept": "kept share",
        "adaptive": "adaptive (95 %)", "fixed": "fixed", "profile": "by layer",
        "gain_fixed": "adaptive - fixed (95 %)", "gain_profile": "adaptive - by layer (95 %)",
        "adaptive_work": "work, adaptive", "fixed_work": "work, fixed",
    }  # fmt: skip
    job.finish(table, columns)
    with draw.panels(1, 2) as (fig, (left, right_axes)):
        for name, what, shift in (
            ("fixed", "one ratio", -0.4),
            ("profile", "a ratio by layer", 0.4),
        ):
            x = [100 * r["adaptive_kept"] + shift for r in table]
            draw.curve(left, x, [r[f"gain_{name}"] for r in table], f"adaptive less {what}", 100,
                       ls="")  # fmt: skip
        left.axhline(0, color="black", lw=0.8)
        for row in table:
            shown = [100 * x for x in row["adaptive_layers"]]
            [line] = right_axes.plot(shown, marker=".", label=f"adaptive, tau {row['tau']}")
            level = 100 * row["fixed_kept"]
            right_axes.axhline(level, color=line.get_color(), ls=":", lw=1)
        left.set(
            xlabel="tokens kept, % (mean over layers)",
            ylabel="difference in exact answers, points (95 %)",
        )
        right_axes.set(xlabel="layer (dotted: fixed ratio)", ylabel="tokens kept, %",
                       ylim=(0, 118))  # fmt: skip
        left.legend()
        right_axes.legend(ncols=2)
        fig.suptitle(clips.title(job, "fixed against adaptive"))
        fig.savefig(job.out / "figure.png")
