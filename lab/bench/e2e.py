"""From a video file to the last token, by stage.

    read      decoding the file's frames
    resize    each to the size the vision tower takes
    encode    tower and projector
    prefill   the decoder over the prompt
    first     what else passes before the first token: the head, checks, choosing
    decode    all further tokens

`covered` is the sum of the stages over the whole, which is measured around them: what it lacks of 1
is tokenising and bookkeeping. The engine itself runs, on a checkpoint or on a random model of a
named shape; nothing is kept between runs, so each reads its file and encodes its frames again.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from zipvl.engine.engine import Engine
from zipvl.engine.inputs import FrameBuffer, Inputs
from zipvl.engine.load import demo_clip, load
from zipvl.engine.run import Run
from zipvl.engine.sampler import Sampling
from zipvl.engine.stats import Clock
from zipvl.policies import load_policy
from zipvl.vision.family import Media
from zipvl.vision.video import Reading

from .model import DTYPES, QUESTION
from .timing import Factory, Row, interleaved, ratios, spread
from .vlm import random_engine

STAGES = ("read", "resize", "encode", "prefill", "first", "decode")
PROMPT = "What happens in this video?"


def bench_e2e(args: argparse.Namespace) -> list[Row]:
    """Seconds of each stage and to the first token. Stages are in wall time whatever the clock."""
    dtype = DTYPES[args.dtype]
    if args.model:
        engine = load(args.model, args.device, args.dtype, args.attn)
    else:
        engine = random_engine(args.shape, args.device, dtype, args.attn, args.layers)
    path, rows = str(args.video or demo_clip()), []
    for frames in args.frames:
        prepare = checkpoint_inputs if args.model else random_inputs
        made: dict[str, list[Row]] = {method: [] for method in args.methods}
        runs: dict[str, Factory] = {
            method: partial(
                answer, engine, partial(prepare, engine, path, frames), method, args.new, found
            )
            for method, found in made.items()
        }
        seconds = interleaved(engine.model.device, args.clock, runs, args.repeats)
        rows += [
            {"bench": "e2e", "frames": frames, "batch": 1, "run": method, "video": Path(path).name,
             "backend": engine.backend, "seconds": seconds[method], **middle(found[1:]),
             **ratios(seconds, method)}
            for method, found in made.items()
        ]  # fmt: skip
    return rows


def answer(
    engine: Engine,
    prepare: Callable[[dict[str, float]], Inputs],
    method: str,
    new: int,
    found: list[Row],
) -> Callable[[], object]:
    """Work that asks once and adds what it measured to `found`."""

    def work() -> None:
        read: dict[str, float] = {}
        began = time.perf_counter()
        inputs = prepare(read)
        run, asked = Run(engine, [inputs], load_policy(method), Sampling()), time.perf_counter()
        steps = run.steps(new, ignore_eos=True)
        next(steps)  # a token that was read back: the device is done
        first, choosing = time.perf_counter(), run.seconds["decode"]
        for _ in steps:
            pass
        total, stats = time.perf_counter() - began, run.result(0).stats
        stages = read | {
            "encode": read["encode"] + stats.seconds["vision"],
            "prefill": stats.seconds["prefill"],
            "first": first - asked - stats.seconds["vision"] - stats.seconds["prefill"],
            "decode": stats.seconds["decode"] - choosing,
        }
        found.append({
            "first_token": first - began, "stages": {name: stages[name] for name in STAGES},
            "covered": sum(stages.values()) / total,
            "tokens": len(inputs), "new": new, "ratio": stats.ratio, "work": stats.attention_work,
            "kv_bytes": stats.kv_bytes, "peak_memory": stats.peak_memory,
        })  # fmt: skip

    return work


def middle(found: list[Row]) -> Row:
    """Medians over the repeats, warm-up left out; what does not vary, from the last."""
    stages = {s: statistics.median(row["stages"][s] for row in found) for s in STAGES}
    first = [row["first_token"] for row in found]
    covered = statistics.median(row["covered"] for row in found)
    return found[-1] | {"stages": stages, "covered": covered, "first_token": first,
                        "first_token_text": spread(first)}  # fmt: skip


def timed_clip(engine: Engine, path: str, frames: int, stages: dict[str, float]) -> Media:
    """What `read_clip` makes; seconds of decoding, resizing and encoding go into `stages`."""
    clock = Clock(torch.device("cpu"))

    def taken(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            clock.lap("read")
            yield frame
            clock.lap("resize")  # what the buffer does with it

    clock.start()
    reading = Reading(path, frames)
    buffer = FrameBuffer(engine.model.vision, reading)
    for some in reading:
        buffer.fill(taken(some))
    clock.lap("read")
    stages |= clock.pop()
    stages["resize"] -= buffer.seconds
    media = buffer.media()  # the last frames
    stages["encode"] = buffer.seconds
    return media


def checkpoint_inputs(engine: Engine, path: str, frames: int, stages: dict[str, float]) -> Inputs:
    return engine.prepare(PROMPT, video=timed_clip(engine, path, frames, stages))


def random_inputs(engine: Engine, path: str, frames: int, stages: dict[str, float]) -> Inputs:
    """The frames' tokens, then a question of random ones."""
    clip = timed_clip(engine, path, frames, stages)
    question = torch.randint(engine.config.text.vocab_size, (QUESTION,))
    ids = torch.cat((torch.zeros(clip.tokens, dtype=torch.long), question))
    return Inputs(ids, torch.arange(len(ids)) < clip.tokens, [clip])
