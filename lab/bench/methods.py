"""What a method that acts at each decode step costs, beside plain attention over as many slots.

Every layer's cache holds n tokens of random keys and values, and the method's budget is n, so that
each step decides as it would in a long answer: who evicts lets one slot go for each new one, who
fetches reads its share of n. What plan() asks to see is random, too: no prefill is paid for, and
the notes are as large as they are. `attention` is the layers' attention with all that the method
does (projections, view, step(), what leaves), `decide` of it step() itself, `leave` what the cache
does with what was decided.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipvl.errors import UsageError
from zipvl.model.batch import Batch
from zipvl.model.cache import Cache, Kept, store_as
from zipvl.model.decoder import trim
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Logits, Notes, Policy, View, ask

from ..raw import rounded
from .memory import ROOT
from .model import QUESTION, Model
from .timing import Factory, Row, interleaved, spread, timed

WARM = 2  # steps before the clock
TOVA = "examples/tova.py:TOVA"
OPTIONS = {  # under which n slots stay, or are chosen among; other methods run as they are
    "streaming": "sinks=4,window={rest}",
    "h2o": "heavy={half},recent={half}",
    "keyformer": "ratio=1",
    "elastic": "ratio=0.5",
    "prefixkv": "ratio=0.5",
    "scope": "budget={n},answer=1,recent=1",
    "tidal": "budget={few}",
    "attnpred_last": "budget={few}",
    TOVA: "budget={n}",
}
LONGER = {"elastic": 2, "prefixkv": 2}  # n slots are what stays of so many times n tokens


def ready(name: str) -> bool:
    """Whether a method can be made without a file of its user's."""
    try:
        return bool(load_policy(name))
    except UsageError:
        return False


