"""Which tokens stay, by layer and kind of question; which must; what the left-out ones receive."""

from typing import Any

import numpy as np

from . import clips, draw, stats
from .runner import Job, Record
from .tau import FILLS, family, short, tau

# --- kept tokens by layer -------------------------------------------------------------------------

# Do harder questions get more? Text is always kept, so shares are of visual tokens: they do not
# change with the question's length. Difficulty: how often dense is wrong on a kind, whether it is
# wrong on this question, and how many objects the clip shows.

LAYERS_OF = "zipvl:tau=0.975"


def run_layers(job: Job) -> None:
    method = job.methods[0] if job.methods else LAYERS_OF
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
    layers_figure(job, table, links, method)


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


def correlation_title(r: dict[str, float], kinds: int) -> str:
    """Empty where nothing varies, as when dense is never wrong."""
    if r["value"] != r["value"]:
        return ""
    known = r["low"] == r["low"]
    inside = f" ({r['low']:.2f} to {r['high']:.2f})" if known else ""
    return f"rank correlation {r['value']:.2f}{inside}, {kinds} kinds"


def layers_figure(job: Job, table: list[Record], links: list[Record], method: str) -> None:
    last = job.frames[-1]
    mine, link = [r for r in table if r["frames"] == last], links[-1]
    with draw.panels(1, 2) as (fig, (left, right)):
        for row in mine:
            line = "--" if row["kind"] == "yesno" else "-"  # ten colours, eleven kinds
            left.plot([100 * x for x in row["by_layer"]], line, marker=".",
                      label=f"{row['kind']} ({row['samples']})")  # fmt: skip
        left.set(xlabel="layer", ylabel=f"visual tokens kept, %, {last} frames")
        left.legend(ncols=2, fontsize=7)
        hardest = sorted(mine, key=lambda row: row["dense_error"]["value"])
        shown = [row | {"choice": f"{row['kind']}, {100 * row['dense_error']['value']:.0f} %"}
                 for row in hardest]  # fmt: skip
        draw.bars(right, shown, "visual", "visual tokens kept, % (95 %)")
        right.set(xlim=(0, 100), ylabel="kind, and how often dense is wrong on it",
                  title=correlation_title(link["kind_error"], len(mine)))  # fmt: skip
        fig.suptitle(clips.title(job, method))
        fig.savefig(job.out / "figure.png")


# --- which tokens must stay -----------------------------------------------------------------------

# Do the dropped queries cost accuracy, or the dropped keys? With `fill=own` every token still looks
# at the kept keys, so what is lost then is lost by keys.

ALWAYS, LEFT_OUT, TAUS = ("text", "last", "none"), ("zero", "own", "previous"), (0.8, 0.975)
SHOWN = TAUS[-1]
RECEIVED = {"zero": "nothing (paper)", "own": "own query, kept keys", "previous": "earlier output"}


def run_always(job: Job) -> None:
    named = {(t, a, f): f"zipvl:always={a},fill={f},tau={t}"
             for t in TAUS for a in ALWAYS for f in LEFT_OUT}  # fmt: skip
    found = clips.records(job, list(named.values()))
    table, kinds = clips.rows(found), clips.rows(found, "kind")
    contrasts = [c for n in (job.frames if len(job.frames) > 1 else ()) for c in
                 contrasted([r for r in found if r["frames"] == n], named, n)]  # fmt: skip
    contrasts += contrasted(found, named, "all")
    job.finish(table, clips.COLUMNS, by_kind=clips.shares(kinds), contrasts=contrasts)
    always_figure(job, table, kinds, named)


def always_figure(job: Job, table: list[Record], kinds: list[Record],
                  named: dict[tuple[float, str, str], str]) -> None:  # fmt: skip
    with draw.panels(1, len(job.frames) + 1, 5) as (fig, (*bars, heat)):
        for axes, n in zip(bars, job.frames, strict=True):
            whole = {r["method"]: r["accuracy"] for r in table if r["frames"] == n}
            for i, fill in enumerate(LEFT_OUT):
                values, spread = draw.spread([whole[named[SHOWN, a, fill]] for a in ALWAYS], 100)
                axes.bar(np.arange(len(ALWAYS)) + 0.27 * (i - 1), values, 0.25, yerr=spread,
                         capsize=2, label=f"left out: {RECEIVED[fill]}")  # fmt: skip
            axes.axhline(100 * whole["dense"]["value"], color="black", lw=1, ls="--", label="dense")
            axes.set_xticks(range(len(ALWAYS)), [f"always={a}" for a in ALWAYS])
            axes.set(ylabel="exact answers, % (95 %)", ylim=(0, 128), yticks=range(0, 101, 20),
                     title=f"{n} frames, tau {SHOWN}")  # fmt: skip
            axes.legend(loc="upper center", ncols=2)
        by_kind(heat, [r for r in kinds if r["frames"] == job.frames[-1]], named)
        fig.suptitle(clips.title(job, "which tokens always stay"))
        fig.savefig(job.out / "figure.png")


def contrasted(found: list[Record], named: dict[tuple[float, str, str], str],
             frames: int | str) -> list[Record]:  # fmt: skip
    """What more text, own queries and earlier outputs change, question by question."""
    pairs = ((("text", "zero"), ("last", "zero")), (("text", "own"), ("text", "zero")),
             (("text", "previous"), ("text", "zero")), (("none", "own"), ("text", "own")),
             (("none", "previous"), ("none", "zero")))  # fmt: skip
    out = []
    for t in TAUS:
        chosen = [(named[t, *a], named[t, *b]) for a, b in pairs]
        for a, b in [*chosen, (named[t, "none", "own"], "dense")]:
            change = clips.difference(found, a, b)
            out.append({"frames": frames, "method": a, "against": b, "change": change})
    return out


