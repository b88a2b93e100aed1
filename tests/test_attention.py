"""The attention layer and its kernels against dense float64 arithmetic with explicit masks."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zipvl import Plan, Policy, StepView, UsageError, View, load_policy
from zipvl.engine.stats import Recorder
from zipvl.model import attention, backends
from zipvl.model.attention import probe_mass
from zipvl.model.backends import BACKENDS
from zipvl.model.batch import Batch, Spans
from zipvl.model.cache import store_as
from zipvl.model.decoder import Prefilled, chunked
from zipvl.model.kernels import attend_kept, attend_sdpa, attend_step
from zipvl.policy import Notes
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Toy

ROOT = Path(__file__).parent.parent
HERE = [  # (backend, device, dtype) that run on this machine
    (name, torch.device(device), dtype)
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    for dtype in (torch.float32, torch.bfloat16)
    for name in BACKENDS
    if backends.usable(name, torch.device(device), dtype, 16)
]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [m, H, D], k, v [n, G, D], mask [m, n] -> float64 [m, H, D]."""
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = torch.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1])
    probs = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("hmn,nhd->mhd", probs, v)


def lower_right(rows: int, slots: int) -> Tensor:
    """[rows, slots]: the last row sees all, the row before one less."""
    i, j = torch.arange(rows)[:, None], torch.arange(slots)[None]
    return j - slots <= i - rows


# --- kernels


@pytest.mark.parametrize(("backend", "device", "dtype"), HERE)
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("room", [0, 5])
def test_backends_equal_the_reference(
    backend: str, device: torch.device, dtype: torch.dtype, H: int, G: int, room: int
) -> None:
    """Packed sequences of 1, 2, 127, 128, 129 slots, as prefill and as the last few or one row."""
    lengths = [1, 2, 127, 128, 129, 3]
    for rows in (lengths, [1] * 6, [1, 2, 9, 128, 1, 2]):
        q_spans, k_spans = Spans(rows, device), Spans(lengths, device, room)
        torch.manual_seed(len(rows) + H + room)
        q = torch.randn(q_spans.total, H, 16).to(device, dtype)
        k, v = torch.randn(2, k_spans.total, G, 16).to(device, dtype)
        unused = torch.ones(k_spans.total, dtype=torch.bool)
        for at in k_spans.slices():
            unused[at] = False
        k[unused], v[unused] = 30.0, 99.0  # nobody may see the free places
        got = BACKENDS[backend](q, k, v, q_spans, k_spans)
        assert got.shape == q.shape
        for a, b in zip(q_spans.slices(), k_spans.slices(), strict=True):
            mask = lower_right(a.stop - a.start, b.stop - b.start)
            want = reference(q[a], k[b], v[b], mask)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(got[a].double().cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [33, 1, 5])
@pytest.mark.parametrize("room", [0, 4])
@pytest.mark.parametrize("shrunk", [False, True])
def test_equal_lengths_take_one_call_and_agree(rows: int, room: int, shrunk: bool) -> None:
    """Also when eviction made the lengths equal, or their places differ."""
    q_spans, k_spans = Spans([rows] * 3, "cpu"), Spans([33, 40, 33], "cpu", room)
    if shrunk:
        k_spans.shrink([33, 33, 33])
    else:
        k_spans = Spans([33] * 3, "cpu", room)
    q = torch.randn(3 * rows, 4, 8)
    k, v = torch.randn(2, k_spans.total, 2, 8)
    got = attend_sdpa(q, k, v, q_spans, k_spans)
    for a, b in zip(q_spans.slices(), k_spans.slices(), strict=True):
        want = reference(q[a], k[b], v[b], lower_right(rows, 33))
        torch.testing.assert_close(got[a].double(), want, rtol=1e-5, atol=1e-5)


def step_view(q: Tensor, k: Tensor, v: Tensor) -> StepView:
    """q [H, D], k and v [n, G, D] as the layer hands them to step()."""
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    return StepView(0, 1, q, k, v, torch.arange(k.shape[1]).expand(len(k), -1), 0, Notes(1))


