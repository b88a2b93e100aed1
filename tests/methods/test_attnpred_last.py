"""AttentionPredictor without training: the history of a layer, and what a step reads by it."""

from functools import partial

import numpy as np
import pytest
import torch

from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.attnpred import AttnPredLast, pooled
from zipvl.policy import Notes, Policy
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .foretold import Follows, pool, running_mean

FEW = {"budget": 48, "sinks": 16, "local": 16}
CASES = [
    ("attnpred_last", FEW | {"dense": 0, "every": 2}, {"budget": 1000}),
    ("attnpred_last", {"budget": 17, "sinks": 0, "local": 1, "dense": 1, "every": 1}, None),
    ("attnpred_last", FEW | {"budget": 63, "ema": 0.3, "every": 9}, {"dense": 3}),
    ("attnpred_last", FEW | {"dense": 0}, {"budget": 154}),  # all there is at the last step
    ("attnpred_last", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


class Spy(Follows, AttnPredLast):
    def guess(self, history: np.ndarray) -> np.ndarray:
        return running_mean(history, self.ema)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ((48, 16, 16, 0, 5, 1.0), 150),  # at times no block between fits
        ((33, 16, 1, 1, 1, 0.5), 100),  # every row is whole
        ((40, 0, 20, 2, 3, 0.1), 77),  # nothing is a sink
        ((71, 32, 7, 0, 10**6, 0.02), 120),  # no row is refreshed
        ((64, 16, 16, 0, 4, 0.7), 30),  # read whole at first; 64 rows come together later
        ((112, 16, 16, 0, 2, 1.0), 113),  # one block is left out
    ],
)
def test_steps_read_what_the_history_foretells(options: tuple, length: int, groups: int) -> None:
    toy = Toy.build(4, groups, seed=length)
    spy = Spy(*options)
    got = toy.run(spy, [toy.prompt(length)], steps=40)
    budget, dense = spy.budget, spy.dense
    want = [
        (layer, n)
        for n in range(length + 1, length + 41)
        if n > budget
        for layer in range(dense, 3)
    ]
    assert [(layer, n) for layer, n, _ in spy.read] == want
    chosen = {tuple(slots) for *_, read in spy.read for slots in read}
    assert len(chosen) > 10
    # nothing leaves, and the cache keeps nothing besides
    assert [c.spans.lengths for c in got.caches] == [[length + 40]] * 3
    assert got.bytes == [2 * (length + 40) * groups * 8 * 4] * 3


def test_heads_of_a_group_choose_together_and_groups_alone() -> None:
    toy = Toy.build(4, 2, seed=3)
    spy = Spy(48, 16, 16, 0, 1)
    toy.run(spy, [toy.prompt(200)], steps=12)
    assert all(len(read) == 2 for *_, read in spy.read)
    assert any(read[0] != read[1] for *_, read in spy.read)


@pytest.mark.parametrize(
    ("every", "whole"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (5, [5]), (8, [])]
)
def test_a_row_of_all_joins_the_history_every_so_many_steps(every: int, whole: list[int]) -> None:
    """Else its numbers are 0 where nothing was read."""
    toy = Toy.build(4, 2)
    got = toy.run(AttnPredLast(48, 16, 16, 0, every), [toy.prompt(100)], steps=7)
    for layer in range(3):
        rows = got.notes[0][layer][:, -7:, :6]  # blocks that were there before
        full = (rows > 0).all(2).all(0)
        assert [i + 1 for i in range(7) if full[i]] == whole


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 90])
def test_the_history_begins_with_the_end_of_the_prompt(length: int) -> None:
    toy = Toy.build(4, 2, seed=length)
    spy = Spy(10**6, 0, 1, 1)
    got = toy.run(spy, [toy.prompt(length)], steps=1)
    assert list(got.notes[0]) == [1, 2]
    rows = min(64, length + 1)
    assert got.notes[0][1].shape == (2, rows, -(-(length + 1) // 16))


def test_pooling() -> None:
    for n in (1, 15, 16, 17, 48, 100):
        x = torch.rand(3, n, generator=torch.Generator().manual_seed(n))
        assert pooled(x).tolist() == [pool(row) for row in x.tolist()]


@pytest.mark.parametrize("ema", [1.0, 0.999, 0.5, 0.01])
def test_means_of_rows(ema: float) -> None:
    for seed, rows in enumerate((1, 2, 64)):
        x = torch.rand(2, rows, 9, generator=torch.Generator().manual_seed(seed))
        got = AttnPredLast(ema=ema).foretell(x, Notes(1))
        want = [running_mean(one, ema) for one in x.double().numpy()]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)
        if ema == 1:
            assert torch.equal(got, x[:, -1])


def test_published_sizes() -> None:
    """1024 slots of a longer cache, 64 the first and 64 the newest; layers 0 and 1 read all."""
    toy = Toy.build(4, 2)
    got = toy.run(AttnPredLast(), [toy.prompt(1100)], steps=1)
    reads = [plan.attend for plan in got.seen.steps]
    assert reads[0] is None
    assert reads[1] is None
    assert 1008 < reads[2].shape[1] <= 1024
    for slots in reads[2].tolist():
        assert slots[:64] == list(range(64))
        assert slots[-64:] == list(range(1101 - 64, 1101))
    repr_ = "AttnPredLast(budget=1024, sinks=64, local=64, dense=2, every=5, ema=1.0)"
    assert repr(load_policy("attnpred_last")) == repr_


def test_batches_and_full_budgets() -> None:
    toy = Toy.build(4, 1)
    prompts = [toy.prompt(90), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(47, "none")]
    dense = toy.run(Policy(), prompts, 12)
    for options in ((48, 16, 16, 0, 3), (17, 0, 1, 1, 1, 0.2)):
        got = toy.run(AttnPredLast(*options), prompts, 12)
        alone = [toy.run(AttnPredLast(*options), [p], 12) for p in prompts]
        assert got.tokens == [one.tokens[0] for one in alone]
        assert got.bytes == dense.bytes
        for mine, one in zip(got.notes, alone, strict=True):
            assert mine.keys() == one.notes[0].keys()
            for layer, history in mine.items():
                torch.testing.assert_close(history, one.notes[0][layer], rtol=1e-3, atol=1e-5)
        assert any(
            not torch.allclose(a, b, rtol=1e-2, atol=1e-2)
            for a, b in zip(got.hidden[1:], dense.hidden[1:], strict=True)
        )
    for options in ((102, 16, 16, 0), (48, 16, 16, 3), (1024,)):
        assert toy.run(AttnPredLast(*options), prompts, 12).tokens == dense.tokens


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sinks": 8}, "sinks is 8: give a multiple of 16"),
        ({"sinks": -16}, "sinks is -16: give a multiple of 16"),
        ({"local": 0}, "local is 0: give 1 or more"),
        ({"budget": 143}, "budget is 143: give 144 or more"),
        ({"budget": 47, "sinks": 16, "local": 16}, "budget is 47: give 48 or more"),
        ({"dense": -1}, "dense is -1: give 0 or more"),
        ({"every": 0}, "every is 0: give 1 or more"),
        ({"ema": 0.0}, "ema is 0.0: give a weight above 0 and up to 1"),
        ({"ema": 1.1}, "ema is 1.1"),
        ({"ema": float("nan")}, "ema is nan"),
        ({"weights": "x"}, "no option 'weights'"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'attnpred_last'.*{says}"):
        load_policy("attnpred_last", **options)
