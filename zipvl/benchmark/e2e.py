"""From a video file to the last token, by stage: read, encode, prefill, decode.

The engine itself runs, on a checkpoint or on a random model of a named shape; nothing is kept
between runs, so each reads its file and encodes its frames again.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..engine.engine import Engine
from ..engine.inputs import Inputs, read_clip
from ..engine.load import demo_clip, load
from ..engine.progress import Progress
from ..engine.run import Run
from ..engine.sampler import Sampling
from ..policy import load_policy
from .model import DTYPES, QUESTION
from .timing import Factory, Row, interleaved, ratios, spread
from .vlm import random_engine

STAGES = {"read": "video", "encode": "vision", "prefill": "prefill", "decode": "decode"}
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
    engine: Engine, prepare: Callable[[], Inputs], method: str, new: int, found: list[Row]
) -> Callable[[], object]:
    """Work that asks once and adds what it measured to `found`."""

    def work() -> None:
        began, first = time.perf_counter(), 0.0
        inputs = prepare()
        run = Run(engine, [inputs], load_policy(method), Sampling())
        for _ in run.steps(new, ignore_eos=True):
            first = first or time.perf_counter() - began
        stats = run.result(0).stats
        found.append({
            "first_token": first,
            "stages": {stage: stats.seconds[name] for stage, name in STAGES.items()},
            "tokens": len(inputs), "new": new, "ratio": stats.ratio, "work": stats.attention_work,
            "kv_bytes": stats.kv_bytes, "peak_memory": stats.peak_memory,
        })  # fmt: skip

    return work


def middle(found: list[Row]) -> Row:
    """Medians over the repeats, warm-up left out; what does not vary, from the last."""
    stages = {s: statistics.median(row["stages"][s] for row in found) for s in STAGES}
    first = [row["first_token"] for row in found]
    return found[-1] | {"stages": stages, "first_token": first, "first_token_text": spread(first)}


def checkpoint_inputs(engine: Engine, path: str, frames: int) -> Inputs:
    return engine.prepare(PROMPT, video=path, frames=frames)


def random_inputs(engine: Engine, path: str, frames: int) -> Inputs:
    """The frames' tokens, then a question of random ones."""
    began = time.perf_counter()
    clip = read_clip(path, engine.config, Progress(False), frames, None, None, None)
    seconds = time.perf_counter() - began
    question = torch.randint(engine.config.text.vocab_size, (QUESTION,))
    ids = torch.cat((torch.zeros(clip.tokens, dtype=torch.long), question))
    return Inputs(ids, torch.arange(len(ids)) < clip.tokens, [clip], seconds)
