"""Item 2 on clips: what a choice of probe rows finds of the all-rows set, and what it answers."""

from typing import Any

import torch

from . import clips, draw, study
from .job import Job, Record

TAU = 0.95
CHOICES = (*study.CHOICES, (10000, 0))


def run(job: Job) -> None:
    named = {f"{r} + {n}" if r < 10000 else "all rows": f"zipvl:tau={TAU},recent={r},random={n}"
             for r, n in CHOICES}  # fmt: skip
    for divisor in ("all", "none"):
        named[f"64 + 64, divisor {divisor}"] = f"zipvl:tau={TAU},divisor={divisor}"
    found = clips.records(job, list(named.values()), extra={"study": lambda i: look(job, i)})
    looked = [r for r in found if r["method"] == "study"]
    answers = clips.rows([r for r in found if r["method"] != "study"])
    sets = study.rows(looked, "frames")
    job.finish(answers, clips.COLUMNS, sets=sets)
    last = job.frames[-1]
    accuracy = {r["method"]: r for r in answers if r["frames"] == last}
    with draw.panels(1, 2, 5.6) as (fig, (left, right)):
        some = [r for r in sets if r["frames"] == last and not r["choice"].startswith("sqrt")]
        draw.bars(left, some, "recall", f"recall of the all-rows set, % (95 %), {last} frames")
        shown = [{"choice": name, **accuracy[m]} for name, m in named.items()]
        draw.bars(right, [{"choice": "dense", **accuracy["dense"]}, *shown], "accuracy",
                   f"exact answers, % (95 %), {last} frames, tau {TAU}")  # fmt: skip
        fig.suptitle(clips.title(job, "probe rows: recent + random"))
        fig.savefig(job.out / "figure.png")


@torch.inference_mode()
def look(job: Job, inputs: Any) -> Record:
    """Sets of all choices on one prompt."""
    watch = study.Study(TAU, study.methods(TAU, len(inputs), job.seed))
    job.engine.prefill([inputs], watch, None, {})
    return {"choices": watch.record()}
