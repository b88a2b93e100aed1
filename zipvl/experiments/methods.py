"""Item 7: every method there is: accuracy against attention work, and against cache bytes."""

from pathlib import Path

from . import clips, draw
from .job import Job, Record

EXAMPLES = (
    *(f"examples/keynorm.py:KeyNorm:ratio={r}" for r in (0.25, 0.5, 0.75)),
    *(f"examples/tova.py:TOVA:budget={b}" for b in (64, 128, 192)),
)
METHODS = (
    *(f"{m}:tau={t}" for m in ("zipvl", "zipvl+") for t in (0.3, 0.5, 0.7, 0.9, 0.975)),
    *(f"fixed:ratio={r}" for r in (0.2, 0.35, 0.6)),
    *(f"random:ratio={r}" for r in (0.2, 0.35, 0.6)),
    *(f"fastv:ratio={r}" for r in (0.1, 0.25, 0.5)),
    *(f"streaming:sinks=4,window={w}" for w in (60, 124, 188)),
    *(f"h2o:heavy={b},recent={b}" for b in (32, 64, 96)),
    *(f"snapkv:budget={b}" for b in (64, 128, 192)),
    *(f"zipvl-quant:tau={t}" for t in (0.7, 0.9, 0.975)),
    *(f"zipvl+:tau={t},kv_bits=4" for t in (0.7, 0.9, 0.975)),
    "zipcache",
    "kivi:kv_bits=4",
    "kivi:kv_bits=2",
)


def family(row: Record) -> str:
    """Whose curve a method is on: its name, with `4 bit` where what it keeps is quantised, too."""
    name, _, options = row["method"].removeprefix("examples/").partition(":")
    return f"{name}, 4 bit" if "tau=" in options and "kv_bits=4" in options else name


def frontier(table: list[Record], cost: str) -> list[Record]:
    """Rows that no other row beats in cost without being less accurate, by cost."""
    best, out = -1.0, []
    for row in sorted(table, key=lambda r: (r[cost], -r["accuracy"]["value"])):
        if row["accuracy"]["value"] > best:
            best = row["accuracy"]["value"]
            out.append(row)
    return out


def run(job: Job) -> None:
    shown = [m for m in EXAMPLES if Path(m.partition(":")[0]).is_file()]  # run in the repository
    found = clips.records(job, job.methods or (*METHODS, *shown))
    table = clips.rows(found)
    fronts = {f"{n} frames, {cost}": [r["method"] for r in frontier(
        [r for r in table if r["frames"] == n], cost)]
        for n in job.frames for cost in ("work", "kv_bytes")}  # fmt: skip
    job.finish(table, clips.COLUMNS, frontiers=fronts)
    mine = [r for r in table if r["frames"] == job.frames[-1]]
    dense = next(r for r in mine if r["method"] == "dense")
    with draw.panels(1, 2, 5.6, 4.6) as (fig, (left, right)):
        for axes, cost in ((left, "work"), (right, "kv_bytes")):
            for i, name in enumerate(dict.fromkeys(map(family, mine))):
                some = [r for r in mine if family(r) == name]
                x = [100 * r[cost] / dense[cost] for r in some]
                draw.curve(axes, x, [r["accuracy"] for r in some], name, 100, alpha=0.8,
                           color=f"C{i % 10}", mfc="white" if i > 9 else None)  # fmt: skip
            front = frontier(mine, cost)
            axes.plot([100 * r[cost] / dense[cost] for r in front],
                      [100 * r["accuracy"]["value"] for r in front], "k--", lw=0.8,
                      label="best at its cost")  # fmt: skip
            axes.set(ylabel=f"exact answers, % (95 %), {job.frames[-1]} frames")
        left.set(xlabel="attention work of prefill, % of dense")
        right.set(xlabel="cache bytes, % of dense")
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        fig.suptitle(clips.title(job, "methods side by side"))
        fig.savefig(job.out / "figure.png")
