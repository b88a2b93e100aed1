"""One frame in a long video (V-NIAH): accuracy, kept share and probe error against length.

    python -m lab.experiments niah --frames 64,256,1024,4096 --samples 24

With 128 probe rows, and with a number that grows as the square root of the prompt (128 at 1,024).
The error of the probes is measured while `dense` answers every second question. A length has at
most PROMPTS tokens of prompts, but a question at every depth.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from zipvl.engine.inputs import HELD, Inputs
from zipvl.engine.run import Result
from zipvl.vision.family import Media

from ..eval.tasks import LARGEST, Item, needle_items
from ..raw import rounded
from . import clips, draw, probe_study, stats
from .runner import Job, Record, policy

METHODS = ("zipvl:tau=0.975", "ideas.py:SqrtProbes:tau=0.975,fill=zero")
NAMES = dict(zip(METHODS, ("zipvl, 64 + 64 probes", "zipvl, 4 sqrt(T) probes"), strict=True))
TAU = 0.975  # of the sets that probes are judged by
DEPTHS = tuple(i / 5 for i in range(6))
PROMPTS = 400_000
CHOICES = {"64 recent + 64 random": "64 recent + 64 random", "sqrt(T)": "4 sqrt(T), half and half",
           "0 recent + 128 random": "128 random", "128 recent": "128 recent"}  # fmt: skip
COLUMNS = {
    "frames": "frames", "prompt": "prompt tokens", "method": "method", "samples": "questions",
    "accuracy": "accuracy (95 %)", "visual": "visual kept (95 %)",
    "work": "attention work (95 %)", "kv_bytes": "cache bytes",
}  # fmt: skip


@torch.inference_mode()
def watch(job: Job, item: Item) -> Inputs:
    """A question about a video that is drawn and encoded scene by scene, never held as pixels."""
    engine, vision, parts = job.engine, job.engine.model.vision, []
    side = min(2 * engine.config.vision.media.size, LARGEST)
    for some in (some for scene in item.scenes(side) for some in scene.split(HELD)):
        medium = engine.prepare("", video=some.numpy(), frames=len(some)).media[0]
        parts.append(vision.features(medium.crops, medium.geometry))
    x = torch.cat(parts)
    whole = replace(medium.geometry, frames=len(x))
    tokens = vision.join(x, whole)
    media = Media("video", medium.crops[:0], whole, len(tokens), features=tokens)
    return engine.prepare(item.question, video=media)


def questions(job: Job) -> dict[str, Item]:
    """The needles of every length, by FRAMES/NUMBER."""
    out: dict[str, Item] = {}
    vision = job.engine.model.vision
    for frames in job.frames:
        tokens = vision.count(vision.plan(1, 1, frames=frames))
        count = min(job.samples, max(len(DEPTHS), PROMPTS // tokens))
        some = needle_items(frames, count, job.seed, DEPTHS)
        out |= {f"{frames}/{i}": item for i, item in enumerate(some)}
    return out


def records(job: Job, methods: Sequence[str]) -> list[Record]:
    """Every method's answer to every question, and seconds; now and then dense with the probes'."""
    items = questions(job)

    def measure(ready: Any, method: str) -> list[Record]:
        item, inputs, second = ready
        looking = probe_study.Study(TAU, probe_study.methods(TAU, len(inputs), job.seed))
        study_now = method == "dense" and not second
        how = looking if study_now else policy(method)
        out = cast(Result, job.engine.generate(inputs, how, max_new_tokens=clips.ANSWER))
        spent = out.stats.seconds
        record = clips.answer_record(item, out) | {"given": out.text, "seconds": spent["prefill"]}
        if study_now:  # that choosing sets takes long is not the fault of dense attention
            record["choices"] = looking.record()
            record["seconds"] -= spent["prefill_select"]
        return [record]

    def prepare(units: list[str]) -> tuple[Item, Inputs, bool]:
        item = items[units[0]]
        return item, watch(job, item), int(units[0].split("/")[1]) % 2 == 1

    return job.records(items, methods, prepare, measure)


def rows(found: list[Record], *more: str) -> list[Record]:
    """A row for each frame count and method, and value of the keys `more`, with intervals."""
    out = []
    for key, some in clips.grouped(found, "frames", "method", *more).items():
        means = {m: stats.mean([float(np.mean(r[m])) for r in some]) for m in ("visual", "work")}
        out.append(dict(zip(("frames", "method", *more), key, strict=True)) | means | {
            "samples": len(some),
            "accuracy": stats.share([r["ok"] for r in some]),
            "by_layer": np.mean([r["visual"] for r in some], axis=0).tolist(),
            "kv_bytes": round(clips.average(some, "kv_bytes")),
            "prompt": round(clips.average(some, "prompt")),
        })  # fmt: skip
    return out


def run(job: Job) -> None:
    report(job, records(job, ("dense", *(job.methods or METHODS))))


def report(job: Job, found: list[Record]) -> None:
    """Tables and figure of what was found."""
    table, depths = rows(found), rows(found, "kind")
    sets = probe_study.rows([r for r in found if "choices" in r], "frames")
    seconds = {f"{n} {m}": clips.average(some, "seconds")
               for (n, m), some in clips.grouped(found, "frames", "method").items()}  # fmt: skip
    job.finish(table, COLUMNS, {"prefill_seconds": rounded(seconds, 2)},
               by_depth=depths, sets=sets)  # fmt: skip
    figure(job, table, sets)


def figure(job: Job, table: list[Record], sets: list[Record]) -> None:
    """Accuracy and kept share by method, recall and error of p by choice of probes."""
    tokens = {r["frames"]: r["prompt"] for r in table}
    with draw.panels(2, 2, 5.2, 3.6) as (fig, axes):
        right, kept, recall, error = axes.flat
        for number, ((method,), some) in enumerate(clips.grouped(table, "method").items()):
            name, style = NAMES.get(method, method), {"color": f"C{number}"}
            x = [r["prompt"] * 1.06 ** (number - 1) for r in some]  # side by side where equal
            draw.curve(right, x, [r["accuracy"] for r in some], name, 100, **style)
            if method != "dense":
                draw.curve(kept, x, [r["visual"] for r in some], name, 100, **style)
        for number, (choice, name) in enumerate(CHOICES.items(), start=3):
            mine, style = (
                [r for r in sets if r["choice"].startswith(choice)],
                {"color": f"C{number}"},
            )
            x = [tokens[r["frames"]] for r in mine]
            draw.curve(recall, x, [r["recall"] for r in mine], name, 100, **style)
            draw.curve(error, x, [r["error"] for r in mine], name, 100, **style)
        right.set(ylabel="needle named, % (95 %)", ylim=(0, 103))
        kept.set(ylabel="visual tokens kept, % (95 %)", ylim=(0, 103))
        recall.set(ylabel="recall of the all-rows set, % (95 %)")
        error.set(ylabel="error of p, % of the all-rows p (95 %)")
        for one in axes.flat:
            one.set(xlabel="prompt tokens", xscale="log")
            one.set_xticks(list(tokens.values()), [f"{n:,}" for n in tokens.values()])
            one.minorticks_off()
            one.legend()
        counts = {r["frames"]: str(r["samples"]) for r in table}
        asked = f"{', '.join(counts.values())} questions by length, every second for the probes"
        fig.suptitle(f"one frame in a long video ({job.settings()['model']} model; {asked})")
        fig.savefig(job.out / "figure.png")
