"""Gathering and scattering tokens: what lies between a Plan and dense tensors."""

import torch
from torch import Tensor

from ..engine.cache import select
from ..policy import Plan


def needed(plan: Plan) -> Tensor | None:
    """Tokens whose values somebody reads: those that attend and those that are cached; None: all."""
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
        return o[slot.clamp(min=0)] * (slot >= 0)[:, None]
    return o.new_zeros(length, o.shape[1]).index_copy(0, index, o)


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
