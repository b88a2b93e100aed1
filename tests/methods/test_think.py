"""ThinK: the channels it keeps, the bytes it frees, and attention over what is left."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import zipvl
from zipvl.model.batch import Spans
from zipvl.model.cache import Kept, LayerCache
from zipvl.model.cache_thin import Thin, ThinCache
from zipvl.model.kernels import attend_sdpa
from zipvl.policies import load_policy
from zipvl.policies.snapkv import SnapKV
from zipvl.policies.think import ThinK
from zipvl.policy import Notes, Plan, Policy, StepView, View
from zipvl.testing import check_policy
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Toy

CASES = [
    ("think", {"ratio": 0.5, "window": 4}, {"ratio": 1.0}),
    ("think", {}, {"ratio": 1.0}),
    ("think", {"ratio": 0.01, "window": 1}, None),  # one channel
    ("think", {"ratio": 0.6, "window": 4, "budget": 12}, {"ratio": 1.0, "budget": 1000}),
    ("think", {"ratio": 0.5, "window": 3, "budget": 3}, None),  # the window and nothing older
]
SHAPES = [(4, 1, 0), (4, 2, 1), (4, 4, 2)]  # query heads, key/value heads, seed


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def best_channels(q: np.ndarray, k: np.ndarray, window: int, count: int) -> list[list[int]]:
    """The rule as published, q [H, T, D] and k [G, n, D] in float64: per key/value head the
    `count` channels of the largest mean q^2 times mean k^2, in order."""
    found = []
    for g, keys in enumerate(k):
        mine = q[g * (len(q) // len(k)) : (g + 1) * (len(q) // len(k)), -window:]
        score = [
            np.mean([np.mean(head[:, c] ** 2) for head in mine]) * np.mean(keys[:, c] ** 2)
            for c in range(k.shape[2])
        ]
        found.append(sorted(np.argsort(score)[::-1][:count].tolist()))
    return found


@pytest.mark.parametrize(("H", "G", "seed"), SHAPES)
@pytest.mark.parametrize("budget", [0, 9])
def test_channels_are_those_of_the_published_score(H: int, G: int, seed: int, budget: int) -> None:
    toy, asked = Toy.build(H, G, seed), []

    class Spy(ThinK):
        def plan(self, view: View) -> Plan:
            plan, k = super().plan(view), view.k.double().numpy()
            rows = torch.tensor([0, view.length - 1])
            torch.testing.assert_close(view.queries(rows), view.q[:, rows])
            if plan.cache is not None:  # thinning comes after SnapKV
                k = np.stack([k[g, kept] for g, kept in enumerate(plan.cache.numpy())])
                assert k.shape[1] == 9
            assert plan.channels is not None
            want = best_channels(view.q.double().numpy(), k, self.window, 5)
            assert plan.channels.tolist() == want
            asked.append(view.length)
            return plan

    for length in (1, 4, 5, 37, 120):  # fewer tokens than the window, as many, more
        toy.run(Spy(0.6, 5, budget), [toy.prompt(length)], steps=1)
    assert asked == [n for n in (1, 4, 5, 37, 120) for _ in range(3)]


@pytest.mark.parametrize(
    ("ratio", "D", "kept"),
    [(0.6, 128, 77), (0.7, 128, 90), (0.5, 8, 4), (0.6, 8, 5), (0.9, 10, 9), (0.7, 10, 7),
     (0.3, 10, 3), (1.0, 128, 128), (0.01, 8, 1), (1e-9, 64, 1)],
)  # fmt: skip
def test_the_share_that_leaves_is_rounded_down(ratio: float, D: int, kept: int) -> None:
    """The authors' code prunes int(D * lambda); 0.4 of 128 are 51."""
    assert Thin(32, ratio).width(D) == kept


@pytest.mark.parametrize(("H", "G", "seed"), SHAPES)
def test_bytes_to_the_byte(H: int, G: int, seed: int) -> None:
    toy = Toy.build(H, G, seed)
    lengths = (90, 41, 6, 3)
    got = toy.run(ThinK(0.5, 6), [toy.prompt(n) for n in lengths])
    want = [
        max(0, n - 6) * G * 4 * 4  # older keys: 4 of 8 channels, 4 bytes a number
        + (min(n, 6) + 4) * G * 8 * 4  # the window's keys and the room of 4 new tokens
        + (n + 4) * G * 8 * 4  # values
        + (G * 4 * 8 if n > 6 else 0)  # the channels' numbers, int64
        for n in lengths
    ]
    assert got.bytes == [sum(want)] * 3
    assert [cache.sequence_bytes() for cache in got.caches] == [want] * 3
    form = ThinK(0.5, 6).storage
    assert form is not None
    assert [form.nbytes(n, 0, 4, G, 8, 4) for n in lengths] == want
    alone = [toy.run(ThinK(0.5, 6), [toy.prompt(n)]).bytes[0] for n in lengths]
    assert alone == want
    dense = toy.run(Policy(), [toy.prompt(90)]).bytes[0]
    assert dense - want[0] == 84 * G * 4 * 4 - G * 4 * 8  # a quarter of the older tokens' bytes


