"""The one interface a method implements: it looks at a view and answers with a Plan.

    start(prompt)        before layer 0: which tokens enter the model
    plan(view)           in each layer: which tokens attend, are cached, go on to the next layer
    trim(layer, notes)   behind each layer: which slots stay in the caches made so far
    step(view)           in each layer of a decode step, before its attention: which slots this step
                         reads, which leave
    scout                a method that answers the prompt first and leaves its notes to this one

Every method has a plan(); the other verbs are None unless a method defines them, and cost nothing
then. The policy decides, the attention layer (model/attention.py) computes, the cache
(model/cache.py) stores. A policy holds its options and nothing else: what a method must remember
between layers or decode steps lives in the notes of the sequence and dies with it.

T tokens, n cached tokens, H query heads, G key/value heads, D head size, C model width, P probe
rows, K kept tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import DAMAGED, REFUSAL, ModelError, UsageError, ZipvlError

FILLS = ("zero", "previous", "own")
Logits = tuple[slice, Tensor, Tensor]  # of some heads, rows [b] of them: [h, b, T] float32
Mask = Callable[[Tensor], Tensor]


class Origin(Protocol):
    """Where the visual tokens of a prompt come from; each part is found out when it is read."""

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """Rows and columns of tiles of each medium, a picture or video; 0, 0: it has none."""

    @property
    def medium(self) -> Tensor:
        """[T] int64, the number of the medium that a token belongs to; -1: text."""

    @property
    def crop(self) -> Tensor:
        """[T] int64, the frame of a video that it shows, or of a picture 0 for the whole and from 1
        on its tiles, row by row; -1: text, and vectors that end a row or a frame."""

    @property
    def received(self) -> Tensor:
        """[T, 2] float32, attention that its patch received in the first block of the vision tower
        and in the last one used, summed over heads: from the class token, or where there is none
        the mean over patches. -inf where crop is -1. Takes a second pass through the tower."""


class Notes(dict):
    """What a method remembers of one sequence, under keys of its own, from its first layer to its
    last decode step; and what the engine knows of the sequence."""

    origin: Origin  # of its visual tokens; who makes the prompt says it

    def __init__(self, prompt: int, new: int = 0):
        super().__init__()
        self.prompt, self.new = prompt, new  # tokens of the prompt, and most that may follow
        self.entered: Tensor | None = None  # [K] which tokens positions count; None: all of them
        self.ahead = 0  # by how much rotary ids of tokens behind the media exceed their positions

    def at(self, number: int) -> int:
        """The position of token `number` of the prompt and of what follows it."""
        if self.entered is None:
            return number
        return int((self.entered < number).sum()) + max(0, number - self.prompt)

    def original(self, positions: Tensor) -> Tensor:
        """The places in the prompt of its tokens at `positions`."""
        return positions.long() if self.entered is None else self.entered[positions.long()]


@dataclass(frozen=True)
class PromptView:
    """What start() may look at: one prompt before layer 0."""

    x: Tensor  # [T, C] embeddings, visual tokens included
    is_visual: Tensor  # [T] bool, image and video tokens
    notes: Notes  # notes.origin: where these come from

    @property
    def length(self) -> int:
        return len(self.x)

    def crops(self) -> list[list[Tensor]]:
        """Of each picture or video, the tokens [n] of each of its crops or frames, in order."""
        medium, crop, out = self.notes.origin.medium, self.notes.origin.crop, []
        for number in range(len(self.notes.origin.tiles)):
            tokens = ((medium == number) & (crop >= 0)).nonzero()[:, 0]
            each, order = crop[tokens].sort(stable=True)
            out.append(list(tokens[order].split(each.bincount().tolist())))
        return out


class LayerView:
    """What the views of a layer share."""

    k: Tensor  # [G, ., D]

    def by_group(self, x: Tensor) -> Tensor:
        """x [H, ...] -> [G, ...]: the mean over the query heads that share a key/value head."""
        return x.unflatten(0, (len(self.k), -1)).mean(1)


@dataclass(frozen=True)
class View(LayerView):
    """What plan() may look at: one layer of one prompt, after RoPE. Read-only but for `notes`.

    What costs something is computed when it is asked for: a method that never reads `q`, `v` or
    `mass()` pays for none of them."""

    layer: int  # 0 .. num_layers - 1
    num_layers: int
    k: Tensor  # [G, T, D]
    positions: Tensor  # [T] place in the prompt; all of 0..T-1 unless tokens were dropped
    is_visual: Tensor  # [T] bool, image and video tokens
    notes: Notes
    project_q: Callable[[Tensor | None], Tensor]  # the layer's, behind q, v and mass()
    project_v: Callable[[], Tensor]
    score: Callable[[Tensor], Tensor]
    blocks: Callable[[Tensor], Iterator[Logits]]  # the layer's, behind logits()
    sums: list[Tensor] = field(default_factory=list)  # of what mass() gave, for ask_all() to check

    @property
    def length(self) -> int:
        return len(self.positions)

    @cached_property
    def q(self) -> Tensor:
        """[H, T, D] queries of all tokens."""
        return self.project_q(None)

    def queries(self, rows: Tensor) -> Tensor:
        """[H, P, D] queries of these `rows` [P] alone (int64, sorted)."""
        return self.project_q(rows)

    @cached_property
    def v(self) -> Tensor:
        """[G, T, D] values of all tokens."""
        return self.project_v()

    def mass(self, rows: Tensor | None = None) -> Tensor:
        """[H, T] float32: the attention that each token receives from `rows` [P] (int64, sorted;
        None: from all rows). Exact: the causal softmax of these rows, summed over them."""
        mass = self.score(self.every if rows is None else rows)
        self.sums.append(mass.sum())
        return mass

    def logits(self, rows: Tensor | None = None) -> Iterator[Logits]:
        """The same rows for methods that need more than sums: blocks (heads, rows [b], logits
        [h, b, T] float32, -inf in the future) that cover all query heads and rows, in bounded
        memory. They are the method's to overwrite."""
        return self.blocks(self.every if rows is None else rows)

    @property
    def every(self) -> Tensor:
        """[T] the indices of all tokens."""
        return torch.arange(self.length, device=self.k.device)

    def seen(self, rows: Tensor) -> Tensor:
        """[T]: how many of the sorted `rows` [P] can see each token, the nnz of Eq. 7."""
        rows = rows.to(self.k.device)
        return len(rows) - torch.searchsorted(rows, self.every)


