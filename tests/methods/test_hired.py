"""HiRED against the published rule in numpy, on random scores and on real towers."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_origin import attention, clip, loaded, packed, picture
from torch import Tensor

import zipvl
from zipvl import UsageError
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.inputs import Shown
from zipvl.policies import load_policy
from zipvl.policies.hired import HiRED
from zipvl.policy import Notes, PromptView
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

CASES = [
    ("hired", {}, {"ratio": 1.0}),
    ("hired", {"ratio": 0.01, "mode": "reference"}, None),  # a token of each stretch
    ("hired", {"ratio": 0.4, "renumber": True}, {"ratio": 1.0, "renumber": True}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def budgets(first: np.ndarray, rows: int, cols: int, ratio: float, alpha: float,
            mode: str) -> list[int]:  # fmt: skip
    """The paper's, of the whole picture and its tiles, with the authors' truncations."""
    N, side = len(first), math.isqrt(len(first))
    total = int((rows * cols + 1) * N * ratio)
    whole = min(int(total * alpha), N)
    marked = np.zeros(N, dtype=int)
    marked[np.argsort(-first, kind="stable")[: int(N * (1 - alpha))]] = 1
    if mode == "reference":
        heat = marked.reshape(rows, cols, -1).sum(-1).flatten()
    else:
        middle = (np.arange(side) + 0.5) / side
        heat = np.zeros(rows * cols, dtype=int)
        for i, mark in enumerate(marked):
            heat[int(middle[i // side] * rows) * cols + int(middle[i % side] * cols)] += mark
    rest = min(total - whole, rows * cols * N)
    shares = [math.floor(rest * int(h) / max(1, heat.sum()) + 1e-9) for h in heat]
    return [whole, *(min(share, N) for share in shares)]


def prompt(crop: Tensor, tiles: tuple[int, int], received: Tensor, text: int) -> PromptView:
    """Some text, a picture's tokens, and some text."""
    place = torch.arange(len(crop) + 2 * text)
    visual = (place >= text) & (place < len(crop) + text)
    notes = Notes(len(place))

    def spread(x: Tensor, other: float) -> Tensor:
        out = torch.full((len(place), *x.shape[1:]), other, dtype=x.dtype)
        return out.masked_scatter(visual.view(-1, *[1] * (x.ndim - 1)).expand_as(out), x)

    notes.origin = SimpleNamespace(
        tiles=[tiles], crop=spread(crop, -1), medium=torch.where(visual, 0, -1),
        received=spread(received, -torch.inf),
    )  # fmt: skip
    return PromptView(torch.randn(len(place), 8), visual, notes)