def test_bytes_of_a_real_head_size() -> None:
    """The paper's 20 % less: 60 % of 128 channels of 16 bit numbers."""
    form, item, G, D = Thin(32, 0.6), 2, 4, 128
    full = 2 * 10_000 * G * D * item
    assert form.nbytes(10_000, 0, 0, G, D, item) / full == pytest.approx(0.8, abs=0.003)


@pytest.mark.parametrize(("H", "G", "seed"), SHAPES)
@pytest.mark.parametrize("budget", [0, 14])
def test_decoding_is_attention_without_these_channels(
    H: int, G: int, seed: int, budget: int
) -> None:
    """Every decode step in float64, where older keys have zeros in the channels that left."""
    toy, window = Toy.build(H, G, seed), 5
    prompt = toy.prompt(60)
    got = toy.run(ThinK(0.5, window, budget), [prompt])
    dense = toy.run(SnapKV(budget, window) if budget else Policy(), [prompt])
    oracle, table = Oracle(toy.decoder), toy.decoder.embed_tokens.weight
    oracle.prefill(table[prompt[0]], got.seen.plans)
    for layer, plan in enumerate(got.seen.plans):
        assert plan.channels is not None
        assert plan.channels.shape == (G, 4)
        for h in range(H):
            gone = sorted(set(range(8)) - set(plan.channels[h // (H // G)].tolist()))
            for token in oracle.held[layer][h][:-window].tolist():
                oracle.keys[layer][token, h, gone] = 0
    for step, token in enumerate(got.tokens[0]):
        want = oracle.step(table[token][None], 60 + step, [Plan()] * 3)
        torch.testing.assert_close(got.hidden[step + 1].double(), want, rtol=1e-4, atol=1e-4)
    assert any(
        not torch.allclose(a, b, rtol=1e-2) for a, b in zip(got.hidden, dense.hidden, strict=True)
    )  # they matter


@pytest.mark.parametrize("budget", [0, 14])
def test_values_and_what_stays_of_keys_are_untouched(budget: int) -> None:
    toy, prompt = Toy.build(4, 2, seed=3), Toy.build(4, 2).prompt(60)
    got = toy.run(ThinK(0.5, 5, budget), [prompt], steps=1)
    dense = toy.run(SnapKV(budget, 5) if budget else Policy(), [prompt], steps=1)
    for plan, mine, full in zip(got.seen.plans, got.held[0], dense.held[0], strict=True):
        (k, v, at), (all_k, all_v, all_at) = mine, full
        assert torch.equal(at, all_at)
        assert torch.equal(v, all_v)
        assert torch.equal(k[-5:], all_k[-5:])
        for g, kept in enumerate(plan.channels):
            gone = [c for c in range(8) if c not in kept.tolist()]
            assert torch.equal(k[:-5, g, kept], all_k[:-5, g, kept])
            assert not k[:-5, g, gone].any()
            assert all_k[:-5, g, gone].any()


def test_a_batch_is_its_prompts_one_by_one() -> None:
    toy = Toy.build(4, 2, seed=4)
    prompts = [toy.prompt(n, v) for n, v in ((64, "some"), (9, "none"), (3, "all"), (140, "some"))]
    policy = ThinK(0.4, 7)
    got, alone = toy.run(policy, prompts), [toy.run(policy, [p]) for p in prompts]
    assert got.tokens == [one.tokens[0] for one in alone]
    for layer in range(3):
        plans = got.seen.plans[4 * layer : 4 * layer + 4]
        for plan, one in zip(plans, alone, strict=True):
            assert torch.equal(plan.channels, one.seen.plans[layer].channels)


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"window": 100}])
def test_all_channels_are_dense(options: dict) -> None:
    toy = Toy.build(4, 2)
    prompts = [toy.prompt(80), toy.prompt(5)]
    got, dense = toy.run(ThinK(**options), prompts), toy.run(Policy(), prompts)
    assert got.tokens == dense.tokens
    for a, b in zip(got.hidden, dense.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    if "window" in options:
        assert got.bytes == dense.bytes


# --- the storage by itself


def random_kept(n: int, seed: int, D: int = 8, G: int = 2) -> Kept:
    chance = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(n, G, D, generator=chance) for _ in range(2))
    channels = torch.stack([torch.randperm(D, generator=chance)[:3].sort().values for _ in "ab"])
    return Kept(k, v, torch.arange(n).int(), channels=channels)


