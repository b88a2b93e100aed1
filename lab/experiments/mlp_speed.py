"""Item 10, speed: seconds of a prefill when tokens left out of attention skip the MLP, too.

With a checkpoint: its own ratios by tau, on windows of text. Without: a decoder of Qwen2-0.5B's
shape with random weights, whose attention is flat, so that ratios are set instead. Time is the
process's CPU time a thread, for shared machines; so result.json changes from run to run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zipvl.engine.inputs import Inputs
from zipvl.model.decoder import Decoder, Prefilled

from ..bench.model import Model
from ..bench.timing import timed
from . import clips, draw, stats
from .job import Job, Record, policy
from .mlp import WHERE, everywhere, mlp_share, sparse_mlps
from .text import windows

SHAPE, LAYERS = "qwen2-0.5b", 2
TAUS, RATIOS = (0.9, 0.975), (0.25, 0.5, 0.75)
COLUMNS = {
    "method": "method", "samples": "prefills", "kept": "kept share", "mlp": "MLP rows",
    "seconds": "CPU seconds a thread (95 %)", "faster": "dense / this (95 %)",
    "gain": "with dense MLPs / this (95 %)",
}  # fmt: skip
Prefill = Callable[[Tensor, str], Prefilled]


def subject(job: Job) -> tuple[Decoder, Prefill, list[Tensor], list[str]]:
    """What is timed: a decoder, how to prefill it, prompts [T] and methods."""
    tokens = job.tokens[0]
    if job.model:
        engine = job.engine

        def prefill(ids: Tensor, method: str) -> Prefilled:
            inputs = Inputs(ids[:tokens], torch.zeros(tokens, dtype=torch.bool), [])
            return engine.prefill([inputs], policy(method), 1, {})

        some = windows(engine, tokens, job.samples, job.seed)
        return engine.model.text, prefill, some, [f"zipvl:always=last,tau={t}" for t in TAUS]
    model = Model(SHAPE, "cpu", torch.float32, "auto", LAYERS)
    chance = torch.Generator().manual_seed(job.seed)
    some = [torch.randint(model.config.vocab_size, (tokens,), generator=chance)
            for _ in range(job.samples)]  # fmt: skip
    return (model.decoder, lambda ids, method: model.prefill(ids, method, 1)[1], some,
            [f"fixed:ratio={r}" for r in RATIOS])  # fmt: skip


@torch.inference_mode()
def run(job: Job) -> None:
    decoder, prefill, some, names = subject(job)
    methods, device = everywhere(job.methods or names), next(decoder.parameters()).device

    def ready(units: list[str]) -> Tensor:
        prefill(some[int(units[0])], "dense")  # warm
        return some[int(units[0])]

    def measure(ids: Any, method: str) -> list[Record]:
        name, start = methods[method]
        last: list[Prefilled] = []
        with sparse_mlps(decoder, start):
            seconds = timed(device, "cpu", lambda: last.append(prefill(ids, name)))
        ratios = [s.ratio for s in last[0].layers]
        return [{"seconds": seconds, "ratios": ratios, "mlp": mlp_share(ratios, start)}]

    found = job.records(map(str, range(job.samples)), methods, ready, measure)
    table = rows(found, methods)
    what = job.settings()["model"] if job.model else f"{SHAPE} shape, {LAYERS} layers, random"
    job.finish(table, COLUMNS, subject=what)
    figure(job, table, what)


def rows(found: list[Record], methods: dict[str, tuple[str, float]]) -> list[Record]:
    """Seconds, and how often faster than dense, and than the same tokens with all MLP rows."""
    seconds = {(r["unit"], r["method"]): r["seconds"] for r in found}
    out = []
    for (method,), some in clips.grouped(found, "method").items():
        base = next(m for m in methods if methods[m] == (methods[method][0], 1.0))
        out.append({
            "method": method, "samples": len(some), "kept": clips.average(some, "ratios"),
            "mlp": clips.average(some, "mlp"), "seconds": stats.mean([r["seconds"] for r in some]),
            "faster": stats.mean([seconds[r["unit"], "dense"] / r["seconds"] for r in some]),
            "gain": stats.mean([seconds[r["unit"], base] / r["seconds"] for r in some]),
        })  # fmt: skip
    return out


def figure(job: Job, table: list[Record], what: str) -> None:
    with draw.panels(1, 1, 6.2, 4) as (fig, axes):
        dense = table[0]["seconds"]["value"]
        axes.axhline(dense, color="black", ls="--", lw=0.8, label="dense attention and MLPs")
        for where in WHERE:
            mine = [r for r in table if r["method"].endswith(where)]
            draw.curve(axes, [100 * r["kept"] for r in mine], [r["seconds"] for r in mine], where)
        axes.set(xlabel="tokens in attention, % (mean over layers)", ylim=(0, 1.15 * dense),
                 ylabel="prefill, CPU seconds a thread (95 %)")  # fmt: skip
        axes.legend(loc="lower right")
        size = f"{job.tokens[0]:,} tokens, {job.samples} prefills each"
        fig.suptitle(f"MLP sparsity: {what}\n{size}")
        fig.savefig(job.out / "figure.png")
