"""Counts to accuracies with intervals, a markdown table, and V-NIAH's heat map."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipvl.errors import UsageError


@dataclass(frozen=True)
class Answer:
    """One answer of one method to one item."""

    method: str
    frames: int
    group: str
    question: str
    right: str
    given: str
    ok: bool
    chance: float
    prompt_tokens: int
    ratios: list[float]  # kept share of each layer
    kv_bytes: int
    prefill_seconds: float
    decode_seconds: float


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): sound for few samples and near 0 or 1."""
    if count == 0:
        return 0.0, 1.0
    p, zz = right / count, z * z
    middle = (p + zz / (2 * count)) / (1 + zz / count)
    half = z * math.sqrt(p * (1 - p) / count + zz / (4 * count * count)) / (1 + zz / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean(values: Iterable[float]) -> float:
    some = list(values)
    return sum(some) / max(1, len(some))


def table(answers: list[Answer]) -> list[dict[str, Any]]:
    """A row for every frame count, method and group, and for all groups together with its costs.

    `hits` has a 1 or 0 for every item in their order, so that methods can be compared in pairs.
    """
    cells: dict[tuple[int, str, str], list[Answer]] = defaultdict(list)
    for a in answers:
        cells[a.frames, a.method, "all"].append(a)
        cells[a.frames, a.method, a.group].append(a)
    rows = []
    for (frames, method, group), some in cells.items():
        right = sum(a.ok for a in some)
        low, high = wilson(right, len(some))
        row: dict[str, Any] = {
            "frames": frames, "method": method, "group": group, "samples": len(some),
            "accuracy": right / len(some), "low": low, "high": high,
            "chance": mean(a.chance for a in some),
        }  # fmt: skip
        costs = {
            "prompt_tokens": mean(a.prompt_tokens for a in some),
            "kept": mean(mean(a.ratios) for a in some),
            "kept_per_layer": [mean(r) for r in zip(*(a.ratios for a in some), strict=True)],
            "kv_bytes": mean(a.kv_bytes for a in some),
            "prefill_seconds": mean(a.prefill_seconds for a in some),
            "decode_seconds": mean(a.decode_seconds for a in some),
            "hits": "".join("01"[a.ok] for a in some),
        }  # fmt: skip
        rows.append(row | costs if group == "all" else row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of all groups, then accuracy by group. Times are left out: they change every run."""
    lines = [
        "| frames | method | accuracy % (95 %) | chance % | kept % | cache kB | prompt tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["group"] == "all":
            lines.append(
                f"| {r['frames']} | {r['method']} | {100 * r['accuracy']:.1f} "
                f"({100 * r['low']:.1f} to {100 * r['high']:.1f}) | {100 * r['chance']:.1f} | "
                f"{100 * r['kept']:.1f} | {r['kv_bytes'] / 1000:.1f} | {r['prompt_tokens']:.0f} |"
            )
    groups = list(dict.fromkeys(r["group"] for r in rows))
    lines += ["", f"| frames | method | {' | '.join(groups)} |", "|---" * (len(groups) + 2) + "|"]
    share = {(r["frames"], r["method"], r["group"]): r["accuracy"] for r in rows}
    for frames, method in dict.fromkeys((r["frames"], r["method"]) for r in rows):
        cells = [share.get((frames, method, g)) for g in groups]
        shown = ["" if c is None else f"{100 * c:.0f}" for c in cells]
        lines.append(f"| {frames} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def coloured_table(axes: Any, cells: Sequence[Sequence[float]], most: float) -> Any:
    """Cells from 0 to `most` in colours that colour-blind readers tell apart, too, and numbers that
    stand out from them; none where there is no value. Returns the image."""
    image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ink = "white" if value < 0.48 * most else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=ink)
    return image


def heat_map(rows: list[dict[str, Any]], method: str, path: Path) -> None:
    """Accuracy by needle depth (down) and video length (across), as LongVA draws V-NIAH."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("the heat map needs matplotlib: pip install 'zipvl[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    mine = [r for r in rows if r["method"] == method and r["group"] != "all"]
    lengths = sorted({r["frames"] for r in mine})
    depths = list(dict.fromkeys(r["group"] for r in mine))
    share = {(r["group"], r["frames"]): 100 * r["accuracy"] for r in mine}
    grid = [[share.get((d, n), math.nan) for n in lengths] for d in depths]
    figure, axes = plt.subplots(figsize=(2 + len(lengths), 3.2), layout="constrained")
    image = coloured_table(axes, grid, 100)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [d.removeprefix("depth ") for d in depths])
    axes.set(xlabel="frames", ylabel="depth of the needle", title=method)
    figure.colorbar(image, label="found, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)
