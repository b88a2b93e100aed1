"""Summary slots: what a cache keeps of tokens that left it, against numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zipvl
from zipvl import Plan, Policy, StepView, UsageError, View
from zipvl.engine.speed import StaticStep, attend_masked
from zipvl.model import backends
from zipvl.model.batch import Spans
from zipvl.model.cache import Kept, LayerCache, summaries
from zipvl.policies import load_policy
from zipvl.testing.toy import Toy

G, D = 2, 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_runs_are_means_of_what_is_left_out(data: st.DataObject) -> None:
    T = data.draw(st.integers(2, 60))
    count, size = data.draw(st.integers(1, T - 1)), data.draw(st.integers(1, 20))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    k, v = torch.randn(2, T, G, D, generator=rng)
    heads = [torch.randperm(T, generator=rng)[:count].sort().values for _ in range(G)]
    shared = data.draw(st.booleans())
    index = heads[0] if shared else torch.stack(heads)
    places = 3 * torch.arange(T, dtype=torch.int32)
    got_k, got_v, at = summaries(k, v, places, index, size)
    for g in range(G):
        left = np.setdiff1d(np.arange(T), heads[0 if shared else g].numpy())
        runs = np.array_split(left, math.ceil(len(left) / size))
        assert max(map(len, runs)) <= size
        for got, x in ((got_k, k), (got_v, v)):
            want = np.stack([x[run, g].numpy().mean(0) for run in runs])
            np.testing.assert_allclose(got[:, g].numpy(), want, rtol=1e-5, atol=1e-5)
        assert at[:, g].tolist() == [3 * run[-1] for run in runs]


def flash(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, most: int, longest: int,
          dropout: float, causal: bool, debug: bool, *, seqused_k: Tensor | None = None,
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What PyTorch's FlashAttention gives for packed sequences: outputs, and [H, rows] logarithms
    of denominators, which are +inf where there is nothing to look at."""
    out, mass = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf)
    for b in range(len(rows) - 1):
        r, s = slice(rows[b], rows[b + 1]), int(slots[b])
        n = int(seqused_k[b]) if seqused_k is not None else int(slots[b + 1]) - s
        assert n <= longest
        assert s + n <= slots[b + 1]
        if n:
            wide = [x[s : s + n].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
            score = torch.einsum("mhd,nhd->hmn", q[r], wide[0]) / math.sqrt(q.shape[-1])
            if causal:
                m = score.shape[1]
                score = score.masked_fill(torch.ones(m, n).tril(n - m) == 0, -torch.inf)
            mass[:, r] = score.logsumexp(-1)
            out[r] = torch.einsum("hmn,nhd->mhd", score.softmax(-1), wide[1])
    return out, mass


def want_of(q: Tensor, k: Tensor, v: Tensor, merged: int, weight: float) -> np.ndarray:
    """q [m, H, D] over slots k, v [n, G, D], rows causal at the end, in float64."""
    m, n, wide = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = (x.double().numpy() for x in (q, k, v))
    k, v = np.repeat(k, wide, 1), np.repeat(v, wide, 1)
    score = np.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1])
    score[:, :, :merged] += math.log(weight)
    unseen = np.arange(n)[None] - n > np.arange(m)[:, None] - m
    mass = np.exp(score - score.max()) * ~unseen
    return np.einsum("hmn,nhd->mhd", mass / mass.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(  # "masked" is the static form of decode steps, of one row each
    ("kind", "rows"),
    [("sdpa", 1), ("sdpa", 3), ("masked", 1), ("torch-flash", 1), ("torch-flash", 3)],
)
@pytest.mark.parametrize(
    ("lengths", "merged"), [([20, 20], [4, 4]), ([9, 30, 12], [5, 0, 3]), ([40], [17])]
)
def test_attention_adds_the_logarithm_of_their_number(
    kind: str, rows: int, lengths: list[int], merged: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    attend = attend_masked if kind == "masked" else backends.BACKENDS[kind]
    weights = [2.5 + b for b in range(len(lengths))]
    spans = Spans(lengths, "cpu", 3, merged, weights)
    q = torch.randn(rows * len(lengths), 6, D)
    k, v = torch.randn(2, spans.total, G, D)
    got = attend(q, k, v, Spans([rows] * len(lengths), "cpu"), spans)
    for b, at in enumerate(spans.slices()):
        mine = slice(rows * b, rows * (b + 1))
        want = want_of(q[mine], k[at], v[at], merged[b], weights[b])
        np.testing.assert_allclose(got[mine].double().numpy(), want, rtol=1e-4, atol=1e-5)


def test_two_halves_are_the_whole() -> None:
    q, (k, v) = torch.randn(5, 4, D), torch.randn(2, 30, 4, D)
    edge = torch.tensor([0, 5]).int()
    parts = [flash(q, k[a:b], v[a:b], edge, torch.tensor([0, b - a]), 5, 30, 0.0, False, False)
             for a, b in ((0, 11), (11, 30), (0, 30))]  # fmt: skip
    got = backends.joined(*parts[0], *parts[1])
    torch.testing.assert_close(got, parts[2][0])


# --- the cache


def kept(n: int, merged: int) -> Kept:
    x = torch.arange(n * G * D, dtype=torch.float32).view(n, G, D)
    return Kept(x, x + 0.5, torch.arange(n).int(), merged=merged, weight=4.0)


def test_what_chooses_slots_does_not_see_summaries_and_they_stay() -> None:
    cache = LayerCache([kept(7, 3), kept(5, 0)], room=2)
    assert cache.places(0).shape == (4, G)
    assert [len(cache.view(b)[0]) for b in (0, 1)] == [7, 5]
    cache.append(
        torch.zeros(2, G, D),
        torch.zeros(2, G, D),
        torch.tensor([70, 50]).int(),
        Spans([1, 1], "cpu"),
    )
    cache.apply([Plan(leave=torch.tensor([1, 3])), Plan()])  # of 3, 4, 5, 6 and the new one
    assert cache.places(0)[:, 0].tolist() == [3, 70, 5]
    assert cache.view(0)[2][:, 0].tolist() == [0, 1, 2, 3, 70, 5]
    other = cache.drop([1, 0], room=1)
    assert other.spans.merged == [0, 3]
    assert other.spans.weights == [4.0, 4.0]
    assert [len(other.view(b)[0]) for b in (0, 1)] == [6, 6]
    less = other.trim([None, torch.tensor([1])])
    assert less.view(1)[2][:, 0].tolist() == [0, 1, 2, 70]
    slot = 2 * G * D * 4
    assert less.sequence_bytes() == [(6 + 1) * slot, (4 + 1) * slot]  # summaries are slots


@torch.inference_mode()
@pytest.mark.parametrize(
    "method", ["zipvl-stream:tau=0.3", "snapkv:budget=40", "h2o:recent=40,heavy=0"]
)
def test_bytes_slots_and_batches(method: str) -> None:
    """A slot for every 8 tokens that left; a batch is its prompts one by one; compiled steps agree."""
    engine = zipvl.load(device="cpu")
    asked = [engine.prepare(q, video=zipvl.demo_clip(), frames=n)
             for q, n in (("What comes first?", 32), ("List all objects in order.", 9))]  # fmt: skip
    name, separator = method, "," if "=" in method else ":"
    plain, merged = name, f"{name}{separator}summary=8"
    alone = [engine.generate(i, merged, max_new_tokens=9) for i in asked]
    together = engine.generate(asked, merged, max_new_tokens=9)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    before, after = (engine.generate(asked[0], m, max_new_tokens=9).stats for m in (plain, merged))
    text = engine.config.text
    slot = 2 * text.num_kv_heads * text.head_dim * 4
    for one, other in zip(before.layers, after.layers, strict=True):
        assert other["cached"] == one["cached"] + math.ceil((one["tokens"] - one["cached"]) / 8)
        room = 1 if method.startswith("h2o") else 9  # its steps let one go for each new one
        assert other["kv_bytes"] == (other["cached"] + room) * slot
    if not method.startswith("h2o"):
        engine.step = StaticStep
        assert engine.generate(asked[0], merged, max_new_tokens=9).tokens == alone[0].tokens


@pytest.mark.parametrize("method", ["zipvl:kv_bits=4,summary=8", "zipvl-quant:summary=8"])
def test_bits_and_summaries_are_one_sentence(method: str) -> None:
    with pytest.raises(UsageError, match="summary and kv_bits"):
        load_policy(method)


class Odd(Policy):
    """Summaries in a quantised cache, or below a step that chooses slots."""

    def plan(self, view: View) -> Plan:
        return Plan(cache=torch.arange(0, view.length, 3), summary=4)


def test_what_cannot_hold_or_read_summaries_says_so() -> None:
    toy = Toy.build(4, 2)
    quantised = Odd()
    quantised.storage = load_policy("kivi").storage
    with pytest.raises(UsageError, match="full precision"):
        toy.run(quantised, [toy.prompt(30)])

    class Chooses(Odd):
        def step(self, view: StepView) -> Plan:
            return Plan(attend=torch.arange(view.length))

    with pytest.raises(UsageError, match="chooses slots of a cache that holds summaries"):
        toy.run(Chooses(), [toy.prompt(30)])
    with pytest.raises(UsageError, match="summary is -1"):
        Plan(summary=-1)
