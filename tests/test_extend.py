"""Several tokens over caches at once: equal to one prefill, and to one token after the other."""

import copy
from collections.abc import Callable

import pytest
import torch
from methods.untrained import NEEDS
from test_parity import CASES, KINDS, ask, close
from test_parity import engine as engine
from torch import Tensor

from zipvl.engine.inputs import Inputs
from zipvl.model.batch import Spans
from zipvl.model.cache import Cache, Kept, LayerCache
from zipvl.model.kernels import attend_sdpa
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Notes, Policy
from zipvl.testing.toy import Toy

PROMPTS = [(94, "some"), (9, "none"), (40, "all")]
METHODS_TOO = ["zipvl:tau=0.7,summary=4", "zipvl:kv_bits=4", "zipvl:kv_bits=4/2,interval=3",
               "kivi:group=4,residual=8", "snapkv:budget=20,window=4",
               "h2o:heavy=8,recent=8"]  # fmt: skip


def starts(toy: Toy, policy: Policy, prompts: list, room: int) -> tuple[list[Cache], list[Notes]]:
    """Prompts prefilled, two tokens decoded, and places for `room` more."""
    got = toy.run(policy, prompts, steps=2)
    every = list(range(len(prompts)))
    return [cache.drop(every, room) for cache in got.caches], got.notes


def one_by_one(toy: Toy, policy: Policy, caches: list[Cache], notes: list[Notes],
               ids: Tensor, first: int) -> Tensor:  # fmt: skip
    """Hidden states [n, C] of the lone sequence's tokens `ids` [n] from position `first` on."""
    hidden = []
    for t, token in enumerate(ids):
        x, at = toy.decoder.embed_tokens(token[None]), torch.tensor([first + t])
        hidden.append(toy.decoder.decode(x, at, caches, policy, attend_sdpa, notes))
    return torch.cat(hidden) if hidden else torch.empty(0, toy.head.shape[1])


# of those that differ in the prefill alone, some; extending knows no difference
OFTEN = ("dense", "zipvl", "zipvl-stream", "zipvl-quant", "hired", "fastv", "sgl", "h2o", "snapkv",
         "think", "tidal", "scope", "keyformer", "streaming", "kivi", "zipcache", "lookm",
         "elastic")  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [*METHODS_TOO,
     *(m if m in OFTEN else pytest.param(m, marks=pytest.mark.slow) for m in METHODS)],
)  # fmt: skip
@torch.inference_mode()
def test_extend_is_decoding_one_after_the_other(method: str) -> None:
    """A ragged batch, in two calls, one of which leaves a sequence out."""
    toy = Toy.build(4, 2, seed=1)
    prompts = [toy.prompt(n, visual) for n, visual in PROMPTS]
    policy = load_policy(method, **NEEDS.get(method, {}))
    caches, notes = starts(toy, policy, prompts, 40)
    rng = torch.Generator().manual_seed(7)
    calls = [(7, 0, 12), (1, 5, 3)]
    told = [[torch.randint(61, (n,), generator=rng) for n in lengths] for lengths in calls]
    begins, got = [n.at(n.prompt) + 2 for n in notes], []
    for lengths, ids in zip(calls, told, strict=True):
        places = [torch.arange(s, s + n) for s, n in zip(begins, lengths, strict=True)]
        x = toy.decoder.embed_tokens(torch.cat(ids))
        out = toy.decoder.extend(x, list(lengths), torch.cat(places), caches, policy, attend_sdpa,
                                 notes, chunk=5)  # fmt: skip
        got.append(out.split(list(lengths)))
        begins = [s + n for s, n in zip(begins, lengths, strict=True)]
    for b, prompt in enumerate(prompts):
        alone, note = starts(toy, policy, [prompt], 40)
        ids = torch.cat([some[b] for some in told])
        want = one_by_one(toy, policy, alone, note, ids, note[0].at(note[0].prompt) + 2)
        close(torch.cat([some[b] for some in got]), want, 1e-4)
        for mine, other in zip(caches, alone, strict=True):
            for one, two in zip(mine.view(b), other.view(0), strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_dense_prefill_in_pieces_is_one_prefill(engine: Callable, kind: str) -> None:
    model = engine(kind).model
    inputs = ask(kind, CASES["two"]).prepare(engine(kind))
    whole = engine(kind).logits(inputs)
    cut = int(inputs.is_visual.nonzero()[-1]) + 1
    start = Inputs(inputs.input_ids[:cut], inputs.is_visual[:cut], inputs.media)
    for pieces in ([len(inputs) - cut], [3, 1, len(inputs) - cut - 4]):
        out = engine(kind).prefill([start], Policy(), len(inputs), {})
        hidden, first = [out.hidden], cut
        for n in pieces:
            x = model.text.embed_tokens(inputs.input_ids[first : first + n])
            at = torch.arange(first, first + n)
            attend = engine(kind).attend
            hidden.append(model.text.extend(x, [n], at, out.caches, Policy(), attend))
            first += n
        close(model.logits(torch.cat(hidden)), whole, 1e-4)


def test_caches_without_room_are_told() -> None:
    toy = Toy.build(4, 2)
    got = toy.run(Policy(), [toy.prompt(5)], steps=1)
    x, at = toy.decoder.embed_tokens(torch.tensor([1])), torch.tensor([6])
    with pytest.raises(AssertionError, match="full"):
        toy.decoder.extend(x, [1], at, got.caches, Policy(), attend_sdpa)


def layer(positions: Tensor) -> LayerCache:
    n = len(positions)
    return LayerCache([Kept(torch.rand(n, 2, 3), torch.rand(n, 2, 3), positions)], room=4)


def test_what_is_cut_is_what_came_last() -> None:
    places = torch.tensor([0, 2, 5, 6, 7])
    cache = layer(places)
    before = [t.clone() for t in cache.view(0)]
    assert cache.cut(8)
    assert cache.spans.lengths == [5]
    assert cache.cut(5)
    assert cache.spans.lengths == cache.spans.used.tolist() == [2]
    for found, wanted in zip(cache.view(0), before, strict=True):
        assert torch.equal(found, wanted[:2])
    new = torch.rand(1, 2, 3)
    cache.append(new, new, torch.tensor([9]), Spans([1], "cpu"))
    assert cache.places(0)[:, 0].tolist() == [0, 2, 9]


def test_what_heads_do_not_share_is_not_cut() -> None:
    ragged = torch.tensor([[0, 0], [3, 1], [5, 2]])
    cache = layer(ragged)
    assert not cache.cut(4)  # one head has something from there on, the other has nothing
    assert cache.spans.lengths == [3]
    assert cache.cut(6)
    moved = layer(torch.tensor([0, 9, 4]))  # a step let a slot go and the newest took its place
    assert not moved.cut(7)
    packed = load_policy("zipvl:kv_bits=4").storage
    assert packed is not None
    quantised = packed.store(4)([Kept(torch.rand(5, 2, 4), torch.rand(5, 2, 4), torch.arange(5))])
    assert quantised.cut(5)
    assert not quantised.cut(4)
    assert copy.deepcopy(quantised).cut(5)
