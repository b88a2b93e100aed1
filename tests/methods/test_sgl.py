"""SGL: an answer of the same model, or of another one, ranks the visual tokens."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import zipvl
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.engine import Engine
from zipvl.errors import ModelError, UsageError
from zipvl.policies import load_policy
from zipvl.policies.sgl import SGL, Watcher
from zipvl.policy import Plan, Policy, StepView, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import attention, step_row

DEMO = Path(zipvl.__file__).parent / "demo" / "model"
CASES = [
    ("sgl", {"ratio": 0.3}, {"ratio": 1.0}),
    ("sgl", {"ratio": 0.0, "depth": 0.0}, {"ratio": 1.0}),
    ("sgl", {"ratio": 0.6, "depth": 0.9}, {"ratio": 1.0}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


# --- the oracle


class Sums(Policy):
    """Dense; the plain float64 sum of what every token of the prompt receives."""

    def __init__(self) -> None:
        self.total: np.ndarray | float = 0.0

    def plan(self, view: View) -> Plan:
        places = view.is_visual.nonzero()[:, 0]
        first = int(places[-1]) + 1 if len(places) else view.length
        first = min(first, view.length - 1)
        self.total = self.total + attention(view)[:, first:].sum((0, 1))
        return Plan()

    def step(self, view: StepView) -> Plan:
        self.total = self.total + step_row(view).sum(0)[: view.notes.prompt]
        return Plan()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("layers", "depth", "at"), [(3, 0.4, 1), (8, 0.4, 3), (5, 0.0, 0), (6, 0.3, 1), (5, 0.9, 4)]
)
@pytest.mark.parametrize("length", [94, pytest.param(90, marks=pytest.mark.slow)])
def test_the_oracle_is_the_plain_sum(
    groups: int, layers: int, depth: float, at: int, length: int
) -> None:
    """Over all layers, heads, rows behind the media (or the last), and four generated tokens."""
    toy, sums = Toy.build(4, groups, length, layers), Sums()
    prompt = toy.prompt(length)
    toy.run(sums, [prompt])
    got = toy.run(SGL(0.25, depth), [prompt])
    received = got.notes[0]["received"].double().numpy()
    np.testing.assert_allclose(received, sums.total, rtol=1e-5, atol=1e-6)
    visual = prompt[1].numpy()
    order = sorted(np.flatnonzero(visual).tolist(), key=lambda j: -sums.total[j])
    want = set(order[: int(0.25 * visual.sum())]) | set(np.flatnonzero(~visual)) | {length - 1}
    for layer, plan in enumerate(got.seen.plans):
        for index in (plan.attend, plan.cache, plan.stream):
            assert index is None if layer != at else set(index.tolist()) == want
    assert got.prefilled == [[length]] * at + [[len(want)]] * (layers - at)
    slot = 2 * groups * 8 * 4
    assert got.bytes == [(n[0] + 4) * slot for n in got.prefilled]
    held = got.held[0][-1][2][:, 0]
    assert held.tolist() == sorted(want)  # original positions


def test_a_batch_is_its_prompts_one_by_one() -> None:
    toy = Toy.build(4, 2, layers=5)
    prompts = [toy.prompt(94), toy.prompt(9, "none"), toy.prompt(40, "all"), toy.prompt(1, "all")]
    got, alone = toy.run(SGL(0.2), prompts), [toy.run(SGL(0.2), [p]) for p in prompts]
    assert got.tokens == [a.tokens[0] for a in alone]
    assert got.prefilled == [[a.prefilled[i][0] for a in alone] for i in range(5)]
    assert [n[1] for n in got.prefilled] == [9] * 5  # text stays
    full, dense = toy.run(SGL(1.0), prompts), toy.run(Policy(), prompts)
    assert full.tokens == dense.tokens


def test_it_says_oracle() -> None:
    assert repr(SGL()) == "SGL(ratio=0.4, depth=0.4, oracle)"
    assert repr(SGL(guide="x/y")) == "SGL(ratio=0.4, depth=0.4, guide=x/y)"
    assert isinstance(SGL.scout, Watcher)


# --- a guide


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zipvl.load(device="cpu", dtype="float32")


def asked(engine: Engine) -> list[zipvl.Inputs]:
    """Two questions about one clip, one about a picture, and text alone."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (16, 96, 96, 3), dtype=np.uint8)
    first = engine.prepare("List all objects in order.", video=video)
    second = engine.prepare("What comes first?", video=first.media[0])
    picture = engine.prepare("What is it?", images=[DEMO.parent / "picture.png"])
    return [first, second, picture, engine.prepare("Hello, who is there?")]