@dataclass(frozen=True)
class StepView(LayerView):
    """What step() may look at: one layer of one sequence at a decode step, the newest token's key
    and value already in the cache. Read-only but for `notes`.

    The newest token is the last slot; the others are in order until some have left, then they are
    not: see `positions`."""

    layer: int
    num_layers: int
    q: Tensor  # [H, D] of the newest token
    k: Tensor  # [G, n, D] of all cached tokens, the newest last
    v: Tensor  # [G, n, D]
    positions: Tensor  # [G, n] places in the prompt and the answer
    due: int  # so many of the newest slots leave full precision after this step
    notes: Notes

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def mass(self, slots: Tensor | None = None) -> Tensor:
        """[H, n] float32: the newest token's attention to each slot; with `slots` [m] or [G, m], as
        if there were no others, [H, m]."""
        if slots is None:
            return self._mass
        return self._logits(select(self.k.transpose(0, 1), slots).transpose(0, 1)).softmax(dim=-1)

    @cached_property
    def logits(self) -> Tensor:
        """[H, n] float32: what mass() is the softmax of."""
        return self._logits(self.k)

    @cached_property
    def _mass(self) -> Tensor:
        return self.logits.softmax(dim=-1)

    def _logits(self, k: Tensor) -> Tensor:
        scores = self.q.unflatten(0, (len(k), -1)) @ k.mT  # [G, H/G, m]
        return (scores.float() / math.sqrt(self.q.shape[-1])).flatten(0, 1)

    @property
    def mass_known(self) -> bool:
        """Whether somebody asked for logits or mass(): the layer need not compute them again."""
        return "logits" in vars(self)


