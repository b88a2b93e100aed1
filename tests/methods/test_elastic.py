"""Elastic Cache: its anchors, what they take in, and the place where a step lets a slot go."""

from functools import partial

import numpy as np
import pytest

from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.elastic import Elastic
from zipvl.policy import Plan, Policy, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import attention

CASES = [
    ("elastic", {"ratio": 0.4}, {"ratio": 1.0}),
    ("elastic", {"ratio": 0.4, "distance": 3, "merge": False}, {"ratio": 1.0}),
    ("elastic", {"ratio": 0.1, "distance": 1, "text": True}, {"ratio": 1.0}),
    ("elastic", {"ratio": 0.01}, None),  # the first token and the last
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


class Spy(Elastic):
    """Remembers what each layer looked at: sums [T], k and v [G, T, D]."""

    def plan(self, view: View) -> Plan:
        seen = self.__dict__.setdefault("seen", [])
        sums = attention(view).mean(0).sum(0)
        seen.append((sums, view.k.double().numpy(), view.v.double().numpy()))
        return super().plan(view)


def merged(x: np.ndarray, anchors: list[int], always: set[int]) -> np.ndarray:
    """x [T, D] where an anchor is the mean of its bucket: those nearer to it than to another."""
    out = x.copy()
    buckets: dict[int, list[int]] = {a: [] for a in anchors}
    for t in range(len(x)):
        if t not in always and anchors:
            buckets[min(anchors, key=lambda a: (abs(a - t), a))].append(t)
    for a, some in buckets.items():
        out[a] = x[some].mean(0)
    return out


@pytest.mark.parametrize(("groups", "seed"), [(1, 3), (2, 0), (4, 3)])
@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.4, 1.0])
@pytest.mark.parametrize("text", [False, True])
def test_anchors_are_means_of_their_buckets(
    ratio: float, groups: int, seed: int, text: bool
) -> None:
    toy, T = Toy.build(4, groups, seed), 70 + seed
    policy, (ids, visual) = Spy(ratio, text=text), toy.prompt(T)
    got = toy.run(policy, [(ids, visual)], steps=1)
    always = {0, T - 1} | (set((~visual).nonzero()[:, 0].tolist()) if text else set())
    count = max(round(ratio * T), len(always))
    for (sums, k, v), (held_k, held_v, places) in zip(policy.seen, got.held[0], strict=True):
        others = sorted(set(range(T)) - always, key=lambda t: -sums[t])
        anchors = sorted(others[: count - len(always)])
        kept = sorted(always | set(anchors))
        assert (places.T.numpy() == kept).all()  # the same for all heads
        for g in range(groups):
            for held, x in ((held_k, k), (held_v, v)):
                want = merged(x[g], anchors, always)[kept]
                np.testing.assert_allclose(held[:, g].double(), want, rtol=1e-5, atol=1e-5)
                untouched = [kept.index(t) for t in always]
                assert np.allclose(held[untouched, g], x[g][kept][untouched], atol=1e-6)


def test_without_merging_keys_stay_as_they_are() -> None:
    toy = Toy.build(4, 2)
    policy = Spy(0.3, merge=False)
    got = toy.run(policy, [toy.prompt(64)], steps=1)
    for (_, k, v), (held_k, held_v, places) in zip(policy.seen, got.held[0], strict=True):
        for held, x in ((held_k, k), (held_v, v)):
            assert (held.double().numpy() == x[:, places[:, 0].long()].transpose(1, 0, 2)).all()


