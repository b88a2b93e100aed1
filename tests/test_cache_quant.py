"""The quantised cache: what it stores, in how many bytes, and what decoding with it is worth."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import zipvl
from tests.methods.untrained import NEEDS
from zipvl.errors import UsageError
from zipvl.model.batch import Batch, Spans
from zipvl.model.cache import Kept, LayerCache
from zipvl.model.cache_quant import KVFormat, QuantCache, as_bits, kivi, zipcache
from zipvl.model.decoder import Decoder
from zipvl.model.kernels import attend_sdpa
from zipvl.policies import METHODS, load_policy
from zipvl.policies.zipcache import ZipCache
from zipvl.policies.zipvl import ZipVLQuant
from zipvl.policy import Plan, StepView, View
from zipvl.testing.toy import Toy

FAMILIES = ["llava", "llava_next_mistral", "llava_onevision", *(
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("llava_next", "llava_next_video", "llava_onevision_tied"))]  # fmt: skip
ONE = Spans([1], "cpu")
QUANTISING = ["zipvl-quant", "zipvl:kv_bits=4", "fixed:ratio=0.5,kv_bits=4/2", "zipcache",
              "kivi:group=4,residual=8"]  # fmt: skip


def random_kv(n: int, G: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    loud = 1 + 4 * torch.rand(G, D, generator=chance)
    k, v = (torch.randn(n, G, D, generator=chance) * loud for _ in range(2))
    return k, v


def build(storage: KVFormat, lengths: list[int], precise: list[Tensor | None], room: int,
          G: int = 2, D: int = 12) -> tuple[QuantCache, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """A cache of random prompts, and what they were."""
    kv = [random_kv(n, G, D, seed=n) for n in lengths]
    cache = storage.store(room)(
        [Kept(k, v, torch.arange(len(k)), p) for (k, v), p in zip(kv, precise, strict=True)]
    )
    assert isinstance(cache, QuantCache)
    return cache, kv


def by_position(cache: QuantCache, b: int) -> tuple[Tensor, Tensor]:
    k, v, at = cache.view(b)
    order = at[:, 0].argsort()
    assert at[order, 0].tolist() == list(range(len(at)))
    return k[order].clone(), v[order].clone()


def codes(x: np.ndarray, bits: int, axes: tuple[int, ...]) -> np.ndarray:
    """There and back, with a minimum and maximum over `axes` of x, float64."""
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    step = (high - low) / (2**bits - 1)
    step[step == 0] = 1
    return np.rint((x - low) / step) * step + low


# --- what is stored


def expect_zipcache(x: np.ndarray, sets: list[tuple[int, np.ndarray]], values: bool) -> np.ndarray:
    """One block: keys per channel within each set, values per token after the block's scale."""
    out = np.full_like(x, np.nan)
    c = np.sqrt(np.abs(x).max(0)) if values else np.ones_like(x[0])
    for bits, index in sets:
        if len(index):
            axes = (1, 2) if values else (0,)
            out[index] = codes(x[index] / c, bits, axes) * c
    return out


def nearly_all(got: Tensor, want: np.ndarray) -> None:
    """Equal but for the odd element on the edge of two codes."""
    same = np.isclose(got.double().numpy(), want, rtol=1e-4, atol=1e-4)
    assert same.mean() > 0.995


def test_prompt_and_new_tokens_are_quantised_by_blocks_once() -> None:
    """Against numpy: the prompt in two sets, then each 5 new tokens in two sets, then a tail."""
    n, interval, new = 37, 5, 13
    chance = np.random.default_rng(0)
    precise = torch.arange(n)[::3]
    cache, [(k, v)] = build(zipcache((4, 2), interval), [n], [precise], room=20)
    later, asked = random_kv(new, 2, 12, seed=99), []

    picks = []
    for t in range(new):
        cache.append(later[0][t : t + 1], later[1][t : t + 1], torch.tensor([n + t]), ONE)
        plan, count = Plan(), cache.due(0)
        if count:
            asked.append((t, count))
            picks.append(torch.from_numpy(np.sort(chance.permutation(count)[:2])))
            plan = Plan(precise=picks[-1])
        cache.apply([plan])
        assert cache.due(0) == 0
    assert asked == [(4, 5), (9, 5)]
    for side, (x, more) in enumerate(zip((k, v), later, strict=True)):
        want = []
        rest = np.setdiff1d(np.arange(n), precise.numpy())
        sets = [(4, precise.numpy()), (2, rest)]
        want.append(expect_zipcache(x.double().numpy(), sets, values=side == 1))
        for i, pick in enumerate(picks):
            block = more[5 * i : 5 * i + 5].double().numpy()
            rest = np.setdiff1d(np.arange(5), pick.numpy())
            want.append(expect_zipcache(block, [(4, pick.numpy()), (2, rest)], side == 1))
        want.append(more[10:].double().numpy())
        nearly_all(by_position(cache, 0)[side], np.concatenate(want))


