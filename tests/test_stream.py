"""zipvl-stream: what a layer leaves out is gone for all later layers, and nothing else changes."""

import math

import pytest
import torch

import zipvl
from zipvl import Plan, UsageError
from zipvl.policies import load_policy
from zipvl.policies.zipvl import covering
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Toy, Trace


def alive_after(got: Trace, length: int) -> list[torch.Tensor]:
    """Places in the prompt of the tokens that are left behind each layer."""
    alive, out = torch.arange(length), []
    for plan in got.seen.plans:
        alive = alive if plan.stream is None else alive[plan.stream]
        out.append(alive)
    return out


@pytest.mark.parametrize("options", ["tau=0.4", "tau=0.2,first=1", "tau=0.1,floor=0.3,always=last"])
@pytest.mark.parametrize("length", [1, 2, 65, 200])
def test_it_is_a_dense_run_whose_left_tokens_are_no_keys(options: str, length: int) -> None:
    """Every token goes through every layer of the oracle; those that left are only masked as keys,
    from the layer on in which they left."""
    toy = Toy.build(4, 2)
    method = load_policy(f"zipvl-stream:recent=6,random=6,{options}")
    got = toy.run(method, [toy.prompt(length)], steps=3)
    alive = alive_after(got, length)
    oracle = Oracle(toy.decoder)
    x = toy.decoder.embed_tokens.weight[toy.prompt(length)[0]]
    masked = [Plan(attend=left, cache=left, fill="own") for left in alive]
    want = oracle.prefill(x, masked)[alive[-1]]
    torch.testing.assert_close(got.hidden[0].double(), want, rtol=1e-3, atol=1e-4)
    for step, token in enumerate(got.tokens[0]):
        row = toy.decoder.embed_tokens.weight[token][None]
        want = oracle.step(row, length + step, [Plan()] * 3)
        torch.testing.assert_close(got.hidden[step + 1].double(), want, rtol=1e-3, atol=1e-4)
    if length == 200:
        assert len(alive[-1]) < len(alive[0]) <= 200  # it did leave something out


def test_text_the_last_token_the_floor_and_the_first_layers() -> None:
    toy = Toy.build(4, 2)
    ids, visual = toy.prompt(200)
    got = toy.run(load_policy("zipvl-stream:tau=0.001,recent=4,random=4"), [(ids, visual)])
    [*_, last] = alive_after(got, 200)
    text = (~visual).nonzero()[:, 0]
    assert set(text.tolist()) <= set(last.tolist())
    none = torch.ones(200, dtype=torch.bool)
    for options, least in (("sinks=0", 1), ("sinks=0,floor=0.25", 50), ("sinks=7", 8)):
        method = load_policy(f"zipvl-stream:tau=0.001,recent=4,random=4,{options}")
        alive = alive_after(toy.run(method, [(ids, none)]), 200)
        assert len(alive[-1]) in (least, least + 1)  # and the last token
        assert alive[-1][-1] == 199
    assert alive[-1][:7].tolist() == list(range(7))
    method = load_policy("zipvl-stream:tau=0.001,first=2,always=last")
    assert [len(a) for a in alive_after(toy.run(method, [(ids, none)]), 200)][:2] == [200, 200]


def test_one_tau_for_any_depth() -> None:
    """Layers that keep tau ** (1 / L) of what is left keep tau in all."""
    mass = torch.rand(500, generator=torch.Generator().manual_seed(0))

    class Seen:
        def __init__(self, layers: int):
            self.num_layers = layers

    for layers, first in ((1, 0), (8, 0), (28, 4), (3, 3), (2, 9)):
        method = load_policy("zipvl-stream", tau=0.6, first=first)
        each = 0.6 ** (1 / max(1, layers - first))
        assert method.budget(Seen(layers), mass) == covering(mass, each)
        assert math.isclose(each ** max(1, layers - first), 0.6)


def test_positions_are_the_original_ones_and_logits_are_nan_where_a_token_left() -> None:
    engine = zipvl.load(device="cpu")
    inputs = engine.prepare("What comes first?", video=zipvl.demo_clip(), frames=32)
    method = "zipvl-stream:tau=0.4"
    out = engine.prefill([inputs], load_policy(method), 2, {})
    lengths = []
    for layer, cache in zip(out.layers, out.caches, strict=True):
        at = cache.places(0)[:, 0]
        assert (at.diff() > 0).all()
        assert layer.attended == layer.cached == [len(at)]
        lengths.append(len(at))
        last = set(at.tolist())
    assert lengths == sorted(lengths, reverse=True)
    assert out.batch.positions.tolist() == sorted(last)
    logits = engine.logits(inputs, method)
    gone = logits.isnan().all(1)
    assert gone.nonzero()[:, 0].tolist() == sorted(set(range(len(inputs))) - last)
    assert inputs.is_visual[gone].all()


@pytest.mark.parametrize(
    ("options", "words"),
    [("always=none", "always is 'none'"), ("first=-1", "first is -1"), ("floor=2", "floor is 2"), ("sinks=-1", "sinks is -1"),
     ("tau=0", "tau is 0"), ("fill=own", "no option 'fill'")],
)  # fmt: skip
def test_bad_options_are_one_sentence(options: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_policy(f"zipvl-stream:{options}")
