"""Every method of the catalogue side by side, at three budgets: what it answers, what it costs.

On clips the questions whose answers are several tokens (lists, counts), as methods that prefill
densely never touch the first token of an answer. On text the loss of ANSWER true tokens behind a
prompt, decoded one by one, so that whatever a method does at a decode step is done. Costs are
measured: the work of the prefill, and the bytes of the caches when the answer is complete.
"""

from typing import Any

import numpy as np
import torch

from zipvl.engine.inputs import Inputs
from zipvl.engine.stats import dense_work
from zipvl.policy import Policy
from zipvl.vision.family import Geometry, Media

from . import clips, draw, stats
from .methods import scatter
from .runner import Job, Record, policy
from .text import windows

BUDGETS = (0.1, 0.2, 0.4)  # s of a prompt's n tokens are k; h half of them
KINDS = ("list", "count")
ANSWER, QUESTION = 256, 32  # tokens of text decoded; of its prompt, the last ones count as text
NETWORK = "lab/results/methods/attnpred.safetensors"  # trained on the demo model
GRID: dict[str, tuple[str, ...]] = {  # templates for all budgets, or a setting for each
    "dense": (),
    # fewer tokens, or pairs of them, in the prefill
    "zipvl": ("tau=0.5", "tau=0.8", "tau=0.975"),
    "zipvl+": ("tau=0.5", "tau=0.8", "tau=0.975"),
    "zipvl-stream": ("tau=0.5", "tau=0.7", "tau=0.9"),
    "fixed": ("ratio={s}",),
    "random": ("ratio={s}",),
    "controls.py:Schedule": ("kept={s}/{s},by=random",),
    "hired": ("ratio={s}",),
    "visionzip_like": ("dominant=1,contextual=0", "dominant=1,contextual=1",
                       "dominant=2,contextual=1"),
    "vidcom2_like": ("ratio={s}",),
    "fastv": ("ratio=0.05", "ratio=0.25", "ratio=0.5"),
    "pyramiddrop": ("lam=0.15", "lam=0.4", "lam=0.65"),
    "sparsevlm": ("cuts=2:0.2/6:0.1/15:0.05", "cuts=2:0.5208/6:0.3472/15:0.191",
                  "cuts=2:0.8/6:0.6/15:0.4"),
    "sgl": ("ratio=0.05", "ratio=0.25", "ratio=0.5"),
    "minference_ref": ("vertical={h},slash={h}",),
    "flexprefill_ref": ("gamma=0.5,block=32,budget=32", "gamma=0.8,block=32,budget=32",
                        "gamma=0.95,block=32,budget=32"),
    "anchor_like": (),
    # a smaller cache behind a dense prefill
    "controls.py:RandomCache": ("ratio={s}",),
    "streaming": ("sinks=4,window={w}",),
    "h2o": ("heavy={h},recent={h}",),
    "snapkv": ("budget={k},window=16",),
    "examples/tova.py:TOVA": ("budget={k}",),
    "keyformer": ("ratio={s}",),
    "prefixkv": ("ratio={s}", "ratio={s},text=true"),
    "elastic": ("ratio={s}", "ratio={s},text=true"),
    "vlcache": ("ratio={s}",),
    "lookm": ("ratio={s}",),
    "scope": ("budget={k},window=16,answer=128,recent=64",),
    "think": ("ratio={s}", "ratio=0.6,budget={k},window=16"),
    "zipvl-quant": ("tau=0.5", "tau=0.8", "tau=0.975"),
    "zipcache": (),
    "kivi": ("kv_bits=2", "kv_bits=4", "kv_bits=8"),
    # a full cache, of which each step reads a part
    "tidal": ("budget={k}",),
    "attnpred_last": ("budget={f},sinks=16,local=16", "budget={f},sinks=16,local=16,ema=0.2"),
    "attnpred_reimpl": (f"budget={{f}},sinks=16,local=16,weights={NETWORK}",),
}  # fmt: skip
SEES = ("hired", "visionzip_like", "vidcom2_like", "anchor_like", "attnpred_reimpl")  # need clips
COLUMNS = {
    "method": "method", "samples": "questions", "accuracy": "right, % (95 %)",
    "change": "change from dense (95 %)", "list": "lists right", "count": "counts right",
    "prefill": "prefill work, % of dense", "kv_bytes": "cache bytes, % of dense",
}  # fmt: skip
TEXT_COLUMNS = {
    "method": "method", "samples": "windows", "extra": "extra loss, nats (95 %)",
    "prefill": "prefill work, % of dense", "kv_bytes": "cache bytes, % of dense",
}  # fmt: skip


