"""What a session may reuse: five questions about a clip, in a talk or each after a rewind.

The caches are chosen for the media alone (media), for a general question (general), for the first
one (first), or anew for each (none). The first question shows what the method loses without one,
the second and the fifth what it loses when another one chose. Dense attention loses nothing by
reuse, but the demo model may by a talk, so dense stands beside each.
"""

from typing import Any

import numpy as np

from zipvl.engine.inputs import Inputs
from zipvl.engine.session import Session

from ..demo.backgrounds import bundled
from ..demo.questions import Question, ask
from ..demo.world import Clip, random_clip, render
from ..eval.tasks import LARGEST, same_answer
from . import clips, draw, stats
from .runner import Job, Record, policy

TURNS, SHOWN = 5, (1, 2, 5)
METHODS = ("zipvl", "zipvl-stream", "zipvl-stream:tau=0.9")
ARMS = ("media", "general", "first", "none")
COLUMNS = {
    "frames": "frames", "method": "method", "reuse": "reuse", "talk": "questions",
    "samples": "clips", **{f"turn {n}": f"right, question {n}" for n in SHOWN},
    "all": "less dense, all five (95 %)",
}  # fmt: skip


def items(frames: int, samples: int, seed: int) -> list[tuple[Clip, list[Question]]]:
    """Clips, and five questions of different kinds about each."""
    found = []
    for number in range(samples):
        rng = np.random.default_rng([seed, frames, number, 2])
        while True:
            clip = random_clip(frames, rng, len(bundled()))
            if len(questions := ask(clip.things, TURNS, rng)) == TURNS:
                break
        found.append((clip, questions))
    return found


def run(job: Job) -> None:
    engine = job.engine
    side = min(2 * engine.config.vision.media.size, LARGEST)
    every = {f"{n}/{i}": item for n in job.frames
             for i, item in enumerate(items(n, job.samples, job.seed))}  # fmt: skip

    def prepare(units: list[str]) -> Any:
        [unit] = units
        clip, questions = every[unit]
        inputs = engine.prepare("", video=render(clip, side).numpy(), frames=None)
        engine.encode(inputs)
        return inputs, questions, int(unit.split("/")[0])

    def measure(ready: Any, arm: str) -> list[Record]:
        inputs, questions, frames = ready
        method, reuse, talk = arm.split("|")
        session = Session(engine, fresh(inputs), policy(method), reuse)
        oks = answers(session, questions, talk)
        return [{"frames": frames, "oks": oks}]

    arms = [f"{m}|{r}|{t}" for t in ("alone", "talk") for m in (job.methods or METHODS)
            for r in ARMS]  # fmt: skip
    arms = ["dense|media|alone", "dense|media|talk", *arms]
    rows = table(job.records(every, arms, prepare, measure))
    job.finish(rows, COLUMNS)
    figure(job, rows)


def fresh(inputs: Inputs) -> Inputs:
    """The same media for one more session."""
    return Inputs(inputs.input_ids, inputs.is_visual, inputs.media, reported=True)


def answers(session: Session, questions: list[Question], talk: str) -> list[bool]:
    """Which of them are right; `alone`: the session is rewound before each."""
    oks = []
    for question in questions:
        if talk == "alone":
            session.rewind()
        oks.append(same_answer(session.ask(question.text, clips.ANSWER).text, question.answer))
    return oks


def table(found: list[Record]) -> list[Record]:
    """A row for each frame count and arm."""
    dense = {(r["unit"], r["method"].split("|")[2]): np.array(r["oks"], float)
             for r in found if r["method"].startswith("dense|")}  # fmt: skip
    rows = []
    for (frames, arm), some in clips.grouped(found, "frames", "method").items():
        method, reuse, talk = arm.split("|")
        oks = np.array([r["oks"] for r in some], float)  # [clips, TURNS]
        less = oks - np.stack([dense[r["unit"], talk] for r in some])
        named = {"frames": frames, "method": method, "talk": talk, "samples": len(some)}
        named["reuse"] = "any" if method == "dense" else reuse
        right = {f"turn {n}": float(oks[:, n - 1].mean()) for n in SHOWN}
        change = {} if method == "dense" else {"all": stats.mean(less.mean(1))}
        rows.append(named | right | change)
    return rows


def figure(job: Job, rows: list[Record]) -> None:
    """What the five answers of a talk lose to dense, by what was reused."""
    label = "right answers of five in a talk, points from dense (95 %)"
    with draw.panels(1, len(job.frames)) as (fig, every):
        for frames, axes in zip(job.frames, np.ravel(every), strict=True):
            talk = [r | {"choice": r["reuse"]} for r in rows
                    if r["frames"] == frames and r["talk"] == "talk" and "all" in r]  # fmt: skip
            series = {m: [r for r in talk if r["method"] == m] for m in job.methods or METHODS}
            draw.points(axes, series, "all", label)
            axes.set(title=f"{frames} frames, {job.samples} clips")
        fig.savefig(job.out / "figure.png")