def by_kind(axes: Any, some: list[Record], named: dict[tuple[float, str, str], str]) -> None:
    cells = {(r["method"], r["kind"]): r["accuracy"]["value"] for r in some}
    names = list(dict.fromkeys(r["kind"] for r in some))
    shown = {f"{a}, {RECEIVED[f].split(' (')[0]}": named[SHOWN, a, f]
             for a in ALWAYS for f in ("zero", "own")}  # fmt: skip
    grid = [[100 * cells[m, k] for k in names] for m in ("dense", *shown.values())]
    what = f"{some[0]['frames']} frames, {min(r['samples'] for r in some)} a kind"
    draw.heat(axes, grid, ["dense", *shown], names, f"exact answers, %, {what}")


# --- what left-out tokens receive, and other cheap changes ----------------------------------------

Right = dict[tuple[str, str], float]  # 1 or 0 by question and method
GRID = (0.3, 0.5, 0.7, 0.9, 0.975)
TAU = 0.5  # of the single ideas: low, so that there is a loss to win back
FILL_METHODS = (
    *(f"zipvl:tau={t}" for t in GRID),
    *(f"zipvl+:tau={t}" for t in GRID),
    *(f"zipvl:fill=own,tau={t}" for t in GRID),
    f"zipvl+:divisor=none,tau={TAU}",
    *(f"ideas.py:{name}:tau={TAU}" for name in
      ("ValueNorm", "HeadMax", "Pooled", "FirstDense", "KeepRecent", "QuestionProbes",
       "FullCache", "CacheOnly")),
    *(f"ideas.py:{name}:tau={t}" for t in (0.7, 0.9) for name in ("HeadMax", "QuestionProbes")),
)  # fmt: skip


def run_fill(job: Job) -> None:
    found = clips.records(job, job.methods or FILL_METHODS)
    table = clips.rows(found)
    variants = [row for n in job.frames for row in paired(found, n)]
    job.finish(table, clips.COLUMNS, variants=variants, halving=halving(found))
    with draw.panels(1, len(job.frames) + 1, 4.8) as (fig, (*curves, right)):
        for axes, n in zip(curves, job.frames, strict=True):
            some = [r for r in table if r["frames"] == n]
            for name, what in FILLS.items():
                mine = [r for r in some if family(r["method"]) == name]
                draw.curve(axes, [100 * r["work"] for r in mine], [r["accuracy"] for r in mine],
                           what, 100)  # fmt: skip
            axes.axhline(100 * some[0]["accuracy"]["value"], color="black", ls="--", lw=0.8)
            axes.set(xlabel="attention work, % of dense (dashed: dense)", title=f"{n} frames",
                     ylabel="exact answers, % (95 %)", ylim=(0, 102))  # fmt: skip
            axes.legend(loc="lower right")
        series = {f"{n} frames": [r for r in variants if r["frames"] == n] for n in job.frames}
        draw.points(right, series, "change", "points above zipvl+ at the same tau (95 %)")
        fig.suptitle(clips.title(job, "what left-out tokens receive, and other ideas"))
        fig.savefig(job.out / "figure.png")


def halving(found: list[Record]) -> list[Record]:
    """Accuracy that zipvl and zipvl+ lose, by tau and over those that text_tau has, too; for each
    frame count and all of them.

    `over_half`: the loss of zipvl+ less half that of zipvl; below 0, zipvl+ more than halves it.
    """
    right: Right = {(r["unit"], r["method"]): float(r["ok"]) for r in found}
    names = {r["method"] for r in found}
    taus = [t for t in dict.fromkeys(tau(r["method"]) for r in found)
            if {f"zipvl:tau={t}", f"zipvl+:tau={t}"} <= names]  # fmt: skip
    units = {n: list(dict.fromkeys(r["unit"] for r in some))
             for (n,), some in clips.grouped(found, "frames").items()}  # fmt: skip
    units["all"] = [u for some in units.values() for u in some]
    sets = {t: [t] for t in taus} | {"0.9 and more": [t for t in taus if float(t) >= 0.9]}
    return [losses(right, some, over) | {"frames": n, "tau": name}
            for n, some in units.items() for name, over in sets.items() if over]  # fmt: skip


def losses(right: Right, units: list[str], taus: list[str]) -> Record:
    """Losses of both methods on some questions, each the mean over `taus`."""

    def lost(method: str) -> np.ndarray:
        kept = [[right[u, f"{method}:tau={t}"] for t in taus] for u in units]
        return np.array([right[u, "dense"] for u in units]) - np.mean(kept, axis=1)

    paper, plus = lost("zipvl"), lost("zipvl+")
    return {
        "questions": len(units), "paper": stats.mean(paper), "plus": stats.mean(plus),
        "saved": stats.mean(paper - plus), "over_half": stats.mean(plus - paper / 2),
    }  # fmt: skip


def paired(found: list[Record], frames: int) -> list[Record]:
    """The single variants against zipvl+ at the same tau, question by question."""
    mine, out = [r for r in found if r["frames"] == frames], []
    names = list(dict.fromkeys(r["method"] for r in mine))
    for method in names:
        base = f"zipvl+:tau={tau(method)}"
        if family(method) is None and base in names:
            choice = f"{short(method).partition(', tau')[0]}, tau {tau(method)}"
            out.append({"frames": frames, "method": method, "choice": choice,
                        "change": clips.difference(mine, method, base)})  # fmt: skip
    return out