def test_one_row_gives_its_probabilities() -> None:
    q, k, v = torch.randn(6, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    view = step_view(q, k, v)
    assert not view.mass_known
    out, mass = attend_step(view, None), view.mass()
    assert view.mass_known
    want = reference(q[None], k, v, lower_right(1, 40))[0]
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    assert mass.shape == (6, 40)
    probs = mass.unflatten(0, (2, 3))
    torch.testing.assert_close(view.by_group(mass), probs.mean(1))
    want = torch.einsum("ghn,ngd->ghd", probs, v).flatten(0, 1)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(mass.sum(-1), torch.ones(6))


@pytest.mark.parametrize("heads", [False, True])
def test_a_step_may_read_some_slots_only(heads: bool) -> None:
    q, k, v = torch.randn(6, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    slots = torch.stack([torch.randperm(40)[:7].sort().values for _ in range(2)])
    if not heads:
        slots = slots[0]
    got = attend_step(step_view(q, k, v), slots)
    for group, mine in enumerate(slots if heads else (slots, slots)):
        some = k[mine, group, None], v[mine, group, None]
        want = reference(q[None, 3 * group : 3 * group + 3], *some, lower_right(1, 7))[0]
        mine = got[3 * group : 3 * group + 3].double()
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 512])
@pytest.mark.parametrize("first", [0, 5])
def test_all_queries_over_kept_keys(block: int, first: int) -> None:
    """Rows before the first kept token see nothing and get zeros."""
    T = 50
    kept = torch.arange(first, T, 3)
    q, k, v = torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)
    got = attend_kept(q, k[kept], v[kept], kept, block)
    want = reference(q, k[kept], v[kept], kept[None] <= torch.arange(T)[:, None])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert (got[:first] == 0).all()
    assert (got[first:] != 0).any(-1).all()


def test_a_backend_that_cannot_run_is_one_sentence() -> None:
    for name, words in (("nope", "unknown attention backend"), ("torch-flash", "--attn auto")):
        with pytest.raises(UsageError, match=words):
            backends.pick(name, torch.device("cpu"), torch.float32, 16)
    assert backends.pick("auto", torch.device("cpu"), torch.float32, 16) == ("sdpa", attend_sdpa)