@dataclass(frozen=True)
class Plan:
    """Sorted int64 indices into a view's tokens, or at a decode step its slots; None: all of them.
    Instead of [K] a bool mask of all tokens will do, and is better on an accelerator: those of a
    layer become indices together, so that its processor waits once.

    start() answers with `stream`, `renumber` and `x`, step() with `attend`, `leave` and `precise`,
    plan() with all but `leave`, `renumber` and `x`.
    """

    attend: Tensor | None = None  # [K]  tokens whose q, k, v take part in this layer's attention;
    #   at a decode step [K] or [G, K], the slots that it reads
    cache: Tensor | None = None  # [K'] | [G, K']  tokens whose k, v stay for decoding
    stream: Tensor | None = None  # [K'']  tokens that go on to the next layer
    leave: Tensor | None = None  # [E] | [G, E]  at a decode step, the slots whose k, v are let go
    #   after it; what is left of the newest ones takes their places (cache.moved)
    precise: Tensor | None = None  # [K]  cached tokens (in step(): of the `due`) with more bits
    fill: str = "zero"  # what the attention output of tokens outside `attend` is:
    #   zero      nothing, the residual passes (the paper)
    #   previous  the output of the nearest earlier token in `attend`
    #   own       their own queries over the keys of `attend` (costs r of dense instead of r^2)
    mask: Mask | None = None  # (rows [b]) -> bool [b, T] | [H, b, T]: what these rows attend to of
    #   what lies before them, for patterns that are no set of tokens. A reference: no faster
    merge: tuple[Tensor, Tensor] | None = None  # for each token the cached one that it joins, int64
    #   [T] | [G, T], -1 none, and a weight: a slot holds the weighted means of what joins it
    room: int | None = None  # new tokens that the cache must hold at a time: 1 for a method whose
    #   steps let one slot go for each new one. None: all that follow
    channels: Tensor | None = None  # [D'] | [G, D']  channels of keys, not tokens: those that a
    #   thinning storage holds of the older cached tokens (model/cache_thin.py)
    summary: int = 0  # of what `cache` leaves out, in order, each run of about so many tokens
    #   becomes one slot: mean key, mean value, and the logarithm of their number on its score; 0:
    #   nothing stays of it. Verbs do not see these slots, they stay
    renumber: bool = False  # of start(): positions, new tokens' too, count the tokens that enter
    x: Tensor | None = None  # [T, C] of start(): embeddings in place of the view's

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise UsageError(f"a Plan's fill is {self.fill!r}: use one of {', '.join(FILLS)}")
        if not isinstance(self.summary, int) or self.summary < 0:
            raise UsageError(f"a Plan's summary is {self.summary!r}: give tokens a slot, or 0")
        if self.precise is not None and getattr(self.cache, "ndim", 1) == 2:
            raise UsageError("a Plan with `precise` needs a `cache` that all heads share")
        if self.mask is not None and self.attend is not None:
            raise UsageError("a Plan has `attend` or `mask`, not both")
        if self.room is not None and (not isinstance(self.room, int) or self.room < 1):
            raise UsageError(f"a Plan's room is {self.room!r}: give new tokens, 1 or more")


Trim = Callable[[int, Notes], dict[int, Tensor] | None]


def select(x: Tensor, index: Tensor | None) -> Tensor:
    """Tokens `index` of x [T, G, ...]: None all, [K] the same for all heads, [G, K] per head."""
    if index is None:
        return x
    if index.ndim == 1:
        return x[index]
    at = index.T * x.shape[1] + torch.arange(x.shape[1], device=x.device)  # [K, G]
    return x.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)


class Storage(Protocol):
    """How a method's caches store keys and values; model/cache_quant.py has the choices."""

    def store(self, room: int) -> Callable[[list[Any]], Any]:
        """What builds a prefill's caches of `Kept` tokens (model/cache.py), with room for more."""

    def restore(self, room: int) -> Callable[[dict[str, Tensor]], Any]:
        """The same of what their saved() gave."""

    def nbytes(self, precise: int, others: int, room: int, G: int, D: int, item: int) -> int:
        """Bytes of one sequence in one layer by formula; `item` bytes a full number."""


class Policy:
    """Dense attention with a full cache; a method overrides what it changes."""

    start: Callable[[PromptView], Plan] | None = None
    trim: Trim | None = None  # for any layer so far
    #   the slots [K] or [G, K] that stay in its cache; the memory of the others is freed
    step: Callable[[StepView], Plan] | None = None
    scout: "Policy | None" = None
    guide: str = ""  # folder or hub id of the model that the scout runs in; "": in this one
    storage: Storage | None = None  # how caches store keys and values; None: in full precision

    def __repr__(self) -> str:
        """The options in the order in which they are given, without those that are None."""
        named = vars(self)
        if is_dataclass(self):
            shown = sorted((f for f in fields(self) if f.repr), key=lambda f: bool(f.kw_only))
            named = {f.name: getattr(self, f.name) for f in shown}
        listed = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
        return f"{type(self).__name__}({listed})"

    def plan(self, view: View) -> Plan:
        """Called once per layer and prompt."""
        return Plan()


