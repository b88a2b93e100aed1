"""Item 10 on clips: accuracy when tokens left out of a layer's attention skip its MLP, too."""

import numpy as np

from zipvl.engine.inputs import Inputs
from zipvl.engine.run import Result

from . import clips, draw
from .job import Job, Record
from .mlp import WHERE, everywhere, mlp_share, sparse_mlps

TAUS = (0.5, 0.8, 0.9, 0.975)
METHODS = tuple(f"{m}:tau={t}" for m in ("zipvl", "zipvl+") for t in TAUS)
DENSE_MLP = next(iter(WHERE))


def run(job: Job) -> None:
    methods = everywhere(job.methods or METHODS)

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
    figure(job, [r for r in table if r["frames"] == job.frames[-1]])


def figure(job: Job, table: list[Record]) -> None:
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
