"""The one interface a method implements: it looks at a View and answers with a Plan.

The policy decides, the attention layer (model/attention.py) computes, the cache (engine/cache.py)
stores. A policy holds its options and nothing else: what a method must remember between layers or
decode steps lives in the `state` dict of the sequence and dies with it.

T tokens, H query heads, G key/value heads, D head size, P probe rows, K kept tokens.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .engine.storage import FULL, Storage
from .errors import UsageError
from .options import fit, parse

METHODS = {
    "dense": "zipvl.policies.dense:Dense",
    "zipvl": "zipvl.policies.zipvl:ZipVL",
    "zipvl+": "zipvl.policies.zipvl_plus:ZipVLPlus",
    "fixed": "zipvl.policies.fixed:Fixed",
    "random": "zipvl.policies.random:Random",
    "fastv": "zipvl.policies.fastv:FastV",
    "streaming": "zipvl.policies.streaming:StreamingLLM",
    "h2o": "zipvl.policies.h2o:H2O",
    "snapkv": "zipvl.policies.snapkv:SnapKV",
    "zipvl-quant": "zipvl.policies.zipvl_quant:ZipVLQuant",
    "zipcache": "zipvl.policies.zipcache:ZipCache",
    "kivi": "zipvl.policies.kivi:KIVI",
}
FILLS = ("zero", "previous", "own")


@dataclass(frozen=True)
class View:
    """What a policy may look at: one layer of one sequence, after RoPE. Read-only but for `state`.

    `q` and `v` are projected when first read: a method that reads neither pays for neither."""

    layer: int  # 0 .. num_layers - 1
    num_layers: int
    k: Tensor  # [G, T, D]
    positions: (
        Tensor  # [T] place of each token in the prompt; all of 0..T-1 unless tokens were dropped
    )
    is_visual: Tensor  # [T] bool, image and video tokens
    project_q: Callable[[], Tensor]
    project_v: Callable[[], Tensor]
    mass: Tensor | None = None  # [H, T] float32, attention each token receives from the probe rows
    seen: Tensor | None = None  # [T]   how many probe rows can see each token
    state: dict = field(default_factory=dict)  # the sequence's notes: one dict for all its layers

    @property
    def length(self) -> int:
        return len(self.positions)

    @cached_property
    def q(self) -> Tensor:
        """[H, T, D] queries of all tokens."""
        return self.project_q()

    @cached_property
    def v(self) -> Tensor:
        """[G, T, D] values of all tokens."""
        return self.project_v()


@dataclass(frozen=True)
class Plan:
    """Sorted indices into the View's tokens; None means all of them."""

    attend: Tensor | None = None  # [K]  tokens whose q, k, v take part in this layer's attention
    cache: Tensor | None = None  # [K'] | [G, K']  tokens whose k, v stay for decoding
    stream: Tensor | None = None  # [K'']  tokens that go on to the next layer
    precise: Tensor | None = None  # [K]  of the cached ones, those a mixed storage gives more bits
    fill: str = "zero"  # what the attention output of tokens outside `attend` is:
    #   zero      nothing, the residual passes (the paper)
    #   previous  the output of the nearest earlier token in `attend`
    #   own       their own queries over the keys of `attend` (costs r of dense instead of r^2)

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise UsageError(f"a Plan's fill is {self.fill!r}: use one of {', '.join(FILLS)}")


class Policy:
    """Dense attention with a full cache; a method overrides what it changes."""

    watch_decode = False  # True: evict() also receives each step's attention probabilities

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def probe(self, view: View) -> Tensor | None:
        """Rows [P], sorted, whose attention the method wants to see; None: it needs none."""
        return None

    def plan(self, view: View) -> Plan:
        """Called once per layer and prompt, with `mass` and `seen` if probe() gave rows."""
        return Plan()

    @property
    def storage(self) -> Storage:
        """How the cache stores keys and values; engine/storage.py has the choices."""
        return FULL

    def precise(self, layer: int, mass: Tensor, state: dict) -> Tensor | None:
        """Called when a mixed storage quantises the n newest tokens: which of them, [K], sorted,
        get more bits, by the newest query's attention to them, `mass` [H, n]; None: all."""
        return None

    def evict(self, layer: int, slots: int, state: dict, probs: Tensor | None) -> Tensor | None:
        """Called after each decode step: `slots` tokens are cached, `probs` [G, slots] if watched.

        `state` is the dict that plan() saw as view.state; each layer writes under its own key.
        Returns the slots to keep, sorted, [N] or [G, N]; None keeps all.
        """
        return None


def load_policy(method: "str | Policy", **options: Any) -> Policy:
    """`zipvl`, `zipvl:tau=0.96,recent=32`, `my.py:Class`, `my.py:Class:tau=0.9`, or a Policy.

    `options` override what the string says; those that are None count as not given.
    Raises UsageError that lists the valid names or options.
    """
    if isinstance(method, Policy):
        return method
    head, _, tail = method.partition(":")
    if head.endswith(".py"):
        name, _, tail = tail.partition(":")
        cls = _from_file(Path(head), name)
    elif head in METHODS:
        module, _, name = METHODS[head].partition(":")
        cls = getattr(importlib.import_module(module), name)
    else:
        raise UsageError(
            f"unknown method {head!r}: use one of {', '.join(METHODS)}, or my_file.py:Class"
        )
    given = dict(parse(item, method) for item in tail.split(",") if item)
    given |= {k: v for k, v in options.items() if v is not None}
    valid = inspect.signature(cls).parameters
    if unknown := given.keys() - valid.keys():
        listed = ", ".join(f"{p.name}={p.default}" for p in valid.values()) or "none"
        raise UsageError(f"method {head!r} has no option {min(unknown)!r}: it takes {listed}")
    try:
        return cls(**{name: fit(value, valid[name]) for name, value in given.items()})
    except (TypeError, ValueError) as e:
        raise UsageError(f"method {method!r}: {e}") from None


def _from_file(path: Path, name: str) -> type[Policy]:
    if not path.is_file():
        raise UsageError(
            f"method file {path} does not exist: check the path before the first colon"
        )
    spec = importlib.util.spec_from_file_location(f"zipvl_method_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the user's own file: any mistake in it ends up here
        why = f"{type(e).__name__}: {e}"
        raise UsageError(f"method file {path} cannot be imported ({why}): correct it") from None
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Policy)]
    found = {c.__name__: c for c in classes if c.__module__ == module.__name__}
    if name not in found:
        known = f"it has {', '.join(found)}" if found else "it has no Policy class"
        raise UsageError(
            f"method file {path} has no method {name!r}: {known}; write {path}:ClassName"
        )
    return found[name]
