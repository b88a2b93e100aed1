"""The compacted cache: what it holds, how many bytes that takes, and decoding from it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zipvl
from zipvl import Plan, Policy, StepView, View, load_policy
from zipvl.config import TextConfig
from zipvl.model.backends import BACKENDS
from zipvl.model.batch import Batch, Spans
from zipvl.model.cache import Kept, LayerCache
from zipvl.model.decoder import Decoder
from zipvl.model.kernels import attend_sdpa
from zipvl.policies.h2o import H2O
from zipvl.policies.streaming import StreamingLLM
from zipvl.policy import Notes, select
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Toy

G, D = 2, 3


def build(lengths: list[int], room: int, dtype: torch.dtype = torch.float32) -> LayerCache:
    """Slot i of sequence b holds the number 100 b + i (+ 10000 in values, + 1000 in head 1)."""
    k = [numbers(b, torch.arange(n)).to(dtype) for b, n in enumerate(lengths)]
    return LayerCache([Kept(t, t + 10000, torch.arange(len(t))) for t in k], room)


def numbers(b: int, at: Tensor) -> Tensor:
    """[len(at), G, D]"""
    heads = torch.arange(G)[None, :, None] * 1000
    return (100 * b + at[:, None, None] + heads + torch.zeros(1, 1, D)).float()


def held(cache: LayerCache, b: int) -> list[list[int]]:
    """Per head, the numbers cached for sequence b; checks that k, v and positions agree."""
    k, v, positions = cache.view(b)
    assert torch.equal(v, k + 10000)
    assert torch.equal(k, k[..., :1].expand_as(k))
    plain = k[..., 0] - 1000 * torch.arange(G)  # [n, G]
    assert torch.equal(plain % 100, positions.float())
    return plain.T.int().tolist()


# --- what it holds


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_append_leave_and_drop_against_plain_lists(data: st.DataObject) -> None:
    """Random operations on the cache and on lists of numbers give the same contents."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    room = data.draw(st.integers(0, 12))
    cache, names, steps = build(lengths, room), list(range(len(lengths))), 0
    want = [[[100 * b + i for i in range(n)] for _ in range(G)] for b, n in enumerate(lengths)]
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["append", "leave", "leave heads", "drop"]))
        if what == "append" and steps < room:
            at = torch.tensor([lengths[b] + steps for b in names])
            new = torch.cat([numbers(b, p[None]) for b, p in zip(names, at, strict=True)])
            cache.append(new, new + 10000, at, Spans([1] * len(new), "cpu"))
            for b, p, w in zip(names, at.tolist(), want, strict=True):
                for row in w:
                    row.append(100 * b + p)
            steps += 1
        if what.startswith("leave") and len(
            want[i := data.draw(st.integers(0, len(names) - 1))][0]
        ):
            n = len(want[i][0])
            count = data.draw(st.integers(1, n))
            rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
            heads = [torch.randperm(n, generator=rng)[:count].sort().values for _ in range(G)]
            heads = heads if what == "leave heads" else [heads[0]] * G
            plans = [Plan()] * len(names)
            plans[i] = Plan(leave=torch.stack(heads) if what == "leave heads" else heads[0])
            cache.apply(plans)
            want[i] = [after(row, h.tolist()) for row, h in zip(want[i], heads, strict=True)]
        if what == "drop":
            stay = sorted(data.draw(st.sets(st.integers(0, len(names) - 1), min_size=1)))
            cache = cache.drop(stay)
            names, want = [names[i] for i in stay], [want[i] for i in stay]
        assert [held(cache, b) for b in range(len(names))] == want
        assert cache.spans.lengths == cache.spans.used.tolist() == [len(w[0]) for w in want]
        assert sum(cache.sequence_bytes()) == cache.nbytes
        left = [c - n for c, n in zip(cache.spans.capacity, cache.spans.lengths, strict=True)]
        assert min(left) >= room - steps  # the tokens still to come always fit


def after(row: list[int], leave: list[int]) -> list[int]:
    """What is where, once these slots have left: the last ones that stay took the free places."""
    count = len(row) - len(leave)
    last = [x for j, x in enumerate(row) if j >= count and j not in leave]
    return [last.pop(0) if j in leave else row[j] for j in range(count)]


