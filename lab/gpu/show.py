"""Rows as lines, as table.md and as figures, the paper's own points beside them."""

from collections.abc import Iterator
from pathlib import Path

from ..bench.plot import Axes, draw_decode, names, of, ticks
from ..bench.timing import Row, spread
from ..palette import shrink

PAPER = {  # arXiv 2410.08584v1, figure 6, LongVA-7B on a card it does not name: tokens -> speed-up
    8192: 1.1, 16384: 1.1, 32768: 1.3, 65536: 1.6, 131072: 2.0, 200_000: 2.6,
}  # fmt: skip
PAPER_DECODE = 2.8  # version 2, tokens a second; batch, length and card are not given


def line(row: Row) -> str:
    """One row on the terminal."""
    parts = [row["key"]]
    if "seconds_per_step" in row:
        parts.append(f"{1000 * row['seconds_per_step']:.3g} ms a step")
        parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    elif "seconds" in row:
        parts.append(f"{spread(row['seconds'])} s, {row['layers']} layers, {row['attention']}")
    if "ask" in row:
        asked = spread([1000 * s for s in row["ask"]])
        parts.append(f"{asked} ms, {row['of prefill']:.2%} of a prefill of {row['prefill']:.3g} s")
    parts += [f"{row[key]:.2f}x {key}" for key in row if key.startswith("over ")]
    parts += [f"{row['allowed']:.2f}x allowed"] if "allowed" in row else []
    if "share" in row:
        parts.append(f"{row['share']:.0%} of the {'floor' if 'floor' in row else 'bandwidth'}")
    if "peak" in row:
        parts.append(f"peak {row['peak'] / 2**30:.2f} GiB, {row['layers']} layers")
    parts += [f"{row[what]} {what}" for what in ("passed", "failed") if what in row]
    parts += [f"{what}: {row[what]}" for what in ("skipped", "error") if what in row]
    return " | ".join(parts)


def cells(*values: object) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def head(*titles: str) -> list[str]:
    return ["", cells(*titles), "|" + "---|" * len(titles)]


def times(row: Row, key: str) -> str:
    return f"{row[key]:.2f}x" if key in row else ""


def table(env: Row, rows: list[Row]) -> str:
    """table.md: what was measured, by kind, and what was not, with the reason."""
    good = [r for r in rows if not {"error", "skipped"} & {*r}]
    kinds = {kind: [r for r in good if r["bench"] == kind] for kind in ("prefill", "decode")}
    out = [
        f"{env['card']}, capability {env['capability']}, driver {env['driver']}, torch "
        f"{env['torch']}, CUDA {env['cuda']}, triton {env['triton']}, attention {env['kernels']}, "
        f"{env['date']}. A copy moves {env['bandwidth'] / 1e9:,.0f} GB/s, read and written; a "
        f"{env['dtype']} product {env['peak'] / 1e12:,.3g} TFLOP/s.",
        *prefill_table(sorted(kinds["prefill"], key=lambda r: r["tokens"])),
        *decode_table(sorted(kinds["decode"], key=lambda r: (r["tokens"], r["batch"]))),
        *extend_table([r for r in good if r["bench"] == "extend"]),
        *head("peak memory", "tokens", "layers", "GiB", "weights", "cache"),
        *(cells(r["run"], r["tokens"], r["layers"], *(f"{r[what] / 2**30:.2f}" for what in
                ("peak", "weights", "kv_bytes"))) for r in good if r["bench"] == "memory"),
        "",
        *(f"- {line(r)}" for r in rows if r["bench"] == "tests" or r not in good),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def prefill_table(rows: list[Row]) -> Iterator[str]:
    yield from head("prefill, tokens", "run", "layers", "seconds", "all layers", "a layer, ms",
                    "against dense", "against FA2", "allowed", "paper", "of the floor",
                    "stages, % of time")  # fmt: skip
    for r in rows:
        whole = sum(r["stages"].values())
        yield cells(
            f"{r['tokens']:,}", r["run"], r["layers"], spread(r["seconds"]),
            f"{r['seconds_all_layers']:.3g}", f"{1000 * r['seconds_per_layer']:.3g}",
            times(r, "over dense"), times(r, "over dense, FA2"), times(r, "allowed"),
            PAPER.get(r["tokens"], "") if "allowed" in r else "", f"{r['share']:.0%}",
            ", ".join(f"{k} {v / whole:.0%}" for k, v in r["stages"].items()),
        )  # fmt: skip


def decode_table(rows: list[Row]) -> Iterator[str]:
    yield from head("decode, tokens", "batch", "run", "ms a step", "tokens/s", "GB a step",
                    "of the bandwidth", f"equal memory (paper: {PAPER_DECODE}x)")  # fmt: skip
    for r in rows:
        yield cells(
            f"{r['tokens']:,}", r["batch"], r["run"], f"{1000 * r['seconds_per_step']:.3g}",
            f"{r['tokens_per_second']:.1f}", f"{r['moved'] / 1e9:.3g}", f"{r['share']:.0%}",
            times(r, "over dense"),
        )  # fmt: skip


def extend_table(rows: list[Row]) -> Iterator[str]:
    yield from head("a later question, tokens before it", "cache", "its tokens", "first token, ms",
                    "the prefill, s", "of it")  # fmt: skip
    for r in rows:
        asked = spread([1000 * s for s in r["ask"]])
        yield cells(f"{r['tokens']:,}", r["run"], r["question"], asked, f"{r['prefill']:.3g}",
                    f"{r['of prefill']:.2%}")  # fmt: skip


def figures(env: Row, rows: list[Row], folder: Path) -> None:
    """prefill.png and decode.png, where there are rows and matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: pip install matplotlib", flush=True)
        return
    steps = [r for r in rows if "steps" in r and "cache" not in r and "bits" not in r["run"]]
    steps.sort(key=lambda r: r["run"])  # one colour a run in all panels
    by_batch = [[r for r in steps if r["batch"] == b] for b in sorted({r["batch"] for r in steps})]
    faster = [r for r in rows if "allowed" in r]
    for name, draw, panels in (("prefill", draw_faster, [faster] if faster else []),
                               ("decode", draw_decode, by_batch)):  # fmt: skip
        if panels:
            size = (6 if len(panels) == 1 else 4 * len(panels), 3.8)
            figure = Figure(figsize=size, dpi=100, layout="constrained")
            FigureCanvasAgg(figure)
            for axes, some in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                  strict=True):  # fmt: skip
                draw(axes, some)
                axes.grid(alpha=0.3)
                axes.legend(fontsize=7)
            title = ", ".join(env[key] for key in ("shape", "dtype", "card", "date"))
            figure.suptitle(title, fontsize=8)
            figure.savefig(folder / f"{name}.png")
            shrink(folder / f"{name}.png")


def draw_faster(axes: Axes, rows: list[Row]) -> None:
    for run in names(rows):
        some = of(rows, run)
        x = [r["tokens"] for r in some]
        [drawn] = axes.plot(x, [r["over dense"] for r in some], "o-", label=run)
        axes.plot(x, [r["allowed"] for r in some], ":", color=drawn.get_color())
    axes.plot([*PAPER], [*PAPER.values()], "ks--", label="the paper's ZipVL, its own card")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="prompt tokens",
             ylabel="prefill, faster than dense (dotted: allowed)")  # fmt: skip
    ticks(axes, rows)