@pytest.mark.parametrize(("ratio", "depth"), [(0.3, 0.4), (0.1, 0.0)])
def test_the_model_as_its_own_guide_is_the_oracle(
    engine: Engine, ratio: float, depth: float
) -> None:
    text, some = f"sgl:ratio={ratio},depth={depth}", {"max_new_tokens": 8}
    own = engine.generate(asked(engine), text, **some)
    inputs = asked(engine)
    other = engine.generate(inputs, f"{text},guide={DEMO}", **some)
    again = [engine.generate(i, f"{text},guide={DEMO}", **some) for i in asked(engine)]
    for a, b, alone in zip(own, other, again, strict=True):
        assert a.tokens == b.tokens == alone.tokens
        assert [x["cached"] for x in a.stats.layers] == [x["cached"] for x in b.stats.layers]
        assert b.stats.seconds["scout"] > 0
    assert own[0].stats.layers[-1]["cached"] < own[0].stats.prompt_tokens
    # a model's features are its own, and the guide is loaded once
    guide = engine.guided.loaded[str(DEMO)]
    assert guide.model is not engine.model
    assert all(m.features is not None for i in inputs for m in i.media)
    assert list(engine.guided.loaded) == [str(DEMO)]
    torch.testing.assert_close(
        engine.logits(inputs[0], f"{text},guide={DEMO}", last=1),
        engine.logits(inputs[0], text, last=1),
    )


def test_the_guide_sees_with_its_own_tower(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights, other features: neither model is fed those of the other."""
    guide = tmp_path / "guide"
    shutil.copytree(DEMO, guide)
    encoded, encode = [], Engine.encode

    def watched(self: Engine, inputs: zipvl.Inputs) -> list:
        fresh = [m.features is None for m in inputs.media]
        encoded.append((self is engine, fresh, out := encode(self, inputs)))
        return out

    inputs = asked(engine)[0]
    engine.generate(inputs, f"sgl:guide={guide}", max_new_tokens=1)
    other = engine.guided.loaded[str(guide)]
    with torch.inference_mode():
        other.model.vision.projector[0].weight.mul_(0.5)
    monkeypatch.setattr(Engine, "encode", watched)
    kept = [m.features for m in inputs.media]
    engine.generate(inputs, f"sgl:guide={guide}", max_new_tokens=1)
    (mine, fresh, theirs), (ours, held, features) = encoded
    assert (mine, fresh, ours, held) == (False, [True], True, [False])
    assert features[0] is kept[0]
    assert not torch.equal(theirs[0], features[0])


def test_what_was_prepared_counts_once(engine: Engine) -> None:
    for text in ("sgl", f"sgl:guide={DEMO}"):
        inputs = asked(engine)[0]
        inputs.seconds = 12.5
        first, second = (engine.generate(inputs, text, max_new_tokens=1) for _ in range(2))
        assert first.stats.seconds["video"] == 12.5
        assert second.stats.seconds["video"] == 0


def changed(folder: Path, file: str, change: Callable[[dict], object]) -> Path:
    shutil.copytree(DEMO, folder)
    raw = json.loads((folder / file).read_text())
    change(raw)
    (folder / file).write_text(json.dumps(raw))
    return folder


def bigger(raw: dict) -> None:
    raw["image_grid_pinpoints"] = [[x * 2 for x in pair] for pair in raw["image_grid_pinpoints"]]


def renamed(raw: dict) -> None:
    vocab = raw["model"]["vocab"]
    a, b = sorted(vocab)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [("config.json", bigger, "size, cut and tokens of pictures"), ("tokenizer.json", renamed, "vocabulary")],
)  # fmt: skip
def test_a_guide_that_sees_other_tokens_is_refused(
    engine: Engine, tmp_path: Path, file: str, change: Callable, says: str
) -> None:
    guide = changed(tmp_path / "other", file, change)
    with pytest.raises(
        UsageError, match=rf"^the guide .*other and the model demo differ in {says}: "
    ) as e:
        engine.generate(asked(engine)[0], f"sgl:guide={guide}", max_new_tokens=1)
    assert "\n" not in str(e.value)
    assert str(guide) not in engine.guided.loaded


def test_other_families_are_refused(engine: Engine, oracle: Callable) -> None:
    with pytest.raises(UsageError, match="differ in vocabulary"):
        engine.generate(asked(engine)[0], SGL(guide=str(oracle("llava").folder)), max_new_tokens=1)
    with pytest.raises(ModelError, match="nowhere"):
        engine.generate(asked(engine)[0], SGL(guide="/nowhere"), max_new_tokens=1)


def test_pixels_that_are_gone_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_inputs, "HELD", 16)
    video = np.zeros((17, 96, 96, 3), dtype=np.uint8)
    inputs = engine.prepare("What?", video=video, frames=17)
    assert inputs.media[0].crops.numel() == 0
    with pytest.raises(UsageError, match="has to see the pixels itself, and a video of more than"):
        engine.generate(inputs, f"sgl:guide={DEMO}", max_new_tokens=1)
    assert engine.generate(inputs, "sgl", max_new_tokens=1).tokens  # the oracle has the features


def test_what_a_guide_must_be(engine: Engine) -> None:
    class Wrong(SGL):
        guide = 3

        def __init__(self) -> None:
            pass

    with pytest.raises(UsageError, match=r"Wrong\.guide is 3: give a folder or hub id"):
        load_policy(Wrong())
    bare = Engine(engine.model, engine.chat, engine.backend, engine.attend)
    with pytest.raises(UsageError, match="needs a guide beside an engine that load"):
        bare.generate("hello", f"sgl:guide={DEMO}", max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "says"), [({"ratio": 2}, "ratio is 2"), ({"depth": 1}, "depth is 1")]
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=f"method 'sgl': {says}"):
        load_policy("sgl", **options)