class Copies(TorchDispatchMode):
    """Counts the numbers that operators put into new keys and values."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and "index" in str(func):
            self.numbers += (args[2] if "put" in str(func) else out).numel()
        return out


def test_eviction_costs_what_leaves_not_what_stays() -> None:
    for n in (90, 2000):
        cache = build([n, 40], room=2)
        with Copies() as copies:
            cache.apply([Plan(leave=torch.tensor([7, 40])), Plan()])
        assert copies.numbers == 2 * (2 + 2) * G * D  # k and v: two slots are read and written


def test_rooms_of_their_own() -> None:
    """A method that lets one slot go for each new one needs one free place, not one for all."""
    some = [numbers(0, torch.arange(n)) for n in (5, 2, 3)]
    kept = [
        Kept(k, k, torch.arange(len(k)), room=r) for k, r in zip(some, (1, None, 9), strict=True)
    ]
    cache = LayerCache(kept, room=4)
    assert cache.spans.capacity == [6, 6, 7]
    assert [cache.spans.free([b]) for b in range(3)] == [1, 4, 4]
    assert cache.drop([2, 0]).spans.capacity == [7, 6]
    assert cache.trim([torch.arange(2), None, None]).spans.capacity == [3, 6, 7]
    assert cache.drop([0], room=8).spans.capacity == [13]


def test_select() -> None:
    x = torch.arange(30).reshape(5, 2, 3)
    assert select(x, None) is x
    assert torch.equal(select(x, torch.tensor([1, 4])), x[[1, 4]])
    per_head = torch.tensor([[0, 2], [3, 4]])
    want = torch.stack([x[[0, 2], 0], x[[3, 4], 1]], dim=1)
    assert torch.equal(select(x, per_head), want)


# --- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_storage(dtype: torch.dtype) -> None:
    cache = build([5, 2], room=3, dtype=dtype)
    slot = 2 * G * D * dtype.itemsize
    storage = [t.untyped_storage().nbytes() for t in (cache.k, cache.v)]
    assert sum(storage) == cache.nbytes == (5 + 2 + 2 * 3) * slot
    assert cache.sequence_bytes() == [8 * slot, 5 * slot]
    cache.apply([Plan(leave=torch.tensor([0, 2, 4])), Plan()])
    assert cache.spans.lengths == [2, 2]
    assert cache.places(0)[:, 0].tolist() == [3, 1]
    assert cache.nbytes == 13 * slot  # eviction frees places for new tokens, storage stays
    smaller = cache.drop([0])
    assert smaller.nbytes == (2 + 6) * slot  # a new tensor, with all the places it had free
    assert cache.k.untyped_storage().data_ptr() != smaller.k.untyped_storage().data_ptr()


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.7", "fixed:ratio=0.2,always=last",
                                    "fastv:after=1,ratio=0.1", "snapkv:budget=20,window=5"])  # fmt: skip
def test_the_prompts_full_keys_do_not_outlive_prefill(method: str) -> None:
    """A cache that were a view of all keys would keep their storage alive."""
    toy = Toy.build(4, 2)
    got = toy.run(load_policy(method), [toy.prompt(90), toy.prompt(30)], steps=2)
    for cache, counts, nbytes in zip(got.caches, got.prefilled, got.bytes, strict=True):
        storage = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
        assert storage == nbytes == (sum(counts) + 2 * 2) * 2 * 2 * 8 * 4


def test_stats_say_the_bytes_in_storage(oracle: Callable) -> None:
    engine = zipvl.load(oracle("llava_next_mistral").folder, device="cpu", dtype="float32")
    prompts = [engine.prepare(p) for p in ("one two three four five six", "seven")]
    policy = load_policy("fixed:ratio=0.5,always=last")
    caches = engine.prefill(prompts, policy, 7, {}).caches
    results = engine.generate(prompts, policy, max_new_tokens=7, ignore_eos=True)
    for layer, cache in enumerate(caches):
        rows = [r.stats.layers[layer] for r in results]
        storage = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
        assert sum(row["kv_bytes"] for row in rows) == storage
        assert [row["cached"] for row in rows] == cache.spans.lengths
        assert [row["cached"] for row in rows] == [row["attended"] for row in rows]
    for r, prompt in zip(results, prompts, strict=True):
        assert r.stats.kv_bytes < r.stats.kv_bytes_dense
        dense = engine.generate(prompt, "dense", max_new_tokens=7, ignore_eos=True).stats
        assert dense.kv_bytes == dense.kv_bytes_dense == r.stats.kv_bytes_dense


# --- decoding


def test_decoding_equals_a_fresh_forward_without_the_dropped_tokens() -> None:
    """Each step against float64 from scratch; the next position is the prompt's original length."""
    toy = Toy.build(4, 2, seed=8)
    for method in ("zipvl:tau=0.6", "zipvl+:tau=0.6,always=last", "fastv:after=1,ratio=0.2"):
        prompt = toy.prompt(77)
        got, oracle = toy.run(load_policy(method), [prompt], steps=5), Oracle(toy.decoder)
        table = toy.decoder.embed_tokens.weight
        oracle.prefill(table[prompt[0]], got.seen.plans)
        assert min(counts[0] for counts in got.prefilled) < 70
        for step, token in enumerate(got.tokens[0]):
            want = oracle.step(table[token][None], 77 + step, [Plan()] * 3)
            torch.testing.assert_close(got.hidden[step + 1].double(), want, rtol=1e-3, atol=1e-3)
        for cache in got.caches:
            assert cache.view(0)[2][-5:, 0].tolist() == [77, 78, 79, 80, 81]
        early = Oracle(toy.decoder)  # and the length of the cache would have been a wrong position
        early.prefill(table[prompt[0]], got.seen.plans)
        wrong = early.step(table[got.tokens[0][0]][None], got.prefilled[-1][0], [Plan()] * 3)
        assert (wrong - got.hidden[1]).abs().max() > 0.01


