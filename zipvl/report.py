"""A run as text and as JSON: setting, stages, layers, and hints where the method does not pay; the
streams it goes to.

It reads what a run left and imports nothing heavy itself, as the command line imports it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import REFUSAL, ZipvlError, printable

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.inputs import Inputs
    from .engine.run import Result
    from .engine.stats import Stats
    from .policy import Policy


@dataclass(frozen=True)
class Trial:
    """What one method made of a prompt; `result` is None where it failed."""

    method: str  # as the user wrote it
    result: Result | None
    fault: str = ""  # what went wrong, in a sentence


NO_MEMORY = re.compile(  # what else libraries say when memory ends; threads need it, too
    rf"{REFUSAL.pattern}|MemoryError|bad_alloc|[Cc]annot allocate memory|failed to map segment|"
    "start new thread|temporarily unavailable|error return without exception set"
)
EVERY = 10.0  # seconds from one line of progress to the next


def open_streams() -> None:
    """Closed streams lead nowhere, and no file gets their numbers; no byte is refused by one."""
    for name, mode, odd in (
        ("stdin", "r", "surrogateescape"),  # as they come on the command line
        ("stdout", "w", "replace"),
        ("stderr", "w", "replace"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors=odd)


def plain(text: str) -> str:
    """Lines as a terminal shows them: no control character of a name reaches it."""
    return printable(text, keep="\n")


def say(text: str = "") -> None:
    """A line on stderr."""
    print(plain(text), file=sys.stderr, flush=True)


def read_line() -> str:
    """A line from the user; the prompt goes to stderr when stdout is not the terminal."""
    if sys.stdout.isatty():
        return input("> ").strip()
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def fault(e: BaseException) -> tuple[int, str]:
    """The exit code for what went wrong, and one line that says what."""
    code, sentence = 1, f"{type(e).__name__}: {e} (--verbose shows where)"
    if isinstance(e, ZipvlError):
        code, sentence = e.code, str(e)
    if code != 3 and (reason := memory_ended(e)):
        advice = "give the process more, or use fewer --frames, --dtype bfloat16 or a smaller model"
        code, sentence = 3, f"out of memory ({reason}): {advice}"
    return code, sentence.replace("\n", " ")


def memory_ended(e: BaseException | None) -> str:
    """How `e`, or an error that led to it, says that memory ended; "" where none does."""
    named = isinstance(e, ZipvlError)  # a file: FFmpeg lacks memory for any header too large
    while e:
        what, home = f"{type(e).__name__}: {e}", type(e).__module__
        doubtful = named and home == "av.error" and isinstance(e, MemoryError)
        if home != "zipvl.errors" and not doubtful and NO_MEMORY.search(what):
            return what.strip(": ")
        e = e.__cause__ or e.__context__
    return ""


@contextmanager
def progress_lines(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """Engine.progress where no terminal is: from time to time a plain line on stderr."""
    done, said = 0, time.monotonic()

    def step(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)

    yield step


def headline(engine: Engine, policies: list[Policy], inputs: Inputs,
             short: bool = False) -> list[str]:  # fmt: skip
    """The effective configuration, part by part; `short`: what stays from question to question."""
    config, dtype = engine.config, str(engine.model.dtype).removeprefix("torch.")
    clips = [m.clip for m in inputs.media if m.clip]
    spans = [f"{len(c.indices)} frames, {c.times[0]:.1f} to {c.times[-1]:.1f} s" for c in clips]
    visual = f"{int(inputs.is_visual.sum())} visual"
    machine = f"{dtype} on {engine.model.device}, {engine.backend}"
    model = f"{config.family} ({config.layout} layout), {machine}"
    if short:
        return [model, *spans, f"{visual} tokens", type(policies[0]).__name__]
    lone = map(repr, policies[:1] if len(policies) == 1 else [])  # compared ones have lines
    return [model, *spans, f"{len(inputs)} tokens, {visual}", *lone]


def summary(stats: Stats) -> str:
    """Seconds of the stages that were reached, rates, and a bar per layer."""
    s, new, mib = stats.seconds, stats.new_tokens, 2**20
    inside = {k.removeprefix("prefill_"): v for k, v in s.items() if k.startswith("prefill_")}
    made = "1 token" if new == 1 else f"{new} tokens, {stats.decode_rate:.1f}/s"
    before = f", and {stats.reused} as they were" if stats.reused else ""
    rows = {
        "video": f"{len(stats.frames)} frames",
        "vision": f"{stats.visual_tokens} visual tokens",
        "prefill": f"{stats.prompt_tokens - stats.reused} tokens, {stats.prefill_rate:.0f}/s"
        + before,
        "decode": made,
    }
    lines = [f"{name:<8} {s[name]:8.3f} s   {what}" for name, what in rows.items() if name in s]
    if not stats.layers:  # Ctrl-C came before
        return "\n".join(lines)
    lines += [
        f"kept     {stats.ratio:8.1%}     of dense: attention work {stats.attention_work:.1%}, "
        f"work of the whole prefill {stats.prefill_work:.1%}",
        f"cache    {stats.kv_bytes / mib:8.2f} MiB  {stats.kv_bytes_dense / mib:.2f} MiB if dense",
        f"memory   {stats.peak_memory / mib:8.0f} MiB  peak",
        f"in prefill: {', '.join(f'{name} {value:.3f} s' for name, value in inside.items())}",
        "layer  kept             entered  attended    cached  cache KiB",
    ]
    for i, layer in enumerate(stats.layers):
        bar = "█" * round(10 * layer["ratio"])
        lines.append(
            f"{i:5}  {bar:<10} {layer['ratio']:4.0%}  {layer['tokens']:8}  {layer['attended']:8}"
            f"  {layer['cached']:8}  {layer['kv_bytes'] / 1024:9.1f}"
        )
    return "\n".join([*lines, *hints(stats)])


def agreement(trial: Trial, first: Result | None) -> str:
    """Whether a trial's tokens are those of the first result."""
    assert trial.result is not None
    assert first is not None
    mine, theirs = trial.result.tokens, first.tokens
    if trial.result is first:
        return "the first"
    if mine == theirs:
        return "same"
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    return f"token {(min(len(mine), len(theirs)) if at is None else at) + 1}"