def test_kivi_residuals_are_the_published_ones() -> None:
    """Keys: whole blocks of R leave; values: all but the newest R are quantised at every step."""
    group, R, D = 4, 8, 12
    for n in (1, 7, 8, 9, 21):
        cache, [(k, v)] = build(kivi(2, group, R), [n], [None], room=30)
        later = random_kv(20, 2, D, seed=5)
        for t in range(20):
            cache.append(later[0][t : t + 1], later[1][t : t + 1], torch.tensor([n + t]), ONE)
            cache.apply([Plan(precise=torch.tensor([0]))])  # one bit width asks nobody
            keys, values = (
                torch.cat(pair)[: n + t + 1].double().numpy()
                for pair in ((k, later[0]), (v, later[1]))
            )
            done = (n + t + 1) // R * R
            for a in range(0, done, group):
                keys[a : a + group] = codes(keys[a : a + group], 2, (0,))
            old = max(0, n + t + 1 - R)
            for d in range(0, D, group):
                values[:old, :, d : d + group] = codes(values[:old, :, d : d + group], 2, (2,))
            got = by_position(cache, 0)
            nearly_all(got[0], keys)
            nearly_all(got[1], values)
            assert cache.stored[0].keys.waiting == (n + t + 1) % R
            assert cache.stored[0].values.waiting == min(n + t + 1, R)
            assert len(cache.stored[0].keys.parts) <= 1  # blocks follow in the same tensors


def test_what_is_quantised_is_never_quantised_again() -> None:
    cache, _ = build(zipcache((4, 2), 3), [40], [torch.arange(10)], room=60)
    before, later = by_position(cache, 0), random_kv(60, 2, 12, seed=1)
    for t in range(60):
        cache.append(later[0][t : t + 1], later[1][t : t + 1], torch.tensor([40 + t]), ONE)
        cache.apply([Plan(precise=torch.tensor([0, 2])) if cache.due(0) else Plan()])
    for one, other in zip(before, by_position(cache, 0), strict=True):
        torch.testing.assert_close(other[:40], one, rtol=0, atol=0)