@torch.inference_mode()
def test_a_sequence_that_stops_leaves_and_the_others_go_on() -> None:
    toy, policy = Toy.build(4, 2), H2O(heavy=6, recent=4)
    prompts = [toy.prompt(n) for n in (20, 33, 9)]

    def start(some: list[tuple[Tensor, Tensor]]) -> Any:
        lengths = [len(ids) for ids, _ in some]
        x = toy.decoder.embed_tokens(torch.cat([ids for ids, _ in some]))
        at = torch.cat([torch.arange(n) for n in lengths])
        pack = Batch.build(lengths, at, at > 2, toy.decoder.config, x.dtype)
        return toy.decoder.prefill(x, pack, policy, attend_sdpa, room=8).caches, pack.notes

    def step(token: int, lengths: list[int], caches: Any, notes: list[Notes]) -> Tensor:
        x = toy.decoder.embed_tokens(torch.full((len(lengths),), token))
        return toy.decoder.decode(x, torch.tensor(lengths), caches, policy, attend_sdpa, notes)

    (together, notes), (alone, one) = start(prompts), start(prompts[2:])
    for token in range(8):
        if token == 3:
            together, notes = [cache.drop([0, 2]) for cache in together], [notes[0], notes[2]]
        live = [20, 33, 9] if token < 3 else [20, 9]
        both = step(token, [n + token for n in live], together, notes)
        single = step(token, [9 + token], alone, one)
        torch.testing.assert_close(both[-1], single[0], rtol=1e-4, atol=1e-5)
    assert [c.spans.lengths for c in together] == [[10, 10]] * 3


def test_eviction_bounds_the_slots_used_and_reuses_them() -> None:
    toy = Toy.build(4, 2)
    for policy, budget in ((StreamingLLM(2, 6), 8), (H2O(4, 4), 8)):
        got = toy.run(policy, [toy.prompt(50), toy.prompt(5)], steps=30)
        for cache in got.caches:
            assert cache.spans.lengths == [budget, budget]
            assert cache.view(0)[2].shape == (budget, 2)
            assert int(cache.view(0)[2].max()) == 50 + 29
            assert (cache.view(0)[2].sort(dim=0).values.diff(dim=0) > 0).all()
            assert cache.spans.capacity[0] == budget + 1  # bytes, not only slots


