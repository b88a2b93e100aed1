"""Figures in one style: small PNG, axes with units, intervals as bars or bands."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from zipvl.errors import UsageError

from ..eval.report import coloured_table


@contextmanager
def panels(rows: int, columns: int, width: float = 5.2, height: float = 3.9) -> Iterator[tuple]:
    """(figure, axes), closed afterwards; without matplotlib a UsageError says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'zipvl[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110,
             "axes.spines.top": False, "axes.spines.right": False,
             "legend.frameon": False, "legend.fontsize": 8}  # fmt: skip
    with plt.rc_context(style):
        fig, axes = plt.subplots(
            rows, columns, figsize=(width * columns, height * rows), layout="constrained"
        )
        yield fig, axes
        plt.close(fig)


def spread(of: Sequence[dict[str, float]], scale: float = 1.0) -> tuple[list[float], list]:
    """Values and the lengths of their error bars, below and above."""
    values = [scale * v["value"] for v in of]
    below = [max(0.0, y - scale * v["low"]) for y, v in zip(values, of, strict=True)]
    above = [max(0.0, scale * v["high"] - y) for y, v in zip(values, of, strict=True)]
    return values, [below, above]


def curve(axes: Any, x: Sequence[float], y: Sequence[dict[str, float]], label: str,
          scale: float = 1.0, **style: Any) -> None:  # fmt: skip
    """Points in order of x with their intervals, joined."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    values, bars = spread([y[i] for i in order], scale)
    usual = {"marker": "o", "ms": 4, "capsize": 2, "lw": 1.4, "elinewidth": 0.8}
    axes.errorbar([x[i] for i in order], values, yerr=bars, label=label, **usual | style)


def bars(axes: Any, table: Sequence[dict[str, Any]], measure: str, label: str,
         scale: float = 100.0) -> None:  # fmt: skip
    """One measure of every row, named by its `choice`, with intervals, downwards."""
    values, bar = spread([r[measure] for r in table], scale)
    place = [-i for i in range(len(table))]
    axes.barh(place, values, xerr=bar, capsize=2, color="C0", alpha=0.75, height=0.65)
    axes.set_yticks(place, [r["choice"].split(": ")[-1] for r in table])
    axes.set(xlabel=label)


def points(axes: Any, series: Mapping[str, Sequence[dict[str, Any]]], measure: str, label: str,
           scale: float = 100.0) -> None:  # fmt: skip
    """One measure of several tables with the same `choice`s, side by side, downwards."""
    for i, (name, table) in enumerate(series.items()):
        values, bar = spread([r[measure] for r in table], scale)
        place = [-k - 0.3 * (i - (len(series) - 1) / 2) for k in range(len(table))]
        axes.errorbar(values, place, xerr=bar, fmt="o", ms=4, capsize=2, lw=1, label=name)
        axes.set_yticks(range(0, -len(table), -1), [r["choice"].split(": ")[-1] for r in table])
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel=label)
    axes.legend()


def heat(axes: Any, cells: Sequence[Sequence[float]], down: Sequence[str], across: Sequence[str],
         title: str) -> None:  # fmt: skip
    """Percentages as a coloured table."""
    coloured_table(axes, cells, 100)
    axes.grid(False)
    axes.set_xticks(range(len(across)), across, rotation=45)
    axes.set_yticks(range(len(down)), down)
    axes.set(title=title)
