"""visionzip_like against its rule in numpy: who is dominant, who stands for whom, and what enters."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from test_origin import attention, clip, loaded, picture

from methods.test_hired import entered, prompt
from zipvl import UsageError
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.inputs import Shown
from zipvl.policies import load_policy
from zipvl.policies.visionzip_like import VisionZipLike
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

CASES = [
    ("visionzip_like", {"dominant": 3, "contextual": 2}, {"dominant": 1000}),
    ("visionzip_like", {"dominant": 0, "contextual": 3, "renumber": True}, {"dominant": 1000}),
    ("visionzip_like", {"dominant": 1, "contextual": 0}, {"contextual": 1000}),
    ("visionzip_like", {}, {"dominant": 1000, "contextual": 0}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def zipped(x: np.ndarray, score: np.ndarray, dominant: int,
           contextual: int) -> dict[int, np.ndarray]:  # fmt: skip
    """Of a crop's features x [n, C], the rows that enter and what they become."""
    ranked = sorted(range(len(x)), key=lambda i: -score[i])
    out = {i: x[i] for i in ranked[:dominant]}
    rest = sorted(ranked[dominant:])
    stride = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::stride][:contextual]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    joined: dict[int, list[int]] = {t: [t] for t in targets}
    for i in rest:
        if targets and i not in targets:
            joined[max(targets, key=lambda t: float(unit[i] @ unit[t]))].append(i)
    return out | {t: np.mean([x[i] for i in mine], axis=0) for t, mine in joined.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (0, 1), (1, 0), (7, 40), (50, 4)])
def test_what_enters(seed: int, dominant: int, contextual: int) -> None:
    """Crops of 30, 1 and 12 tokens with newlines between them."""
    chance = np.random.default_rng(seed)
    crop = np.array([0] * 30 + [-1] + [1] + [-1] + [2] * 12 + [-1])
    received = np.where(crop[:, None] < 0, -np.inf, chance.random((len(crop), 2)))
    view = prompt(torch.tensor(crop), (0, 0), torch.tensor(received), 3)
    before, x = view.x.clone(), view.x.double().numpy()
    plan = VisionZipLike(dominant, contextual).start(view)
    want = {i: x[i] for i in (0, 1, 2, *range(len(x) - 3, len(x)))}
    for number in range(3):
        mine = np.flatnonzero(crop == number) + 3
        made = zipped(x[mine], received[mine - 3, 1], dominant, contextual)
        want |= {int(mine[i]): row for i, row in made.items()}
    assert plan.stream.nonzero()[:, 0].tolist() == sorted(want)
    for i, row in want.items():
        np.testing.assert_allclose(plan.x[i].double().numpy(), row, rtol=1e-5, atol=1e-6)
    assert torch.equal(view.x, before)  # the view is read-only


def test_twins_stay_themselves() -> None:
    """Two chosen tokens alike: neither joins the other, and no mean is over nobody."""
    view = prompt(torch.zeros(6).long(), (0, 0), torch.rand(6, 2), 1)
    view.x[1:7] = torch.ones(8)
    plan = VisionZipLike(0, 3).start(view)
    assert plan.stream.tolist() == [True, True, False, True, False, True, False, True]
    torch.testing.assert_close(plan.x[1:7], torch.ones(6, 8))


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_a_real_tower_and_what_the_decoder_gets(oracle: Callable, kind: str) -> None:
    """Dominant by transformers' attention; logits are those of the dense decoder over the rows that
    enter, at their places or counted anew."""
    engine = loaded(oracle, kind)
    image = picture((72, 72) if kind == "llava_onevision" else (70, 100))
    inputs = engine.prepare("what is there", images=[image, picture((40, 40), seed=2)])
    with torch.inference_mode():
        x = engine.model.embed(inputs.input_ids, inputs.is_visual, engine.encode(inputs)).double()
    want = {i: x[i].numpy() for i in (~inputs.is_visual).nonzero()[:, 0].tolist()}
    shown = Shown(inputs, engine.model)
    pixels = oracle(kind).pixels([image, picture((40, 40), seed=2)])
    for number, one in enumerate(pixels):
        score = attention(oracle, kind, one[:1])[0, :, 1].numpy()
        mine = ((shown.medium == number) & (shown.crop == 0)).nonzero()[:, 0].numpy()
        made = zipped(x[mine].numpy(), score, 4, 3)
        want |= {int(mine[i]): row for i, row in made.items()}
    method = "visionzip_like:dominant=4,contextual=3"
    kept = entered(engine, inputs, method)
    assert kept.nonzero()[:, 0].tolist() == sorted(want)
    rows = torch.tensor(np.stack([want[i] for i in sorted(want)])).float()
    with torch.inference_mode():
        dense = engine.model.logits(engine.model.text(rows, [len(rows)]))
    found = engine.logits(inputs, f"{method},renumber=true")
    torch.testing.assert_close(found[kept], dense, rtol=1e-3, atol=1e-3)
    assert (engine.logits(inputs, method)[-1] - dense[-1]).abs().max() > 1e-3  # other places


def test_frames_a_batch_and_a_long_video(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, method = loaded(oracle, "llava_onevision"), "visionzip_like:dominant=2,contextual=1"
    video = engine.prepare("what is there", video=clip(4))
    shown, kept = Shown(video, engine.model), entered(engine, video, method)
    assert shown.crop[kept & video.is_visual].unique(return_counts=True)[1].tolist() == [3] * 4
    prompts = [video, engine.prepare("hello"), engine.prepare("see", images=[picture()])]
    options = {"max_new_tokens": 8, "ignore_eos": True}
    together = [r.tokens for r in engine.generate(prompts, method, **options)]
    assert together == [engine.generate(p, method, **options).tokens for p in prompts]
    monkeypatch.setattr(engine_inputs, "HELD", 4)
    with pytest.raises(UsageError, match="at most 4 --frames"):
        engine.generate(engine.prepare("what", video=clip(9), frames=9), method)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bytes_and_the_full_budget(groups: int) -> None:
    toy = Toy.build(4, groups)
    prompts = [toy.prompt(60), toy.prompt(9), toy.prompt(33)]
    got = toy.run(VisionZipLike(3, 2), prompts)
    counts = []
    for _, visual in prompts:
        stretches = np.split(visual.numpy(), np.flatnonzero(np.diff(visual.numpy())) + 1)
        counts.append(sum(len(s) if not s[0] else min(5, len(s)) for s in stretches))
    extra = [n - c for n, c in zip(got.prefilled[0], counts, strict=True)]
    assert all(e in (0, int(v[-1])) for e, (_, v) in zip(extra, prompts, strict=True))
    assert got.prefilled == [got.prefilled[0]] * 3
    assert got.bytes == [2 * (sum(got.prefilled[0]) + 3 * 4) * groups * 8 * 4] * 3
    dense = toy.run(load_policy("dense"), prompts).tokens
    assert toy.run(VisionZipLike(1000), prompts).tokens == dense


@pytest.mark.parametrize("options", ["dominant=-1", "contextual=-1", "dominant=0,contextual=0"])
def test_bad_options_are_told(options: str) -> None:
    with pytest.raises(UsageError, match=options.split("=")[0]):
        load_policy(f"visionzip_like:{options}")