def test_notes_live_with_the_sequence() -> None:
    """One for all layers and decode steps of a sequence; another sequence, other notes. They know
    the prompt's length and how many tokens may follow."""
    seen: list[tuple] = []

    class Writes(Policy):
        def plan(self, view: View) -> Plan:
            view.notes.setdefault("of", view.length)
            assert (view.notes.prompt, view.notes.new) == (view.length, 2)
            seen.append(("plan", view.layer, view.length, view.notes["of"]))
            return Plan(stream=torch.arange(view.length)) if view.layer == 0 else Plan()

        def step(self, view: StepView) -> Plan:
            notes = view.notes
            notes["steps"] = notes.get("steps", 0) + 1
            seen.append(
                ("step", view.layer, view.length - 1 - (notes["steps"] - 1) // 3, notes["of"])
            )
            return Plan()

    toy = Toy.build(4, 2)
    for _ in range(2):
        toy.run(Writes(), [toy.prompt(12), toy.prompt(5)], steps=2)
    assert len(seen) == 2 * (3 * 2 + 2 * 3 * 2)
    assert all(length == noted for _, _, length, noted in seen)


# --- on a GPU


class Third(Policy):
    """A deterministic plan of every sort: a third attends, heads differ, tokens leave."""

    def plan(self, view: View) -> Plan:
        every = torch.arange(view.length, device=view.k.device)
        third = every[every % 3 == (view.length - 1) % 3]
        heads = torch.stack([every[i : view.length - 8 + i] for i in range(len(view.k))])
        return (
            Plan(attend=third, cache=third),
            Plan(cache=heads, fill="previous", attend=third),
            Plan(stream=third),
        )[view.layer % 3]


def gpu_inputs(model: Decoder, lengths: list[int]) -> tuple[Tensor, Batch]:
    rng = torch.Generator().manual_seed(1)
    dtype = model.norm.weight.dtype
    x = torch.randn(sum(lengths), model.config.hidden_size, generator=rng).to("cuda", dtype)
    at = torch.cat([torch.arange(n) for n in lengths]).cuda()
    return x, Batch.build(lengths, at, at % 7 > 0, model.config, dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@torch.inference_mode()
def gpu_run(backend: str, dtype: torch.dtype, policy: Policy, lengths: list[int]) -> list[Tensor]:
    """Hidden states of a prefill and of 12 decode steps with given tokens."""
    model = Toy.build(4, 2, seed=2).decoder.to("cuda", dtype)
    x, pack = gpu_inputs(model, lengths)
    out = model.prefill(x, pack, policy, BACKENDS[backend], room=12)
    hidden = [out.hidden]
    for step in range(12):
        new = torch.randn(len(lengths), 32, generator=torch.Generator().manual_seed(step))
        at = torch.tensor(lengths, device="cuda") + step
        args = (new.to("cuda", dtype), at, out.caches, policy, BACKENDS[backend])
        hidden.append(model.decode(*args))
    return hidden


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Policy(), Third(), StreamingLLM(2, 40)])
@pytest.mark.parametrize("lengths", [[130, 257, 64], [1, 128, 129, 2], [500]])
def test_flash_equals_sdpa_in_prefill_and_decode(policy: Policy, lengths: list[int]) -> None:
    """bfloat16 through both kernels: varlen prefill, then decoding in a cache with room."""
    if isinstance(policy, Third):
        lengths = [n + 40 for n in lengths]
    want = gpu_run("sdpa", torch.bfloat16, policy, lengths)
    got = gpu_run("torch-flash", torch.bfloat16, policy, lengths)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert relative(g, w) < 0.06


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Policy(), Third()])
def test_bfloat16_is_close_to_float32(policy: Policy) -> None:
    """The toy's bfloat16 error on a CPU is 0.025."""
    want = gpu_run("sdpa", torch.float32, policy, [130, 257])
    got = gpu_run("torch-flash", torch.bfloat16, policy, [130, 257])
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 0.08


@pytest.mark.gpu
def test_peak_memory_falls_with_the_ratio() -> None:
    """32k tokens, a shape with a heavy cache: its bytes and the peak follow the ratio."""
    config = TextConfig("qwen2", 64, 512, 1024, 8, 8, 8, 64, 1e-6, 1e6, qkv_bias=True)
    model = Decoder(config).to("cuda", torch.bfloat16).eval()
    peaks, sizes = [], []
    for ratio in (1.0, 0.5, 0.1):
        x, pack = gpu_inputs(model, [32768])
        pack = replace(pack, is_visual=torch.ones_like(pack.is_visual))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            policy = load_policy("fixed", ratio=ratio)
            out = model.prefill(x, pack, policy, BACKENDS["torch-flash"], 16, chunk=4096)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        sizes.append(sum(c.nbytes for c in out.caches))
        del out
    dense = 8 * (32768 + 16) * 2 * 8 * 64 * 2
    assert sizes[0] == dense
    assert sizes[1] < 0.51 * dense
    assert sizes[2] < 0.11 * dense
    assert peaks[0] - peaks[1] > 0.3 * dense
    assert peaks[1] - peaks[2] > 0.2 * dense
