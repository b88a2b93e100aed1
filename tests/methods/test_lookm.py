"""LOOK-M: what stays of each head, and what becomes of the rest."""

from functools import partial

import numpy as np
import pytest

from zipvl.errors import UsageError
from zipvl.policies import load_policy, lookm
from zipvl.policies.lookm import LookM
from zipvl.policy import Plan, Policy, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import attention

CASES = [
    ("lookm", {"ratio": 0.6}, {"ratio": 1.0}),
    ("lookm", {}, {"ratio": 1.0, "recent": 1.0}),
    ("lookm", {"ratio": 0.5, "merge": "average", "recent": 0.1}, {"ratio": 1.0}),
    ("lookm", {"ratio": 0.01, "recent": 0.0, "merge": "none"}, None),  # text alone, or one token
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


class Spy(LookM):
    """Remembers what each layer looked at: sums [G, T], k and v [G, T, D]."""

    def plan(self, view: View) -> Plan:
        seen = self.__dict__.setdefault("seen", [])
        G = len(view.k)
        sums = attention(view).sum(1).reshape(G, -1, view.length).mean(1)
        seen.append((sums, view.k.double().numpy(), view.v.double().numpy()))
        return super().plan(view)


def chosen(sums: np.ndarray, text: set[int], ratio: float, recent: float) -> list[int]:
    """Of one head, by its column sums [T]."""
    T = len(sums)
    budget = max(1, round(ratio * T))
    always = text | set(range(T - round(recent * budget), T))
    others = sorted(set(range(T)) - always, key=lambda t: -sums[t])
    return sorted([*always, *others[: max(0, budget - len(always))]])


def merged(x: np.ndarray, k: np.ndarray, kept: list[int], how: str) -> np.ndarray:
    """Keys or values x [T, D] of one head, which go where keys k [T, D] are alike: [K, D]."""
    joins: dict[int, list[int]] = {p: [] for p in kept}
    for e in sorted(set(range(len(k))) - set(kept)):
        alike = [k[e] @ k[p] / np.linalg.norm(k[e]) / np.linalg.norm(k[p]) for p in kept]
        joins[kept[int(np.argmax(alike))]].append(e)
    if how == "none":
        return x[kept]
    if how == "average":
        return np.stack([np.mean([x[p], *(x[e] for e in joins[p])], axis=0) for p in kept])
    return np.stack([np.mean([x[p], *((x[e] + x[p]) / 2 for e in joins[p])], 0) for p in kept])


@pytest.mark.parametrize(("groups", "seed"), [(1, 5), (2, 0), (4, 5)])
@pytest.mark.parametrize(
    ("ratio", "recent"),
    [(0.01, 0.0), (0.2, 0.5), (0.5, 0.3), pytest.param(0.9, 1.0, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("merge", ["pivot", "average", "none"])
def test_sets_and_merging(ratio: float, recent: float, merge: str, groups: int, seed: int) -> None:
    toy, T = Toy.build(4, groups, seed), 64 + seed
    policy, prompt = Spy(ratio, recent, merge), toy.prompt(T)
    text = set((~prompt[1]).nonzero()[:, 0].tolist())
    got, differ = toy.run(policy, [prompt], steps=1), False
    for (sums, k, v), (held_k, held_v, places) in zip(policy.seen, got.held[0], strict=True):
        for g in range(groups):
            kept = chosen(sums[g], text, ratio, recent)
            assert places[:, g].tolist() == kept
            assert text <= set(kept)
            for held, x in ((held_k, k), (held_v, v)):
                want = merged(x[g], k[g], kept, merge)
                np.testing.assert_allclose(held[:, g].double(), want, rtol=1e-4, atol=1e-5)
                differ |= not np.allclose(want, x[g][kept])
    assert differ == (merge != "none")
    # the heads' sets are of one size, and the cache no larger
    assert got.bytes == [2 * (len(kept) + 1) * groups * 8 * 4] * 3


@pytest.mark.parametrize("visual", ["none", "some", "all"])
def test_text_is_kept_above_the_budget(visual: str) -> None:
    toy = Toy.build(4, 2)
    ids, is_visual = toy.prompt(90, visual)
    text, counts = int((~is_visual).sum()), []
    for ratio in (0.01, 0.2, 0.6):
        got = toy.run(LookM(ratio, recent=0.0), [(ids, is_visual)])
        want = max(text, round(ratio * 90))
        assert got.prefilled == [[want]] * 3
        assert [c.spans.lengths for c in got.caches] == [[want + 4]] * 3  # and all that is new
        counts.append(want)
    assert counts == {"none": [90] * 3, "some": [24, 24, 54], "all": [1, 18, 54]}[visual]


def test_blocks_of_similarities_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, runs = Toy.build(4, 2), []
    for size in (lookm.BLOCK, 1, 4 * 2 * 32 * 7):  # all rows at a time, one, seven
        monkeypatch.setattr(lookm, "BLOCK", size)
        runs.append(toy.run(LookM(0.5), [toy.prompt(64)]))
    for other in runs[1:]:
        for one, two in zip(runs[0].seen.plans, other.seen.plans, strict=True):
            assert (one.merge[0] == two.merge[0]).all()
            assert (one.merge[1] == two.merge[1]).all()


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1)
    prompts = [toy.prompt(94), toy.prompt(1, "all"), toy.prompt(2, "all"), toy.prompt(30, "none")]
    for policy in (LookM(1e-6), LookM(0.5), LookM(0.5, merge="average"), LookM(1.0)):
        got = toy.run(policy, prompts)
        alone = [toy.run(policy, [p]) for p in prompts]
        assert got.tokens == [a.tokens[0] for a in alone]
        assert got.prefilled == [[a.prefilled[i][0] for a in alone] for i in range(3)]
        assert got.bytes == [sum(a.bytes[i] for a in alone) for i in range(3)]
    full, dense = toy.run(LookM(1.0), prompts), toy.run(Policy(), prompts)
    assert full.tokens == dense.tokens
    assert full.bytes == dense.bytes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"recent": -1}, "recent is -1"),
        ({"merge": "weighted"}, "merge is 'weighted': use one of pivot, average, none"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'lookm': {says}"):
        load_policy("lookm", **options)
