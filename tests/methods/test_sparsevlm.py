"""SparseVLM against its rule in float64: raters, cuts, heads, ranks."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from test_origin import clip, loaded, picture

from methods.test_hired import entered
from zipvl import Plan, UsageError, View
from zipvl.policies import load_policy
from zipvl.policies.sparsevlm import SparseVLM
from zipvl.policy import Notes, PromptView
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

CASES = [
    ("sparsevlm", {}, {"cuts": "0:1"}),
    ("sparsevlm", {"cuts": "0:0.3/1:0.1", "of": 0, "heads": 1}, {"cuts": "2:1"}),
    ("sparsevlm", {"cuts": "0:0.0", "of": 0}, None),  # all visual tokens leave behind layer 0
    ("sparsevlm", {"cuts": "1:0.5/2:0.5/9:0.1", "of": 0}, {"cuts": "9:0", "of": 0}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def raters(x: np.ndarray, visual: np.ndarray) -> list[int]:
    """Words behind the last visual token that resemble visual tokens more than the mean word."""
    seen = np.flatnonzero(visual)
    text = [i for i in np.flatnonzero(~visual) if not len(seen) or i > seen[-1]]
    text = text or np.flatnonzero(~visual).tolist()
    if not len(seen) or not text:
        return np.flatnonzero(~visual).tolist()
    rating = np.zeros(len(text))
    for i in seen:
        logits = np.array([x[i] @ x[t] for t in text])
        rating += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() / len(seen)
    best = [t for t, r in zip(text, rating, strict=True) if r > rating.mean()]
    return [int(t) for t in best or text]


@pytest.mark.parametrize("seed", range(4))
def test_raters(seed: int) -> None:
    chance = np.random.default_rng(seed)
    for T, last in ((40, 30), (40, 40), (12, 1), (9, 0), (30, 29)):
        x, visual = chance.normal(size=(T, 6)), chance.random(T) < 0.5
        visual[last:] = False
        if last == 40:
            visual[-1] = True  # no text behind it
        view = PromptView(torch.tensor(x), torch.tensor(visual), Notes(T))
        assert SparseVLM().start(view) == Plan()
        assert view.notes["raters"].tolist() == raters(x, visual)
        assert view.notes["visual"] == visual.sum()
    view = PromptView(torch.ones(6, 4), torch.arange(6) < 3, Notes(6))
    SparseVLM().start(view)
    assert view.notes["raters"].tolist() == [3, 4, 5]  # all alike: none is above the mean


@pytest.mark.parametrize("heads", [1, 2, 14])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cuts_by_the_raters_rows(groups: int, heads: int) -> None:
    """Layers 1 and 3: who goes on is who gets most from the raters, in the heads that look."""
    checked = []

    class Spy(SparseVLM):
        def plan(self, view: View) -> Plan:
            plan = super().plan(view)
            if view.layer not in (1, 3):
                assert plan == Plan()
                return plan
            q, k = view.q.double(), view.k.double().repeat_interleave(4 // groups, 0)
            scores = q @ k.mT / k.shape[-1] ** 0.5
            future = torch.ones(scores.shape[1:]).triu(1) > 0
            probs = scores.masked_fill(future, -torch.inf).softmax(-1).numpy()  # [H, T, T]
            places, visual = view.positions.tolist(), view.is_visual.numpy()
            rows = [places.index(r) for r in want_raters]
            looks = probs[:, rows][:, :, visual].sum((1, 2))
            best = sorted(range(4), key=lambda h: -looks[h])[:heads]
            score = probs[best][:, rows].mean((0, 1))
            count = round({1: 0.6, 3: 0.25}[view.layer] * int(prompt[1].sum()))
            seen = sorted(np.flatnonzero(visual), key=lambda i: -score[i])[:count]
            want = sorted({*seen, *np.flatnonzero(~visual)})
            assert plan.stream.nonzero()[:, 0].tolist() == want
            checked.append(view.layer)
            return plan

    for length in (36, 55, 74):  # each ends in text, which sees all visual tokens
        toy, prompt = Toy.build(4, groups, seed=length, layers=5), Toy.build(4, 2).prompt(length)
        x = toy.decoder.embed_tokens.weight[prompt[0]].detach().double().numpy()
        want_raters = raters(x, prompt[1].numpy())
        got = toy.run(Spy("1:0.6/3:0.25", heads, 0), [prompt])
        text, visual = int((~prompt[1]).sum()), int(prompt[1].sum())
        sizes = [length, length, *(text + round(s * visual) for s in (0.6, 0.6, 0.25))]
        assert got.prefilled == [[size] for size in sizes]
        assert got.bytes == [2 * (n + 4) * groups * 8 * 4 for [n] in got.prefilled]
    assert checked == [1, 3] * 3


@pytest.mark.parametrize(
    ("layers", "of", "want"),
    [(32, 32, [2, 6, 15]), (28, 32, [1, 5, 13]), (8, 32, [0, 1, 3]), (40, 32, [2, 7, 18]),
     (3, 32, [0, 1]), (3, 0, [2]), (20, 0, [2, 6, 15])],
)  # fmt: skip
def test_cuts_lie_in_proportion_to_the_depth(layers: int, of: int, want: list[int]) -> None:
    """Where two cuts fall in one layer the later one counts."""
    toy, prompt = Toy.build(4, 2, layers=layers), Toy.build(4, 2).prompt(55)
    plans = toy.run(SparseVLM(of=of), [prompt], steps=1).seen.plans
    assert [i for i, plan in enumerate(plans) if plan.stream is not None] == want
    text, visual = int((~prompt[1]).sum()), int(prompt[1].sum())
    first = {2: 0.5208, 0: 0.5208 if layers == 8 else 0.3472}.get(want[0], 0.5208)
    assert len(plans[want[0]].stream) == text + round(first * visual)


def test_pictures_videos_and_a_batch(oracle: Callable) -> None:
    engine, method = loaded(oracle, "llava_onevision"), "sparsevlm:cuts=0:0.5/1:0.2,of=0"
    prompts = [
        engine.prepare("<image> and <video> differ how", images=[picture()], video=clip(3)),
        engine.prepare("hello"),
        engine.prepare("what is there", images=[picture((30, 90))]),
    ]
    options = {"max_new_tokens": 8, "ignore_eos": True}
    results = engine.generate(prompts, method, **options)
    for inputs, result in zip(prompts, results, strict=True):
        assert result.tokens == engine.generate(inputs, method, **options).tokens
        text, visual = int((~inputs.is_visual).sum()), int(inputs.is_visual.sum())
        left = [text + round(share * visual) for share in (1, 0.5, 0.2)]
        assert [layer["cached"] for layer in result.stats.layers] == left
        kept = entered(engine, inputs, method)
        assert kept[~inputs.is_visual].all()
        assert int(kept.sum()) == left[-1]


def test_all_tokens_at_full_budget() -> None:
    toy = Toy.build(4, 2)
    prompts = [toy.prompt(60), toy.prompt(9), toy.prompt(33)]
    got = toy.run(SparseVLM("0:1/2:1", of=0), prompts)
    assert got.tokens == toy.run(load_policy("dense"), prompts).tokens


@pytest.mark.parametrize(
    "options", ["cuts=2", "cuts=2:1.5", "cuts=3:0.5/2:0.1", "cuts=2:0.1/3:0.5", "heads=0", "of=-1"]
)
def test_bad_options_are_told(options: str) -> None:
    with pytest.raises(UsageError, match=options.split("=")[0]):
        load_policy(f"sparsevlm:{options}")