@pytest.mark.parametrize("mode", ["quadrant", "reference"])
@pytest.mark.parametrize("tiles", [(2, 2), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_budgets_of_tiles(mode: str, tiles: tuple[int, int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    (rows, cols), side = tiles, 12
    for ratio, alpha in ((0.2, 0.5), (0.4, 0.5), (0.05, 0.3), (0.9, 0.0), (1.0, 1.0), (0.001, 0.9)):
        first = chance.random(side**2)
        first[chance.integers(side**2, size=30)] += 1  # some are hot
        policy = HiRED(ratio, alpha, mode)
        got = policy.shares(torch.tensor(first), rows, cols)
        assert got == budgets(first, rows, cols, ratio, alpha, mode)


def test_a_hot_quadrant_is_funded_and_the_reference_funds_its_neighbour() -> None:
    """All heat in the top right quarter: a band of rows is half of it, and half of the left one."""
    first = torch.rand(24, 24)
    first[:12, 12:] += 10
    quarter = HiRED(0.2).shares(first.flatten(), 2, 2)
    bands = HiRED(0.2, mode="reference").shares(first.flatten(), 2, 2)
    assert quarter[0] == bands[0] == 288
    assert quarter[2] > 2 * max(quarter[1], *quarter[3:])
    assert abs(bands[1] - bands[2]) <= 0.2 * bands[1]
    assert bands[1] > 1.5 * bands[3]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("renumber", [False, True])
def test_the_best_of_each_crop_enter(seed: int, renumber: bool) -> None:
    """Merged tiles whose padding is gone, newlines, text on both sides."""
    chance, (rows, cols, side) = np.random.default_rng(seed), (2, 3, 6)
    N = side**2
    row, col = np.meshgrid(np.arange(rows * side - 3), np.arange(cols * side + 1), indexing="ij")
    tile = np.where(col == cols * side, -1, 1 + row // side * cols + col // side)
    crop = np.concatenate([np.zeros(N, dtype=int), tile.flatten()])
    received = np.where(crop[:, None] < 0, -np.inf, chance.random((len(crop), 2)))
    policy = HiRED(0.3, 0.5, "quadrant", renumber)
    plan = policy.start(prompt(torch.tensor(crop), (rows, cols), torch.tensor(received), 4))
    kept = plan.stream.numpy()
    counts = budgets(received[:N, 0], rows, cols, 0.3, 0.5, "quadrant")
    want = np.zeros(len(crop), dtype=bool)
    for number, count in enumerate(counts):
        mine = np.flatnonzero(crop == number)
        want[mine[np.argsort(-received[mine, 1])[:count]]] = True
    assert kept[:4].all()
    assert kept[-4:].all()
    np.testing.assert_array_equal(kept[4:-4], want)
    assert not want[crop < 0].any()
    assert plan.renumber == renumber


def entered(engine: zipvl.engine.engine.Engine, inputs: zipvl.Inputs, method: str) -> Tensor:
    """Mask of the tokens that the first layer sees."""
    return ~engine.logits(inputs, method).isnan()[:, 0]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_a_lone_crop_keeps_what_transformers_tower_likes(oracle: Callable, ratio: float) -> None:
    engine = loaded(oracle, "llava")
    inputs = engine.prepare("what is there", images=[picture()])
    score = attention(oracle, "llava", oracle("llava").pixels([picture()])[0])[0, :, 1]
    kept = entered(engine, inputs, f"hired:ratio={ratio}")
    assert kept[~inputs.is_visual].all()
    best = np.argsort(-score.numpy())[: int(ratio * 16)]
    assert kept[inputs.is_visual].nonzero()[:, 0].tolist() == sorted(best)
    result = engine.generate(inputs, f"hired:ratio={ratio}", max_new_tokens=9, ignore_eos=True)
    slots = int(kept.sum()) + 9  # of 64 channels in float32, keys and values
    assert {layer["kv_bytes"] for layer in result.stats.layers} == {2 * slots * 64 * 4}
    dense = engine.generate(inputs, "dense", max_new_tokens=9, ignore_eos=True)
    assert (result.tokens == dense.tokens) or ratio < 1


@pytest.mark.parametrize(
    ("size", "mode"),  # 16 patches are no three bands: the authors' reshape fails there
    [((70, 100), "reference"), ((100, 100), "reference"),
     *((size, "quadrant") for size in ((70, 100), (150, 40), (30, 300), (100, 100)))],
)  # fmt: skip
def test_tiles_of_a_real_tower(oracle: Callable, size: tuple[int, int], mode: str) -> None:
    """LLaVA-NeXT: budgets and ranks by transformers' attention, crops by the original packing."""
    engine, image = loaded(oracle, "original_16"), picture(size, seed=3)
    inputs = engine.prepare("what is there", images=[image])
    scores = attention(oracle, "original_16", oracle("original_16").pixels([image])[0])
    n, N = scores.shape[:2]
    number = torch.arange(float(n))[:, None, None].expand(-1, N, 1)
    known, ends = packed(oracle, "original_16", torch.cat((number, scores), 2), image.size)
    geometry = inputs.media[0].geometry
    first = scores[0, :, 0].numpy()
    counts = budgets(first, geometry.rows, geometry.cols, 0.4, 0.5, mode)
    assert len(counts) == n > 2
    want = torch.zeros(len(known), dtype=torch.bool)
    for i, count in enumerate(counts):
        mine = ((known[:, 0] == i) & ~ends).nonzero()[:, 0]
        want[mine[known[mine, 2].argsort(descending=True)[: int(count)]]] = True
    kept = entered(engine, inputs, f"hired:ratio=0.4,mode={mode}")
    assert torch.equal(kept[inputs.is_visual], want)


def test_frames_and_tiles_without_a_whole_picture_share_evenly(oracle: Callable) -> None:
    for kind, given in (("llava_onevision", {"video": clip(4)}),
                        ("original_longva", {"images": [picture((90, 200))]})):  # fmt: skip
        engine = loaded(oracle, kind)
        inputs = engine.prepare("what is there", **given)
        shown, kept = Shown(inputs, engine.model), entered(engine, inputs, "hired:ratio=0.3")
        crops = shown.crop[kept & (shown.crop >= 0)].unique(return_counts=True)
        sizes = shown.crop[shown.crop >= 0].unique(return_counts=True)
        assert torch.equal(crops[0], sizes[0])
        assert crops[1].tolist() == [int(0.3 * n) for n in sizes[1].tolist()]
        assert not (kept & (shown.crop < 0) & inputs.is_visual).any()


def test_several_media_and_a_batch(oracle: Callable) -> None:
    """Each medium is treated as if it were alone, and each prompt."""
    engine, method = loaded(oracle, "llava_next"), "hired:ratio=0.3,renumber=true"
    images = [picture((70, 100)), picture((30, 90), seed=5)]
    both = engine.prepare("<image> and <image> differ", images=images)
    kept = entered(engine, both, method)[both.is_visual].split([m.tokens for m in both.media])
    singles = [engine.prepare("what", images=[m]) for m in both.media]
    for mine, single in zip(kept, singles, strict=True):
        assert torch.equal(mine, entered(engine, single, method)[single.is_visual])
    prompts = [both, *singles, engine.prepare("no picture at all")]
    options = {"max_new_tokens": 8, "ignore_eos": True}
    together = [r.tokens for r in engine.generate(prompts, method, **options)]
    assert together == [engine.generate(p, method, **options).tokens for p in prompts]


def test_a_long_video_is_refused(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_inputs, "HELD", 4)
    engine = loaded(oracle, "llava_onevision")
    inputs = engine.prepare("what is there", video=clip(9), frames=9)
    with pytest.raises(UsageError, match="at most 4 --frames"):
        engine.generate(inputs, "hired", max_new_tokens=2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_toy_crops(groups: int) -> None:
    """The smallest share keeps a token of each stretch; every layer and its cache hold no more."""
    toy = Toy.build(4, groups)
    for length in (5, 23, 60):
        ids, visual = toy.prompt(length)
        got = toy.run(HiRED(0.001), [(ids, visual)])
        starts = int((visual[1:] & ~visual[:-1]).sum()) + int(visual[0])
        count = int((~visual).sum()) + starts
        kept = got.seen.started.stream
        assert len(kept) - count in ((0,) if not visual[-1] else (0, 1))  # the last token stays
        assert got.prefilled == [[len(kept)]] * 3
        assert got.bytes == [2 * (len(kept) + 4) * groups * 8 * 4] * 3


@pytest.mark.parametrize("options", ["ratio=0", "ratio=1.1", "alpha=2", "mode=rows"])
def test_bad_options_are_told(options: str) -> None:
    with pytest.raises(UsageError, match=options.split("=")[0]):
        load_policy(f"hired:{options}")
