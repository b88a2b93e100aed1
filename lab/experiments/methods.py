"""Every method there is: accuracy against attention work, and against cache bytes."""

from pathlib import Path

from . import clips, draw
from .runner import Job, Record

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


PAIRS = (  # at nearly the same cost, or the same bits
    ("zipvl:tau=0.7", "random:ratio=0.35"), ("zipvl:tau=0.9", "random:ratio=0.6"),
    ("zipvl+:tau=0.7", "zipvl:tau=0.7"), ("zipvl+:tau=0.9", "fixed:ratio=0.6"),
    ("zipvl+:tau=0.9", "fastv:ratio=0.5"), ("snapkv:budget=64", "streaming:sinks=4,window=60"),
    ("h2o:heavy=32,recent=32", "snapkv:budget=64"), ("zipvl-quant:tau=0.9", "zipvl:tau=0.9"),
    ("zipvl+:tau=0.9,kv_bits=4", "zipvl+:tau=0.9"), ("zipvl+:tau=0.9,kv_bits=4", "zipcache"),
    ("zipvl+:tau=0.9,kv_bits=4", "h2o:heavy=32,recent=32"),
)  # fmt: skip


def family(row: Record) -> str:
    """Whose curve a method is on: its name, with `4 bit` where what it keeps is quantised, too."""
    name, _, options = row["method"].removeprefix("examples/").partition(":")
    name = name.replace(".py", " (example)")
    return f"{name}, 4 bit" if "tau=" in options and "kv_bits=4" in options else name


def quantised(row: Record) -> bool:
    return "kv_bits" in row["method"] or row["method"].startswith("zipvl-quant")


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
    known = {r["method"] for r in found}
    pairs = [{"method": a, "against": b, "change": clips.difference(found, a, b)}
             for a, b in PAIRS if {a, b} <= known]  # fmt: skip
    job.finish(table, clips.COLUMNS, frontiers=fronts, pairs=pairs)
    figure(job, [r for r in table if r["frames"] == job.frames[-1]])


def figure(job: Job, table: list[Record]) -> None:
    """Left, methods whose prefill is sparse (quantising leaves its work alone); right, all."""
    dense, names = table[0], list(dict.fromkeys(map(family, table)))
    sparse = [r for r in table if r["work"] < 1 and not quantised(r)]
    with draw.panels(1, 2, 6, 4.8) as (fig, (left, right)):
        for axes, cost, some in ((left, "work", [dense, *sparse]), (right, "kv_bytes", table)):
            for i, name in enumerate(names):
                mine = [r for r in some if family(r) == name]
                x = [100 * r[cost] / dense[cost] for r in mine]
                style = {"color": "black", "marker": "*", "ms": 9} if name == "dense" else {
                    "color": f"C{i % 10}", "marker": "os^"[i // 10], "alpha": 0.8}  # fmt: skip
                if mine:
                    draw.curve(axes, x, [r["accuracy"] for r in mine], name, 100, **style)
            front = frontier(some, cost)
            axes.plot([100 * r[cost] / dense[cost] for r in front],
                      [100 * r["accuracy"]["value"] for r in front], "k--", lw=0.8,
                      label="best at its cost")  # fmt: skip
            axes.set(ylabel=f"exact answers, % (95 %), {job.frames[-1]} frames")
        left.set(xlabel="attention work of prefill, % of dense", xscale="log")
        left.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
        left.minorticks_off()
        right.set(xlabel="cache bytes, % of dense", xlim=(0, 105))
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        fig.suptitle(clips.title(job, "methods side by side"))
        fig.savefig(job.out / "figure.png")