def test_sequences_of_a_batch_know_nothing_of_each_other() -> None:
    lengths, storage = [5, 31, 1], zipcache((4, 2), 2)
    split = [torch.arange(0, n, 2) for n in lengths]
    batch, _ = build(storage, lengths, list(split), room=9)
    alone = [build(storage, [n], [s], room=9)[0] for n, s in zip(lengths, split, strict=True)]
    later = random_kv(3 * 7, 2, 12, seed=3)
    for t in range(7):
        if t == 4:  # the middle one has finished
            batch, alone = batch.drop([0, 2]), [alone[0], alone[2]]
            lengths = [5, 1]
        some = [t * 3 + b for b in range(len(alone))]
        at = torch.tensor([n + t for n in lengths])
        batch.append(later[0][some], later[1][some], at, Spans([1] * len(some), "cpu"))
        batch.apply([Plan(precise=torch.tensor([1]))] * len(alone))
        for b, cache in enumerate(alone):
            i = some[b]
            cache.append(later[0][i : i + 1], later[1][i : i + 1], at[b : b + 1], ONE)
            cache.apply([Plan(precise=torch.tensor([1]))])
    assert batch.spans.lengths == [12, 8]
    for b, cache in enumerate(alone):
        for one, other in zip(batch.view(b), cache.view(0), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert batch.sequence_bytes()[b] == cache.nbytes


def test_one_scratch_buffer_serves_all_layers() -> None:
    toy = Toy.build(4, 2, layers=3)
    got = toy.run(load_policy("zipvl-quant", interval=2), [toy.prompt(70), toy.prompt(9)])
    scratches = {id(cache.scratch): cache.scratch for cache in got.caches}
    (scratch,) = scratches.values()
    slots = max(cache.spans.total for cache in got.caches)
    assert (
        scratch.nbytes == 2 * slots * 2 * 8 * 4
    )  # k and v of the largest layer, G 2, D 8, float32
    other = toy.run(load_policy("zipvl-quant"), [toy.prompt(70)])
    assert other.caches[0].scratch is not scratch


def test_a_quantised_cache_says_that_it_cannot_evict() -> None:
    cache, _ = build(zipcache((4,), 3), [9], [None], room=2)
    for evict in (lambda: cache.apply([Plan(leave=torch.arange(3))]),
                  lambda: cache.trim([torch.arange(3)])):  # fmt: skip
        with pytest.raises(UsageError, match="leave out its kv_bits"):
            evict()
    assert cache.trim([None]) is cache


# --- bytes


def formula(n: int, top: int, room: int, G: int, D: int, interval: int) -> int:
    """ZipVL v1 at 4 and 2 bits in bfloat16, written out once more."""
    tail = 2 * min(interval, room) * G * D * 2
    packed = 2 * (top * G * ((D + 1) // 2) + (n - top) * G * ((D + 3) // 4))
    keys = 2 * (2 * G * D) * ((top > 0) + (n > top))  # minimum and step of each channel and set
    values = 2 * (2 * n + G * D)  # minimum and step of each token, a scale a channel
    return tail + packed + keys + values


LENGTHS = [*range(1, 34), 63, 64, 65, 100, 127, 128, 129, 511, 1000, 4097, 10_000]


def test_storage_bytes_are_the_formula() -> None:
    chance = np.random.default_rng(1)
    for n in LENGTHS:
        G, D, room = (
            int(chance.integers(1, 4)),
            int(chance.integers(1, 20)),
            int(chance.integers(7)),
        )
        top = int(chance.integers(1, n + 1))
        k = torch.randn(n, G, D, dtype=torch.bfloat16)
        some = torch.randperm(n)[:top].sort().values
        for storage in (
            zipcache((4, 2), 5),
            zipcache((8,), 5),
            kivi(2, 4, 8),
            kivi(4, 32, 64),
        ):
            cache = storage.store(room)([Kept(k, k, torch.arange(n), some)])
            assert cache.nbytes == storage.nbytes(top, n - top, room, G, D, 2)
            assert cache.sequence_bytes() == [cache.nbytes]
        full = LayerCache([Kept(k, k, torch.arange(n))], room)
        assert full.nbytes == sum(full.sequence_bytes()) == 2 * (n + room) * G * D * 2
        assert zipcache((4, 2), 5).nbytes(top, n - top, room, G, D, 2) == formula(
            n, top, room, G, D, 5
        )


def tensors_in(thing: object) -> list[Tensor]:
    """All tensors that an object reaches."""
    if isinstance(thing, Tensor):
        return [thing]
    parts = thing if isinstance(thing, list) else getattr(thing, "__dict__", {}).values()
    return [t for part in parts for t in tensors_in(part)]


def test_bytes_are_those_of_every_tensor_the_cache_holds() -> None:
    """Found by walking the objects, so that nothing is forgotten; positions are not counted."""
    for storage in (zipcache((4, 2), 5), kivi(2, 4, 8)):
        cache, _ = build(storage, [37, 12], [torch.arange(9), torch.arange(3)], room=11)
        held = [t for one in cache.stored for t in tensors_in([one.keys, one.values])]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        assert cache.nbytes == sum(found.values())
        more = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors_in([cache.stored, cache.spans]) if t.untyped_storage().nbytes()
                and t.untyped_storage().data_ptr() not in found}  # fmt: skip
        assert sorted(more.values()) == sorted([(3 + 2) * 4, (37 + 11) * 4, (12 + 11) * 4])


@pytest.mark.parametrize(("G", "D"), [(4, 128), (8, 128), (40, 128)])
def test_compression_at_the_papers_ratio(G: int, D: int) -> None:
    """Ratio 28.6 % in the paper: 6.18x. LongVA-7B, LLaMA3-8B and LLaVA-NeXT-13B heads."""
    n = 4096
    top = round(0.286 * n)
    storage, x = zipcache((4, 2), 100), torch.randn(n, G, D, dtype=torch.bfloat16)
    cache = storage.store(0)([Kept(x, x, torch.arange(n), torch.arange(top))])
    dense = 2 * n * G * D * 2
    longer = [2 * m * G * D * 2 / storage.nbytes(round(0.286 * m), m - round(0.286 * m), 0, G, D, 2)
              for m in (4096, 16384, 131072)]  # fmt: skip
    print(f"G {G}: {dense / cache.nbytes:.3f}x at 4096; by formula {[round(x, 3) for x in longer]}")
    assert dense / cache.nbytes >= 6.0
    assert longer == sorted(longer)
    assert longer[0] == dense / cache.nbytes


# --- decoding


@torch.inference_mode()
def forced(text: Decoder, x: Tensor, policy: zipvl.Policy, new: Tensor) -> Tensor:
    """Hidden states [1 + steps, C] before and after each of the tokens `new` that are put after the
    embeddings x [T, C] of a prompt."""
    n = len(x)
    pack = Batch.build([n], torch.arange(n), torch.arange(n) > 9, text.config, x.dtype)
    out = text.prefill(x, pack, policy, attend_sdpa, room=len(new))
    hidden = [out.hidden[-1:]]
    for step, token in enumerate(new):
        at = torch.tensor([n + step])
        hidden.append(
            text.decode(
                text.embed_tokens(token[None]), at, out.caches, policy, attend_sdpa, pack.notes
            )
        )
    return torch.cat(hidden)


# The seed of a picture on which full precision decides each of its 64 tokens clearly: random weights
# give near ties on most pictures, where the rounding of 8 bits may tip the choice.
CLEAR = {"llava": 21, "llava_next": 22, "llava_next_mistral": 30, "llava_next_video": 56,
         "llava_onevision": 18, "llava_onevision_tied": 56}  # fmt: skip
EIGHT_BITS = ("zipvl-quant:tau=1,kv_bits=8,interval=10", "kivi:kv_bits=8,group=8,residual=16")


def a_picture(seed: int | None) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", FAMILIES)
def test_eight_bits_give_the_same_64_tokens(oracle: Callable, kind: str) -> None:
    engine = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
    inputs = engine.prepare("what is in the picture", images=[a_picture(CLEAR[kind])])
    options = {"max_new_tokens": 64, "ignore_eos": True}
    want = engine.generate(inputs, "dense", **options).tokens
    assert len(want) == 64
    assert len(set(want)) > 4  # no answer of one token over and over
    for method in EIGHT_BITS:
        assert engine.generate(inputs, method, **options).tokens == want


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_eight_bits_tip_only_near_ties(oracle: Callable, kind: str) -> None:
    """On any picture, at 64 positions of the full-precision answer: the same next token, but for
    near ties, and logits that hardly move."""
    engine = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
    inputs = engine.prepare("what is in the picture", images=[a_picture(None)])
    answer = engine.generate(inputs, "dense", max_new_tokens=63, ignore_eos=True)
    model, new = engine.model, torch.tensor(answer.tokens)
    with torch.inference_mode():
        x = model.embed(inputs.input_ids, inputs.is_visual, engine.encode(inputs))
        want = model.logits(forced(model.text, x, zipvl.Policy(), new))
        assert want[:-1].argmax(1).tolist() == answer.tokens
        for method in EIGHT_BITS:
            got = model.logits(forced(model.text, x, load_policy(method), new))
            chosen, best = got.argmax(1), want.max(1).values
            margin = (best - want.gather(1, chosen[:, None])[:, 0]) / want.std(1)
            assert margin.max() < 0.15
            assert (margin == 0).sum() >= 58
            assert ((got - want).norm(dim=1) / want.norm(dim=1)).mean() < 0.02


def test_300_new_tokens_cross_recompressions_without_a_jump() -> None:
    """Error of the logits before and after tokens leave the tail, at 4 and 2 bits."""
    toy = Toy.build(4, 2, seed=8)
    chance = torch.Generator().manual_seed(4)
    prompt, new = (torch.randint(61, (n,), generator=chance) for n in (400, 300))
    x = toy.decoder.embed_tokens(prompt)
    want = forced(toy.decoder, x, zipvl.Policy(), new)[1:] @ toy.head.T
    got = forced(toy.decoder, x, load_policy("zipvl-quant"), new)[1:] @ toy.head.T
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    parts = [error[a : a + 100].mean() for a in (0, 100, 200)]
    assert max(parts) < 0.3
    assert max(parts) < 1.3 * min(parts)
    for edge in (100, 200):  # the step after the 100th token sees it in few bits
        assert error[edge : edge + 20].mean() < 2 * error[edge - 20 : edge].mean()


def test_more_bits_are_nearer() -> None:
    toy, chance = Toy.build(4, 2, seed=9), torch.Generator().manual_seed(5)
    prompt, new = (torch.randint(61, (n,), generator=chance) for n in (300, 12))
    x = toy.decoder.embed_tokens(prompt)
    want = forced(toy.decoder, x, zipvl.Policy(), new)
    policies = [load_policy("kivi", kv_bits=bits, residual=32) for bits in (2, 4, 8)]
    errors = [float((forced(toy.decoder, x, p, new) - want).norm()) for p in policies]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("method", QUANTISING)
def test_batches_streams_and_a_second_run(oracle: Callable, method: str) -> None:
    engine = zipvl.load(oracle("llava_onevision").folder, device="cpu")
    rng = np.random.default_rng(12)
    pictures = [Image.fromarray(rng.integers(0, 256, (s, 80, 3), dtype=np.uint8)) for s in (40, 90)]
    a, b = (engine.prepare(f"picture {i}", images=[p]) for i, p in enumerate(pictures))
    options = {"method": method, "max_new_tokens": 9, "ignore_eos": True}
    first, other, again = (engine.generate(i, **options).tokens for i in (a, b, a))
    assert first == again
    assert [r.tokens for r in engine.generate([a, b], **options)] == [first, other]
    assert [p.token for p in engine.stream(a, **options)][:-1] == first


def test_kept_bytes_of_a_run_are_those_of_its_caches(
    oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = zipvl.load(oracle("llava").folder, device="cpu", dtype="bfloat16")
    picture = Image.fromarray(np.zeros((50, 50, 3), dtype=np.uint8))
    inputs, held = engine.prepare("what", images=[picture]), []
    prefill = engine.prefill

    def spy(*args: object) -> object:
        out = prefill(*args)  # type: ignore[arg-type]
        held.append(sum(cache.nbytes for cache in out.caches))
        return out

    monkeypatch.setattr(engine, "prefill", spy)
    for method in QUANTISING:
        result = engine.generate(inputs, method, max_new_tokens=3)
        assert result.stats.kv_bytes == held[-1] < result.stats.kv_bytes_dense


def test_new_tokens_are_sorted_by_the_newest_query() -> None:
    """By its softmax over all slots, among the tokens of the block only."""
    toy, seen = Toy.build(4, 2, seed=6), []

    class Spy(ZipVLQuant):
        def sort_new(self, view: StepView) -> Plan:
            plan = super().sort_new(view)
            if not view.due:
                assert plan.precise is None
                return plan
            seen.append(view.layer)
            k = view.k.repeat_interleave(2, 0)
            mass = (view.q[:, None] @ k.mT / 8**0.5)[:, 0].softmax(-1)[:, -3:]
            total, order = mass.mean(0), mass.mean(0).sort(descending=True)
            p = next(i for i in range(1, 4) if order.values[:i].sum() >= 0.7 * total.sum() - 1e-7)
            assert plan.precise.tolist() == sorted(order.indices[:p].tolist())
            return plan

    toy.run(Spy(tau=0.7, interval=3), [toy.prompt(20)])
    assert seen == [0, 1, 2]


def test_plans_are_those_of_the_dropping_methods() -> None:
    """v1 stores at more bits what v2 keeps, attends among the same, and drops nothing."""
    toy = Toy.build(4, 2, seed=7)
    for name in ("zipvl", "fixed"):
        drop, mixed, few = (
            toy.run(load_policy(name, kv_bits=bits), [toy.prompt(200)]) for bits in (None, "4/2", 2)
        )
        assert drop.prefilled == few.prefilled
        assert mixed.prefilled == [[200]] * 3
        assert few.bytes < drop.bytes
        one, other = drop.seen.plans[0], mixed.seen.plans[0]
        assert torch.equal(one.attend, other.attend)
        assert torch.equal(one.attend, other.precise)
        assert one.precise is other.cache is None
        for cache, plan in zip(mixed.caches, mixed.seen.plans, strict=True):
            parts = cache.stored[0].keys.parts
            assert [(p.bits, len(p)) for p in parts] == [
                (4, len(plan.precise)), (2, 200 - len(plan.precise)),
            ]  # fmt: skip


def test_zipcache_takes_its_share_by_normalised_scores() -> None:
    toy, plans = Toy.build(4, 2, seed=7), []

    class Spy(ZipCache):
        def plan(self, view: View) -> Plan:
            plans.append(super().plan(view))
            rows = self.probe(view).tolist()
            assert rows == sorted(set(rows))
            assert set(range(190, 200)) <= set(rows)
            assert len(rows) == 20
            mass = view.mass(torch.tensor(rows)).mean(0)
            score = [float(mass[j]) / sum(i >= j for i in rows) for j in range(200)]
            best = sorted(range(200), key=lambda j: -score[j])[:60]
            assert plans[-1].precise.tolist() == sorted(best)
            return plans[-1]

    toy.run(Spy(ratio=0.3), [toy.prompt(200)])
    assert len(plans) == 3


def test_precise_tokens_are_found_among_the_cached_ones() -> None:
    cached, precise = torch.tensor([1, 4, 6, 9]), torch.tensor([4, 9])
    k, at = torch.randn(12, 2, 4), torch.arange(12)

    def slots(plan: Plan) -> Tensor | None:
        return Kept.of(plan, k, k, at, False).precise

    assert slots(Plan(cache=cached, precise=precise)).tolist() == [1, 3]
    assert slots(Plan(precise=precise)).tolist() == [4, 9]
    assert slots(Plan(cache=cached)) is None
    with pytest.raises(UsageError, match="all heads share"):
        Plan(cache=cached.expand(2, -1), precise=precise)


# --- options


def test_bits_are_read() -> None:
    assert [as_bits(x) for x in (None, 4, "8", "4/2", "4,2", " 4 / 2", (8, 8))] == [
        (), (4,), (8,), (4, 2), (4, 2), (4, 2), (8, 8),
    ]  # fmt: skip
    for bad in (3, 0, -4, "", "4/", "2/4", "4/2/2", "x", 4.0):
        with pytest.raises(ValueError, match="give 2, 4 or 8"):
            as_bits(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("zipvl:kv_bits=3", "give 2, 4 or 8"),
        ("zipvl:kv_bits=4,interval=0", "interval is 0"),
        ("zipvl-quant:interval=0", "interval is 0"),
        ("zipcache:interval=0", "interval is 0"),
        ("zipcache:ratio=0", "ratio is 0"),
        ("zipcache:probes=0.6", "probes is 0.6"),
        ("kivi:kv_bits=3", "give 2, 4 or 8"),
        ("kivi:group=0", "group is 0"),
        ("kivi:residual=100", "multiple of the group of 32"),
        ("h2o:kv_bits=4", "no option 'kv_bits'"),
    ],
)
def test_bad_options_are_one_sentence(method: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_policy(method)


def test_methods_without_bits_show_none() -> None:
    assert "kv_bits" not in repr(load_policy("zipvl"))
    assert "kv_bits=(4,)" in repr(load_policy("zipvl", kv_bits=4))
    for name in METHODS:
        copy.deepcopy(
            load_policy(name, **NEEDS.get(name, {}))
        )  # options only: nothing that cannot be copied
