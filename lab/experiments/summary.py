"""Do means of what is evicted beat eviction alone, at equal bytes? A cache, the answer's tokens.

On clips the divergence (KL) of the answer's token distributions from dense, over the tokens of the
dense answer, each given those before it; on text the extra loss of what follows a prompt.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from zipvl.engine.inputs import Inputs
from zipvl.engine.run import Result
from zipvl.errors import UsageError

from ..eval.tasks import LARGEST, task_items
from . import clips, draw, stats
from .runner import Job, Record, policy
from .text import follow, windows
from .text import loss_after as text_loss

SIZES = (0, 8, 16, 32)
BUDGETS = (16, 24, 32, 48, 64, 96, 128, 160)  # of a prompt of 64 frames, 265 tokens
TEXT_BUDGETS = (48, 64, 96, 128, 192, 256, 384)
STREAM = (0.05, 0.2, 0.4, 0.6, 0.8)
COLUMNS = {
    "method": "method", "samples": "prompts", "kl": "KL from dense, nats (95 %)",
    "same": "same answer", "cache": "cache bytes", "evicting": "eviction alone needs",
}  # fmt: skip
TEXT_COLUMNS = {
    "method": "method", "samples": "windows", "kl": "extra loss, nats (95 %)",
    "cache": "cache bytes", "evicting": "eviction alone needs",
}  # fmt: skip


def methods(budgets: Sequence[int], window: int) -> list[str]:
    """Eviction at each budget, without and with summaries."""
    some = [f"snapkv:budget={b},window={window}" for b in budgets]
    some += [f"h2o:heavy={b - b // 2},recent={b // 2}" for b in budgets]
    some += [f"zipvl-stream:tau={t}" for t in STREAM]
    return [f"{m},summary={n}" if n else m for m in some for n in SIZES]


def kind(method: str) -> str:
    """Whose curve a method is on."""
    size = method.partition("summary=")[2]
    return method.split(":")[0] + (f", a slot for {size}" if size else "")


@torch.inference_mode()
def divergence(job: Job, inputs: Inputs, answer: list[int], method: str) -> tuple[Any, int]:
    """Log-probabilities [n - 1, V] of the answer behind its first token, and the cache's bytes."""
    out = job.engine.prefill([inputs], policy(method), 0, {})
    held, known = sum(cache.nbytes for cache in out.caches), torch.tensor(answer[:-1]).long()
    if not len(known):
        return torch.empty(0, job.engine.config.text.vocab_size), held
    hidden = follow(job.engine, out.caches, known.to(out.hidden.device), len(inputs))
    return job.engine.model.logits(hidden).log_softmax(-1), held


def run(job: Job) -> None:
    engine, frames = job.engine, job.frames[-1]
    items = task_items("all", frames, job.samples, job.seed)
    side = min(2 * engine.config.vision.media.size, LARGEST)

    def prepare(units: list[str]) -> tuple[Inputs, list[int], Any, int]:
        item = items[int(units[0])]
        inputs = engine.prepare(item.question, video=item.video(side).numpy(), frames=frames)
        answer = cast(Result, engine.generate(inputs, "dense", max_new_tokens=clips.ANSWER)).tokens
        return inputs, answer, *divergence(job, inputs, answer, "dense")

    def measure(ready: Any, method: str) -> list[Record]:
        inputs, answer, dense, most = ready
        got, held = divergence(job, inputs, answer, method)
        kl = (dense.exp() * (dense - got)).sum(-1).mean() if len(dense) else torch.zeros(())
        same = torch.equal(got.argmax(-1), dense.argmax(-1))
        return [{"kl": float(kl), "same": same, "cache": held / most, "tokens": len(answer)}]

    units = [str(i) for i in range(len(items))]
    found = job.records(units, job.methods or methods(BUDGETS, 8), prepare, measure)
    if not (found := [r for r in found if r["tokens"] > 1]):
        raise UsageError("no answer has more than its first token: ask more --samples")
    finish(job, found, COLUMNS, "KL from dense, nats", f"{frames} frames")


def run_text(job: Job) -> None:
    some = windows(job.engine, job.tokens[0], job.samples, job.seed)

    def prepare(units: list[str]) -> Any:
        ids = some[int(units[0])]
        return ids, text_loss(job.engine, ids, policy("dense"))

    def measure(ready: Any, method: str) -> list[Record]:
        ids, (dense, most) = ready
        loss, held = text_loss(job.engine, ids, policy(method))
        return [{"kl": loss - dense, "cache": held / most}]

    chosen = job.methods or [m for m in methods(TEXT_BUDGETS, 32) if not m.startswith("zipvl")]
    found = job.records(map(str, range(job.samples)), chosen, prepare, measure)
    finish(job, found, TEXT_COLUMNS, "extra loss, nats", f"{job.tokens[0]} tokens")


def finish(job: Job, found: list[Record], columns: dict[str, str], what: str, where: str) -> None:
    table = [
        {"method": key[0], "samples": len(some), "kl": stats.mean([r["kl"] for r in some]),
         "cache": clips.average(some, "cache")}
        | ({"same": stats.share([r["same"] for r in some])} if "same" in some[0] else {})
        for key, some in clips.grouped(found, "method").items()
    ]  # fmt: skip
    for row in table:
        row["evicting"] = evicting(row, table)
    job.finish(table, columns)
    names = list(dict.fromkeys(r["method"].split(":")[0] for r in table))
    with draw.panels(1, len(names), 4.6, 4) as (fig, axes):
        for one, name in zip(np.atleast_1d(axes), names, strict=True):
            mine = [r for r in table if r["method"].split(":")[0] == name]
            for curve in dict.fromkeys(kind(r["method"]) for r in mine):
                points = [r for r in mine if kind(r["method"]) == curve]
                x = [100 * r["cache"] for r in points]
                draw.curve(one, x, [r["kl"] for r in points], curve.removeprefix(f"{name}, "))
            one.set(title=name, xlabel="cache, % of dense", ylabel=f"{what} (95 %)", ylim=(0, None))
            one.legend()
        fig.suptitle(f"{job.settings()['model']} model, {where}, {table[0]['samples']} prompts")
        fig.savefig(job.out / "figure.png")


def evicting(row: Record, table: list[Record]) -> float | None:
    """The share of the cache at which eviction alone comes to the KL of a row with summaries,
    between two budgets on a straight line of log KL; None where no budget does."""
    name = row["method"].split(":")[0]
    if "summary=" not in row["method"]:
        return None
    plain = sorted((r for r in table if kind(r["method"]) == name), key=lambda r: r["cache"])
    worth = [np.log(max(1e-6, r["kl"]["value"])) for r in plain]
    aim = np.log(max(1e-6, row["kl"]["value"]))
    for i in range(len(plain) - 1):
        if worth[i] >= aim >= worth[i + 1]:
            share = (worth[i] - aim) / max(1e-9, worth[i] - worth[i + 1])
            less, more = plain[i]["cache"], plain[i + 1]["cache"]
            return float(less + share * (more - less))
    return None