def masked(kept: Kept, old: int) -> Tensor:
    """The keys of `kept`, the first `old` of them with zeros outside its channels."""
    k = kept.k.clone()
    for g, channels in enumerate(kept.channels):
        gone = [c for c in range(k.shape[2]) if c not in channels.tolist()]
        k[: max(0, old), g, gone] = 0
    return k


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_gathered_queries(seed: int) -> None:
    """The kernel over what read() gives, against the query cut to the kept channels."""
    kept, window = random_kept(30, seed), 6
    cache = Thin(window, 0.375).store(4)([kept])
    q = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed + 9))
    k, v, spans = cache.read()
    got = attend_sdpa(q, k, v, Spans([1], "cpu"), spans)[0]
    for h in range(4):
        g = h // 2
        assert kept.channels is not None
        some, ask = kept.channels[g], q[0, h].double()
        thin = kept.k[: 30 - window, g][:, some].double() @ ask[some]
        whole = kept.k[30 - window :, g].double() @ ask
        probs = (torch.cat((thin, whole)) / 8**0.5).softmax(0)
        want = probs @ kept.v[:, g].double()
        torch.testing.assert_close(got[h].double(), want, rtol=1e-5, atol=1e-6)


def test_it_grows_drops_and_gets_room() -> None:
    kept = [random_kept(n, n) for n in (20, 4, 11)]
    cache = Thin(5, 0.375).store(2)(kept)
    new = [random_kept(3, 50 + i) for i in range(6)]
    want = [[masked(one, len(one.k) - 5), one.v] for one in kept]

    def grow(rows: list[int], step: int) -> None:
        k, v = new[step].k[rows], new[step].v[rows]
        cache.append(
            k, v, torch.tensor([len(want[b][0]) for b in rows]).int(), Spans([1] * len(rows), "cpu")
        )
        cache.apply([Plan()] * len(rows))
        for i, b in enumerate(rows):
            want[b] = [torch.cat((a, x[i : i + 1])) for a, x in zip(want[b], (k, v), strict=True)]
        for i, b in enumerate(rows):
            got_k, got_v, places = cache.view(i)
            assert torch.equal(got_k, want[b][0])
            assert torch.equal(got_v, want[b][1])
            assert places[:, 1].tolist() == list(range(len(want[b][0])))
        assert [cache.due(i) for i in range(len(rows))] == [0] * len(rows)

    grow([0, 1, 2], 0)
    grow([0, 1, 2], 1)
    cache = cache.drop([0, 2], 3)  # full: room for more, and one sequence has left
    assert isinstance(cache, ThinCache)
    for step in (2, 3, 4):
        grow([0, 2], step)
    old, late = 15 * 2 * 3 + 6 * 2 * 3, (5 + 5) + (5 + 5)
    values = (20 + 5) + (11 + 5)
    assert cache.nbytes == 4 * (old + late * 16 + values * 16) + 2 * 2 * 3 * 8
    cache = cache.drop([1])  # what is left of the room stays
    assert cache.spans.free() == 0
    assert torch.equal(cache.view(0)[0], want[2][0])


@pytest.mark.parametrize("per_head", [False, True])
def test_trim(per_head: bool) -> None:
    kept = [random_kept(20, 1), random_kept(9, 2), random_kept(12, 3)]
    cache = Thin(5, 0.375).store(2)(kept)
    some = torch.tensor([0, 3, 14, 15, 19])
    slots = torch.stack((some, torch.tensor([1, 2, 3, 4, 19]))) if per_head else some
    trimmed = cache.trim([slots, None, torch.tensor([8, 11])])
    heads = slots if per_head else slots.expand(2, -1)
    k, v, places = trimmed.view(0)
    for g in range(2):
        assert torch.equal(k[:, g], masked(kept[0], 15)[heads[g], g])
        assert torch.equal(v[:, g], kept[0].v[heads[g], g])
        assert places[:, g].tolist() == heads[g].tolist()
    assert torch.equal(trimmed.view(1)[0], masked(kept[1], 4))
    assert torch.equal(trimmed.view(2)[0], kept[2].k[[8, 11]])  # both are of the window
    thin = [3, 4, 0]  # of one head's four older tokens three: the other's third is the last
    whole = [n - m + 2 for n, m in zip((5, 9, 2), thin, strict=True)]
    values = [n + 2 for n in (5, 9, 2)]
    want = [
        4 * 2 * (3 * m + 8 * w + 8 * n) + (2 * 3 * 8 if m else 0)
        for m, w, n in zip(thin, whole, values, strict=True)
    ]
    assert trimmed.sequence_bytes() == want
    trimmed.append(
        kept[0].k[:3], kept[0].v[:3], torch.tensor([20, 9, 12]).int(), Spans([1, 1, 1], "cpu")
    )
    assert torch.equal(trimmed.view(0)[0][-1], kept[0].k[0])
    assert trimmed.spans.lengths == [6, 10, 3]


