"""A run as text and as JSON: setting, stages, layers, and hints where the method does not pay.

It reads what a run left and imports nothing heavy itself, as the command line imports it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.engine import Engine, Result
    from .engine.inputs import Inputs
    from .engine.stats import Stats
    from .policy import Policy


def headline(engine: Engine, policy: Policy, inputs: Inputs) -> str:
    """One line: the effective configuration."""
    config, dtype = engine.config, str(engine.model.dtype).removeprefix("torch.")
    clips = [m.clip for m in inputs.media if m.clip]
    spans = [f"{len(c.indices)} frames, {c.times[0]:.1f} to {c.times[-1]:.1f} s" for c in clips]
    tokens = f"{len(inputs)} tokens, {int(inputs.is_visual.sum())} visual"
    machine = f"{dtype} on {engine.model.device}, {engine.backend}"
    model = f"{config.family} ({config.layout} layout), {machine}"
    return "; ".join([model, *spans, tokens, repr(policy)])


def summary(stats: Stats) -> str:
    """Seconds by stage, rates, and a bar per layer."""
    s, n, mib = stats.seconds, stats.prompt_tokens, 2**20
    parts = [
        f"{name.removeprefix('prefill_')} {value:.3f} s"
        for name, value in s.items()
        if name.startswith("prefill_")
    ]
    lines = [
        f"video    {s['video']:8.3f} s   {len(stats.frames)} frames read",
        f"vision   {s['vision']:8.3f} s   {stats.visual_tokens} visual tokens",
        f"prefill  {s['prefill']:8.3f} s   {n} tokens, {stats.prefill_rate:.0f}/s",
        f"decode   {s['decode']:8.3f} s   {stats.new_tokens} tokens, {stats.decode_rate:.1f}/s",
        f"kept     {stats.ratio:8.1%}     attention work {stats.attention_work:.1%} of dense",
        f"cache    {stats.kv_bytes / mib:8.2f} MiB  {stats.kv_bytes_dense / mib:.2f} MiB if dense",
        f"memory   {stats.peak_memory / mib:8.0f} MiB  peak",
        f"in prefill: {', '.join(parts)}",
        "layer  kept            tokens     cache KiB",
    ]
    for i, layer in enumerate(stats.layers):
        bar = "█" * round(10 * layer["ratio"])
        lines.append(
            f"{i:5}  {bar:<10} {layer['ratio']:4.0%}  {layer['attended']:>6}/{layer['tokens']:<6}"
            f" {layer['kv_bytes'] / 1024:8.1f}"
        )
    return "\n".join([*lines, *hints(stats)])


def hints(stats: Stats) -> Iterator[str]:
    """The failure signs that the paper names, where this run shows them."""
    if stats.method == "Dense()":
        return
    if stats.ratio > 0.9:
        yield (
            f"hint: {stats.ratio:.0%} of the tokens took part in attention: the task needs its "
            "tokens, the prompt is mostly text (always kept), or tau is high"
        )
    parts = ("probe", "select", "attend")
    probe, select, attend = (stats.seconds.get(f"prefill_{part}", 0.0) for part in parts)
    cost, saved = probe + select, attend / max(stats.attention_work, 1e-9) - attend
    if cost > saved:
        yield (
            f"hint: choosing tokens took {cost:.3f} s and saved about {saved:.3f} s of attention: "
            "prompts of this length are faster with --dense"
        )
    cached = sum(layer["cached"] for layer in stats.layers)
    if cached > 0.9 * stats.prompt_tokens * len(stats.layers):
        yield "hint: the cache holds over 90 % of the prompt: the method drops little from it"
    elif stats.kv_bytes > 0.9 * stats.kv_bytes_dense:
        yield (
            "hint: most of the cache is room for new tokens: a smaller --max-new-tokens shrinks it"
        )


def as_json(
    engine: Engine,
    inputs: Inputs,
    text: str,
    tokens: list[int],
    result: Result | None,
    model: str | None,
    seed: int,
) -> dict:
    """The run as plain JSON; `stats` is null when Ctrl-C ended it.

    `model` is the name it was asked for (None: the demo), `seed` that of the sampling.
    """
    import torch

    return {
        "text": text,
        "finish_reason": result.finish_reason if result else "interrupted",
        "tokens": tokens,
        "usage": {
            "prompt_tokens": len(inputs),
            "visual_tokens": int(inputs.is_visual.sum()),
            "completion_tokens": len(tokens),
            "total_tokens": len(inputs) + len(tokens),
        },
        "stats": result.stats.to_dict() if result else None,
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
