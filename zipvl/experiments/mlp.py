"""Item 10: tokens left out of a layer's attention skip its MLP as well (the paper's future work).

The engine knows nothing of it: each layer's plan is noted on its way out, and the MLP in its place
runs on the rows that attended. Text decoders only; loss and prefill time against tau.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.engine import Engine
from ..model.decoder import Block
from ..policy import Plan
from . import draw, text_tau
from .job import Job, Record, policy
from .text import TAIL, continuation, windows

TAUS = (0.9, 0.95, 0.99)
WHERE = {"dense MLP": 1.0, "skipped in the later half": 0.5, "skipped in all layers": 0.0}


class KeptMLP(nn.Module):
    """An MLP over the rows of the last plan only; zeros elsewhere, so the residual passes."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.kept = mlp, cast(Tensor | None, None)

    def forward(self, x: Tensor) -> Tensor:
        kept, self.kept = self.kept, None
        if kept is None:
            return self.mlp(x)
        return torch.zeros_like(x).index_copy(0, kept, self.mlp(x[kept]))


@contextmanager
def sparse_mlps(engine: Engine, start: float) -> Iterator[None]:
    """One prompt at a time: layers from share `start` of the depth on skip MLPs, too."""
    blocks, chunk = list(engine.model.text.blocks()), engine.chunk
    chosen = blocks[round(start * len(blocks)) :]
    engine.chunk = None  # the MLP must see all rows at once to know which is which
    for block in chosen:
        watch(block)
    try:
        yield
    finally:
        engine.chunk = chunk
        for block in chosen:
            block.mlp = cast(KeptMLP, block.mlp).mlp  # type: ignore[assignment]
            del block.self_attn.plan


def watch(block: Block) -> None:
    """Puts a KeptMLP in the block, and tells it which rows its attention kept."""
    mlp, plan = KeptMLP(block.mlp), block.self_attn.plan

    def noted(*args: Any) -> Plan:
        made = plan(*args)
        mlp.kept = made.attend
        return made

    block.mlp = mlp  # type: ignore[assignment]
    block.self_attn.plan = noted  # type: ignore[method-assign, assignment]


def run(job: Job) -> None:
    engine = job.engine
    some = windows(engine, job.tokens[0], job.samples, job.seed)
    methods = {f"{m}:always=last,tau={t} | {where}": (f"{m}:always=last,tau={t}", start)
               for m in ("zipvl", "zipvl+") for t in TAUS
               for where, start in WHERE.items()} | {"dense": ("dense", 1.0)}  # fmt: skip
    seconds: dict[str, list[float]] = {}

    def measure(ids: Any, method: str) -> list[Record]:
        name, start = methods[method]
        with sparse_mlps(engine, start):
            began = time.perf_counter()
            loss, out = continuation(engine, ids, policy(name))
            seconds.setdefault(method, []).append(time.perf_counter() - began)
        ratios = [s.ratio for s in out.layers]
        first = round(start * len(ratios))
        mlp = (first + sum(ratios[first:])) / len(ratios)
        work = [r**2 for r in ratios]
        return [{"loss": loss, "ratios": ratios, "mlp": mlp, "work": float(np.mean(work)),
                 "cached": float(np.mean(ratios))}]  # fmt: skip

    names = [m for m in methods if not job.methods or methods[m][0] in job.methods]
    units = map(str, range(job.samples))
    found = job.records(units, dict.fromkeys(("dense", *names)), lambda u: some[int(u[0])], measure)
    table = text_tau.rows(found)
    for row in table:
        row["mlp"] = float(np.mean([r["mlp"] for r in found if r["method"] == row["method"]]))
    timing = {"seconds_per_window": {m: round(float(np.median(s)), 2) for m, s in seconds.items()}}
    job.finish(table, text_tau.COLUMNS | {"mlp": "MLP rows"}, timing)
    with draw.panels(1, 2) as (fig, both):
        for axes, name in zip(both, ("zipvl", "zipvl+"), strict=True):
            for where in WHERE:
                mine = [r for r in table if r["method"].startswith(f"{name}:")
                        and r["method"].endswith(where)]  # fmt: skip
                draw.curve(axes, [100 * r["kept"] for r in mine], [r["extra"] for r in mine], where)
            axes.set(xlabel="tokens in attention, % (mean over layers)", title=name,
                     ylabel="extra loss, nats a token (95 %)")  # fmt: skip
            axes.legend()
        fig.suptitle(f"MLP sparsity ({job.settings()['model']}, {job.samples} windows of "
                     f"{job.tokens[0]} tokens, loss on the {TAIL} after)")  # fmt: skip
        fig.savefig(job.out / "figure.png")
