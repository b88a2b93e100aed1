"""Items 2 and 5 on a text decoder: what a choice of probe rows finds of the all-rows set.

Several --tokens give the curve against length, for 128 probes and for a number that grows as
sqrt(T).
"""

from typing import Any

import torch
from torch import Tensor

from zipvl.engine.inputs import Inputs

from . import study
from .job import Job, Record
from .text import TAIL, windows

TAU = 0.975


def run(job: Job) -> None:
    engine = job.engine
    some: dict[str, Tensor] = {}
    for tokens in job.tokens:
        cut = windows(engine, tokens, job.samples, job.seed)
        some |= {f"{tokens}/{i}": ids[:-TAIL] for i, ids in enumerate(cut)}

    @torch.inference_mode()
    def measure(ids: Any, method: str) -> list[Record]:
        watch = study.Study(TAU, study.methods(TAU, len(ids), job.seed))
        inputs = Inputs(ids, torch.zeros(len(ids), dtype=torch.bool), [])
        engine.prefill([inputs], watch, None, {})
        return [{"tokens": len(ids), "choices": watch.record()}]

    found = job.records(some, [f"tau={TAU}"], lambda u: some[u[0]], measure)
    table = study.rows(found, "tokens")
    job.finish(table, study.columns("tokens"))
    title = f"probe rows, tau {TAU} ({job.settings()['model']}, {job.samples} windows a length)"
    study.figure(job, table, "tokens", title)