def methods(tokens: int) -> list[str]:
    """The grid for a prompt of so many tokens."""
    found = []
    for name, settings in GRID.items():
        some = [
            f"{name}:{s}".format(**budget(share, tokens)) for s in settings for share in BUDGETS
        ]
        found += list(dict.fromkeys(some)) or [name]
    return found


def budget(share: float, tokens: int) -> dict[str, Any]:
    k = round(share * tokens)
    return {"s": share, "k": k, "h": k // 2, "w": k - 4, "f": max(48, k)}


def run(job: Job) -> None:
    [frames, *_] = job.frames
    tokens = len(job.engine.prepare("List all objects in order.", video=np.zeros(
        (frames, 8, 8, 3), np.uint8), frames=None))  # fmt: skip
    chosen, found = job.methods or methods(tokens), []
    for kind in KINDS:
        one = Job(job.name, job.out / kind, job.model, job.samples, job.seed, frames=(frames,),
                  loaded=job.loaded)  # fmt: skip
        found += [r | {"unit": f"{kind}/{r['unit']}"} for r in clips.records(one, chosen, kind)]
    dense = {r["unit"]: r for r in found if r["method"] == "dense"}
    table = []
    for (method,), some in clips.grouped(found, "method").items():
        base = [dense[r["unit"]] for r in some]
        right = {kind: [r["ok"] for r in some if r["kind"] == kind] for kind in KINDS}
        table.append({
            "method": label(method), "samples": len(some),
            "accuracy": stats.share([r["ok"] for r in some]),
            "change": stats.mean([float(r["ok"]) - d["ok"]
                                  for r, d in zip(some, base, strict=True)]),
            **{kind: float(np.mean(oks)) for kind, oks in right.items()},
            "prefill": clips.average(some, "prefill") / clips.average(base, "prefill"),
            "kv_bytes": clips.average(some, "kv_bytes") / clips.average(base, "kv_bytes"),
        })  # fmt: skip
    job.finish(table, COLUMNS, prompt=tokens, answer=clips.ANSWER)
    figure(job, table, "accuracy", 100, f"lists and counts right of {frames} frames, % (95 %)")


def run_text(job: Job) -> None:
    """Windows of a batch are decoded together, each as if it were alone."""
    [tokens, *_] = job.tokens
    engine = job.engine
    some = windows(engine, tokens, job.samples, job.seed, ANSWER)
    work = dense_work(engine.config.text, tokens, ends=True)

    def measure(ready: list[torch.Tensor], method: str) -> list[Record]:
        losses, out, held = forced(engine, ready, tokens, policy(method))
        return [
            {"loss": losses[b], "kv_bytes": held[b],
             "prefill": sum(layer.work[b] for layer in out.layers) / work}
            for b in range(len(ready))
        ]  # fmt: skip

    grid = [m for m in methods(tokens) if not m.startswith(SEES)]
    chosen = list(dict.fromkeys(("dense", *(job.methods or grid))))
    units = [str(i) for i in range(len(some))]
    found = job.records(
        units, chosen, lambda them: [some[int(u)] for u in them], measure, job.samples
    )
    groups = {key[0]: rows for key, rows in clips.grouped(found, "method").items()}
    table = [{
        "method": label(method), "samples": len(rows),
        "extra": stats.mean([r["loss"] - d["loss"]
                             for r, d in zip(rows, groups["dense"], strict=True)]),
        "prefill": clips.average(rows, "prefill"),
        "kv_bytes": clips.average(rows, "kv_bytes") / clips.average(groups["dense"], "kv_bytes"),
    } for method, rows in groups.items()]  # fmt: skip
    job.finish(table, TEXT_COLUMNS, answer=ANSWER, question=QUESTION,
               dense_loss=clips.average(groups["dense"], "loss"))  # fmt: skip
    figure(job, table, "extra", 1, f"extra loss of {ANSWER} decoded tokens, nats (95 %)")


@torch.inference_mode()
def forced(
    engine: Any, some: list[torch.Tensor], tokens: int, method: Policy
) -> tuple[Any, Any, Any]:
    """Windows [tokens + ANSWER]: mean loss of each one's answer, decoded token by token; what the
    prefill did; bytes of each one's caches at the end."""
    model, device, B = engine.model, engine.model.device, len(some)
    ids = torch.stack(some).to(device)  # [B, tokens + ANSWER]
    film = tokens - QUESTION
    inputs = []
    for window in ids:
        shown = model.text.embed_tokens(window[:film])
        media = [Media("video", torch.empty(0), Geometry(1, 1, frames=film), film, features=shown)]
        inputs.append(Inputs(window[:tokens].cpu(), torch.arange(tokens) < film, media))
    notes = engine.take_notes(inputs, method, ANSWER)
    out = engine.prefill(inputs, method, ANSWER, {}, notes, ends=True)
    hidden, loss = out.hidden, torch.zeros(B, device=device)
    for i in range(ANSWER):
        true = ids[:, tokens + i]
        loss += torch.nn.functional.cross_entropy(model.logits(hidden), true, reduction="none")
        if i + 1 < ANSWER:
            places = torch.full((B,), tokens + i, device=device)
            x = model.text.embed_tokens(true)
            hidden = model.text.decode(x, places, out.caches, method, engine.attend, notes)
    if not bool(torch.isfinite(loss).all()):
        raise FloatingPointError(f"{method} gives a loss that is no number")
    held = np.sum([cache.sequence_bytes() for cache in out.caches], axis=0).tolist()
    return (loss / ANSWER).tolist(), out, held


def figure(job: Job, table: list[Record], measure: str, scale: float, what: str) -> None:
    """Left who saves work in the prefill, against that; right who saves bytes, against them."""
    names = list(GRID)
    early = {label(name) for name in names[: names.index("controls.py:RandomCache")]}
    dense, *rows = (r | {"method": curve(r["method"])} for r in table)
    some = [r for r in rows if r["method"].partition(":")[0] in early]
    rest = [r for r in rows if r["method"].partition(":")[0] not in early]
    with draw.panels(1, 2, 7.2, 4.6) as (fig, axes):
        for one, mine, cost, name in zip(
            axes, (some, rest), ("prefill", "kv_bytes"),
            ("work of the whole prefill", "cache bytes"), strict=True,
        ):  # fmt: skip
            scatter(one, [dense, *mine], cost, measure, scale)
            one.set(xlabel=f"{name}, % of dense", ylabel=what)
            one.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
        fig.suptitle(f"side by side ({job.settings()['model']} model, {job.samples} samples)")
        fig.savefig(job.out / "figure.png")


def curve(method: str) -> str:
    """With its variant in front of the colon: settings that are no points of one curve."""
    for mark, name in (
        ("text=true", " text"),
        ("ema=", " mean"),
        ("ratio=0.6,budget", " + snapkv"),
    ):
        method = method.replace(":", f"{name}:", 1) if mark in method else method
    return method


def label(method: str) -> str:
    """As tables call it: controls are no methods of the catalogue."""
    for file in ("controls.py:", "examples/tova.py:"):
        method = method.removeprefix(file)
    return method
