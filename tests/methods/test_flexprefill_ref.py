"""FlexPrefill's masks, pairs and tokens against the published rule in numpy, float64."""

from functools import partial

import numpy as np
import pytest
import torch

from zipvl.engine.stats import masked_pairs
from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.flexprefill_ref import FlexPrefillRef
from zipvl.policy import Policy
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .test_minference_ref import looked, probabilities, seen

CASES = [
    ("flexprefill_ref", {"block": 8, "budget": 0, "gamma": 0.5}, {"gamma": 1.0}),
    ("flexprefill_ref", {"block": 7, "budget": 9, "tau": 0.4, "per": "head"}, {"budget": 1000}),
    ("flexprefill_ref", {"block": 16, "budget": 0, "tau": 1.0, "gamma": 0.3}, {"gamma": 1.0}),
    ("flexprefill_ref", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def fewest(values: np.ndarray, gamma: float) -> int:
    """The least number of values whose sum reaches gamma of the whole."""
    falling = sorted(values, reverse=True)
    for n in range(1, len(falling) + 1):
        if sum(falling[:n]) >= gamma * sum(falling):
            return n
    return len(falling)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * np.log(a / m) if a else 0) + (b * np.log(b / m) if b else 0)
    return float(np.sqrt(max(0.0, total / 2)))


def soft(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def published(q: np.ndarray, k: np.ndarray, o: FlexPrefillRef) -> tuple[np.ndarray, bool]:
    """What one head attends to, bool [T, T], and whether it is query-aware."""
    T, D = q.shape
    B, first = o.block, max(0, T - o.block)
    A = probabilities(q, k, first)
    column, diagonal = A.sum(0) / len(A), np.zeros(T)
    for i in range(first, T):
        for j in range(i + 1):
            diagonal[i - j] += A[i - first, j] / len(A)
    blocks = [slice(s, min(s + B, T)) for s in range(0, T, B)]
    N = len(blocks)
    mean_k = np.stack([k[b].mean(0) for b in blocks])
    mean_q = np.stack([q[b].mean(0) for b in blocks])
    true = np.array([column[b].sum() for b in blocks])
    guess = soft(mean_k @ q[first:].mean(0) / np.sqrt(D))
    aware = divergence(guess, true) < o.tau

    least = max(1, int(np.ceil(o.budget / B)))
    columns = least if aware else max(least, fewest(column, o.gamma) // B + 1)
    slashes = least if aware else max(least, fewest(diagonal, o.gamma) // B + 1)
    true[0] = np.inf
    slash = np.array([diagonal[b].sum() for b in blocks])
    slash[0] = np.inf
    kept = np.zeros((N, N), bool)
    kept[:, np.argsort(-true, kind="stable")[:columns]] = True
    for s in np.argsort(-slash, kind="stable")[:slashes]:
        for i in range(s, N):
            kept[i, i - s] = True
    if aware:
        map_ = np.zeros((N, N))
        for i in range(N):
            map_[i, : i + 1] = soft(mean_k[: i + 1] @ mean_q[i] / np.sqrt(D))
        rows = [(i, map_[i]) for i in range(N)] if o.per == "row" else [(None, map_.flatten())]
        for i, values in rows:
            for place in np.argsort(-values, kind="stable")[: fewest(values, o.gamma)]:
                kept[(i, place) if i is not None else divmod(place, N)] = True
    reads = kept.repeat(B, 0).repeat(B, 1)[:T, :T]
    return reads & (np.tri(T) > 0), aware


@pytest.mark.parametrize(
    ("groups", "T", "options"),
    [
        (1, 96, {"block": 8, "gamma": 0.9, "tau": 0.15, "budget": 0}),
        (2, 101, {"block": 8, "gamma": 0.5, "tau": 0.17, "budget": 0}),
        (4, 101, {"block": 8, "gamma": 0.7, "tau": 0.17, "budget": 17, "per": "head"}),
        (2, 150, {"block": 16, "gamma": 0.2, "tau": 0.0, "budget": 0}),
        (4, 150, {"block": 16, "gamma": 0.6, "tau": 1.0, "budget": 20}),
        (2, 131, {"block": 1, "gamma": 0.4, "tau": 0.4, "budget": 3}),
        (2, 33, {"block": 32, "gamma": 0.3, "tau": 0.1, "budget": 0}),
        (1, 32, {"block": 32, "gamma": 0.3, "tau": 0.1, "budget": 0}),  # one block
        (1, 5, {"block": 128, "gamma": 0.3, "tau": 0.1, "budget": 0}),  # part of one
        (2, 300, {"budget": 0}),
    ],
)
def test_the_mask_is_the_published_one(groups: int, T: int, options: dict) -> None:
    policy = FlexPrefillRef(**options)
    looks = looked(policy, 4, groups, T, seed=T)
    for (q, k), plan in zip(looks.saw, looks.plans, strict=True):
        got = seen(plan, T, 4)
        want = np.stack([published(q[h], k[h], policy)[0] for h in range(4)])
        assert (got == want).all()
        assert want[:, np.arange(T), np.arange(T)].all()
        if plan.mask is not None:
            assert masked_pairs(plan.mask, T) == round(2 * want.sum() / 4 - T)


def test_heads_of_both_kinds_are_compared() -> None:
    """A fact about the test above: its prompts have query-aware heads and others."""
    policy = FlexPrefillRef(block=8, gamma=0.5, tau=0.17, budget=0)
    looks = looked(policy, 4, 2, 101, seed=101)
    kinds = {published(q[h], k[h], policy)[1] for q, k in looks.saw for h in range(4)}
    assert kinds == {True, False}


def test_a_budget_is_read_by_every_head() -> None:
    """Of the same prompt, whatever gamma asks for: more tokens, more blocks, none lost."""
    small, large = (
        seen(looked(FlexPrefillRef(0.01, 0.3, n, 8), 4, 2, 120, seed=1).plans[0], 120, 4)
        for n in (0, 40)
    )
    assert (small <= large).all()
    blocks = large[:, 112:, ::8][:, -1].sum(1)  # of the last row
    assert (blocks >= 5).all()
    assert (small[:, 112:, ::8][:, -1].sum(1) >= 2).all()  # the first columns and its own


def test_all_budgets_are_dense() -> None:
    toy = Toy.build(4, 2)
    prompt = toy.prompt(150)
    dense = toy.run(Policy(), [prompt]).tokens
    for options in ({}, {"budget": 150, "block": 8}, {"budget": 0, "gamma": 1.0, "block": 8}):
        got = toy.run(FlexPrefillRef(**options), [prompt])
        assert got.tokens == dense
        assert all(plan.mask is None for plan in got.seen.plans)
    nearly = toy.run(FlexPrefillRef(budget=149, block=8), [prompt])
    assert all(masked_pairs(plan.mask, 150) == 150**2 for plan in nearly.seen.plans)
    assert nearly.tokens == dense


def test_the_cache_is_full_and_the_mask_small() -> None:
    toy = Toy.build(4, 2)
    got = toy.run(FlexPrefillRef(0.3, 0.1, 0, 8), [toy.prompt(150), toy.prompt(90)])
    assert got.prefilled == [[150, 90]] * 3
    mask = got.seen.plans[0].mask
    assert mask(torch.tensor([149, 3])).shape == (4, 2, 150)
    held = [c.cell_contents for c in mask.__closure__ if isinstance(c.cell_contents, torch.Tensor)]
    assert sum(t.numel() for t in held) == 4 * 19 * 19  # blocks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": 0}, "gamma is 0.0: give a share"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"tau": -0.1}, "tau is -0.1"),
        ({"budget": -1}, "budget is -1"),
        ({"block": 0}, "block is 0: give 1 token"),
        ({"per": "layer"}, "per is 'layer': use one of row, head"),
    ],
)
def test_options(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_policy("flexprefill_ref", **options)
