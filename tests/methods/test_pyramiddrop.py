"""PyramidDrop: three cuts, each by the layer to come."""

from functools import partial

import numpy as np
import pytest
import torch

from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.pyramiddrop import PyramidDrop
from zipvl.policy import Policy
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import watched

CASES = [
    ("pyramiddrop", {}, {"lam": 1.0}),
    ("pyramiddrop", {"lam": 0.7, "cuts": 1}, {"lam": 1.0}),
    ("pyramiddrop", {"lam": 0.0, "cuts": 2}, {"lam": 1.0, "cuts": 9}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def best(row: np.ndarray, visual: np.ndarray, count: int) -> set[int]:
    """The published set: every text token, and the visual ones that the last row likes best."""
    places = sorted(np.flatnonzero(visual).tolist(), key=lambda j: -row[j])
    return set(places[:count]) | set(np.flatnonzero(~visual).tolist())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("layers", "cuts"), [(8, (2, 4, 6)), (6, (1, 3, 4)), (4, (1, 2, 3))])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_cuts_are_the_published_ones(groups: int, layers: int, cuts: tuple, seed: int) -> None:
    toy = Toy.build(4, groups, seed, layers)
    ids, is_visual = toy.prompt(92 + seed % 3)  # text at the end
    policy, looks = watched(PyramidDrop())
    got = toy.run(policy, [(ids, is_visual)], steps=2)
    visual, left = is_visual.numpy(), np.arange(len(ids))
    total, sizes = int(visual.sum()), []
    for layer in range(layers):
        plan = got.seen.plans[layer]
        if layer in cuts:
            # the layer's own queries and keys on what enters it, the last token's row of them
            row = looks[layer][:, -1].mean(0)
            want = best(row, visual[left], int(total * 0.5 ** (1 + cuts.index(layer))))
            for index in (plan.attend, plan.cache, plan.stream):
                assert set(index.tolist()) == want
            left = left[sorted(want)]
        else:
            assert plan.attend is plan.cache is plan.stream is None
        sizes.append([len(left)])
        held = got.held[0][layer][2][:, 0]  # places of the prompt: nobody is renumbered
        assert held.tolist() == left.tolist()
    assert got.prefilled == sizes
    assert got.bytes == [2 * (n[0] + 2) * groups * 8 * 4 for n in sizes]


def test_counts_are_shares_of_the_first_number_rounded_down() -> None:
    toy = Toy.build(4, 2, layers=8)
    for length in (19, 37, 57):  # 10, 24 and 38 visual tokens, and text at the end
        ids, visual = toy.prompt(length)
        text, seen = int((~visual).sum()), int(visual.sum())
        got = toy.run(PyramidDrop(), [(ids, visual)], steps=1)
        shares = [seen] * 2 + [seen // 2] * 2 + [seen // 4] * 2 + [seen // 8] * 2
        assert [n[0] - text for n in got.prefilled] == shares


def test_a_batch_of_unequal_prompts_and_edges() -> None:
    toy = Toy.build(4, 2, layers=8)
    prompts = [toy.prompt(80), toy.prompt(7, "none"), toy.prompt(33, "all"), toy.prompt(1, "all")]
    got = toy.run(PyramidDrop(lam=0.5), prompts)
    assert [n[1] for n in got.prefilled] == [7] * 8  # text stays
    assert [n[3] for n in got.prefilled] == [1] * 8  # the last token stays
    last = [16, 8, 4]  # of 33 visual ones, and the last token where it is not among them
    assert all(n[2] - last[i // 2 - 1] in (0, 1) for i, n in enumerate(got.prefilled) if i > 1)
    alone = [toy.run(PyramidDrop(lam=0.5), [p]) for p in prompts]
    assert got.tokens == [a.tokens[0] for a in alone]
    assert got.prefilled == [[a.prefilled[i][0] for a in alone] for i in range(8)]


def test_lam_one_is_dense() -> None:
    toy = Toy.build(4, 2, layers=8)
    for prompt in (toy.prompt(50), toy.prompt(20, "all")):
        got, want = toy.run(PyramidDrop(lam=1.0), [prompt]), toy.run(Policy(), [prompt])
        assert got.tokens == want.tokens
        torch.testing.assert_close(got.hidden[0], want.hidden[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"), [({"lam": 1.1}, "lam is 1.1"), ({"cuts": 0}, "cuts is 0")]
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'pyramiddrop': {says}"):
        load_policy("pyramiddrop", **options)
