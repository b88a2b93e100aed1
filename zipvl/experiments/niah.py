"""Item 5: one frame in a long video (V-NIAH): accuracy, kept share and probe error against length.

With 128 probe rows, and with a number that grows as the square root of the prompt (128 at 1,024).
"""

from . import clips, draw, study
from .job import Job
from .probes import look

METHODS = ("dense", "zipvl:tau=0.975", "ideas.py:SqrtProbes:tau=0.975,fill=zero",
           "zipvl+:tau=0.975", "fixed:ratio=0.5")  # fmt: skip


def run(job: Job) -> None:
    methods = job.methods or METHODS
    found = clips.records(job, methods, "niah", {"study": lambda i: look(job, i)})
    table = clips.rows([r for r in found if r["method"] != "study"])
    depths = clips.rows([r for r in found if r["method"] != "study"], "kind")
    sets = study.rows([r for r in found if r["method"] == "study"], "frames")
    job.finish(table, clips.COLUMNS, by_depth=depths, sets=sets)
    with draw.panels(1, 3, 4.4) as (fig, (found_axes, kept, error)):
        for (method,), some in clips.grouped(table, "method").items():
            x = [r["prompt"] for r in some]
            name = method.removeprefix("ideas.py:")
            draw.curve(found_axes, x, [r["accuracy"] for r in some], name, 100)
            if method != "dense":
                kept.plot(x, [100 * r["visual"] for r in some], marker="o", ms=4, label=name)
        length = {r["frames"]: r["prompt"] for r in table}
        for name in ("64 recent + 64 random", "128 recent", "sqrt(T)"):
            mine = [r for r in sets if r["choice"].startswith(name)]
            x = [length[r["frames"]] for r in mine]
            draw.curve(error, x, [r["error"] for r in mine], name, 100)
        found_axes.set(ylabel="needle named, % (95 %)", ylim=(0, 102))
        kept.set(ylabel="visual tokens kept, %", ylim=(0, 102))
        error.set(ylabel="error of p, % of the all-rows p (95 %)")
        for axes in (found_axes, kept, error):
            axes.set(xlabel="prompt tokens", xscale="log")
            axes.legend(fontsize=7)
        fig.suptitle(clips.title(job, "one frame in a long video"))
        fig.savefig(job.out / "figure.png")
