"""Every method there is: accuracy, or the loss of a text decoder, against the work of the whole
prefill and against cache bytes; and controls that any method must beat."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import clips, draw, stats
from .runner import Job, Record
from .text import TAIL
from .text import records as text_records

EXAMPLES = (
    *(f"examples/keynorm.py:KeyNorm:ratio={r}" for r in (0.25, 0.5, 0.75)),
    *(f"examples/tova.py:TOVA:budget={b}" for b in (64, 128, 192)),
)
USED = "zipvl-stream"  # the recommended setting is its default
SPARSE = (
    *(f"{m}:tau={t}" for m in ("zipvl", "zipvl+") for t in (0.5, 0.7, 0.9, 0.975)),
    *(f"{USED}:tau={t}" for t in (0.3, 0.5, 0.6)),
    USED,
    *(f"{USED}:tau={t}" for t in (0.8, 0.9)),
    *(f"fixed:ratio={r}" for r in (0.2, 0.35, 0.6)),
    *(f"random:ratio={r}" for r in (0.2, 0.35, 0.6)),
    *(f"fastv:ratio={r}" for r in (0.1, 0.25, 0.5)),
    "controls.py:Schedule:kept=1/0.5/0.25/0.125,by=last",  # PyramidDrop's schedule and rule
)
METHODS = (
    *SPARSE,
    *(f"streaming:sinks=4,window={w}" for w in (60, 124, 188)),
    *(f"h2o:heavy={b},recent={b}" for b in (32, 64, 96)),
    *(f"snapkv:budget={b}" for b in (64, 128, 192)),
    *(f"zipvl-quant:tau={t}" for t in (0.7, 0.9, 0.975)),
    *(f"zipvl+:tau={t},kv_bits=4" for t in (0.7, 0.9, 0.975)),
    *(f"{USED}:tau={t},kv_bits=4" for t in (0.5, 0.7)),
    *(f"{USED}:tau={t},summary=8" for t in (0.1, 0.3, 0.5, 0.7)),
    *("h2o:heavy=16,recent=16" + more for more in ("", ",summary=8")),
    *("snapkv:budget=32,window=8" + more for more in ("", ",summary=8")),
    "zipcache",
    "kivi:kv_bits=4",
    "kivi:kv_bits=2",
)
TEXT_METHODS = (
    *(f"{m}:tau={t}" for m in ("zipvl", "zipvl+") for t in (0.9, 0.975)),
    *(f"{USED}:tau={t}" for t in (0.5, 0.6)),
    USED,
    *(f"{USED}:tau={t}" for t in (0.8, 0.9)),
    "fixed:ratio=0.6",
    "random:ratio=0.6",
    "fastv:ratio=0.25",
    "controls.py:Schedule:kept=1/0.5/0.25/0.125,by=last",
    "streaming:sinks=4,window=380",
    "h2o:heavy=128,recent=256",
    "snapkv:budget=384",
    "zipvl-quant:tau=0.9",
    "kivi:kv_bits=4",
    f"{USED}:kv_bits=4",
)
RULES = ("random", "knorm", "last", "mass")  # who leaves, by the recommended setting's own curve
QUESTION = 256  # of a text prompt, the last tokens that stay

PAIRS = (  # at nearly the same cost, or the same bits
    (USED, "zipvl:tau=0.975"), (USED, "zipvl+:tau=0.9"), (f"{USED}:tau=0.5", "zipvl+:tau=0.7"),
    ("zipvl:tau=0.7", "random:ratio=0.35"), ("zipvl:tau=0.9", "random:ratio=0.6"),
    ("zipvl+:tau=0.7", "zipvl:tau=0.7"), ("zipvl+:tau=0.9", "fixed:ratio=0.6"),
    ("zipvl+:tau=0.9", "fastv:ratio=0.5"), ("snapkv:budget=64", "streaming:sinks=4,window=60"),
    ("h2o:heavy=32,recent=32", "snapkv:budget=64"), ("zipvl-quant:tau=0.9", "zipvl:tau=0.9"),
    ("zipvl+:tau=0.9,kv_bits=4", "zipvl+:tau=0.9"), ("zipvl+:tau=0.9,kv_bits=4", "zipcache"),
    ("zipvl+:tau=0.9,kv_bits=4", "h2o:heavy=32,recent=32"),
)  # fmt: skip
COLUMNS = {
    "method": "method", "windows": "windows", "extra": "extra loss, nats (95 %)",
    "kept": "kept share", "prefill": "prefill work", "cache": "cache bytes",
}  # fmt: skip


def controls(curve: list[float], layers: int) -> list[str]:
    """Other choices of who leaves, as many in every layer as `curve` says; and random ones from a
    third and from two thirds of the layers on."""
    kept = "/".join(f"{share:.4f}" for share in curve)
    rules = [f"by={rule}" for rule in RULES]
    rules += [f"by=random,after={layers * third // 3}" for third in (1, 2)]
    return [f"controls.py:Schedule:kept={kept},{rule}" for rule in rules]


def label(method: str) -> str:
    """A method as tables and figures call it: a curve of many numbers is that of USED."""
    name, _, options = method.removeprefix("examples/").partition(":")
    if name != "controls.py":
        return method
    kept, _, rule = options.removeprefix("Schedule:kept=").partition(",")
    return f"curve {kept}, {rule}" if kept.count("/") < 4 else f"{USED}'s curve, {rule}"


def family(row: Record) -> str:
    """Whose curve a method is on: its name, with `4 bit` where what it keeps is quantised, too."""
    name, _, options = row["method"].removeprefix("examples/").partition(":")
    if name == "controls.py":
        return label(row["method"]) if options.count("/") > 3 else "PyramidDrop's schedule"
    name = name.replace(".py", " (example)")
    if "summary=" in options:
        return f"{name}, summaries"
    bits = "kv_bits=4" in options and not name.startswith("kivi")
    return f"{name}, 4 bit" if bits else name


def frontier(table: list[Record], cost: str, worth: Callable[[Record], float]) -> list[Record]:
    """Rows that no other row beats in cost without being worth less, by cost."""
    best, out = -np.inf, []
    for row in sorted(table, key=lambda r: (r[cost], -worth(r))):
        if worth(row) > best:
            best = worth(row)
            out.append(row)
    return out


def accuracy(row: Record) -> float:
    return row["accuracy"]["value"]


def loss(row: Record) -> float:
    return -row["extra"]["value"]


def named(table: list[Record]) -> list[Record]:
    return [row | {"method": label(row["method"])} for row in table]


def run(job: Job) -> None:
    shown = [m for m in EXAMPLES if Path(m.partition(":")[0]).is_file()]  # run in the repository
    found = clips.records(job, job.methods or (*METHODS, *shown))
    if not job.methods:
        for n in job.frames:
            mine = [r["ratios"] for r in found if r["method"] == USED and r["frames"] == n]
            curve = np.mean(mine, axis=0).tolist()
            one = replace(job, frames=(n,), out=job.out / f"controls{n}")
            found += [r for r in clips.records(one, controls(curve, len(curve)))
                      if r["method"] != "dense"]  # fmt: skip
    table = clips.rows(found)
    fronts = {f"{n} frames, {cost}": [label(r["method"]) for r in frontier(
        [r for r in table if r["frames"] == n], cost, accuracy)]
        for n in job.frames for cost in ("prefill", "kv_bytes")}  # fmt: skip
    known = {r["method"] for r in found}
    pairs = [{"method": a, "against": b, "change": clips.difference(found, a, b)}
             for a, b in PAIRS if {a, b} <= known]  # fmt: skip
    job.finish(named(table), clips.COLUMNS, frontiers=fronts, pairs=pairs)
    lengths = {f"{n} frames": [r for r in table if r["frames"] == n] for n in job.frames}
    figure(job, lengths, "accuracy", "exact answers, % (95 %)", 100, "methods side by side")


def run_text(job: Job) -> None:
    """The same on a text decoder, whose prompts are a film of text and a question of QUESTION."""
    methods = ["dense", *(job.methods or TEXT_METHODS)]
    found = text_records(job, methods, QUESTION)
    if not job.methods:
        curve = np.mean([r["ratios"] for r in found if r["method"] == USED], axis=0).tolist()
        more = ["dense", *controls(curve, len(curve))]
        found += [r for r in text_records(job, more, QUESTION) if r["method"] != "dense"]
    table = loss_table(found)
    job.finish(named(table), COLUMNS, paired=against_paper(found))
    what = f"{job.tokens[0]} tokens of prompt, loss on the {TAIL} after it"
    figure(job, {what: table}, "extra", "extra loss, nats a token (95 %)", 1, "text, by method")


def loss_table(found: list[Record]) -> list[Record]:
    """A row a method: extra loss against dense on the same windows, and what it cost."""
    groups = {key[0]: some for key, some in clips.grouped(found, "method").items()}
    dense = groups["dense"]
    return [
        {
            "method": method,
            "windows": len(some),
            "extra": stats.mean([r["loss"] - d["loss"] for r, d in zip(some, dense, strict=True)]),
            "kept": clips.average(some, "ratios"),
            "kept_per_layer": np.mean([r["ratios"] for r in some], axis=0).tolist(),
            "prefill": clips.average(some, "prefill"),
            "kv_bytes": clips.average(some, "kv_bytes"),
            "cache": clips.average(some, "kv_bytes") / clips.average(dense, "kv_bytes"),
        }
        for method, some in groups.items()
    ]


def against_paper(found: list[Record]) -> list[Record]:
    """Each zipvl-stream against half of what the paper's setting loses, window by window."""
    lost = {(r["method"], r["unit"]): r["loss"] for r in found}
    units = list(dict.fromkeys(r["unit"] for r in found))
    half = [(lost["zipvl:tau=0.975", u] - lost["dense", u]) / 2 for u in units
            if ("zipvl:tau=0.975", u) in lost]  # fmt: skip
    return [
        {"method": m, "less_than_half_of_zipvl": stats.mean(
            [lost[m, u] - lost["dense", u] - h for u, h in zip(units, half, strict=True)])}
        for m in dict.fromkeys(r["method"] for r in found) if m.startswith(USED) and half
    ]  # fmt: skip


