"""Tokens left out of a layer's attention skip its MLP as well (the paper's future work).

The engine knows nothing of it: each layer's plan is noted on its way out, and the MLP in its place
runs on the rows that attended. Three measures: the loss of a text decoder, accuracy on clips, and
the time of a prefill.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from zipvl.engine.engine import Result
from zipvl.engine.inputs import Inputs
from zipvl.engine.stats import Counted
from zipvl.model.batch import Batch
from zipvl.model.cache import Cache
from zipvl.model.decoder import Block, Decoder
from zipvl.policy import Plan

from ..bench.model import Model
from ..bench.timing import timed
from . import clips, draw, stats
from .runner import Job, Record, policy
from .tau import LOSS_COLUMNS, loss_rows
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
            del block.self_attn.prefill


def watch(block: Block) -> None:
    """Puts a KeptMLP in the block, and tells it which rows its attention kept."""
    mlp, prefill = KeptMLP(block.mlp), block.self_attn.prefill

    def noted(x: Tensor, batch: Batch, *rest: Any) -> tuple[Tensor, list[Plan], Cache | None]:
        out, plans, cache = prefill(x, batch, *rest)
        for plan, length in zip(plans, batch.spans.lengths, strict=True):
            mlp.note(plan, length)
        return out, plans, cache

    block.mlp = mlp  # type: ignore[assignment]
    block.self_attn.prefill = noted  # type: ignore[method-assign, assignment]


def everywhere(methods: Iterable[str]) -> dict[str, tuple[str, float]]:
    """Each method with each choice of WHERE, by `method | where`; dense for comparison."""
    made = {f"{m} | {where}": (m, start) for m in methods for where, start in WHERE.items()}
    return {"dense": ("dense", 1.0)} | made


def mlp_share(ratios: list[float], start: float) -> float:
    """MLP rows that are computed, as a share, when `ratios` of the tokens attend in each layer."""
    first = round(start * len(ratios))
    return (first + sum(ratios[first:])) / len(ratios)


# --- loss on text ---------------------------------------------------------------------------------


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
    table = loss_rows(found)
    for row in table:
        row["mlp"] = float(np.mean([r["mlp"] for r in found if r["method"] == row["method"]]))
    job.finish(table, LOSS_COLUMNS | {"mlp": "MLP rows"})
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


# --- accuracy on clips ----------------------------------------------------------------------------

CLIP_TAUS = (0.5, 0.8, 0.9, 0.975)
CLIP_METHODS = tuple(f"{m}:tau={t}" for m in ("zipvl", "zipvl+") for t in CLIP_TAUS)
DENSE_MLP = next(iter(WHERE))


def run_clips(job: Job) -> None:
    methods = everywhere(job.methods or CLIP_METHODS)

    def ask(asked: list[Inputs], method: str) -> list[Result]:
        name, start = methods[method]
        with sparse_mlps(job.engine.model.text, start):
            return clips.answer(job.engine, asked, name)

    found = clips.records(job, list(methods), ask=ask)
    table = clips.rows(found)
    for row in table:
        name, start = methods[row["method"]]
        row["mlp"] = mlp_share(row["kept_per_layer"], start)
        if name != "dense":
            mine = [r for r in found if r["frames"] == row["frames"]]
            row["skip"] = clips.difference(mine, row["method"], f"{name} | {DENSE_MLP}")
    more = {"mlp": "MLP rows", "skip": "change from dense MLPs (95 %)"}
    job.finish(table, clips.COLUMNS | more)
    clip_figure(job, [r for r in table if r["frames"] == job.frames[-1]])


def clip_figure(job: Job, table: list[Record]) -> None:
    dense = 100 * table[0]["accuracy"]["value"]
    families = list(dict.fromkeys(r["method"].split(":")[0] for r in table[1:]))
    with draw.panels(1, len(families), 5.2) as (fig, axes):
        for one, name in zip(np.atleast_1d(axes), families, strict=True):
            one.axhline(dense, color="black", ls="--", lw=0.8, label="dense attention and MLPs")
            for i, where in enumerate(WHERE):
                mine = [r for r in table if r["method"].startswith(f"{name}:")
                        and r["method"].endswith(where)]  # fmt: skip
                x = [100 * r["kept"] + 0.7 * (i - 1) for r in mine]
                draw.curve(one, x, [r["accuracy"] for r in mine], where, 100)
            one.set(xlabel="tokens in attention, % (mean over layers)", title=name, ylim=(0, 102),
                    ylabel="exact answers, % (95 %)")  # fmt: skip
            one.legend(loc="lower right")
        fig.suptitle(clips.title(job, f"MLP sparsity, {job.frames[-1]} frames"))
        fig.savefig(job.out / "figure.png")


# --- time -----------------------------------------------------------------------------------------

# With a checkpoint: its own ratios by tau, on windows of text. Without: a decoder of Qwen2-0.5B's
# shape with random weights, whose attention is flat, so that ratios are set instead. Time is the
# process's CPU time a thread, for shared machines; so result.json changes from run to run.

SHAPE, LAYERS = "qwen2-0.5b", 2
SPEED_TAUS, RATIOS = (0.9, 0.975), (0.25, 0.5, 0.75)
SPEED_COLUMNS = {
    "method": "method", "samples": "prefills", "kept": "kept share", "mlp": "MLP rows",
    "seconds": "CPU seconds a thread (95 %)", "faster": "dense / this (95 %)",
    "gain": "with dense MLPs / this (95 %)",
}  # fmt: skip
Prefill = Callable[[Tensor, str], Counted]


def subject(job: Job) -> tuple[Decoder, Prefill, list[Tensor], list[str]]:
    """What is timed: a decoder, how to prefill it, prompts [T] and methods."""
    tokens = job.tokens[0]
    if job.model:
        engine = job.engine

        def prefill(ids: Tensor, method: str) -> Counted:
            inputs = Inputs(ids[:tokens], torch.zeros(tokens, dtype=torch.bool), [])
            return engine.prefill([inputs], policy(method), 1, {})

        some = windows(engine, tokens, job.samples, job.seed)
        return engine.model.text, prefill, some, [f"zipvl:always=last,tau={t}" for t in SPEED_TAUS]
    model = Model(SHAPE, "cpu", torch.float32, "auto", LAYERS)
    chance = torch.Generator().manual_seed(job.seed)
    some = [torch.randint(model.config.vocab_size, (tokens,), generator=chance)
            for _ in range(job.samples)]  # fmt: skip
    return (model.decoder, lambda ids, method: model.prefill(ids, method, 1)[1], some,
            [f"fixed:ratio={r}" for r in RATIOS])  # fmt: skip


@torch.inference_mode()
def run_speed(job: Job) -> None:
    decoder, prefill, some, names = subject(job)
    methods, device = everywhere(job.methods or names), next(decoder.parameters()).device

    def ready(units: list[str]) -> Tensor:
        prefill(some[int(units[0])], "dense")  # warm
        return some[int(units[0])]

    def measure(ids: Any, method: str) -> list[Record]:
        name, start = methods[method]
        last: list[Counted] = []
        with sparse_mlps(decoder, start):
            seconds = timed(device, "cpu", lambda: last.append(prefill(ids, name)))
        ratios = [s.ratio for s in last[0].layers]
        return [{"seconds": seconds, "ratios": ratios, "mlp": mlp_share(ratios, start)}]

    found = job.records(map(str, range(job.samples)), methods, ready, measure)
    table = speed_rows(found, methods)
    what = job.settings()["model"] if job.model else f"{SHAPE} shape, {LAYERS} layers, random"
    job.finish(table, SPEED_COLUMNS, subject=what)
    speed_figure(job, table, what)


def speed_rows(found: list[Record], methods: dict[str, tuple[str, float]]) -> list[Record]:
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


def speed_figure(job: Job, table: list[Record], what: str) -> None:
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
