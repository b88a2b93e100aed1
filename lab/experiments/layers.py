"""Item 4: kept visual tokens by layer and kind of question; do harder questions get more?

Text is always kept, so shares are of visual tokens: they do not change with the question's length.
Difficulty: how often dense is wrong on a kind, whether it is wrong on this question, and how many
objects the clip shows.
"""

import numpy as np

from . import clips, draw, stats
from .job import Job, Record

METHOD = "zipvl:tau=0.975"


def run(job: Job) -> None:
    method = job.methods[0] if job.methods else METHOD
    found = clips.records(job, [method])
    table, links = [], []
    for n in job.frames:
        mine = [r for r in found if r["frames"] == n]
        wrong = {r["unit"]: 1 - float(r["ok"]) for r in mine if r["method"] == "dense"}
        mine = [r for r in mine if r["method"] == method]
        kinds = []
        for (kind,), some in clips.grouped(mine, "kind").items():
            kinds.append({
                "frames": n, "kind": kind, "samples": len(some),
                "visual": stats.mean([float(np.mean(r["visual"])) for r in some]),
                "by_layer": np.mean([r["visual"] for r in some], axis=0).tolist(),
                "dense_error": stats.share([wrong[r["unit"]] > 0 for r in some]),
                "objects": clips.average(some, "objects"),
            })  # fmt: skip
        table += kinds
        links.append(correlations(n, mine, kinds, wrong))
    columns = {
        "frames": "frames", "kind": "kind", "samples": "questions", "objects": "objects",
        "dense_error": "dense error (95 %)", "visual": "visual kept (95 %)",
    }  # fmt: skip
    job.finish(table, columns, correlations=links)
    figure(job, table, links, method)


def correlations(frames: int, mine: list[Record], kinds: list[Record],
                 wrong: dict[str, float]) -> Record:  # fmt: skip
    """Rank correlations of the kept share with three measures of difficulty."""
    kept = [float(np.mean(r["visual"])) for r in mine]
    return {
        "frames": frames,
        "kind_error": stats.spearman([k["visual"]["value"] for k in kinds],
                                     [k["dense_error"]["value"] for k in kinds]),
        "wrong": stats.spearman(kept, [wrong[r["unit"]] for r in mine]),
        "objects": stats.spearman(kept, [r["objects"] for r in mine]),
        "objects_by_layer": [stats.spearman([r["visual"][i] for r in mine],
                                            [r["objects"] for r in mine])
                             for i in range(len(mine[0]["visual"]))],
    }  # fmt: skip


def figure(job: Job, table: list[Record], links: list[Record], method: str) -> None:
    last = job.frames[-1]
    mine, link = [r for r in table if r["frames"] == last], links[-1]
    with draw.panels(1, 2) as (fig, (left, right)):
        for row in mine:
            line = "--" if row["kind"] == "yesno" else "-"  # ten colours, eleven kinds
            left.plot([100 * x for x in row["by_layer"]], line, marker=".",
                      label=f"{row['kind']} ({row['samples']})")  # fmt: skip
        left.set(xlabel="layer", ylabel=f"visual tokens kept, %, {last} frames")
        left.legend(ncols=2, fontsize=7)
        r = link["kind_error"]
        hardest = sorted(mine, key=lambda row: row["dense_error"]["value"])
        shown = [row | {"choice": f"{row['kind']}, {100 * row['dense_error']['value']:.0f} %"}
                 for row in hardest]  # fmt: skip
        draw.bars(right, shown, "visual", "visual tokens kept, % (95 %)")
        right.set(xlim=(0, 100), ylabel="kind, and how often dense is wrong on it",
                  title=f"rank correlation {r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f}), "
                        f"{len(mine)} kinds")  # fmt: skip
        fig.suptitle(clips.title(job, method))
        fig.savefig(job.out / "figure.png")