def figure(job: Job, tables: dict[str, list[Record]], measure: str, what: str, scale: float,
           title: str) -> None:  # fmt: skip
    """Every method, a row of panels for each of `tables`: left against the work of the prefill,
    right against cache bytes."""
    with draw.panels(len(tables), 2, 5.6, 4.2) as (fig, axes):
        for both, (name, table) in zip(np.atleast_2d(axes), tables.items(), strict=True):
            for one, cost in zip(both, ("prefill", "kv_bytes"), strict=True):
                scatter(one, table, cost, measure, scale)
            both[0].set(xlabel="work of the whole prefill, % of dense", ylabel=what, title=name)
            both[1].set(xlabel="cache bytes, % of dense", title=name)
        named = both[1].get_legend_handles_labels()  # one legend for all rows
        fig.legend(*named, loc="outside right center", fontsize=7.5)
        fig.suptitle(f"{title} ({job.settings()['model']} model, {job.samples} samples)")
        fig.savefig(job.out / "figure.png")


def scatter(axes: Any, table: list[Record], cost: str, measure: str, scale: float) -> None:
    """One measure of every method over its cost, a curve for each family, and the frontier."""
    dense, names = table[0], list(dict.fromkeys(map(family, table)))
    for i, name in enumerate(names):
        mine = [r for r in table if family(r) == name]
        x = [100 * r[cost] / dense[cost] for r in mine]
        style = {"color": "black", "marker": "*", "ms": 9} if name == "dense" else {
            "color": f"C{i % 10}", "marker": "os^vD"[i // 10], "alpha": 0.8,
            "lw": 2.2 if name == USED else 1}  # fmt: skip
        draw.curve(axes, x, [r[measure] for r in mine], name, scale, **style)
    front = frontier(table, cost, accuracy if measure == "accuracy" else loss)
    axes.plot([100 * r[cost] / dense[cost] for r in front],
              [scale * r[measure]["value"] for r in front], "k--", lw=0.8,
              label="best at its cost")  # fmt: skip
