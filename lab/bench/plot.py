"""Figures from the raw JSON of bench.py, so that they can be drawn again:

python -m lab.bench.plot lab/results/*.json --out lab/results
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zipvl.errors import UsageError

from ..command import Parser, ended
from .timing import Row

Axes = Any


def of(rows: list[Row], run: str) -> list[Row]:
    return sorted((r for r in rows if r["run"] == run), key=lambda r: r["tokens"])


def names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r["run"] for r in rows))


def seconds(row: Row) -> float:
    return statistics.median(row["seconds"])


def bars(rows: list[Row], scale: float = 1.0) -> list[list[float]]:
    """How far minimum and maximum lie from the median, for matplotlib's error bars."""
    low = [(seconds(r) - min(r["seconds"])) * scale for r in rows]
    return [low, [(max(r["seconds"]) - seconds(r)) * scale for r in rows]]


def free_attention(dense: Row) -> float:
    """Seconds of a dense prefill without its attention stage, by the stage shares of its last run.

    A guide, not a bound: a sparse run also skips projections of tokens that it leaves out.
    """
    return seconds(dense) * (1 - dense["share"]["attend"])


def draw_time(axes: Axes, rows: list[Row]) -> None:
    for run in names(rows):
        some = of(rows, run)
        axes.errorbar(
            [r["tokens"] for r in some], [seconds(r) for r in some], bars(some), marker="o",
            capsize=3, label=run,
        )  # fmt: skip
    dense = of(rows, "dense")
    if dense:
        axes.plot(
            [r["tokens"] for r in dense], [free_attention(r) for r in dense], "k--",
            label="dense, were attention free",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="prefill, seconds")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(lambda y, _: f"{y:g}")  # 2 and 3, where a log axis writes 2 x 10^0
    ticks(axes, rows)


def draw_speedup(axes: Axes, rows: list[Row]) -> None:
    for dense in of(rows, "dense"):
        tokens = dense["tokens"]
        some = [r for r in rows if r["tokens"] == tokens and "ratio" in r]
        some.sort(key=lambda r: r["ratio"])
        [line] = axes.plot(
            [r["ratio"] for r in some], [seconds(dense) / seconds(r) for r in some], "o-",
            label=f"{tokens} tokens",
        )  # fmt: skip
        free = seconds(dense) / free_attention(dense)
        axes.axhline(free, color=line.get_color(), linestyle="--", linewidth=1)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xlabel="share of tokens kept (dashed: were attention free)", ylabel="faster than dense"
    )
    axes.set_xlim(0, 1.05)


def draw_decode(axes: Axes, rows: list[Row]) -> None:
    for batch in sorted({r["batch"] for r in rows}):
        for run in names(rows):
            some = [r for r in of(rows, run) if r["batch"] == batch]
            axes.errorbar(
                [r["tokens"] for r in some], [1000 * r["seconds_per_step"] for r in some],
                bars(some, 1000 / some[0]["steps"]), marker="o", capsize=3,
                label=f"{run}, batch {batch}",
            )  # fmt: skip
    axes.set(xscale="log", xlabel="tokens of context", ylabel="ms a step")
    axes.set_ylim(bottom=0)
    ticks(axes, rows)


def draw_batch(axes: Axes, rows: list[Row]) -> None:
    for run in names(rows):
        for tokens in sorted({r["tokens"] for r in rows}):
            some = [r for r in rows if r["run"] == run and r["tokens"] == tokens]
            axes.plot(
                [r["batch"] for r in some], [r["tokens_per_second"] for r in some], "o-",
                label=f"{run}, prompts up to {tokens}",
            )  # fmt: skip
    axes.set(xlabel="sequences in the batch", ylabel="tokens a second")
    axes.set_ylim(bottom=0)


def draw_e2e(axes: Axes, rows: list[Row]) -> None:
    labels = [f"{r['run']}, {r['frames']} frames" for r in rows]
    left = [0.0] * len(rows)
    for stage in rows[0]["stages"]:
        spent = [r["stages"][stage] for r in rows]
        axes.barh(labels, spent, left=left, label=stage)
        left = [a + b for a, b in zip(left, spent, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds")


def draw_memory(axes: Axes, rows: list[Row]) -> None:
    measured = [r for r in rows if "measured" in r]
    for run in names(measured):
        some = of(measured, run)
        x = [r["tokens"] for r in some]
        [line] = axes.plot(x, [r["measured"] / 1e6 for r in some], "o-", label=f"{run}, measured")
        formula = [r["formula"]["total"] / 1e6 for r in some]
        axes.plot(x, formula, "--", color=line.get_color(), label=f"{run}, formula")
    axes.set(xlabel="prompt tokens", ylabel="peak of a prefill, MB")
    axes.set_ylim(bottom=0)


def ticks(axes: Axes, rows: list[Row]) -> None:
    at = sorted({r["tokens"] for r in rows})
    axes.set_xticks(at, [f"{n:,}" for n in at])
    axes.set_xticks([], minor=True)


Draw = Callable[[Axes, list[Row]], None]
FIGURES: dict[str, dict[str, Draw]] = {  # rows of a benchmark -> file names
    "prefill": {"prefill_time": draw_time, "prefill_speedup": draw_speedup},
    "decode": {"decode_context": draw_decode},
    "batch": {"decode_batch": draw_batch},
    "e2e": {"e2e_stages": draw_e2e},
    "memory": {"prefill_memory": draw_memory},
}


def draw(reports: list[dict], folder: Path) -> list[Path]:
    """A PNG for each figure that a report's rows allow, named after benchmark, shape and dtype."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'zipvl[plot]'") from None
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for report in joined(reports):
        rows, about = report["rows"], report["machine"]
        for name, paint in FIGURES.get(rows[0]["bench"], {}).items():
            figure = Figure(figsize=(6, 3.8), dpi=100, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            paint(axes, rows)
            layers = f", {report['layers']} layers" if report.get("layers") else ""
            axes.set_title(
                f"{report['shape']}{layers}, {report['dtype']}, {about['gpu'] or about['cpu']} "
                f"({about['threads']} threads), {about['date']}", fontsize=8,
            )  # fmt: skip
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
            made.append(folder / f"{name}_{report['shape']}_{report['dtype']}.png")
            figure.savefig(made[-1])
    return made


def joined(reports: list[dict]) -> list[dict]:
    """Reports of the same benchmark on the same model as one."""
    out: dict[tuple, dict] = {}
    for report in reports:
        key = report["rows"][0]["bench"], report["shape"], report["dtype"], report.get("layers")
        before = out.get(key, report | {"rows": []})
        out[key] = before | {"rows": before["rows"] + report["rows"]}
    return list(out.values())


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("reports", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        reports = [json.loads(p.read_text(encoding="utf-8")) for p in args.reports]
        made = draw(reports, args.out)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UsageError("give JSON files that bench.py wrote with --out") from None
    for path in made:
        print(path)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