def acting(methods: list[str], n: int) -> dict[str, Policy]:
    """The dense baseline and those of `methods` that act at decode steps or store in their own
    form, with a budget of n; those that fetch read `few`."""
    found: dict[str, Policy] = {"dense": Policy()}
    words = {"n": n, "half": max(1, n // 2), "rest": max(1, n - 4), "few": max(160, n // 8)}
    for name in methods:
        options = OPTIONS.get(name, "").format(**words)
        file = f"{ROOT}/{name}" if name == TOVA else name
        policy = load_policy(f"{file}:{options}" if options else file)
        acts = policy.step is not None or policy.storage is not None
        if acts and policy.scout is None:
            found[f"{name}:{options}" if options else name] = policy
    return found


def filled(model: Model, policy: Policy, n: int, room: int) -> tuple[list[Cache], Notes]:
    """The caches that `policy` makes of n random tokens, with `room`, and its notes."""
    c, notes = model.config, Notes(n, room)
    store = store_as(policy.storage, room)
    positions = torch.arange(n, dtype=torch.int32, device=model.device)
    caches: list[Cache] = []
    for layer in range(c.num_layers):
        view = random_view(model, layer, positions, notes)
        plan = ask(policy.plan, view)
        kept = Kept.of(plan, view.k.transpose(0, 1), view.v.transpose(0, 1), positions, False)
        caches.append(store([kept]))
        if plan.stream is not None:
            positions = positions[plan.stream]
        if policy.trim is not None:
            trim(caches, layer, [notes], policy.trim)
    return caches, notes


def random_view(model: Model, layer: int, positions: Tensor, notes: Notes) -> View:
    """A layer of a prompt whose attention nobody computes."""
    c, n, device = model.config, len(positions), model.device
    some = partial(torch.randn, device=device, dtype=model.dtype)

    def blocks(rows: Tensor) -> Iterator[Logits]:
        rows, share = rows[-QUESTION:], c.num_heads // c.num_kv_heads
        future = torch.arange(n, device=device) > rows[:, None]
        for start in range(0, c.num_heads, share):
            logits = torch.randn(share, len(rows), n, device=device)
            yield slice(start, start + share), rows, logits.masked_fill_(future, -torch.inf)

    def queries(rows: Tensor | None = None) -> Tensor:
        return some(c.num_heads, n if rows is None else len(rows), c.head_dim)

    return View(
        layer, c.num_layers, some(c.num_kv_heads, n, c.head_dim), positions,
        positions < n - QUESTION, notes,
        project_q=queries,
        project_v=lambda: some(c.num_kv_heads, n, c.head_dim),
        score=lambda rows: torch.rand(c.num_heads, n, device=device),
        blocks=blocks,
    )  # fmt: skip


class Laps(dict[str, float]):
    """Seconds of the parts of some steps; and what the caches hold behind them."""

    def __init__(self, model: Model, clock: str):
        super().__init__()
        self.device, self.clock = model.device, clock
        self.restart()

    def restart(self) -> None:
        self.update(attention=0.0, decide=0.0, leave=0.0)

    def of(self, part: str, work: Callable) -> Callable:
        """`work`, whose time is counted."""

        def counted(*given: Any) -> Any:
            out: list[Any] = []
            self[part] += timed(self.device, self.clock, lambda: out.append(work(*given)))
            return out[0]

        return counted

    def holds(self, caches: list[Cache]) -> None:
        self.slots = statistics.mean(len(cache.places(0)) for cache in caches)
        self.kv_bytes = sum(cache.nbytes for cache in caches)


class Watched(Policy):
    """The steps of a policy under a clock."""

    def __init__(self, policy: Policy, laps: Laps):
        if policy.step is not None:
            self.step = laps.of("decide", policy.step)


def steps_of(model: Model, policy: Policy, n: int, new: int, clock: str,
             seen: list[Laps]) -> Callable[[], object]:  # fmt: skip
    """`new` steps behind n tokens, without embedding and head; `seen` gets their laps."""
    torch.manual_seed(0)
    caches, notes = filled(model, policy, n, new + WARM)
    laps, c = Laps(model, clock), model.config
    inputs = torch.randn(new + WARM, 1, c.hidden_size, device=model.device, dtype=model.dtype)
    text = torch.zeros(1, dtype=torch.bool, device=model.device)
    watched = Watched(policy, laps)
    for cache in caches:
        # a clock around the method of this object alone; caches have no hook for one
        cache.apply = laps.of("leave", cache.apply)  # type: ignore[method-assign]
    seen.append(laps)

    def work(first: int = WARM, steps: int = new) -> None:
        laps.restart()
        for i in range(first, first + steps):
            at = torch.tensor([n + i], device=model.device)
            x, batch = inputs[i], Batch.build([1], at, text, c, model.dtype, [notes])
            for block, cache in zip(model.decoder.blocks(), caches, strict=True):
                attend = laps.of("attention", block.self_attn.decode)
                h = block.input_layernorm(x)
                x = block.feed_forward(x, attend(h, batch, cache, watched, model.attend))
        laps.holds(caches)

    work(0, WARM)
    return work


@torch.inference_mode()
def bench_methods(model: Model, args: argparse.Namespace) -> list[Row]:
    """Seconds of `--new` steps of every method that acts at them, all in one interleaved run."""
    methods = [*filter(ready, METHODS), TOVA] if args.methods == ["dense"] else args.methods
    rows: list[Row] = []
    for tokens in args.tokens:
        seen: dict[str, list[Laps]] = {}
        runs: dict[str, Factory] = {
            name: partial(steps_of, model, policy, tokens * LONGER.get(name.split(":")[0], 1),
                          args.new, args.clock, seen.setdefault(name, []))
            for name, policy in acting(methods, tokens).items()
        }  # fmt: skip
        spent = {"step": interleaved(model.device, args.clock, runs, args.repeats)}
        laps = {name: mine[-args.repeats :] for name, mine in seen.items()}
        for part in ("attention", "decide", "leave"):
            spent[part] = {name: [one[part] for one in mine] for name, mine in laps.items()}
        for name in runs:
            last, parts = laps[name][-1], {part: both[name] for part, both in spent.items()}
            rows.append(rounded({
                "bench": "methods", "tokens": tokens, "batch": 1, "run": name,
                "seconds": parts.pop("step"), "steps": args.new, **parts,
                "slots": last.slots, "kv_bytes": last.kv_bytes,
                "times_dense": {part: times(spent[part], name) for part in ("attention", "step")},
            }))  # fmt: skip
    return rows


def times(seconds: dict[str, list[float]], name: str) -> str:
    """As long as dense, within a repeat."""
    both = zip(seconds[name], seconds["dense"], strict=True)
    return spread([mine / dense for mine, dense in both]) + "x"
