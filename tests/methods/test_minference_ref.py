"""MInference's masks, pairs and tokens against the published rule in numpy, float64."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from zipvl.engine.stats import masked_pairs
from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.minference_ref import MInferenceRef
from zipvl.policy import Plan, Policy, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

CASES = [
    ("minference_ref", {"vertical": 1, "slash": 1, "rows": 5}, {"slash": 1000}),
    ("minference_ref", {"vertical": 40, "slash": 60, "rows": 64}, {"vertical": 1000}),
    ("minference_ref", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


class Looks(Policy):
    """Does what a method does and keeps what it saw: queries and keys in float64."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.saw: list[tuple[np.ndarray, np.ndarray]] = []
        self.plans: list[Plan] = []

    def plan(self, view: View) -> Plan:
        q, k = view.q, view.k.repeat_interleave(len(view.q) // len(view.k), dim=0)
        self.saw.append((q.double().numpy(), k.double().numpy()))
        self.plans.append(self.policy.plan(view))
        return self.plans[-1]


def looked(policy: Policy, heads: int, groups: int, length: int, seed: int) -> Looks:
    looks = Looks(policy)
    toy = Toy.build(heads, groups, seed)
    ids = torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed))
    toy.run(looks, [(ids, ids > 20)], steps=1)
    return looks


def probabilities(q: np.ndarray, k: np.ndarray, first: int) -> np.ndarray:
    """Causal attention [T - first, T] of one head's rows from `first` on."""
    out = np.zeros((len(q) - first, len(q)))
    for i in range(first, len(q)):
        scores = np.array([q[i] @ k[j] / np.sqrt(q.shape[1]) for j in range(i + 1)])
        weights = np.exp(scores - scores.max())
        out[i - first, : i + 1] = weights / weights.sum()
    return out


def published(q: np.ndarray, k: np.ndarray, vertical: int, slash: int, rows: int) -> np.ndarray:
    """What one head attends to, bool [T, T], token by token."""
    T = len(q)
    first = max(0, T - rows)
    A = probabilities(q, k, first)
    column, diagonal = A.sum(0), np.zeros(T)
    for i in range(first, T):
        for j in range(i + 1):
            diagonal[i - j] += A[i - first, j]
    column[:30], diagonal[:100] = np.inf, np.inf
    columns = np.argsort(-column, kind="stable")[: max(30, vertical)]
    offsets = np.argsort(-diagonal, kind="stable")[: max(50, slash)]
    reads = np.zeros((T, T), bool)
    reads[:, columns] = True
    for start in range(0, T, 64):  # of each diagonal, the block of columns that 64 rows cross
        for o in offsets:
            reads[start : start + 64, max(0, start - o) : max(0, start - o + 64)] = True
    return reads & (np.tri(T) > 0)


def seen(plan: Plan, T: int, heads: int) -> np.ndarray:
    """The mask of a plan, asked as attention does: some rows at a time."""
    if plan.mask is None:
        return np.broadcast_to(np.tri(T) > 0, (heads, T, T))
    parts = [plan.mask(rows) for rows in torch.arange(T).split(77)]
    assert all(part.dtype == torch.bool for part in parts)
    return torch.cat(parts, dim=1).numpy() & (np.tri(T) > 0)


@pytest.mark.parametrize(
    ("groups", "T", "vertical", "slash", "rows"),
    [
        (1, 200, 1, 1, 64),
        pytest.param(2, 333, 45, 101, 64, marks=pytest.mark.slow),
        pytest.param(4, 500, 31, 105, 7, marks=pytest.mark.slow),
        (4, 257, 100, 55, 1),
        pytest.param(2, 300, 60, 101, 300, marks=pytest.mark.slow),
        (2, 290, 30, 100, 1000),  # more rows than tokens
        (1, 51, 1, 1, 64),  # below both windows, above the least offsets
        (2, 50, 1, 1, 64),
        (2, 9, 3, 3, 64),
    ],
)
def test_the_mask_is_the_published_one(
    groups: int, T: int, vertical: int, slash: int, rows: int
) -> None:
    policy = MInferenceRef(vertical, slash, rows)
    looks = looked(policy, 4, groups, T, seed=T)
    for (q, k), plan in zip(looks.saw, looks.plans, strict=True):
        got = seen(plan, T, 4)
        want = np.stack([published(q[h], k[h], vertical, slash, rows) for h in range(4)])
        assert (got == want).all()
        assert want[:, np.arange(T), np.arange(T)].all()
        if plan.mask is not None:
            assert want.sum() < 4 * (np.tri(T) > 0).sum() or T < 64
            assert masked_pairs(plan.mask, T) == round(2 * want.sum() / 4 - T)


def test_a_head_is_a_pattern_of_its_own() -> None:
    looks = looked(MInferenceRef(40, 60, 64), 4, 2, 400, seed=3)
    masks = seen(looks.plans[1], 400, 4)
    assert not (masks[0] == masks[1]).all()  # query heads that share keys


def test_forced_lines_come_first() -> None:
    """With no more than the least, what attention says does not matter."""
    for seed in (0, 1):
        masks = seen(looked(MInferenceRef(1, 1), 4, 4, 200, seed).plans[0], 200, 4)
        i, j = np.ogrid[:200, :200]
        start = i // 64 * 64
        near = (start - j < 50) & (
            start - j > -64
        )  # an offset from 0 to 49 crosses the block there
        assert (masks == ((near | (j < 30)) & (j <= i))).all()


def test_all_budgets_are_dense() -> None:
    toy = Toy.build(4, 2)
    prompt = toy.prompt(150)
    dense = toy.run(Policy(), [prompt]).tokens
    for options in ({}, {"vertical": 150}, {"slash": 150}):
        got = toy.run(MInferenceRef(**options), [prompt])
        assert got.tokens == dense
        assert all(plan.mask is None for plan in got.seen.plans)
    nearly = toy.run(MInferenceRef(149, 149), [prompt])
    assert all(plan.mask is not None for plan in nearly.seen.plans)
    assert all(masked_pairs(plan.mask, 150) == 150**2 for plan in nearly.seen.plans)
    assert nearly.tokens == dense


def test_the_cache_is_full_and_steps_are_dense() -> None:
    got = Toy.build(4, 2).run(MInferenceRef(1, 1), [Toy.build(4, 2).prompt(n) for n in (150, 90)])
    assert got.prefilled == [[150, 90]] * 3
    assert MInferenceRef.step is None


def test_a_mask_is_made_of_as_many_rows_as_asked() -> None:
    """No [T, T] waits behind it: what it holds on to grows with heads x tokens."""
    [plan, *_] = looked(MInferenceRef(1, 1), 4, 2, 300, seed=0).plans
    mask: Tensor = plan.mask(torch.tensor([250, 3]))
    assert mask.shape == (4, 2, 300)
    held = [cell.cell_contents for cell in plan.mask.__closure__]
    assert max(t.numel() for t in held if isinstance(t, Tensor)) <= 4 * (300 + 63)


@pytest.mark.parametrize("option", ["vertical", "slash", "rows"])
def test_options(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is 0: give 1 or more"):
        load_policy("minference_ref", **{option: 0})
