"""vidcom2_like against its rule in float64, written as loops over frames and tokens."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from test_origin import clip, loaded, picture

from methods.test_hired import entered, prompt
from zipvl import UsageError
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.inputs import Shown
from zipvl.policies import load_policy
from zipvl.policies.vidcom2_like import VidCom2Like
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

CASES = [
    ("vidcom2_like", {}, {"ratio": 1.0}),
    ("vidcom2_like", {"ratio": 0.001}, None),  # a token of each stretch
    ("vidcom2_like", {"ratio": 0.6, "temperature": 3.0}, {"ratio": 1.0}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def alike(a: np.ndarray, b: np.ndarray) -> float:
    far = float(((a - b) ** 2).sum())
    return sum(math.exp(-far / (2 * 2.0**n)) for n in (-3, -2, -1, 0, 1))


def chosen(frames: list[np.ndarray], ratio: float, temperature: float) -> list[np.ndarray]:
    """Masks of the tokens [n, C] of each frame that stay."""
    every = np.concatenate(frames)
    spread = every.var(axis=0)
    steady = sorted(range(len(spread)), key=lambda c: spread[c])[: len(spread) // 2]
    unit = [f[:, steady] / np.linalg.norm(f[:, steady], axis=1, keepdims=True) for f in frames]
    centre = np.concatenate(unit).mean(axis=0)
    video = [[alike(token, centre) for token in f] for f in unit]
    total = [
        [v + alike(token, f.mean(axis=0)) for v, token in zip(vs, f, strict=True)]
        for vs, f in zip(video, unit, strict=True)
    ]
    weight = np.array([-np.mean(vs) for vs in video]) / temperature
    share = np.exp(weight - weight.max())
    share /= share.sum()
    kept = []
    for f, scores, s in zip(frames, total, share, strict=True):
        count = max(1, round(min(1.0, ratio * (1 + s - 1 / len(frames))) * len(f)))
        mask = np.zeros(len(f), dtype=bool)
        mask[np.argsort(scores)[:count]] = True
        kept.append(mask)
    flat, scores = np.concatenate(kept), np.concatenate(total)
    wanted = max(len(frames), int(ratio * len(every)))
    while flat.sum() > wanted:
        flat[max(np.flatnonzero(flat), key=lambda i: scores[i])] = False
    while flat.sum() < wanted:
        flat[min(np.flatnonzero(~flat), key=lambda i: scores[i])] = True
    return np.split(flat, np.cumsum([len(f) for f in frames])[:-1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("ratio", "temperature"), [(0.25, 0.01), (0.5, 0.1), (0.05, 0.01), (0.9, 0.02), (1.0, 0.01)]
)
def test_what_stays(seed: int, ratio: float, temperature: float) -> None:
    """Six frames of 20 tokens, one of them a stranger, with newlines and text around them."""
    chance = np.random.default_rng(seed)
    crop = np.concatenate([[i] * 20 + [-1] for i in range(6)])
    view = prompt(torch.tensor(crop), (0, 0), torch.zeros(len(crop), 2), 3)
    x = chance.normal(size=16) + 0.3 * chance.normal(size=(len(crop), 16)).astype(np.float32)
    x[crop == 3] += chance.normal(size=16)
    view.x[3:-3, :] = torch.tensor(x[:, :8]).float()
    rows = view.x[3:-3].double().numpy()
    kept = VidCom2Like(ratio, temperature).start(view).stream.numpy()
    want = chosen([rows[crop == i] for i in range(6)], ratio, temperature)
    assert kept[:3].all()
    assert kept[-3:].all()
    assert kept[3:-3][crop < 0].all()
    for i in range(6):
        np.testing.assert_array_equal(kept[3:-3][crop == i], want[i])
    assert kept[3:-3][crop >= 0].sum() == max(6, int(ratio * 120))


def test_a_strange_frame_keeps_more() -> None:
    torch.manual_seed(0)
    crop = torch.arange(5).repeat_interleave(40)
    view = prompt(crop, (0, 0), torch.zeros(200, 2), 2)
    view.x[2:-2] = torch.randn(8) + 0.2 * torch.randn(200, 8)
    view.x[2:-2][crop == 2] = -view.x[2:-2][crop == 2]
    kept = VidCom2Like(0.25).start(view).stream[2:-2]
    counts = crop[kept].bincount(minlength=5).tolist()
    assert counts[2] == max(counts)
    assert counts[2] >= 15
    assert sum(counts) == 50


def test_a_video_long_or_not_is_ranked_by_its_features(
    oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pixels are needed: a video whose frames are gone keeps the same."""
    engine = loaded(oracle, "llava_onevision")
    short = engine.prepare("what is there", video=clip(9), frames=9)
    monkeypatch.setattr(engine_inputs, "HELD", 4)
    long = engine.prepare("what is there", video=clip(9), frames=9)
    assert len(long.media[0].crops) == 0
    kept = entered(engine, long, "vidcom2_like:ratio=0.4")
    assert torch.equal(kept, entered(engine, short, "vidcom2_like:ratio=0.4"))
    shown, x = Shown(long, engine.model), engine.encode(long)[0].double().numpy()
    crop = shown.crop[long.is_visual].numpy()
    want = chosen([x[crop == i] for i in range(9)], 0.4, 0.01)
    mine = kept[long.is_visual].numpy()
    for i in range(9):
        np.testing.assert_array_equal(mine[crop == i], want[i])
    assert mine[crop < 0].all()


def test_several_media_and_a_batch(oracle: Callable) -> None:
    engine, method = loaded(oracle, "llava_next_video"), "vidcom2_like:ratio=0.4"
    both = engine.prepare("<image> and <video>", images=[picture()], video=clip(3))
    kept = entered(engine, both, method)[both.is_visual].split([m.tokens for m in both.media])
    singles = [
        engine.prepare("what", images=[both.media[0]]),
        engine.prepare("what", video=both.media[1]),
    ]
    for mine, single in zip(kept, singles, strict=True):
        assert torch.equal(mine, entered(engine, single, method)[single.is_visual])
    prompts, options = [both, *singles, engine.prepare("hello")], {"max_new_tokens": 8}
    together = [r.tokens for r in engine.generate(prompts, method, **options)]
    assert together == [engine.generate(p, method, **options).tokens for p in prompts]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bytes_and_the_full_budget(groups: int) -> None:
    toy = Toy.build(4, groups)
    prompts = [toy.prompt(60), toy.prompt(9), toy.prompt(33)]
    got = toy.run(VidCom2Like(0.5), prompts)
    for n, (_, visual) in zip(got.prefilled[0], prompts, strict=True):
        stretches = int((visual[1:] & ~visual[:-1]).sum()) + int(visual[0])
        count = int((~visual).sum()) + max(stretches, int(0.5 * int(visual.sum())))
        assert n - count in (0, int(visual[-1]))  # the last token stays
    assert got.prefilled == [got.prefilled[0]] * 3
    assert got.bytes == [2 * (sum(got.prefilled[0]) + 3 * 4) * groups * 8 * 4] * 3
    dense = toy.run(load_policy("dense"), prompts).tokens
    assert toy.run(VidCom2Like(1.0), prompts).tokens == dense


@pytest.mark.parametrize("options", ["ratio=0", "ratio=2", "temperature=0"])
def test_bad_options_are_told(options: str) -> None:
    with pytest.raises(UsageError, match=options.split("=")[0]):
        load_policy(f"vidcom2_like:{options}")