def hints(stats: Stats) -> Iterator[str]:
    """The failure signs that the paper names, where this run shows them: of attention only where
    the method chose who takes part in it, of the cache where it holds bytes that dense has too."""
    if stats.method == "Dense()":
        return
    chose = any(layer["chose"] for layer in stats.layers)
    if chose and stats.ratio > 0.9:
        yield (
            f"hint: {stats.ratio:.0%} of the tokens took part in attention: the task needs its "
            "tokens, the prompt is mostly text (always kept), or tau is high"
        )
    parts = ("probe", "select", "attend")
    probe, select, attend = (stats.seconds.get(f"prefill_{part}", 0.0) for part in parts)
    rest, whole = stats.seconds.get("prefill_rest", 0.0), stats.prompt_tokens * len(stats.layers)
    entered = sum(layer["tokens"] for layer in stats.layers) / max(1, whole)
    saved = attend / max(stats.attention_work, 1e-9) - attend + rest / max(entered, 1e-9) - rest
    if chose and (cost := probe + select) > saved:
        yield (
            f"hint: choosing tokens took {cost:.3f} s and saved about {saved:.3f} s: "
            "prompts of this length are faster with --dense"
        )
    if stats.kv_bytes > 0.9 * stats.kv_bytes_dense:
        cached = sum(layer["cached"] for layer in stats.layers)
        if cached > 0.9 * stats.prompt_tokens * len(stats.layers):
            yield ("hint: the cache holds over 90 % of the prompt: the method drops little from it")
        else:
            yield (
                "hint: most of the cache is room for new tokens: a smaller --max-new-tokens "
                "shrinks it"
            )


def as_json(
    engine: Engine, inputs: Inputs, result: Result, model: str | None, seed: int
) -> dict[str, Any]:
    """The run as plain JSON; `stats` is null when Ctrl-C ended it before all layers were through.

    `model` is the name it was asked for (None: the demo), `seed` that of the sampling.
    """
    import torch

    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": result.tokens,
        "usage": {
            "prompt_tokens": len(inputs),
            "visual_tokens": int(inputs.is_visual.sum()),
            "completion_tokens": len(result.tokens),
            "total_tokens": len(inputs) + len(result.tokens),
        },
        "stats": result.stats.to_dict() if result.stats.layers else None,
        "warnings": inputs.warnings,
        "env": {
            "model": model or "demo",
            "device": str(engine.model.device),
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "attention": engine.backend,
            "seed": seed,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