def sound(policy: Any) -> Policy:
    """`policy`, if it is one and what it brings can be used. Raises UsageError."""
    if not isinstance(policy, Policy):
        raise UsageError(
            f"{shown(policy)} is no method: give an instance of a class of zipvl.Policy"
        )
    name = type(policy).__name__
    if not isinstance(policy.scout, Policy | None):
        raise UsageError(
            f"{name}.scout is {shown(policy.scout)}: give a Policy that is made, or None"
        )
    if not isinstance(policy.guide, str):
        raise UsageError(f"{name}.guide is {shown(policy.guide)}: give a folder or hub id, or ''")
    if policy.storage is not None and not hasattr(policy.storage, "store"):
        raise UsageError(f"{name}.storage is {shown(policy.storage)}: give a KVFormat, or None")
    return policy


PARTS = {  # the parts of a Plan that each verb answers with, and their most dimensions
    PromptView: {"stream": 1},
    View: {"attend": 1, "cache": 2, "stream": 1, "precise": 1, "channels": 2},
    StepView: {"attend": 2, "leave": 2, "precise": 1},
}


AnyView = PromptView | View | StepView


def ask(verb: Callable[[Any], Plan], view: AnyView) -> Plan:
    """What a method's start(), plan() or step() answers, masks as indices (ask_all)."""
    return ask_all(verb, [view])[0]


def ask_all(verb: Callable[[Any], Plan], views: Iterable[AnyView]) -> list[Plan]:
    """The answers for all sequences of a batch, their masks as indices. Raises UsageError that
    names a verb which fails, gives no Plan, or a Plan of anything but indices into the view, and
    ModelError where attention was no number: who ranks tokens by it chose blindly."""
    plans: list[Plan] = []
    masks: dict[int, Tensor] = {}
    sums: list[tuple[int, Tensor]] = []
    for view in views:
        plans.append(plan := answer(verb, view))
        for part in PARTS[type(view)]:
            index = getattr(plan, part)
            if index is not None and index.dtype == torch.bool:
                masks[id(index)] = index
        if isinstance(view, View):
            sums += [(view.layer, total) for total in view.sums]
    if not masks and not sums:
        return plans
    # the one time in a layer that the processor waits for its device
    chosen = {key: places(mask) for key, mask in masks.items()}
    asked = [m.sum() for m in masks.values()] + [total for _, total in sums]
    numbers = torch.stack([n.float() for n in asked]).tolist()
    counts, totals = map(int, numbers[: len(masks)]), numbers[len(masks) :]
    for (layer, _), total in zip(sums, totals, strict=True):
        if not math.isfinite(total):
            raise ModelError(f"the attention scores of layer {layer} {DAMAGED}")
    indices = {key: found[:n] for (key, found), n in zip(chosen.items(), counts, strict=True)}
    if any(not len(index) for index in indices.values()):
        raise UsageError(f"{named(verb)} gives a Plan with an empty mask: keep at least one token")
    parts = ("attend", "cache", "stream", "leave", "precise", "channels")
    return [
        replace(plan, **{p: indices.get(id(getattr(plan, p)), getattr(plan, p)) for p in parts})
        for plan in plans
    ]


def places(mask: Tensor) -> Tensor:
    """The int64 indices that are True in mask [T], in order, then nothing of use, [T + 1] in all:
    what nonzero() gives, without asking the device how many they are."""
    T = len(mask)
    at = torch.where(mask, mask.cumsum(0) - 1, T)  # the others share the last place
    return at.new_empty(T + 1).scatter_(0, at, torch.arange(T, device=mask.device))


