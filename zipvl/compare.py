"""One question studied: methods beside each other in a table, and what they kept as a page."""

from __future__ import annotations

import json
import shlex
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from .engine.engine import Engine
from .engine.inputs import Inputs
from .engine.run import Result
from .policy import Policy
from .report import Trial, agreement, as_json, fault, say, summary
from .vision.video import Reading

Answer = Callable[[Inputs, Policy, bool], Result]  # asks a method, aloud unless the bool is set


def study(a: Namespace, engine: Engine, policies: list[Policy], answer: Answer, prompt: str,
          inputs: Inputs) -> int:  # fmt: skip
    """Asks each of the methods, prints what came out, writes the page that is wanted.

    Returns the exit code: 1 where a method failed, 130 after Ctrl-C.
    """
    if a.compare:
        trials = compare(a, engine, policies, answer, inputs)
    else:
        trials = [Trial(a.methods[0], answer(inputs, policies[0], a.json))]
    if a.json:
        said = [
            {"method": trial.method}
            | (as_json(engine, inputs, trial.result, a.model, a.seed) if trial.result
               else {"error": trial.fault})
            for trial in trials
        ]  # fmt: skip
        print(json.dumps({"runs": said} if a.compare else said[0]), flush=True)
    elif a.compare:
        print(answers(trials), end="", flush=True)
    if a.compare and not a.quiet:
        say(table(trials))
    done = [trial.result for trial in trials if trial.result]
    if a.stats:
        for result in done:
            say(summary(result.stats))
    if any(result.finish_reason == "interrupted" for result in done):
        return 130
    if a.report:
        report(a, engine, policies, prompt, inputs, trials)
    return int(len(done) < len(trials))


def compare(a: Namespace, engine: Engine, policies: list[Policy], answer: Answer,
            inputs: Inputs) -> list[Trial]:  # fmt: skip
    """What each method made of `inputs`; where one fails, the others run.

    Media are encoded before, once, and a short answer that nobody times wakes up what sleeps:
    threads, memory, kernels. Ctrl-C leaves out the methods behind it.
    """
    began, trials = time.perf_counter(), list[Trial]()
    engine.encode(inputs)
    inputs.vision_seconds += time.perf_counter() - began
    engine.generate("Hello", Policy(), max_new_tokens=2)
    for method, policy in zip(a.methods, policies, strict=True):
        if not a.quiet:
            say(f"{len(trials) + 1} of {len(a.methods)}: {policy!r}")
        try:
            result = answer(inputs, policy, True)
        except Exception as e:
            if a.verbose:
                raise
            trials.append(Trial(method, None, fault(e)[1]))
            continue
        trials.append(Trial(method, result))
        if result.finish_reason == "interrupted":
            break
    return trials


def answers(trials: list[Trial]) -> str:
    """The answer, where all methods that came to one agree; else each method's in a line."""
    given = {trial.method: trial.result.text for trial in trials if trial.result}
    if len(set(given.values())) == 1:
        return next(iter(given.values())) + "\n"
    return "".join(f"{method}: {text}\n" for method, text in given.items())


def table(trials: list[Trial]) -> str:
    """A line a method: whether its answer is the first one's, its seconds, shares and bytes."""
    wide = max(len(trial.method) for trial in trials)
    first = next((trial.result for trial in trials if trial.result), None)
    read = first.stats.seconds if first else {}
    lines = [
        f"read in {read.get('video', 0):.2f} s and encoded in {read.get('vision', 0):.2f} s, once; "
        "cache and peak in MiB",
        f"{'':{wide}}  answer        prefill  1st token   decode    kept    work          cache"
        "    peak",
    ]
    for trial in trials:
        if trial.result is None:
            lines.append(f"{trial.method:{wide}}  failed: {trial.fault}")
            continue
        s = trial.result.stats
        if not s.layers:
            lines.append(f"{trial.method:{wide}}  interrupted in the prefill")
            continue
        share = s.kv_bytes / max(1, s.kv_bytes_dense)
        lines.append(
            f"{trial.method:{wide}}  {agreement(trial, first):10}{s.seconds['prefill']:9.3f} s"
            f"{s.seconds['first_token']:9.3f} s{s.decode_rate:7.1f}/s{s.ratio:8.1%}"
            f"{s.prefill_work:8.1%}{s.kv_bytes / 2**20:9.2f} {share:4.0%}"
            f"{s.peak_memory / 2**20:8.0f}"
        )
    return "\n".join(lines)


def report(a: Namespace, engine: Engine, policies: list[Policy], prompt: str, inputs: Inputs,
           trials: list[Trial]) -> None:  # fmt: skip
    """Writes the page; videos too long to be held as pixels are read again for it."""
    from .page import content, write_page

    frames = a.frames or (engine.model.vision.frames if a.fps is None else None)
    videos = [
        None if len(m.crops) else Reading(v, frames, a.fps, a.start, a.end, reader=a.reader)
        for v, m in zip(a.video, (m for m in inputs.media if m.clip), strict=True)
    ]
    settings = {
        "command": shlex.join(["zipvl", *a.argv]),
        "files": ", ".join([*a.video, *a.image]) or "none",
        "checkpoint": a.model or "bundled demo",
        "seed": str(a.seed),
    }
    new = a.max_new_tokens
    page = content(engine, inputs, prompt, trials, policies, videos, new, settings)
    write_page(Path(a.report), page)
    if not a.quiet:
        say(f"report: {a.report}")
