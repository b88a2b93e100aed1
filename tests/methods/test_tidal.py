"""TidalDecode: which slots each layer of a step reads."""

from functools import partial

import numpy as np
import pytest
import torch

from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.tidal import TidalDecode
from zipvl.policy import Plan, Policy, StepView
from zipvl.testing import check_policy
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Toy

CASES = [
    ("tidal", {"budget": 9, "first": 0, "again": 0.7}, {"budget": 1000}),
    ("tidal", {"budget": 1, "first": 0, "again": 1.0, "heads": "mean"}, {"first": 3}),
    ("tidal", {"budget": 20, "first": 1}, {"budget": 154}),
    ("tidal", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def largest(view: StepView, budget: int, heads: str) -> list[set[int]]:
    """By key/value head: the slots of the largest logits of its query heads, or of their mean."""
    q, k = view.q.double().numpy(), view.k.double().numpy()
    share, found = len(q) // len(k), []
    for g, keys in enumerate(k):
        mine = [keys @ q[h] / np.sqrt(q.shape[1]) for h in range(g * share, (g + 1) * share)]
        score = np.max(mine, axis=0) if heads == "max" else np.mean(mine, axis=0)
        found.append({int(i) for i in np.argsort(-score)[:budget]})
    return found


class Spy(TidalDecode):
    """Follows the rule: who reads all, who chooses, who reads what was chosen."""

    chooses = ()  # layers

    def step(self, view: StepView) -> Plan:
        plan, log = super().step(view), self.__dict__.setdefault("log", [])
        if view.length <= self.budget or view.layer < self.first:
            assert plan.attend is None
            log.append("all")
        elif view.layer in self.chooses:
            assert plan.attend is None
            self.read = largest(view, self.budget, self.heads)
            log.append("choose")
        else:
            assert [set(row.tolist()) for row in plan.attend] == self.read
            log.append("some")
        assert plan.leave is None
        return plan


@pytest.mark.parametrize("heads", ["max", "mean"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("layers", "first", "again", "chooses"),
    [(10, 2, 0.4, (2, 4)), (8, 2, 0.4, (2, 3)), (5, 2, 0.4, (2, 3)), (6, 0, 0.5, (0, 3)),
     (4, 0, 0.0, (0, 1)), (6, 1, 1.0, (1,)), (3, 2, 0.4, (2,))],
)  # fmt: skip
def test_layers_read_what_was_chosen(
    layers: int, first: int, again: float, chooses: tuple, groups: int, heads: str
) -> None:
    toy = Toy.build(4, groups, seed=layers, layers=layers)
    spy = Spy(7, first, again, heads)
    spy.chooses = chooses
    got = toy.run(spy, [toy.prompt(30)], steps=5)
    step = ["all" if i < first else "choose" if i in chooses else "some" for i in range(layers)]
    assert spy.log == step * 5
    # nothing leaves, and nothing is kept besides
    assert [c.spans.lengths for c in got.caches] == [[35]] * layers
    assert got.bytes == [2 * 35 * groups * 8 * 4] * layers


def test_one_step_equals_attention_over_these_slots_alone() -> None:
    """Against the float64 decoder, told by hand which slots a layer sees."""
    toy, (ids, visual) = Toy.build(4, 2, seed=1, layers=4), Toy.build(4, 2).prompt(40)
    got = toy.run(TidalDecode(6, first=1, again=1.0), [(ids, visual)], steps=1)
    table, oracle = toy.decoder.embed_tokens.weight, Oracle(toy.decoder)
    oracle.prefill(table[ids], [Plan()] * 4)
    read = got.seen.steps[2].attend
    assert read.shape == (2, 6)
    assert (read == got.seen.steps[3].attend).all()
    plans = [Plan(), Plan(), Plan(attend=read), Plan(attend=read)]
    want = oracle.step(table[got.tokens[0][0]][None], 40, plans)
    torch.testing.assert_close(got.hidden[1].double(), want, rtol=1e-3, atol=1e-3)
    plain = toy.run(Policy(), [(ids, visual)], steps=1)
    assert got.tokens == plain.tokens  # the prompt is dense
    assert not torch.allclose(got.hidden[1], plain.hidden[1], rtol=1e-2, atol=1e-2)


def test_published_layers() -> None:
    """2 and 13 of 32, found by the layers that read all."""
    toy = Toy.build(4, 4, layers=32)
    steps = toy.run(TidalDecode(8), [toy.prompt(20)], steps=1).seen.steps
    assert [i for i, plan in enumerate(steps) if plan.attend is None] == [0, 1, 2, 13]


def test_short_caches_are_read_whole_until_they_are_long() -> None:
    toy = Toy.build(4, 2, layers=4)
    got = toy.run(TidalDecode(12, first=0, again=0.5), [toy.prompt(9)], steps=6)
    reads = [plan.attend is not None for plan in got.seen.steps]
    step = [False, True, False, True]
    assert reads == [False] * 4 * 3 + step * 3  # 10, 11, 12 slots, then 13 and more


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1, layers=5)
    prompts = [toy.prompt(90), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(30, "none")]
    dense = toy.run(Policy(), prompts, 6)
    for policy in (TidalDecode(1, 0), TidalDecode(5, 1, 0.5, "mean"), TidalDecode(1000)):
        got = toy.run(policy, prompts, 6)
        assert got.tokens == [toy.run(policy, [p], 6).tokens[0] for p in prompts]
        assert got.bytes == dense.bytes
    assert got.tokens == dense.tokens  # of the last one, which reads everything
    assert toy.run(TidalDecode(96, 0), prompts, 6).tokens == dense.tokens


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"first": -1}, "first is -1"),
        ({"again": 1.5}, "again is 1.5"),
        ({"heads": "sum"}, "heads is 'sum': use one of max, mean"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'tidal': {says}"):
        load_policy("tidal", **options)