def answer(verb: Callable[[Any], Plan], view: AnyView) -> Plan:
    """What a verb says about one view, checked as far as that needs no number of a tensor."""
    plan = call(verb, view)
    if not isinstance(plan, Plan):
        raise UsageError(f"{named(verb)} gives {shown(plan)}: return a Plan")
    heads = len(view.k) if isinstance(view, LayerView) else 0
    counts = {"precise": view.due} if isinstance(view, StepView) else {}
    if isinstance(view, View):
        counts["channels"] = view.k.shape[-1]
    for part, ndim in PARTS[type(view)].items():
        if (index := getattr(plan, part)) is None:
            continue
        kind = "channel" if part == "channels" else "token"
        if wrong := fault(index, counts.get(part, view.length), ndim, heads, kind):
            where = "" if isinstance(view, PromptView) else f" in layer {view.layer}"
            raise UsageError(f"{named(verb)} gives a Plan{where} whose {part} {wrong}")
    if isinstance(view, PromptView) and plan.x is not None and plan.x.shape != view.x.shape:
        raise UsageError(f"{named(verb)} gives a Plan whose x is not as large as the view's")
    if isinstance(view, StepView) and plan.cache is not None:
        raise UsageError(f"{named(verb)} gives a Plan with `cache`: name what is to `leave`")
    return plan


def ask_trim(verb: Trim, layer: int, notes: Notes,
             lengths: list[int], heads: int) -> dict[int, Tensor]:  # fmt: skip
    """What a method's trim() answers behind `layer`, where the caches so far hold `lengths` slots
    of the sequence for each of `heads`. Raises UsageError as ask() does."""
    slots = call(verb, layer, notes)
    if slots is None:
        return {}
    if not isinstance(slots, dict):
        raise UsageError(f"{named(verb)} gives {shown(slots)}: return a dict of slots, or None")
    for earlier, index in slots.items():
        if not isinstance(earlier, int) or not 0 <= earlier < len(lengths):
            raise UsageError(f"{named(verb)} names layer {shown(earlier)}, which has no cache yet")
        if wrong := fault(index, lengths[earlier], 2, heads):
            raise UsageError(f"{named(verb)} gives slots of layer {earlier} whose index {wrong}")
    return slots


def call(verb: Callable[..., Any], *given: Any) -> Any:
    """verb(*given). Raises UsageError that names a verb which fails."""
    try:
        return verb(*given)
    except (ZipvlError, AssertionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        if REFUSAL.search(str(e)):  # an allocator's, under another name
            raise
        raise UsageError(
            f"{named(verb)} fails with {type(e).__name__} ({e}): "
            "zipvl.testing.check_policy shows why"
        ) from e


def named(verb: Any) -> str:
    """A partial, or a number where a function should be, has no name: then what it is."""
    return f"{getattr(verb, '__qualname__', None) or shown(verb)}() of the method"


def shown(x: Any) -> str:
    """The start of its repr, in one line."""
    return " ".join(repr(x).split())[:60]


def fault(index: Any, count: int, ndim: int, heads: int, kind: str = "token") -> str:
    """What is wrong with an index [K], or [heads, K] where `ndim` is 2, into `count` tokens, or
    what `kind` says; "" if nothing is. On an accelerator its numbers are not read: the processor
    would wait for them."""
    if not isinstance(index, Tensor):
        return f"is {shown(index)}: give a tensor of indices"
    if index.dtype == torch.bool:
        right = list(index.shape) == [count]
        return (
            "" if right else f"is a mask of shape {list(index.shape)}: the {kind}s need [{count}]"
        )
    if index.dtype != torch.int64:
        return f"has dtype {index.dtype}: give int64 indices, or a bool mask of all {count} {kind}s"
    if not 1 <= index.ndim <= ndim:
        return f"has shape {list(index.shape)}: one index per {kind} is needed"
    if index.ndim == 2 and len(index) != heads:
        return f"has {len(index)} rows: the key/value heads need {heads}, not one row a query head"
    if not index.shape[-1]:
        return f"is empty: keep at least one {kind}"
    if index.device.type != "cpu":
        return ""
    if not bool((index.diff(dim=-1) > 0).all()):
        return "is not sorted or not unique: causality needs order, .sort().values"
    if int(index[..., 0].min()) < 0 or int(index[..., -1].max()) >= count:
        why = ": positions are not indices into the view" if kind == "token" else ""
        return f"reaches outside the {count} {kind}s there are{why}"
    return ""


def check(valid: bool, message: str) -> None:
    """For options: load_policy makes the ValueError a sentence that names the method."""
    if not valid:
        raise ValueError(message)


def choice(name: str, value: str, options: tuple[str, ...]) -> None:
    check(value in options, f"{name} is {value!r}: use one of {', '.join(options)}")