# --- scores


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 70), st.integers(0, 10**6), st.sampled_from([1, 2, 4]))
def test_probe_mass_is_the_full_softmax_of_its_rows(T: int, P: int, seed: int, G: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(T, 4, 8, generator=rng) * 3, torch.randn(T, G, 8, generator=rng)
    rows = torch.randperm(T, generator=rng)[:P].sort().values
    logits = torch.einsum("thd,nhd->htn", q.double(), k.double().repeat_interleave(4 // G, 1))
    full = (logits / 8**0.5).masked_fill(~lower_right(T, T), -torch.inf).softmax(-1)  # [H, T, T]
    want = full[:, rows].sum(1)
    for block in (1, 3, len(rows), 1000):  # divides P, does not, all, more than all
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "SCORE_BYTES", block * 4 * (4 // G) * T)
            got = probe_mass(q[rows], k, rows)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(got.sum(1), torch.tensor(float(len(rows))))
    view = View(0, 1, k.transpose(0, 1), torch.arange(T), torch.ones(T) > 0, Notes(T), *[None] * 4)
    assert view.seen(rows).tolist() == [sum(r >= j for r in rows.tolist()) for j in range(T)]


def test_probe_mass_does_not_round_its_logits() -> None:
    """bfloat16 queries and keys: products and softmax in float32, whatever the model's dtype."""
    q, k = torch.randn(9, 4, 16).bfloat16() * 4, torch.randn(60, 2, 16).bfloat16()
    rows = torch.arange(51, 60)
    got, want = probe_mass(q, k, rows), probe_mass(q.double(), k.double(), rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- the layer


class Fixed(Policy):
    """Keeps given tokens: one index tensor or None per sequence, by its length."""

    def __init__(self, plans: dict[int, Plan]):
        self.plans = plans

    def plan(self, view: View) -> Plan:
        return self.plans[view.length]


def layer_inputs(toy: Toy, lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple:
    config = toy.decoder.config
    x = torch.randn(sum(lengths), config.hidden_size, dtype=dtype)
    at = torch.cat([torch.arange(n) for n in lengths])
    return x, Batch.build(lengths, at, at % 3 > 0, config, dtype)


def prefill(
    layer: torch.nn.Module, x: Tensor, batch: Batch, policy: Policy, room: int | None
) -> tuple:
    """One layer: its output, its cache, and what it did."""
    watch = Recorder(x.device, layer.config)
    store = None if room is None else store_as(policy.storage, room)
    out, plans, cache = layer.prefill(x, batch, policy, attend_sdpa, store, watch)
    watch.layer(batch.spans.lengths, plans, batch.spans.lengths, False)
    return out, cache, watch.counted(Prefilled(out, batch, [cache] if cache else [])).layers[0]


def plain(layer: torch.nn.Module, x: Tensor, plan: Plan) -> Tensor:
    """One layer of one sequence, the paper's way: project everything, full mask, zero or fill."""
    oracle = Oracle.__new__(Oracle)
    oracle.config = layer.config
    w = {f"self_attn.{n}": p.detach().double() for n, p in layer.named_parameters()}
    w["input_layernorm.weight"] = torch.ones(x.shape[1], dtype=torch.float64)
    oracle.norm = lambda x, weight: x
    q, k, v = oracle.project(w, x.double(), torch.arange(len(x)))
    keep = torch.zeros(len(x), dtype=torch.bool)
    keep[slice(None) if plan.attend is None else plan.attend] = True
    mask = torch.ones(len(x), len(x), dtype=torch.bool).tril() & keep
    out = oracle.attend(q, k, v, mask.expand(q.shape[1], -1, -1))
    if plan.fill == "zero":
        out[~keep] = 0
    if plan.fill == "previous":
        kept = keep.nonzero()[:, 0].tolist()
        for t in range(len(x)):
            before = [j for j in kept if j <= t]
            out[t] = out[before[-1]] if before else 0
    return out @ w["self_attn.o_proj.weight"].T


@pytest.mark.parametrize(("H", "G"), [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("fill", ["zero", "previous", "own"])
def test_sparse_prefill_is_dense_attention_under_the_kept_mask(H: int, G: int, fill: str) -> None:
    """A packed batch whose sequences keep different numbers of tokens, one of them all."""
    toy, lengths = Toy.build(H, G, seed=H + G), [1, 17, 40, 41]
    plans = {
        1: Plan(attend=torch.tensor([0]), cache=torch.tensor([0]), fill=fill),
        17: Plan(attend=torch.tensor([2, 3, 11]), cache=torch.tensor([1, 3, 16]), fill=fill),
        40: Plan(),
        41: Plan(attend=torch.arange(5, 41, 2), fill=fill),
    }
    x, pack = layer_inputs(toy, lengths)
    layer = toy.decoder.layers[1].self_attn
    with torch.no_grad():
        for room in (None, 3):
            out, cache, stats = prefill(layer, x, pack, Fixed(plans), room)
            for at, n in zip(pack.spans.slices(), lengths, strict=True):
                want = plain(layer, x[at], plans[n])
                torch.testing.assert_close(out[at].double(), want, rtol=1e-4, atol=1e-5)
            assert stats.attended == [1, 3, 40, 18]
            rows = {"own": [1, 17, 40, 41]}.get(fill, [1, 3, 40, 18])
            assert stats.pairs == [a * r for a, r in zip([1, 3, 40, 18], rows, strict=True)]
            assert stats.cached == ([1, 3, 40, 41] if room else [0] * 4)
    assert cache.view(1)[2][:, 0].tolist() == [1, 3, 16]


def test_mixed_fills_in_one_batch() -> None:
    toy, lengths = Toy.build(4, 2), [20, 21, 22]
    plans = {
        n: Plan(attend=torch.arange(3, n, 4), fill=f)
        for n, f in zip(lengths, ("zero", "previous", "own"), strict=True)
    }
    x, pack = layer_inputs(toy, lengths)
    layer = toy.decoder.layers[0].self_attn
    with torch.no_grad():
        out = prefill(layer, x, pack, Fixed(plans), None)[0]
    for at, n in zip(pack.spans.slices(), lengths, strict=True):
        want = plain(layer, x[at], plans[n])
        torch.testing.assert_close(out[at].double(), want, rtol=1e-4, atol=1e-5)


def test_work_only_where_it_counts() -> None:
    """q and o are computed for the rows somebody reads; v for these, or for all rows where a cache
    holds others."""
    toy, lengths = Toy.build(4, 2), [30, 50]
    four = torch.arange(4)
    plans = {
        30: Plan(attend=four, cache=four),
        50: Plan(attend=torch.arange(9), cache=torch.arange(20, 26)),
    }
    layer, rows = toy.decoder.layers[0].self_attn, {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer, name).register_forward_hook(
            lambda _m, args, _o, name=name: rows.__setitem__(name, len(args[0]))
        )
    x, pack = layer_inputs(toy, lengths)
    with torch.no_grad():
        prefill(layer, x, pack, Fixed(plans), 1)
        assert rows == {"q_proj": 4 + 9, "k_proj": 80, "v_proj": 80, "o_proj": 4 + 9}
        kept = torch.arange(9)
        prefill(layer, x, pack, Fixed(plans | {50: Plan(attend=kept, cache=kept)}), 1)
    assert rows == {"q_proj": 4 + 9, "k_proj": 80, "v_proj": 4 + 9, "o_proj": 4 + 9}


def test_a_method_that_reads_q_and_v_gets_all_of_them() -> None:
    toy, seen = Toy.build(4, 2), []

    class Reads(Policy):
        def plan(self, view: View) -> Plan:
            seen.append((view.q, view.k, view.v, view.length))
            return Plan()

    x, pack = layer_inputs(toy, [12, 7])
    layer = toy.decoder.layers[2].self_attn
    with torch.no_grad():
        prefill(layer, x, pack, Reads(), None)
        for at, (q, k, v, n) in zip(pack.spans.slices(), seen, strict=True):
            o = reference(*(t.transpose(0, 1) for t in (q, k, v)), lower_right(n, n))
            want = plain(layer, x[at], Plan())
            got = o.flatten(1) @ layer.o_proj.weight.double().T
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dropped_streams_and_per_head_caches() -> None:
    """Tokens that leave the stream are gone for later layers; positions stay the original ones."""
    toy = Toy.build(4, 2, seed=9)
    drop = torch.tensor([0, 4, 5, 9, 10, 15])
    heads = torch.tensor([[0, 3, 5], [1, 2, 4]])

    class Drops(Policy):
        def plan(self, view: View) -> Plan:
            if view.layer == 0:
                return Plan(attend=torch.arange(2, 16), stream=drop)
            assert view.positions.tolist() == drop.tolist()
            return Plan(cache=heads) if view.layer == 1 else Plan()

    got = toy.run(Drops(), [toy.prompt(16)])
    ids = toy.prompt(16)[0]
    want = Oracle(toy.decoder).prefill(toy.decoder.embed_tokens.weight[ids], got.seen.plans)
    torch.testing.assert_close(got.hidden[0].double(), want, rtol=1e-3, atol=1e-3)
    positions = got.caches[1].view(0)[2][:3]
    assert positions.T.tolist() == drop[heads].tolist()
    assert got.prefilled == [[16], [3], [6]]


# --- chunks, memory, gradients


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 999))
def test_chunks_of_mlp_and_norms_change_nothing(T: int, chunk: int, seed: int) -> None:
    toy = Toy.build(4, 2)
    block = toy.decoder.layers[0]
    x = torch.randn(T, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for part in (block.input_layernorm, toy.decoder.norm):
            torch.testing.assert_close(chunked(part, chunk, x), part(x), rtol=1e-5, atol=1e-5)
        h, both = x.flip(0), block.feed_forward(x, x.flip(0))  # whose memory holds the result
        torch.testing.assert_close(chunked(block.feed_forward, chunk, x, h), both)


def test_chunks_change_nothing_in_a_whole_prefill() -> None:
    toy = Toy.build(4, 2)
    x, pack = layer_inputs(toy, [70, 33])
    policy, runs = load_policy("zipvl:tau=0.8,always=last"), []
    with torch.no_grad():
        for chunk in (None, 13):
            watch = Recorder(x.device, toy.decoder.config)
            fresh = replace(pack, notes=[Notes(70), Notes(33)])
            out = toy.decoder.prefill(x, fresh, policy, attend_sdpa, 2, chunk, watch)
            runs.append(watch.counted(out))
    whole, parts = runs
    torch.testing.assert_close(whole.hidden, parts.hidden, rtol=1e-5, atol=1e-5)
    assert [s.attended for s in whole.layers] == [s.attended for s in parts.layers]


class Largest(TorchDispatchMode):
    """The most bytes any one tensor made inside the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize(
    "method",
    ["zipvl:tau=0.9,always=last", "zipvl:tau=0.9,always=last,fill=own", "h2o", "snapkv", "fastv"],
)
def test_no_tensor_grows_with_the_square_of_the_length(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without SCORE_BYTES in the way, twice the tokens make no tensor more than twice as large."""
    monkeypatch.setattr(attention, "SCORE_BYTES", 1 << 18)
    toy, most = Toy.build(4, 2, layers=2), []
    for T in (1024, 2048):
        x, pack = layer_inputs(toy, [T])
        with torch.inference_mode(), Largest() as largest:
            toy.decoder.prefill(x, pack, load_policy(method), attend_sdpa, 1)
        most.append(largest.bytes)
        assert largest.bytes < T * T / 2  # bool [T, T] would be T * T
    assert most[1] <= 2.1 * most[0]


@pytest.mark.slow
def test_peak_memory_of_a_long_prefill_is_bounded() -> None:
    """A fresh process: 24k tokens fit where one float32 [T, T] tensor would be 2.3 GB."""
    code = (
        "import resource, torch\n"
        "from zipvl import load_policy\n"
        "from zipvl.testing.toy import Toy\n"
        "toy = Toy.build(2, 1, layers=1); run = lambda n: toy.run(\n"
        "    load_policy('zipvl', tau=0.3, always='last', recent=8, random=8), [toy.prompt(n)], 1)\n"
        "run(500); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); run(24000); print((peak() - before) >> 10)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert int(out.stdout) < 300  # MiB; hidden states, keys and scores of 24k tokens are about 60


@pytest.mark.parametrize("lengths", [[9, 9], [5, 12, 1]])
def test_gradients_flow_through_the_dense_model(lengths: list[int]) -> None:
    toy = Toy.build(4, 2)
    x, _ = layer_inputs(toy, lengths)
    x.requires_grad_()
    toy.decoder.train().forward(x, lengths).square().mean().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()
    for name, p in toy.decoder.named_parameters():
        if name == "embed_tokens.weight":
            continue
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad != 0).any(), name


def test_forward_is_the_dense_oracle_in_a_batch() -> None:
    toy, lengths = Toy.build(4, 1, seed=4), [11, 30, 11]
    x, pack = layer_inputs(toy, lengths)
    with torch.no_grad():
        got = toy.decoder.forward(x, lengths)
    for at in pack.spans.slices():
        want = Oracle(toy.decoder).prefill(x[at], [Plan()] * 3)
        torch.testing.assert_close(got[at].double(), want, rtol=1e-3, atol=1e-4)
