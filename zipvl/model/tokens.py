"""Gathering and scattering tokens: what lies between a Plan and dense tensors."""

import torch
from torch import Tensor

from ..engine.cache import Cache, select
from ..engine.storage import Storage
from ..errors import UsageError
from ..policy import Plan
from .kernels import Spans
from .pack import Pack


def needed(plan: Plan) -> Tensor | None:
    """Tokens whose values somebody reads: those that attend or are cached; None: all."""
    if plan.attend is None or plan.cache is None:
        return None
    if plan.cache is plan.attend:
        return plan.attend
    return torch.cat((plan.attend, plan.cache.flatten())).unique()


def lookup(v: Tensor, need: Tensor | None, index: Tensor | None) -> Tensor:
    """Of the values v [needed, G, D] of tokens `need`, those of tokens `index`."""
    if need is index or index is None:
        return v
    return select(v, index if need is None else torch.searchsorted(need, index))


def spread(o: Tensor, index: Tensor, length: int, fill: str) -> Tensor:
    """Outputs o [K, C] of tokens `index` back at their places among `length` rows.

    The output projection is linear, so `previous` can gather after it at no cost.
    """
    if fill == "previous":
        slot = torch.searchsorted(index, torch.arange(length, device=o.device), right=True) - 1
        return o[slot.clamp(min=0)].mul_((slot >= 0)[:, None])
    return o.new_zeros(length, o.shape[1]).index_copy_(0, index, o)


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def compact(k: Tensor, v: Tensor, v_spans: Spans, needs: list[Tensor | None], pack: Pack,
            plans: list[Plan], room: int, storage: Storage) -> Cache:  # fmt: skip
    """A cache of exactly the planned tokens of each sequence, with room for `room` more.

    k [sum T, G, D] holds all tokens; v [sum needed, G, D] only `needs`, at `v_spans`.
    """
    at, kept = pack.spans.slices(), [plan.cache for plan in plans]
    some = zip(v_spans.slices(), needs, kept, strict=True)
    return storage.build(
        [select(k[a], index) for a, index in zip(at, kept, strict=True)],
        [lookup(v[a], need, index) for a, need, index in some],
        [places(pack.positions[a], index) for a, index in zip(at, kept, strict=True)],
        [precise_slots(plan) for plan in plans],
        room,
        pack.state,
        pack.scratch,
    )


def places(positions: Tensor, index: Tensor | None) -> Tensor:
    """Of positions [T], those of tokens `index`: [K], or [K, G] where heads differ."""
    if index is None:
        return positions
    return positions[index if index.ndim == 1 else index.T]


def precise_slots(plan: Plan) -> Tensor | None:
    """Which slots of the cache hold the plan's precise tokens, [K]; None: all."""
    if plan.precise is None or plan.cache is None:
        return plan.precise
    if plan.cache.ndim == 2:
        raise UsageError("a Plan with `precise` needs a `cache` that all heads share")
    return torch.isin(plan.cache, plan.precise).nonzero()[:, 0]
