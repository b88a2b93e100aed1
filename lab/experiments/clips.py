"""Answers of methods to questions about clips of the demo world, and rows made of them."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.engine.run import Result

from ..eval.tasks import LARGEST, Item, same_answer, task_items
from . import stats
from .runner import Job, Record, policy

ANSWER, BATCH = 20, 16  # new tokens at most; questions asked at once
COLUMNS = {
    "frames": "frames", "method": "method", "samples": "questions",
    "accuracy": "accuracy (95 %)", "change": "change from dense (95 %)", "kept": "kept share",
    "visual": "visual kept", "work": "attention work", "prefill": "prefill work",
    "kv_bytes": "cache bytes",
}  # fmt: skip


Ask = Callable[[list[Inputs], str], list[Result]]


def records(job: Job, methods: Sequence[str], task: str = "all",
            extra: dict[str, Callable[[Any], Record]] | None = None,
            ask: Ask | None = None) -> list[Record]:  # fmt: skip
    """Every method's answer to `samples` questions for each frame count, dense always among them.

    `unit` is FRAMES/NUMBER; `visual` the share of visual tokens kept in each layer, for methods
    that keep all text. `extra` are measurements of the prompts other than answers. `ask` answers a
    batch in an experiment's own way.
    """
    engine, special = job.engine, extra or {}
    items = {f"{n}/{i}": item for n in job.frames
             for i, item in enumerate(task_items(task, n, job.samples, job.seed))}  # fmt: skip
    side = min(2 * engine.config.vision.media.size, LARGEST)

    def prepare(units: list[str]) -> list[tuple[Item, Any]]:
        ready = []
        for item in (items[unit] for unit in units):
            video = item.video(side).numpy()
            inputs = engine.prepare(item.question, video=video, frames=item.frames)
            engine.encode(inputs)
            ready.append((item, inputs))
        return ready

    def measure(ready: Any, method: str) -> list[Record]:
        asked = [inputs for _, inputs in ready]
        if method in special:
            return [{"frames": item.frames} | special[method](inputs) for item, inputs in ready]
        answers = ask(asked, method) if ask else answer(engine, asked, method)
        return [answer_record(item, out) for (item, _), out in zip(ready, answers, strict=True)]

    methods = list(dict.fromkeys(("dense", *methods, *special)))
    return job.records(items, methods, prepare, measure, BATCH)


def answer(engine: Engine, asked: list[Inputs], method: str) -> list[Result]:
    """Greedy answers to a batch."""
    return cast(list[Result], engine.generate(asked, policy(method), max_new_tokens=ANSWER))


def answer_record(item: Item, out: Result) -> Record:
    layers, seen = out.stats.layers, out.stats.visual_tokens
    text = out.stats.prompt_tokens - seen
    return {
        "frames": item.frames,
        "kind": item.group,
        "objects": sum(len(c.things) for c in item.clips),
        "ok": same_answer(out.text, item.answer),
        "ratios": [layer["ratio"] for layer in layers],
        "visual": [(layer["attended"] - text) / seen for layer in layers],
        "work": out.stats.attention_work,
        "prefill": out.stats.prefill_work,
        "kv_bytes": out.stats.kv_bytes,
        "prompt": out.stats.prompt_tokens,
    }


def grouped(found: list[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records by the values of `keys`, in order of appearance."""
    groups: dict[tuple, list[Record]] = {}
    for r in found:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    return groups


def rows(found: list[Record], *more: str) -> list[Record]:
    """A row for each frame count and method (and each value of the keys `more`)."""
    dense = {r["unit"]: r["ok"] for r in found if r["method"] == "dense"}
    out = []
    for key, some in grouped(found, "frames", "method", *more).items():
        layers = np.mean([r["ratios"] for r in some], axis=0).tolist()
        by_layer = {} if more else {"kept_per_layer": layers}
        out.append(dict(zip(("frames", "method", *more), key, strict=True)) | by_layer | {
            "samples": len(some),
            "accuracy": stats.share([r["ok"] for r in some]),
            "change": stats.mean([float(r["ok"]) - dense[r["unit"]] for r in some]),
            "kept": average(some, "ratios"),
            "visual": average(some, "visual"),
            "work": average(some, "work"),
            "prefill": average(some, "prefill"),
            "kv_bytes": average(some, "kv_bytes"),
            "prompt": average(some, "prompt"),
        })  # fmt: skip
    return out


def shares(table: list[Record]) -> list[Record]:
    """Of rows by kind of question, what is worth its bytes in a result."""
    keys = ("frames", "method", "kind", "samples")
    return [{k: r[k] for k in keys} | {"accuracy": r["accuracy"]["value"]} for r in table]


def difference(found: list[Record], first: str, second: str) -> dict[str, float]:
    """Accuracy of one method less that of another, question by question."""
    right = {(r["unit"], r["method"]): float(r["ok"]) for r in found}
    units = [r["unit"] for r in found if r["method"] == first]
    return stats.mean([right[u, first] - right[u, second] for u in units])


def average(some: list[Record], key: str) -> float:
    return float(np.mean([r[key] for r in some]))


def matching(table: list[Record], test: Callable[[Record], bool]) -> list[Record]:
    return [r for r in table if test(r)]


def title(job: Job, what: str) -> str:
    """What a figure is about, its model and its sample size."""
    return f"{what} ({job.settings()['model']} model, {job.samples} questions a frame count)"
