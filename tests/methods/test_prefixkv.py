"""PrefixKV: one share of attention for all layers, found at once; its profiles."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import zipvl
from zipvl.errors import UsageError
from zipvl.model import decoder
from zipvl.policies import load_policy
from zipvl.policies.prefixkv import PrefixKV
from zipvl.policies.profile import write_profile
from zipvl.policy import Notes, Policy
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import watched

CASES = [
    ("prefixkv", {"ratio": 0.4}, {"ratio": 1.0}),
    ("prefixkv", {"ratio": 0.4, "distance": 3}, {"ratio": 1.0}),
    ("prefixkv", {"ratio": 0.1, "distance": 1, "text": True}, {"ratio": 1.0}),
    ("prefixkv", {"ratio": 0.01, "sinks": 0}, None),
    ("prefixkv", {"ratio": 0.8, "sinks": 5}, {"ratio": 1.0}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def test_contract_of_a_profile(tmp_path: Path) -> None:
    some, all_of_it = tmp_path / "some.json", tmp_path / "all.json"
    write_profile(some, 0.4, [0.9, 0.0, 0.3])
    write_profile(all_of_it, 1.0, [1.0, 1.0, 1.0])
    everything = {"ratio": 1.0, "profile": str(all_of_it)}
    check_policy(PrefixKV, everything=everything, ratio=0.4, profile=str(some))


def searched(scores: list[np.ndarray], budget: int, always: int) -> list[int]:
    """The published search: bisect the share p until so many tokens stay in all layers together,
    of each layer those that always do and as many as cover p."""
    covered = [np.cumsum(np.sort(s)[::-1]) / s.sum() for s in scores]
    low, high = 0.0, 1.0
    for _ in range(200):
        p = (low + high) / 2
        counts = [min(len(c), always + int((c < p).sum()) + 1) for c in covered]
        if sum(counts) == budget:
            break
        low, high = (p, high) if sum(counts) < budget else (low, p)
    return counts


def kept(score: np.ndarray, always: set[int], count: int) -> list[int]:
    order = sorted(range(len(score)), key=lambda j: (j not in always, -score[j]))
    return sorted(order[: max(count, len(always))])


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_published_search(ratio: float, groups: int, seed: int) -> None:
    toy, T = Toy.build(4, groups, seed, layers=6), 94 + seed
    policy, looks = watched(PrefixKV(ratio))
    got = toy.run(policy, [toy.prompt(T)], steps=1)
    scores = [look.mean(0).sum(0) for look in looks]
    counts = [n[0] for n in got.prefilled]
    want = searched(scores, round(ratio * T * 6), always=2)
    assert sum(counts) == sum(want) == round(ratio * T * 6)
    assert max(abs(a - b) for a, b in zip(counts, want, strict=True)) <= 1
    assert len(set(counts)) > 1  # the layers are not alike
    for layer, (score, count) in enumerate(zip(scores, counts, strict=True)):
        held = got.held[0][layer][2]
        assert held[:, 0].tolist() == kept(score, {0, T - 1}, count)
        assert (held == held[:, :1]).all()  # the same for all heads
    assert got.bytes == [2 * (n + 1) * groups * 8 * 4 for n in counts]  # the others are freed


@pytest.mark.parametrize("seed", range(20))
def test_on_random_scores_of_any_shape(seed: int) -> None:
    """trim() alone, on column sums that fall slowly, fast, or not at all between few tokens."""
    rng = np.random.default_rng(seed)
    T, L, ratio = int(rng.integers(3, 60)), int(rng.integers(1, 9)), rng.uniform(0.1, 1)
    scores = [rng.exponential(size=T) ** rng.uniform(0.2, 4) for _ in range(L)]
    policy, notes, budget = PrefixKV(ratio), Notes(T), round(ratio * T * L)

    class View:
        def __init__(self, layer: int, score: np.ndarray):
            self.layer, self.num_layers, self.length, self.notes = layer, L, T, notes
            self.every, self.is_visual = torch.arange(T), torch.ones(T, dtype=torch.bool)
            self.mass = lambda: torch.from_numpy(score)[None].float()

    held = [np.arange(T)] * L
    for layer, score in enumerate(scores):
        policy.plan(View(layer, score))
        for i, slots in (policy.trim(layer, notes) or {}).items():
            assert i <= layer
            held[i] = held[i][slots.numpy()]
    counts = [len(h) for h in held]
    if budget >= 3 * L:  # the search gives each layer one token more than those that always stay
        want = searched(scores, budget, always=2)
        assert sum(counts) == sum(want) == budget
        assert max(abs(a - b) for a, b in zip(counts, want, strict=True)) <= 1
    for score, mine in zip(scores, held, strict=True):
        assert mine.tolist() == kept(score, {0, T - 1}, len(mine))


def test_no_more_than_the_budget_and_one_layer_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, held, plain = Toy.build(4, 2, layers=8), [], decoder.trim

    def trim(caches: list, *rest: object) -> None:
        held.append([sum(c.nbytes for c in caches)])
        plain(caches, *rest)
        held[-1].append(sum(c.nbytes for c in caches))

    monkeypatch.setattr(decoder, "trim", trim)
    toy.run(PrefixKV(0.3), [toy.prompt(94)], steps=1)
    slot, budget = 2 * 2 * 8 * 4, round(0.3 * 94 * 8)
    assert len(held) == 8
    for i, (before, after) in enumerate(held, 1):
        assert before <= (budget + 94 + i) * slot  # and one free place a layer
        assert after <= (budget + i) * slot
    assert held[-1][1] == (budget + 8) * slot


@pytest.mark.parametrize("profile", [False, True])
@pytest.mark.parametrize(("distance", "ratio"), [(25, 0.8), (7, 0.5), (40, 0.25), (1, 0.9)])
def test_decoding_deletes_at_one_place(
    distance: int, ratio: float, profile: bool, tmp_path: Path
) -> None:
    """The published rule as it is written for slots that lie in order of position."""
    toy, T, steps = Toy.build(4, 2, layers=4), 60, 17
    write_profile(tmp_path / "p.json", ratio, [ratio, 0.31, 0.0, 1.0])
    path = str(tmp_path / "p.json") if profile else ""
    got = toy.run(PrefixKV(ratio, distance=distance, profile=path), [toy.prompt(T)], steps)
    gone = 0
    for layer, cache in enumerate(got.caches):
        slots = got.held[0][layer][2][:, 0].tolist()
        kept = len(slots)
        for made in range(1, steps + 1):
            slots.append(T + made - 1)
            if len(slots) - kept / T * (T + made) >= 1 - 1e-9:
                at = kept - distance
                del slots[at if at >= 1 else max(1, kept // 2)]
                gone += 1
            if made < steps:
                assert sorted(got.held[made][layer][2][:, 0].tolist()) == slots
        assert sorted(cache.view(0)[2][:, 0].tolist()) == slots
        if profile:  # the layer has no more places than its share needs
            most = min(steps, int(np.ceil(kept / T * steps)) + 1)
            assert cache.nbytes == 2 * (kept + most) * 2 * 8 * 4
    assert gone > 3


@pytest.mark.parametrize(("ratio", "distance"), [(0.5, 2), (0.5, 25), (0.7, 40), (0.3, 5)])
def test_text_stays_while_decoding(ratio: float, distance: int) -> None:
    """The same rule for slots in this order: first token and text, others of the prompt, answer."""
    toy, (ids, visual) = Toy.build(4, 2, layers=4), Toy.build(4, 2).prompt(57)
    got = toy.run(PrefixKV(ratio, text=True, distance=distance), [(ids, visual)], steps=12)
    always, gone = [0, *(~visual).nonzero()[:, 0].tolist()], 0
    always = sorted(set(always))
    for layer, cache in enumerate(got.caches):
        held = got.held[0][layer][2][:, 0].tolist()
        slots, kept = always + [j for j in held if j not in always], len(held)
        for made in range(1, 13):
            slots.append(57 + made - 1)
            if len(slots) - kept / 57 * (57 + made) >= 1 - 1e-9:
                at = kept - distance if kept > distance else kept // 2
                del slots[max(at, len(always))]
                gone += 1
        assert sorted(cache.view(0)[2][:, 0].tolist()) == sorted(slots)
        assert set(always) <= set(slots)
    assert gone > 8


def test_text_stays_where_it_is_told_to() -> None:
    toy, (ids, visual) = Toy.build(4, 2, layers=5), Toy.build(4, 2).prompt(94)
    text = (~visual).nonzero()[:, 0].tolist()
    for ratio in (0.05, 0.3, 0.6):
        got = toy.run(PrefixKV(ratio, text=True), [(ids, visual)], steps=1)
        letter = toy.run(PrefixKV(ratio), [(ids, visual)], steps=1)
        for held in got.held[0]:
            assert set(text) <= set(held[2][:, 0].tolist())
        assert any(set(text) - set(held[2][:, 0].tolist()) for held in letter.held[0])
        always = 5 * (len(text) + 1)  # the first token is visual
        want = max(round(ratio * 94 * 5), always - 5 * (not visual[0]))
        assert sum(n[0] for n in got.prefilled) == want


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1, layers=4)
    prompts = [toy.prompt(94), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(30, "none")]
    for policy in (PrefixKV(1e-6), PrefixKV(0.5), PrefixKV(1.0)):
        got = toy.run(policy, prompts)
        alone = [toy.run(policy, [p]) for p in prompts]
        assert got.tokens == [a.tokens[0] for a in alone]
        assert got.prefilled == [[a.prefilled[i][0] for a in alone] for i in range(4)]
    tiny = toy.run(PrefixKV(1e-6), prompts).prefilled
    assert tiny == [[2, 1, 2, 2]] * 4  # first and last token
    full, dense = toy.run(PrefixKV(1.0), prompts), toy.run(Policy(), prompts)
    assert full.tokens == dense.tokens
    assert full.prefilled == dense.prefilled


def test_a_profile_is_each_layers_share(tmp_path: Path) -> None:
    toy, shares = Toy.build(4, 2, seed=2, layers=4), [0.9, 0.5, 0.0, 0.26]
    write_profile(tmp_path / "p.json", 0.4, shares)
    policy, looks = watched(PrefixKV(0.4, profile=str(tmp_path / "p.json")))
    got = toy.run(policy, [toy.prompt(94)], steps=1)
    for layer, share in enumerate(shares):
        want = kept(looks[layer].mean(0).sum(0), {0, 93}, round(share * 94))
        assert got.held[0][layer][2][:, 0].tolist() == want
    assert got.bytes == [2 * (n[0] + 1) * 2 * 8 * 4 for n in got.prefilled]


GOOD = {"format": "zipvl-prefixkv", "version": 1, "ratio": 0.5, "shares": [0.5, 0.5, 0.5]}
BAD = [
    (None, "no readable file"),
    ("[1]", "no readable file"),
    ("{", "no readable file"),
    (GOOD | {"version": 2}, "is not zipvl-prefixkv version 1"),
    (GOOD | {"format": "x"}, "is not zipvl-prefixkv version 1"),
    (GOOD | {"shares": []}, "no `shares` from 0 to 1"),
    (GOOD | {"shares": [0.5, 1.5]}, "no `shares` from 0 to 1"),
    (GOOD | {"shares": [0.5, True]}, "no `shares` from 0 to 1"),
    (GOOD | {"shares": {"0": 1}}, "no `shares` from 0 to 1"),
    (GOOD | {"shares": [float("nan")]}, "no `shares` from 0 to 1"),
    (GOOD | {"ratio": 0.2}, "is of ratio=0.2: give it, not 0.5"),
]


@pytest.mark.parametrize(("what", "says"), BAD)
def test_a_bad_profile_is_one_sentence(tmp_path: Path, what: object, says: str) -> None:
    path = tmp_path / "p.json"
    if what is not None:
        path.write_text(what if isinstance(what, str) else json.dumps(what))
    with pytest.raises(UsageError, match=f"^method 'prefixkv': profile .*p.json.*{says}") as e:
        load_policy(f"prefixkv:profile={path}")
    assert "\n" not in str(e.value)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(GOOD))
    engine = zipvl.load(device="cpu", dtype="float32")
    with pytest.raises(UsageError, match=r"p.json has 3 layers, and the model 8: make one of this"):
        engine.generate("hello", f"prefixkv:profile={tmp_path / 'p.json'}", max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"distance": 0}, "distance is 0"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'prefixkv': {says}"):
        load_policy("prefixkv", **options)
