"""VL-Cache: layers share a budget by how dense the question's attention is."""

from functools import partial

import numpy as np
import pytest

from zipvl.errors import UsageError
from zipvl.model import attention
from zipvl.policies import load_policy
from zipvl.policies.vlcache import VLCache
from zipvl.policy import Policy
from zipvl.testing import check_policy
from zipvl.testing.toy import Prompt, Toy

from .looking import watched

CASES = [
    ("vlcache", {"ratio": 0.3}, None),  # at ratio 1 sparse layers still give tokens away
    ("vlcache", {"ratio": 0.001}, None),
    ("vlcache", {"ratio": 0.2, "text": True}, None),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def published(looks: list[np.ndarray], prompt: Prompt, ratio: float, text: bool) -> list[list[int]]:
    """What each layer keeps, by the paper's steps: sparsity of the rows behind the media, shares of
    the budget, the newest tokens and those that these rows look at."""
    visual, T, L = prompt[1].numpy(), len(prompt[0]), len(looks)
    places = np.flatnonzero(visual)
    behind = [i for i in range(T) if len(places) and i > places[-1]] or list(
        range(max(0, T - 32), T)
    )
    dense = []
    for look in looks:
        per_head = []
        for head in look:
            zeros = sum(head[i, j] < 0.01 * head[i].max() for i in behind for j in range(i + 1))
            per_head.append(zeros / sum(i + 1 for i in behind))
        dense.append(1 - np.mean(per_head))
    window, kept = max(1, round(0.1 * ratio * T)), []
    for look, share in zip(looks, dense, strict=True):
        beta = np.clip(share / sum(dense) * ratio * L, 0.01, 1)
        score = look[:, behind].sum(1).mean(0)
        stays = {j for j in range(T) if j >= T - window or (text and not visual[j])}
        order = sorted(range(T), key=lambda j: (j not in stays, -score[j]))
        kept.append(sorted(order[: max(len(stays), round(beta * T))]))
    return kept


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "visual"), [(94, "some"), (60, "none"), (20, "none"), (90, "some")]
)
@pytest.mark.parametrize(("ratio", "text"), [(0.3, False), (0.12, True), (0.02, False)])
def test_it_is_the_published_rule(
    groups: int, length: int, visual: str, ratio: float, text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With text behind the media, without, and without media; some rows at a time."""
    monkeypatch.setattr(attention, "SCORE_BYTES", 4 * 4 // groups * length * 3)
    toy, prompt = (
        Toy.build(4, groups, seed=length, layers=5),
        Toy.build(4, 2).prompt(length, visual),
    )
    policy, looks = watched(VLCache(ratio, text))
    got = toy.run(policy, [prompt], steps=1)
    want = published(looks, prompt, ratio, text)
    for held, mine in zip(got.held[0], want, strict=True):
        assert held[2][:, 0].tolist() == mine
        assert (held[2] == held[2][:, :1]).all()
    assert got.prefilled == [[len(mine)] for mine in want]
    assert got.bytes == [2 * (len(mine) + 1) * groups * 8 * 4 for mine in want]


def test_layers_differ_and_add_up() -> None:
    toy = Toy.build(4, 2, layers=8)
    got = toy.run(VLCache(0.3), [toy.prompt(94)], steps=1)
    counts = [n[0] for n in got.prefilled]
    assert len(set(counts)) > 2
    assert abs(sum(counts) - 0.3 * 94 * 8) <= 4  # rounded one by one


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1, layers=4)
    prompts = [toy.prompt(94), toy.prompt(1, "all"), toy.prompt(2), toy.prompt(33, "all")]
    for policy in (VLCache(1e-6), VLCache(0.4), VLCache(1.0), VLCache(0.1, text=True)):
        got = toy.run(policy, prompts)
        alone = [toy.run(policy, [p]) for p in prompts]
        assert got.tokens == [a.tokens[0] for a in alone]
        assert got.prefilled == [[a.prefilled[i][0] for a in alone] for i in range(4)]
    assert toy.run(VLCache(1e-6), prompts).prefilled == [[1] * 4] * 4  # 1 % of each, the newest


def test_at_ratio_one_the_first_token_is_dense_and_the_densest_layer_whole() -> None:
    toy, prompts = Toy.build(4, 2, layers=6), [Toy.build(4, 2).prompt(94)]
    got, dense = toy.run(VLCache(1.0), prompts, steps=1), toy.run(Policy(), prompts, steps=1)
    assert got.tokens == dense.tokens
    counts = [n[0] for n in got.prefilled]
    assert max(counts) == 94 > min(counts)


@pytest.mark.parametrize("ratio", [0, 1.5])
def test_options(ratio: float) -> None:
    with pytest.raises(UsageError, match=f"method 'vlcache': ratio is {ratio}"):
        load_policy("vlcache", ratio=ratio)