class Trims(ThinK):
    def plan(self, view: View) -> Plan:
        view.notes["G"] = len(view.k)
        return super().plan(view)

    def trim(self, layer: int, notes: Notes) -> dict[int, Tensor] | None:
        half = torch.arange(notes.prompt)[notes.prompt // 2 :]
        return {0: half, 1: half.expand(notes["G"], -1)} if layer == 2 else None


def test_a_method_may_trim_thinned_caches() -> None:
    toy, prompt = Toy.build(4, 2), Toy.build(4, 2).prompt(60)
    got = toy.run(Trims(0.5, 5), [prompt])
    assert got.prefilled == [[30], [30], [60]]
    whole = toy.run(ThinK(0.5, 5), [prompt])
    for layer in (0, 1):
        for mine, full in zip(got.held[0][layer], whole.held[0][layer], strict=True):
            assert torch.equal(mine, full[30:])


class Evicts(ThinK):
    def step(self, view: StepView) -> Plan:
        return Plan(leave=torch.tensor([0]))


class Summarises(ThinK):
    def plan(self, view: View) -> Plan:
        return Plan(cache=torch.arange(10), summary=4, channels=torch.arange(3))


def test_what_it_cannot_do_is_said() -> None:
    toy = Toy.build(4, 2)
    with pytest.raises(zipvl.UsageError, match="cache without some key channels cannot do"):
        toy.run(Evicts(), [toy.prompt(50)])
    with pytest.raises(zipvl.UsageError, match="leave out summary"):
        toy.run(Summarises(), [toy.prompt(50)])


class Channels(ThinK):
    def __init__(self, what: object):
        super().__init__(0.25, 4)
        self.what = what

    def plan(self, view: View) -> Plan:
        return Plan(channels=self.what)


@pytest.mark.parametrize(
    ("what", "says"),
    [(torch.tensor([[0, 1], [3, 2]]), "not sorted"),
     (torch.tensor([[0, 1], [3, 8]]), "reaches outside the 8 channels there are$"),
     (torch.tensor([[-1, 1], [3, 4]]), "reaches outside the 8 channels"),
     (torch.zeros(4, 1).long(), "the key/value heads need 2, not one row a query head"),
     (torch.zeros(2, 0).long(), "at least one channel"),
     (torch.ones(9) > 0, r"a mask of shape \[9\]: the channels need \[8\]"),
     (torch.zeros(2, 2), "give int64 indices, or a bool mask of all 8 channels"),
     ([0, 1], r"is \[0, 1\]: give a tensor")],
)  # fmt: skip
def test_channels_that_are_none_are_named(what: object, says: str) -> None:
    toy = Toy.build(4, 2)
    with pytest.raises(zipvl.UsageError, match=r"a Plan in layer 0 whose channels .*" + says):
        toy.run(Channels(what), [toy.prompt(20)])


@pytest.mark.parametrize("what", [torch.tensor([1, 6]), torch.arange(8) % 5 == 1])
def test_channels_may_be_those_of_all_heads(what: Tensor) -> None:
    toy = Toy.build(4, 2)
    got = toy.run(Channels(what), [toy.prompt(20)], steps=1)
    k, _, _ = got.held[0][2]
    assert k[:16].any(0).any(0).tolist() == [c in (1, 6) for c in range(8)]
    assert k[16:].any(0).all()


def test_a_full_cache_does_not_mind_channels() -> None:
    kept = random_kept(5, 0)
    assert torch.equal(LayerCache([kept], 2).view(0)[0], kept.k)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"ratio": 0.0}, "ratio is 0.0: give the share"), ({"ratio": 1.1}, "ratio is 1.1"),
     ({"window": 0}, "window is 0: give 1 or more"), ({"budget": -1}, "budget is -1"),
     ({"budget": 31}, "budget is 31: it must hold the window of 32")],
)  # fmt: skip
def test_options(options: dict, says: str) -> None:
    with pytest.raises(zipvl.UsageError, match=says):
        load_policy("think", **options)
