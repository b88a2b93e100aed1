"""Three questions about one video: seconds to each first token, and what a saved session costs.

The video's features are made before the clock starts, so that the first question's time is that of
the prefill alone and flatters nobody. A saved session is opened and asked again: `open` is the
reading of its file, `process` all that a new process needs until the answer begins, the start of
Python, the import of torch and the model included.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.engine.load import demo_clip, load
from zipvl.engine.session import Session
from zipvl.policies import load_policy

from ..raw import rounded
from .model import DTYPES
from .timing import Row, spread, versus

QUESTIONS = ("List all objects in order.", "What comes first?", "What comes last?")
ANSWER = 32  # new tokens at most


def bench_sessions(args: argparse.Namespace) -> list[Row]:
    """For each frame count and method, `repeats` sessions, the methods in turn."""
    dtype = str(DTYPES[args.dtype]).removeprefix("torch.")
    engine, video = load(args.model, args.device, dtype, args.attn), args.video or demo_clip()
    rows = []
    for frames in args.frames:
        inputs = engine.prepare("", video=str(video), frames=frames)
        engine.encode(inputs)
        found: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
        for repeat in range(args.repeats + 1):
            for method, taken in found.items():
                taken += [asked(engine, inputs, method)] if repeat else []
        for method, taken in found.items():
            rows.append(row(args, engine, inputs, method, taken))
    return rows


def begun(engine: Engine, inputs: Inputs, method: str) -> Session:
    """A session as `--reuse first` makes it; caches that cannot be cut hold the media alone, as
    others could not be saved."""
    policy = load_policy(method)
    fixed = policy.step is not None or policy.storage is not None
    return Session(engine, replace(inputs, reported=True), policy, "media" if fixed else "first")


def asked(engine: Engine, inputs: Inputs, method: str) -> dict[str, float]:
    """Seconds of a session's questions to their first tokens, and of one that was saved."""
    session = begun(engine, inputs, method)
    taken = {}
    for number, question in enumerate(QUESTIONS, 1):
        stats = session.ask(question, ANSWER).stats
        taken[f"question {number}"] = stats.seconds["first_token"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.zipvl"
        began = time.perf_counter()
        session.save(path)
        taken["save"] = time.perf_counter() - began
        taken["file_bytes"] = path.stat().st_size
        began = time.perf_counter()
        opened = engine.open_session(path)
        taken["open"] = time.perf_counter() - began
        taken["opened, question 1"] = opened.ask(QUESTIONS[0], ANSWER).stats.seconds["first_token"]
    return taken


def row(args: argparse.Namespace, engine: Engine, inputs: Inputs, method: str,
        taken: list[dict[str, float]]) -> Row:  # fmt: skip
    seconds = {name: [one[name] for one in taken] for name in taken[0]}
    size = int(seconds.pop("file_bytes")[0])
    names = [f"question {n}" for n in (2, 3)]
    shares = {name: versus(seconds, name, "question 1") for name in names}
    return rounded({
        "bench": "sessions", "tokens": len(inputs), "batch": 1, "run": method,
        "questions": seconds, "of_first": shares, "file_bytes": size,
        "process": process(args, engine, inputs, method),
    })  # fmt: skip


def process(args: argparse.Namespace, engine: Engine, inputs: Inputs,
            method: str) -> list[float]:  # fmt: skip
    """Seconds of the command that opens a saved session, until it answers."""
    session = begun(engine, inputs, method)
    session.ask(QUESTIONS[0], ANSWER)
    words = [
        sys.executable,
        "-m",
        "zipvl",
        "-p",
        QUESTIONS[1],
        "--max-new-tokens",
        str(ANSWER),
        "-q",
    ]
    words += ["-m", args.model] if args.model else []
    words += ["--device", args.device, "--dtype", args.dtype]
    spent = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.zipvl"
        session.save(path)
        for _ in range(args.repeats):
            began = time.perf_counter()
            with subprocess.Popen([*words, "--open", str(path)], stdout=subprocess.PIPE) as child:
                assert child.stdout is not None
                assert child.stdout.read(1), "no answer"
                spent.append(time.perf_counter() - began)
    return spent


def shown(row: Row) -> list[str]:
    """What the table on stdout says of it."""
    parts = [
        f"{name} {spread([s * 1e3 for s in taken])} ms" for name, taken in row["questions"].items()
    ]
    parts += [f"{name}: {share} of question 1" for name, share in row["of_first"].items()]
    return [
        *parts,
        f"file {row['file_bytes'] / 2**20:.2f} MiB",
        f"process {spread(row['process'])} s",
    ]
