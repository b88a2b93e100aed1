"""Keyformer: sums of a noisy softmax, its temperature, and what leaves at every few steps."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from zipvl.errors import UsageError
from zipvl.model import attention as layer_of_attention
from zipvl.policies import keyformer, load_policy
from zipvl.policies.keyformer import Keyformer, gumbel, mixed
from zipvl.policy import Plan, Policy, StepView, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

CASES = [
    ("keyformer", {"ratio": 0.4}, {"ratio": 1.0}),
    ("keyformer", {"ratio": 0.3, "every": 2, "noise": False}, {"ratio": 1.0, "every": 8}),
    ("keyformer", {"ratio": 0.01, "recent": 0.0, "every": 1}, None),  # one token
    ("keyformer", {"ratio": 0.2, "recent": 1.0, "every": 3, "seed": 5}, None),  # a window
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(q: Tensor, k: Tensor) -> np.ndarray:
    """q [H, r, D], k [G, n, D] -> [H, r, n], by query head, nothing masked."""
    q, k = q.double().numpy(), k.double().numpy()
    share = len(q) // len(k)
    return np.stack([q[h] @ k[h // share].T / np.sqrt(q.shape[2]) for h in range(len(q))])


def by_group(x: np.ndarray, groups: int) -> np.ndarray:
    return x.reshape(groups, -1, x.shape[-1]).mean(1)


def best(scores: dict[int, float], count: int, newest: int) -> set[int]:
    """The published choice: the last positions, and of the others those of the largest scores."""
    places = sorted(scores)
    recent = places[len(places) - newest :]
    others = sorted(set(places) - set(recent), key=lambda p: -scores[p])
    return {*recent, *others[: count - newest]}


class Spy(Keyformer):
    """Follows the rule in numpy, by position: `scores[layer][g]` of what is held there."""

    def plan(self, view: View) -> Plan:
        if view.layer == 0:
            self.scores, self.made, self.evicted = {}, {}, 0
        T, G = view.length, len(view.k)
        self.count = max(1, round(self.ratio * T))
        self.newest = round(self.recent * self.count)
        plan = super().plan(view)
        future = np.triu(np.ones((T, T)), 1) > 0
        probs = softmax(np.where(future, -np.inf, logits(view.q, view.k) + self.more(T)))
        sums = by_group(probs.sum(1), G)
        self.scores[view.layer] = []
        for g in range(G):
            score = dict(enumerate(sums[g]))
            kept = best(score, self.count, self.newest)
            assert plan.cache[g].tolist() == sorted(kept)
            self.scores[view.layer].append({p: score[p] for p in kept})
        self.made[view.layer] = 0
        return plan

    def step(self, view: StepView) -> Plan:
        places, G = view.positions.tolist(), len(view.k)
        made = self.made[view.layer] = self.made[view.layer] + 1
        plan = super().step(view)
        tau = 1 + made / view.notes.new
        row = softmax((logits(view.q[:, None], view.k)[:, 0] + self.more(1)) / tau)
        for g, new in enumerate(by_group(row, G)):
            held = self.scores[view.layer][g]
            held[view.notes.prompt + made - 1] = 0.0
            assert sorted(places[g]) == sorted(held)
            for p, x in zip(places[g], new, strict=True):
                held[p] += x
            if made % self.every:
                assert plan.leave is None
                continue
            kept = best(held, self.count, self.newest)
            assert {places[g][s] for s in plan.leave[g]} == held.keys() - kept
            self.scores[view.layer][g] = {p: held[p] for p in kept}
            self.evicted += len(held) - len(kept)
        return plan

    def more(self, rows: int) -> np.ndarray | float:
        return 0.0


@pytest.mark.parametrize(("groups", "seed"), [(1, 0), (2, 4), (4, 0)])
@pytest.mark.parametrize(
    ("ratio", "recent", "every"), [(0.6, 0.3, 8), (0.25, 0.5, 3), (0.1, 0.0, 1), (1.0, 0.2, 4)]
)
def test_it_is_the_published_rule(
    groups: int, seed: int, ratio: float, recent: float, every: int
) -> None:
    toy, T, steps = Toy.build(4, groups, seed), 51 + seed, 18
    spy = Spy(ratio, recent, every, noise=False)
    got = toy.run(spy, [toy.prompt(T)], steps)
    count = max(1, round(ratio * T))
    assert got.prefilled == [[count]] * 3
    assert spy.evicted == 3 * groups * (steps // every * every)
    assert [c.spans.lengths for c in got.caches] == [[count + steps % every]] * 3
    # places for the steps between two evictions, and no more
    assert got.bytes == [2 * (count + every) * groups * 8 * 4] * 3


class Noisy(Spy):
    """The same with noise, which `told` gathers as it is drawn."""

    def __init__(self, *options: object, monkeypatch: pytest.MonkeyPatch, **more: object):
        super().__init__(*options, **more)
        self.told: list[tuple[Tensor, Tensor]] = []
        self.drawn: list[np.ndarray] = []

        def noted(lines: Tensor, columns: Tensor) -> Tensor:
            noise = gumbel(lines, columns)
            self.told.append((lines, noise))
            return noise

        monkeypatch.setattr(keyformer, "gumbel", noted)

    def more(self, rows: int) -> np.ndarray:
        """[H, rows, n], or [H, n] at a step."""
        told, self.told = self.told, []
        lines = torch.cat([lines.flatten() for lines, _ in told])
        assert len(lines.unique()) == len(lines) == 4 * rows  # each line is another one
        noise = torch.cat([x.flatten(0, -2) for _, x in told]).double().numpy()
        self.drawn.append(noise)
        return noise.reshape(4, rows, -1) if rows > 1 else noise

    def plan(self, view: View) -> Plan:
        self.told = []
        return super().plan(view)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_noise_is_added_to_each_logit(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy.build(4, groups, seed=2)
    spy = Noisy(0.4, every=3, monkeypatch=monkeypatch)
    toy.run(spy, [toy.prompt(37)], steps=7)
    assert len(spy.drawn) == 3 * (1 + 7)
    heads = [noise[0] for noise in spy.drawn]  # of each layer and step: no noise comes twice
    for i, one in enumerate(heads):
        assert all(len(np.intersect1d(one, other)) < 2 for other in heads[:i])


def test_noise_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy.build(4, 2)
    runs = []
    for size in (1 << 26, 8 * 60, 8 * 60 * 7):  # all rows at a time, one, seven
        monkeypatch.setattr(layer_of_attention, "SCORE_BYTES", size)
        runs.append(toy.run(Keyformer(0.3), [toy.prompt(60)]))
    assert runs[0].tokens == runs[1].tokens == runs[2].tokens
    for plans in zip(*(run.seen.plans for run in runs), strict=True):
        assert len({str(plan.cache.tolist()) for plan in plans}) == 1


def test_seeds_differ_and_noise_matters() -> None:
    toy = Toy.build(4, 2)
    kept = [
        str([plan.cache.tolist() for plan in toy.run(policy, [toy.prompt(60)]).seen.plans])
        for policy in (Keyformer(0.3), Keyformer(0.3, seed=1), Keyformer(0.3, noise=False))
    ]
    assert len(set(kept)) == 3


def test_the_noise_is_gumbel_s() -> None:
    lines, columns = torch.arange(1000) ^ 123456789, torch.arange(1000) ^ 987654321
    x = gumbel(lines, columns).double().numpy()
    n, ordered = x.size, np.sort(np.exp(-np.exp(-x)).ravel())  # uniform, if it is
    assert np.isfinite(x).all()
    distance = np.abs(ordered - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / np.sqrt(n)  # Kolmogorov and Smirnov, one in a thousand
    assert abs(x.mean() - 0.5772157) < 5 * 1.2825 / np.sqrt(n)
    y = (x - x.mean()) / x.std()
    for dr, dc in [(0, 1), (1, 0), (1, 1), (0, 2), (0, 16), (64, 0), (256, 256)]:
        pairs = y[dr:, dc:] * y[: 1000 - dr, : 1000 - dc]
        assert abs(pairs.mean()) < 4.5 / np.sqrt(pairs.size)
    for way in (0, 1):  # sums of rows and of columns vary as those of independent ones do
        assert 0.8 < y.sum(way).var() / 1000 < 1.2
    one = gumbel(lines[5:6], columns)
    assert torch.equal(one[0], gumbel(lines, columns)[5])


def test_the_largest_noisy_logit_is_drawn_by_softmax() -> None:
    x = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    noise = gumbel(torch.arange(200_000), torch.arange(5) ^ 77777)
    share = np.bincount((x + noise).argmax(1).numpy(), minlength=5) / 200_000
    want = softmax(x.double().numpy())
    assert (np.abs(share - want) < 5 * np.sqrt(want * (1 - want) / 200_000)).all()


def test_the_hash_is_that_of_32_bits() -> None:
    """lowbias32, on numbers without a sign; and no two inputs meet."""
    rng = np.random.default_rng(0)
    given = np.concatenate([rng.integers(-(2**31), 2**31, 10_000), np.arange(-5000, 5000)])
    x = given.astype(np.int32).view(np.uint32)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    got = mixed(torch.from_numpy(given).int()).numpy()
    assert (got == x.view(np.int32)).all()
    assert len(np.unique(got)) == len(np.unique(given))


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1)
    prompts = [toy.prompt(90), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(30, "none")]
    for policy in (Keyformer(1e-6, every=2), Keyformer(0.5, every=3), Keyformer(1.0)):
        got = toy.run(policy, prompts, steps=7)
        alone = [toy.run(policy, [p], steps=7) for p in prompts]
        assert got.tokens == [a.tokens[0] for a in alone]
        after = [[a.caches[i].spans.lengths[0] for a in alone] for i in range(3)]
        assert [c.spans.lengths for c in got.caches] == after
    assert toy.run(Keyformer(1e-6), prompts).prefilled == [[1, 1, 1, 1]] * 3
    full, dense = toy.run(Keyformer(1.0), prompts, 7), toy.run(Policy(), prompts, 7)
    assert full.tokens == dense.tokens  # until the first eviction
    assert full.prefilled == dense.prefilled


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"recent": 1.5}, "recent is 1.5"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'keyformer': {says}"):
        load_policy("keyformer", **options)
