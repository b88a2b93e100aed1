"""What a choice of probe rows finds of the all-rows set, and, on clips, what it answers.

On text several --tokens give the curve against length, for 128 probes and for a number that grows
as sqrt(T).
"""

from typing import Any

import torch
from torch import Tensor

from zipvl.engine.inputs import Inputs

from . import clips, draw, probe_study
from .runner import Job, Record
from .text import TAIL, windows

TAU = 0.95
CHOICES = (*probe_study.CHOICES, (10000, 0))


def run(job: Job) -> None:
    named = {f"{r} + {n}" if r < 10000 else "all rows": f"zipvl:tau={TAU},recent={r},random={n}"
             for r, n in CHOICES}  # fmt: skip
    for divisor in ("all", "none"):
        named[f"64 + 64, divisor {divisor}"] = f"zipvl:tau={TAU},divisor={divisor}"
    found = clips.records(job, list(named.values()), extra={"study": lambda i: look(job, i)})
    looked = [r for r in found if r["method"] == "study"]
    answers = clips.rows([r for r in found if r["method"] != "study"])
    sets = probe_study.rows(looked, "frames")
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
    watch = probe_study.Study(TAU, probe_study.methods(TAU, len(inputs), job.seed))
    job.engine.prefill([inputs], watch, None, {})
    return {"choices": watch.record()}


# --- on text --------------------------------------------------------------------------------------

TEXT_TAU = 0.975


def run_text(job: Job) -> None:
    engine = job.engine
    some: dict[str, Tensor] = {}
    for tokens in job.tokens:
        cut = windows(engine, tokens, job.samples, job.seed)
        some |= {f"{tokens}/{i}": ids[:-TAIL] for i, ids in enumerate(cut)}

    @torch.inference_mode()
    def measure(ids: Any, method: str) -> list[Record]:
        watch = probe_study.Study(TEXT_TAU, probe_study.methods(TEXT_TAU, len(ids), job.seed))
        inputs = Inputs(ids, torch.zeros(len(ids), dtype=torch.bool), [])
        engine.prefill([inputs], watch, None, {})
        return [{"tokens": len(ids), "choices": watch.record()}]

    found = job.records(some, [f"tau={TEXT_TAU}"], lambda u: some[u[0]], measure)
    table = probe_study.rows(found, "tokens")
    job.finish(table, probe_study.columns("tokens"))
    about = f"{job.settings()['model']}, {job.samples} windows a length"
    probe_study.figure(job, table, "tokens", f"probe rows, tau {TEXT_TAU} ({about})")