@pytest.mark.parametrize("T", [1, 2, 9, 60])
@pytest.mark.parametrize(
    ("distance", "ratio"), [(25, 0.8), (7, 0.5), (40, 0.25), (1, 0.9), (3, 0.33), (25, 1.0)]
)
def test_decoding_deletes_at_one_place(distance: int, ratio: float, T: int) -> None:
    """The published rule as it is written for slots that lie in order of position."""
    toy, steps = Toy.build(4, 2), 17
    got = toy.run(Elastic(ratio, distance), [toy.prompt(T)], steps)
    for layer, cache in enumerate(got.caches):
        slots = got.held[0][layer][2][:, 0].tolist()
        kept = len(slots)
        assert kept == min(T, max(2, round(ratio * T)))
        most = 0
        for made in range(1, steps + 1):
            slots.append(T + made - 1)
            most = max(most, len(slots))
            if len(slots) - ratio * (T + made) >= 1 - 1e-9:
                at = kept - distance
                del slots[at if at >= 1 else max(1, kept // 2)]
            if made < steps:
                assert sorted(got.held[made][layer][2][:, 0].tolist()) == slots
        assert sorted(cache.view(0)[2][:, 1].tolist()) == slots
        assert most <= cache.spans.capacity[0] <= most + 1
        room = max(0, int(np.ceil(ratio * (T + steps - 1))) - kept) + 1
        assert cache.nbytes == 2 * (kept + room) * 2 * 8 * 4


@pytest.mark.parametrize("visual", ["some", "none", "all"])
@pytest.mark.parametrize(("ratio", "distance"), [(0.2, 25), (0.5, 2), (0.5, 12)])
def test_text_stays_while_decoding(visual: str, ratio: float, distance: int) -> None:
    """Of the others the nearest to the fixed place leaves, of two the earlier."""
    toy, T, steps = Toy.build(4, 2), 57, 25
    prompt = toy.prompt(T, visual)
    text = {0, T - 1} | set((~prompt[1]).nonzero()[:, 0].tolist())
    got, gone = toy.run(Elastic(ratio, distance, text=True), [prompt], steps), 0
    for layer, cache in enumerate(got.caches):
        slots = got.held[0][layer][2][:, 0].tolist()
        kept = len(slots)
        share, at = max(ratio, kept / T), kept - distance
        at = at if at >= 1 else max(1, kept // 2)
        for made in range(1, steps + 1):
            slots.append(T + made - 1)
            if len(slots) - share * (T + made) >= 1 - 1e-9:
                free = [i for i, p in enumerate(slots) if p not in text]
                del slots[min(free, key=lambda i: (abs(i - at), i))]
                gone += 1
            assert text <= set(slots)
            if made < steps:
                assert sorted(got.held[made][layer][2][:, 0].tolist()) == slots
        assert sorted(cache.view(0)[2][:, 0].tolist()) == slots
    assert (gone == 0) == (visual == "none")  # then all of the prompt stays


def test_the_letter_lets_text_leave() -> None:
    toy, (ids, visual) = Toy.build(4, 2), Toy.build(4, 2).prompt(94)
    text = set((~visual).nonzero()[:, 0].tolist())
    for policy, stays in ((Elastic(0.3), False), (Elastic(0.3, text=True), True)):
        held = toy.run(policy, [(ids, visual)], steps=1).held[0]
        assert all(text <= set(h[2][:, 0].tolist()) for h in held) == stays


def test_edges_and_batches() -> None:
    toy = Toy.build(4, 1)
    prompts = [toy.prompt(94), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(30, "none")]
    for policy in (Elastic(1e-6), Elastic(0.5, 3), Elastic(0.5, text=True), Elastic(1.0)):
        got = toy.run(policy, prompts, steps=9)
        alone = [toy.run(policy, [p], steps=9) for p in prompts]
        assert got.tokens == [a.tokens[0] for a in alone]
        for i, cache in enumerate(got.caches):
            assert cache.spans.lengths == [a.caches[i].spans.lengths[0] for a in alone]
            assert cache.nbytes == sum(a.caches[i].nbytes for a in alone)
    assert toy.run(Elastic(1e-6), prompts).prefilled == [[2, 1, 2, 2]] * 3
    full, dense = toy.run(Elastic(1.0), prompts, 9), toy.run(Policy(), prompts, 9)
    assert full.tokens == dense.tokens
    assert [c.spans.lengths for c in full.caches] == [c.spans.lengths for c in dense.caches]
    assert [c.nbytes for c in full.caches] == [c.nbytes for c in dense.caches]


@pytest.mark.parametrize(
    ("options", "says"), [({"ratio": 1.1}, "ratio is 1.1"), ({"distance": 0}, "distance is 0")]
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'elastic': {says}"):
        load_policy("elastic", **options)
