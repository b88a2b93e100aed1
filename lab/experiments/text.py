"""Long text without downloads, and the loss of a decoder on what follows a prompt.

The text is the Python language reference as it ships inside CPython (pydoc_data.topics, PSF
licence): prose, tables and code on one subject. A window is `tokens` of prompt and TAIL that follow
it. The prompt is prefilled under a method, and the TAIL is scored against the cache it left, each
token given the true ones before it. Loss inside the prompt would mean nothing: there, tokens that
are left out attend to nothing.
"""

import math
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.engine.stats import Counted, dense_work, layer_rows
from zipvl.errors import UsageError
from zipvl.model.cache import Cache
from zipvl.policy import Policy
from zipvl.vision.family import Geometry, Media

from .runner import Job, Record, policy

TAIL = 128


def windows(engine: Engine, tokens: int, samples: int, seed: int,
            tail: int = TAIL) -> list[Tensor]:  # fmt: skip
    """`samples` windows of token ids [tokens + tail], without overlap, in a seeded order.

    Raises UsageError when the text is too short for so many.
    """
    ids = engine.chat.encode("\n\n".join(topics[name] for name in sorted(topics)))
    size = tokens + tail
    found = torch.tensor(ids)[: len(ids) // size * size].unflatten(0, (-1, size))
    if len(found) < samples:
        raise UsageError(f"the text has {len(found)} windows of {size} tokens: lower --samples")
    order = np.random.default_rng(seed).permutation(len(found))[:samples]
    return [found[i] for i in order]


@torch.inference_mode()
def continuation(engine: Engine, ids: Tensor, method: Policy,
                 question: int | None = None) -> tuple[float, Counted]:  # fmt: skip
    """Mean loss in nats of ids' last TAIL tokens after a prompt of all before them.

    `question`: so many of the prompt's last tokens count as text, which methods keep, those before
    as the film, of which they may leave out what they like; None: all is text."""
    prompt, tail = ids[:-TAIL], ids[-TAIL:].to(engine.model.device)
    film = 0 if question is None else len(prompt) - question
    shown = engine.model.text.embed_tokens(prompt[:film].to(tail.device))
    media = [Media("video", torch.empty(0), Geometry(1, 1, frames=film), film, features=shown)]
    inputs = Inputs(prompt, torch.arange(len(prompt)) < film, media)
    out = engine.prefill([inputs], method, 0, {}, ends=True)
    hidden = torch.cat((out.hidden, follow(engine, out.caches, tail[:-1], len(prompt))))
    return float(torch.nn.functional.cross_entropy(engine.model.logits(hidden), tail)), out


def loss_after(engine: Engine, ids: Tensor, method: Policy) -> tuple[float, int]:
    """continuation()'s loss, and the bytes of the cache."""
    loss, out = continuation(engine, ids, method)
    return loss, sum(cache.nbytes for cache in out.caches)


def follow(engine: Engine, caches: list[Cache], ids: Tensor, start: int) -> Tensor:
    """Hidden states [n, C] of n known tokens that follow a prompt, over the caches it left, which
    stay as they are (for methods that evict nothing meanwhile)."""
    model, n = engine.model.text, len(ids)
    roomy = [cache.drop([0], n) for cache in caches]
    positions = torch.arange(start, start + n, device=ids.device)
    return model.extend(model.embed_tokens(ids), [n], positions, roomy, Policy(), engine.attend)


def records(job: Job, methods: list[str], question: int | None = None) -> list[Record]:
    """Loss, kept shares, work and cache of every method on every window."""
    [tokens, *_] = job.tokens
    some = windows(job.engine, tokens, job.samples, job.seed)
    dense = dense_work(job.engine.config.text, tokens, ends=True)

    def measure(ids: Any, method: str) -> list[Record]:
        loss, out = continuation(job.engine, ids, policy(method), question)
        rows = layer_rows(out.layers, 0, tokens)
        if not math.isfinite(loss):
            raise UsageError(f"method {method} gives a loss of {loss}")
        record = {
            "loss": loss,
            "ratios": [r["ratio"] for r in rows],
            "work": sum(r["work"] for r in rows) / len(rows),
            "cached": sum(r["cached"] for r in rows) / len(rows) / tokens,
            "prefill": sum(s.work[0] for s in out.layers) / dense,
            "kv_bytes": sum(r["kv_bytes"] for r in rows),
        }
        return [record]

    return job.records(map(str, range(job.samples)), methods, lambda u: some[int(u[0])], measure)
