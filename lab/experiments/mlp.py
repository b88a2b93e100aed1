"""Item 10: tokens left out of a layer's attention skip its MLP as well (the paper's future work).

The engine knows nothing of it: each layer's plan is noted on its way out, and the MLP in its place
runs on the rows that attended. Here: the loss of a text decoder; `mlp_clips` has accuracy on clips,
`mlp_speed` the time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from zipvl.model.decoder import Block, Decoder
from zipvl.model.pack import Pack
from zipvl.policy import Plan

from . import draw, text_tau
from .job import Job, Record, policy
from .text import TAIL, continuation, windows

TAUS = (0.9, 0.95, 0.99)
WHERE = {"dense MLP": 1.0, "skipped in the later half": 0.5, "skipped in all layers": 0.0}


class KeptMLP(nn.Module):
    """An MLP over the rows of the last plans only; zeros elsewhere, so the residual passes."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.waiting = mlp, torch.zeros(0, dtype=torch.bool)

    def note(self, plan: Plan, length: int) -> None:
        """`plan` is that of the next `length` rows."""
        kept = torch.ones(length, dtype=torch.bool)
        if plan.attend is not None:
            kept = torch.zeros_like(kept).index_fill(0, plan.attend.cpu(), True)
        self.waiting = torch.cat((self.waiting, kept))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C]: a prompt, a batch of them or a part; new tokens, which no plan is about."""
        kept, self.waiting = self.waiting[: len(x)], self.waiting[len(x) :]
        if bool(kept.all()):
            return self.mlp(x)
        rows = kept.nonzero()[:, 0].to(x.device)
        return torch.zeros_like(x).index_copy(0, rows, self.mlp(x[rows]))


@contextmanager
def sparse_mlps(decoder: Decoder, start: float) -> Iterator[None]:
    """Layers from share `start` of the depth on skip MLPs, too."""
    blocks = list(decoder.blocks())
    chosen = blocks[round(start * len(blocks)) :]
    for block in chosen:
        watch(block)
    try:
        yield
    finally:
        for block in chosen:
            block.mlp = cast(KeptMLP, block.mlp).mlp  # type: ignore[assignment]
            del block.self_attn.plan


def watch(block: Block) -> None:
    """Puts a KeptMLP in the block, and tells it which rows its attention kept."""
    mlp, plan = KeptMLP(block.mlp), block.self_attn.plan

    def noted(x: Tensor, k: Tensor, pack: Pack, b: int, *rest: Any) -> Plan:
        made = plan(x, k, pack, b, *rest)
        mlp.note(made, pack.spans.lengths[b])
        return made

    block.mlp = mlp  # type: ignore[assignment]
    block.self_attn.plan = noted  # type: ignore[method-assign, assignment]


def everywhere(methods: Iterable[str]) -> dict[str, tuple[str, float]]:
    """Each method with each choice of WHERE, by `method | where`; dense for comparison."""
    made = {f"{m} | {where}": (m, start) for m in methods for where, start in WHERE.items()}
    return {"dense": ("dense", 1.0)} | made


def mlp_share(ratios: list[float], start: float) -> float:
    """MLP rows that are computed, as a share, when `ratios` of the tokens attend in each layer."""
    first = round(start * len(ratios))
    return (first + sum(ratios[first:])) / len(ratios)


def run(job: Job) -> None:
    engine = job.engine
    some = windows(engine, job.tokens[0], job.samples, job.seed)
    methods = everywhere([f"{m}:always=last,tau={t}" for m in ("zipvl", "zipvl+") for t in TAUS])

    def measure(ids: Any, method: str) -> list[Record]:
        name, start = methods[method]
        with sparse_mlps(engine.model.text, start):
            loss, out = continuation(engine, ids, policy(name))
        ratios = [s.ratio for s in out.layers]
        work = [r**2 for r in ratios]
        return [{"loss": loss, "ratios": ratios, "mlp": mlp_share(ratios, start),
                 "work": float(np.mean(work)), "cached": float(np.mean(ratios))}]  # fmt: skip

    names = [m for m in methods if not job.methods or methods[m][0] in job.methods]
    names = list(dict.fromkeys(("dense", *names)))
    units = map(str, range(job.samples))
    found = job.records(units, names, lambda u: some[int(u[0])], measure)
    table = text_tau.rows(found)
    for row in table:
        row["mlp"] = float(np.mean([r["mlp"] for r in found if r["method"] == row["method"]]))
    job.finish(table, text_tau.COLUMNS | {"mlp": "MLP rows"})
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
