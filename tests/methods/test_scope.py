"""SCOPE: SnapKV's cache of the prompt, and what stays of an answer, step by step."""

from functools import partial

import numpy as np
import pytest

from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.scope import SCOPE, STRATEGIES
from zipvl.policies.snapkv import SnapKV
from zipvl.policy import Plan, Policy, StepView, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import attention, step_row

CASES = [
    ("scope", {"budget": 12, "window": 4, "answer": 2, "recent": 1}, {"budget": 1000, "answer": 9}),
    ("scope", {"budget": 12, "window": 4, "recent": 1, "strategy": "adaptive", "delta": 2}, None),
    ("scope", {"budget": 1, "window": 1, "recent": 1, "strategy": "discontinuous", "delta": 3}, None),
    ("scope", {"budget": 9, "window": 3, "answer": 1, "recent": 1, "summary": 4}, None),
    ("scope", {}, {}),  # as published: more than these prompts and answers have
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def snapped(look: np.ndarray, budget: int, window: int, kernel: int, groups: int) -> list[set[int]]:
    """SnapKV of the attention [H, T, T]: what each key/value head keeps of the prompt."""
    T, found = look.shape[1], []
    if budget >= T:
        return [set(range(T))] * groups
    votes = look[:, T - window :, : T - window].sum(1).reshape(groups, -1, T - window).mean(1)
    for row in votes:
        pooled = [row[max(0, j - kernel // 2) : j + kernel // 2 + 1].max() for j in range(len(row))]
        best = sorted(range(len(row)), key=lambda j: -pooled[j])[: budget - window]
        found.append({*best, *range(T - window, T)})
    return found


class Spy(SCOPE):
    """Follows the rule by position: what each head of each layer holds of prompt and answer."""

    def plan(self, view: View) -> Plan:
        if view.layer == 0:
            self.prompts, self.answers, self.made, self.gone, self.most_held = {}, {}, {}, 0, 0
        G, T = len(view.k), view.length
        self.prompts[view.layer] = snapped(attention(view), self.budget, self.window, 1, G)
        self.answers[view.layer] = [[] for _ in range(G)]
        self.made[view.layer] = 0
        plan = super().plan(view)
        kept = range(T) if plan.cache is None else None
        for g, mine in enumerate(self.prompts[view.layer]):
            assert set(kept or plan.cache[g].tolist()) == mine
        return plan

    def step(self, view: StepView) -> Plan:
        self.made[view.layer] += 1
        made, places, T = self.made[view.layer], view.positions.tolist(), view.notes.prompt
        rows = step_row(view).reshape(len(view.k), -1, view.length).mean(1)
        plan = super().step(view)
        for g, row in enumerate(rows):
            mine = self.answers[view.layer][g]
            mine.append(T + made - 1)
            self.most_held = max(self.most_held, len(mine))
            assert set(places[g]) == self.prompts[view.layer][g] | set(mine)
            window = self.answer if self.strategy == "slide" else self.recent + made // self.delta
            due = self.strategy != "discontinuous" or made % self.delta == 0
            if len(mine) <= window or not due:
                assert plan.leave is None
                continue
            score = dict(zip(places[g], row, strict=True))
            old = sorted(mine[: -self.recent], key=lambda p: -score[p])
            stay = sorted([*old[: window - self.recent], *mine[-self.recent :]])
            assert {places[g][s] for s in plan.leave[g]} == set(mine) - set(stay)
            self.gone += len(mine) - len(stay)
            self.answers[view.layer][g] = stay
        return plan


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("groups", "seed"), [(1, 0), (2, 1)])
@pytest.mark.parametrize(
    ("answer", "recent", "delta"),
    [
        (5, 2, 4),
        (1, 1, 1),
        (6, 6, 5),
        pytest.param(9, 1, 3, marks=pytest.mark.slow),
        pytest.param(40, 30, 7, marks=pytest.mark.slow),
    ],
)
def test_what_stays_step_by_step(
    strategy: str, groups: int, seed: int, answer: int, recent: int, delta: int
) -> None:
    toy, steps, G = Toy.build(4, groups, seed, layers=2), 24, groups
    for T in (50, 12, 5):  # more than the budget, as much, less
        options = {"answer": answer, "recent": recent, "strategy": strategy, "delta": delta}
        spy = Spy(budget=12, window=4, kernel=1, **options)
        got = toy.run(spy, [toy.prompt(T)], steps)
        held = [len(mine[0]) for mine in spy.answers.values()]
        assert [c.spans.lengths for c in got.caches] == [[min(T, 12) + n] for n in held]
        if strategy == "slide":
            assert held == [min(answer, steps)] * 2
            assert spy.gone == 2 * G * max(0, steps - answer)
        # places: as many as were ever needed at a time
        room = {"slide": answer + 1, "adaptive": recent + (steps - 1) // delta + 1,
                "discontinuous": recent + (steps - 1) // delta + delta}[strategy]  # fmt: skip
        assert got.bytes == [2 * (min(T, 12) + min(room, steps)) * G * 8 * 4] * 2
        assert spy.most_held <= min(room, steps)
        assert spy.most_held == min(room, steps) or strategy == "discontinuous"


def test_its_prompt_is_snapkv_s() -> None:
    """Pooling and all; and the prompt's part never changes."""
    toy, prompts = Toy.build(4, 2, seed=3), [Toy.build(4, 2).prompt(n) for n in (70, 30, 8)]
    for pool in ("max", "avg"):
        options = {"budget": 14, "window": 4, "kernel": 5, "pool": pool}
        got = toy.run(SCOPE(**options, answer=2, recent=1), prompts, 9)
        want = toy.run(SnapKV(**options), prompts, 9)
        for one, other in zip(got.seen.plans, want.seen.plans, strict=True):
            assert (one.cache is None) == (other.cache is None)
            assert one.cache is None or (one.cache == other.cache).all()
        for cache, all_of_it in zip(got.caches, want.caches, strict=True):
            for b, T in enumerate((70, 30, 8)):
                (k, v, at), (wk, wv, wat) = cache.view(b), all_of_it.view(b)
                n = min(T, 14)
                assert len(at) == n + 2
                for part, whole in ((k, wk), (v, wv), (at, wat)):
                    assert (part[:n] == whole[:n]).all()


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1)
    prompts = [toy.prompt(90), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(30, "none")]
    dense = toy.run(Policy(), prompts, 11)
    for strategy in STRATEGIES:
        options = {"strategy": strategy, "answer": 3, "recent": 2, "delta": 4}
        policy = SCOPE(budget=10, window=3, **options)
        got = toy.run(policy, prompts, 11)
        alone = [toy.run(policy, [p], 11) for p in prompts]
        assert got.tokens == [a.tokens[0] for a in alone]
        for i, cache in enumerate(got.caches):
            assert cache.spans.lengths == [a.caches[i].spans.lengths[0] for a in alone]
        full = SCOPE(strategy=strategy, answer=300)  # larger than everything there is
        got = toy.run(full, prompts, 11)
        assert got.tokens == dense.tokens
        assert [c.spans.lengths for c in got.caches] == [c.spans.lengths for c in dense.caches]
        assert got.bytes == dense.bytes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recent": 0}, "recent is 0"),
        ({"answer": 9, "recent": 10}, "answer is 9: it must hold"),
        ({"delta": 0}, "delta is 0"),
        ({"strategy": "jump"}, "strategy is 'jump': use one of slide, adaptive, discontinuous"),
        ({"budget": 8}, "budget is 8: it must hold the window of 32"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'scope': {says}"):
        load_policy("scope", **options)
