"""InternVL against transformers, and what a family owes to the engine: sessions, films, pages, methods.

The prompts hold several spans of visual tokens with text between them.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import tiny_intern
import torch
from fuzz_damage import retell
from methods.untrained import NEEDS
from test_layouts import refused, write
from test_page import FEW
from test_parity import CASES, Asked, Case, check, check_chunks, picture
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import zipvl
from zipvl import page
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs, Shown, conversation, place_media
from zipvl.engine.run import Result
from zipvl.engine.sampler import Sampling
from zipvl.errors import ModelError, UsageError
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM
from zipvl.model.weights import load_weights
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Notes, PromptView
from zipvl.serve.media import Medium, Store
from zipvl.serve.request import Ask, Limits
from zipvl.vision.internvl import InternConfig, InternVL, best_tiles

KINDS = list(tiny_intern.KINDS)
MORE = {
    "narrow": Case("What is shown?", ((1, 50),)),
    "square": Case("What is shown?", ((84, 84),)),
    "usual": Case("Describe it in detail.", ((640, 480),)),
    "three frames": Case("What happens?", frames=3),
    "all": Case("A <video> and <image> and <image>, what differs?", ((64, 48), (30, 90)), frames=2),
}
TESTED = {
    k: c for k, c in CASES.items() if k not in ("tile", "rounded", "rounded 5", "larger")
} | MORE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(kind: str) -> Path:
        tiny_intern.build(kind, made := tmp_path_factory.mktemp("intern") / kind)
        return made

    return build


@pytest.fixture(scope="module")
def oracle(folder: Callable) -> Callable[[str], tiny_intern.InternOracle]:
    return cache(lambda kind: tiny_intern.InternOracle(folder(kind), kind))


@pytest.fixture(scope="module")
def engine(folder: Callable) -> Callable[[str], Engine]:
    return cache(lambda kind: zipvl.load(folder(kind), device="cpu", dtype="float32"))


def ask(case: Case, seed: int = 0) -> Asked:
    """A case with its media; the prompt is what the template makes of its parts."""
    rng = np.random.default_rng([seed, *map(ord, case.words)])
    images = [picture(rng, *size) for size in case.sizes]
    video = np.stack([np.asarray(picture(rng, 90, 61)) for _ in range(case.frames)] or [[]])
    messages = place_media(conversation(case.words, None), len(images), min(1, case.frames))
    text = tiny_intern.rendered(messages[0]["content"])
    return Asked(case.words, text, images, video if case.frames else None)


def mixed(engine: Engine) -> Inputs:
    """A video of three frames, then a picture."""
    return ask(CASES["both placed"]).prepare(engine)


# --- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TESTED)
def test_parity(engine: Callable, oracle: Callable, kind: str, case: str) -> None:
    check(engine(kind), oracle(kind), ask(TESTED[case]))


@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_tokens_over_caches_too(engine: Callable, oracle: Callable, kind: str) -> None:
    """Of a prompt at once, and of a session's turns, the second over what the first has read."""
    case = ask(CASES["both"], seed=1)
    wanted = oracle(kind).greedy(case.text, case.images, case.video)
    assert len(set(wanted)) > 3, "a loop of one token: any engine would agree"
    inputs = case.prepare(engine(kind))
    result = engine(kind).generate(inputs, "dense", max_new_tokens=64, ignore_eos=True)
    assert result.tokens == wanted
    one = engine(kind).session(case.images, case.video, frames=None, method="dense")
    said = [{"role": "user", "content": case.words}]
    for _ in range(2):
        turn = one.turn(said, Sampling())
        assert len(list(turn.steps(12, True))) == 12
        assert turn.tokens[0] == wanted[:12]
        one.rewind()
        assert one.ask("What else?", max_new_tokens=2).stats.reused == one.held.read
        one.rewind()


def test_tiles_are_transformers_own() -> None:
    chance = random.Random(5)
    for _ in range(2000):
        high, wide = (int(10 ** chance.uniform(0, 3.5)) for _ in range(2))
        if chance.random() < 0.5:  # shapes as near to several canvases
            high, wide = (chance.randint(1, 8) * chance.choice((56, 57, 80, 112)) for _ in range(2))
        least = chance.choice((1, 1, 2, 3))
        most = least + chance.choice((0, 1, 5, 11))
        made = replace(SAMPLE, min_tiles=least, max_tiles=most)
        cols, rows = get_optimal_tiled_canvas((high, wide), (56, 56), least, most)
        wanted = (0, 0) if rows * cols == 1 else (rows, cols)
        assert best_tiles(high, wide, made) == wanted, (high, wide, least, most)


SAMPLE = InternConfig(8, 8, 1, 56, 14, True, False, "layer_norm", 1e-6, "gelu", 1, False, 2, 1, 12,
                      (0.5,) * 3, (0.5,) * 3)  # fmt: skip


def test_what_cuts_alike_has_the_same_tokens() -> None:
    """A guide must."""
    alike = {"hidden_size": 16, "mean": (0.1,) * 3, "std": (0.2,) * 3, "blocks": 2}
    other = {"image_size": 60, "patch_size": 7, "shrink": 1, "min_tiles": 2, "max_tiles": 3}
    with torch.device("meta"):
        cuts = InternVL(SAMPLE, 8).cuts
        assert all(InternVL(replace(SAMPLE, **{k: v}), 8).cuts == cuts for k, v in alike.items())
        assert all(InternVL(replace(SAMPLE, **{k: v}), 8).cuts != cuts for k, v in other.items())


LAYERS = {"third": (3, 3), "before the last": (-2, 2), "first": (1, 1)}


@pytest.mark.parametrize("name", LAYERS)
def test_feature_layers(name: str, tmp_path: Path) -> None:
    """Of a tower with a last norm, which only the very last state passes; blocks left are unused."""
    layer, used = LAYERS[name]
    tiny_intern.build("intern35", tmp_path, 3, {"vision_feature_layer": layer})
    loaded = zipvl.load(tmp_path, device="cpu", dtype="float32")
    assert len(cast(InternVL, loaded.model.vision).tower.blocks) == used
    check(loaded, tiny_intern.InternOracle(tmp_path, "intern35"), ask(CASES["one"]))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_received_and_origin(engine: Callable, oracle: Callable, kind: str) -> None:
    """Attention from the class token, the mean of each block of patches; tiles, then the whole."""
    own, hf, image = engine(kind), oracle(kind), picture(np.random.default_rng(3), 130, 70)
    inputs = own.prepare("What?", images=[image])
    shown, [medium] = Shown(inputs, own.model), inputs.media
    tower = hf.model.model.vision_tower
    tower.set_attn_implementation("eager")
    seen = tower(hf.cut(image), output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    looks = torch.stack([seen[i][:, :, 0, 1:].sum(1) for i in (0, 2)], -1)  # [n, N, 2]
    side = int(looks.shape[1] ** 0.5)
    maps = looks.unflatten(1, (side, side))
    blocks = [maps[:, i : i + 2, j : j + 2].mean((1, 2))
              for i in range(0, side, 2) for j in range(0, side, 2)]  # fmt: skip
    want = torch.stack(blocks, 1)  # [n, M, 2]
    assert want.std(1).min() > 1e-4
    torch.testing.assert_close(shown.received[inputs.is_visual], want.flatten(0, 1))
    tiles = [*range(1, len(want)), 0]
    numbers = torch.tensor(tiles).repeat_interleave(want.shape[1])
    assert torch.equal(shown.crop[inputs.is_visual], numbers)
    assert shown.tiles == [(medium.geometry.rows, medium.geometry.cols)]
    assert medium.geometry.rows * medium.geometry.cols == len(want) - 1 > 1


def test_received_of_several_media(engine: Callable) -> None:
    own = engine("intern3")
    inputs = mixed(own)
    view = PromptView(torch.zeros(len(inputs), 4), inputs.is_visual, Notes(len(inputs)))
    view.notes.origin = Shown(inputs, own.model)
    video, image = view.crops()
    assert [len(crop) for crop in video] == [4, 4, 4]
    assert all((crop.diff() == 1).all() for crop in video)  # each frame a span of its own
    assert all(int(b[0] - a[-1]) > 5 for a, b in pairwise(video))
    assert int(image[1][0]) < int(image[0][0]) == int(image[-1][-1]) + 1


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_and_shards_load_the_same(
    engine: Callable, oracle: Callable, folder: Callable, kind: str, tmp_path: Path
) -> None:
    config, own = read_config(folder(kind)), oracle(kind).model.state_dict()
    tiny.respell(folder(kind), tmp_path / "new", "new")
    tiny.shard(folder(kind), tmp_path / "shards")
    want = engine(kind).model.state_dict()
    for place in ("new", "shards"):
        found = load_weights(config, tmp_path / place, torch.device("cpu"), torch.float32)
        assert found.state_dict().keys() == want.keys()
        assert all(torch.equal(t, want[name]) for name, t in found.state_dict().items())
    assert sum(t.numel() for t in want.values()) == sum(t.numel() for t in own.values())
    assert torch.equal(
        want["vision.projector.3.bias"], own["model.multi_modal_projector.linear_2.bias"]
    )


def test_what_files_may_hold_beside(folder: Callable, engine: Callable, tmp_path: Path) -> None:
    """The mask of pre-training and a norm that is not used; any other name is told."""
    tiny.copy_rest(folder("intern3"), tmp_path)
    tensors = tiny.load_file(folder("intern3") / "model.safetensors")
    more = {"embeddings.mask_token": torch.ones(1, 1, 32), "layernorm.weight": torch.ones(32),
            "encoder.layer.3.lambda_1": torch.ones(32)}  # fmt: skip
    tensors |= {f"vision_tower.{name}": t for name, t in more.items()}
    tiny.save(tensors, tmp_path / "model.safetensors")
    config = read_config(tmp_path)
    load_weights(config, tmp_path, torch.device("cpu"), torch.float32)
    tensors["vision_tower.encoder.layer.1.lambda_3"] = torch.ones(32)
    tiny.save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected \(1\): vision\.tower\.blocks\.1\.lambda_3"):
        load_weights(config, tmp_path, torch.device("cpu"), torch.float32)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_4_files_read_the_same(folder: Callable, kind: str, tmp_path: Path) -> None:
    """Every value that equals a class default left out, sides as one number, settings flat."""
    new, usual = config_of(folder(kind)), InternVLConfig().to_dict()
    old = tiny.as_v4(new)
    if kind == "intern35":
        old["text_config"]["head_dim"] = 24
    old = {k: v for k, v in old.items() if k in ("text_config", "vision_config", "architectures")
           or usual.get(k, ...) != v}  # fmt: skip
    vision = InternVLVisionConfig().to_dict()
    old["vision_config"] = {k: v[0] if k in ("image_size", "patch_size") else v
                            for k, v in new["vision_config"].items() if vision.get(k, ...) != v}  # fmt: skip
    assert old["vision_config"].keys() >= {"image_size", "hidden_size"}
    assert len(json.dumps(old)) < len(json.dumps(new)) / 1.5
    raw = json.loads((folder(kind) / tiny_intern.KINDS[kind].file).read_text())
    write(tmp_path, raw.get("image_processor", raw), "preprocessor_config.json")
    found, wanted = read_config(write(tmp_path, old)), read_config(folder(kind))
    assert found == wanted
    write(
        tmp_path,
        {k: v for k, v in old.items() if k != "architectures"} | {"model_type": "internvl"},
    )
    assert read_config(tmp_path) == wanted


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """Of a file that says no more than what it is; its numbers make the published tensors."""
    write(tmp_path, {"architectures": ["InternVLForConditionalGeneration"], "text_config": {}})
    config = read_config(tmp_path)
    assert (config.text.kind, config.image_token, config.video_token) == ("qwen2", 151667, 151667)
    vision = config.vision
    with torch.device("meta"):
        found = VLM(replace(config, text=replace(config.text, num_layers=1)))
        theirs = tiny_intern.InternVLForConditionalGeneration(
            InternVLConfig(text_config={"model_type": "qwen2", "num_hidden_layers": 1})
        )
    assert sum(p.numel() for p in found.vision.parameters()) == sum(
        p.numel() for part in (theirs.model.vision_tower, theirs.model.multi_modal_projector)
        for p in part.parameters()
    )  # fmt: skip
    processor = tiny_intern.GotOcr2ImageProcessorPil()
    assert (vision.min_tiles, vision.max_tiles) == (processor.min_patches, processor.max_patches)
    assert (vision.mean, vision.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    theirs = theirs.config.vision_config
    assert (vision.layer_norm_eps, vision.hidden_act) == (theirs.layer_norm_eps, theirs.hidden_act)
    assert (vision.num_heads, vision.grid, vision.shrink) == (theirs.num_attention_heads, 32, 2)
    family = found.vision
    assert family.count(family.plan(448, 448)) == 256
    assert family.count(family.plan(480, 640)) == 13 * 256
    assert family.count(family.plan(480, 640, frames=3)) == 3 * 256


BAD: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "heads": ("vision_config", {"num_attention_heads": 5}, "do not fit"),
    "patch": ("vision_config", {"patch_size": 57}, "patch 57 and blocks of 2 x 2 patches do not fit"),
    "odd grid": ("vision_config", {"image_size": [70, 70]}, "image 70, patch 14 and blocks of 2 x 2"),
    "two sides": ("vision_config", {"image_size": [56, 84]}, "image_size is [56, 84]"),
    "no side": ("vision_config", {"patch_size": [True, True]}, "patch_size is True"),
    "width": ("vision_config", {"hidden_size": "32"}, "hidden_size is '32'"),
    "layers": ("vision_config", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "norm": ("vision_config", {"norm_type": "batch_norm"}, "norm_type 'batch_norm'"),
    "eps": ("vision_config", {"layer_norm_eps": 0}, "layer_norm_eps is 0"),
    "activation": ("vision_config", {"hidden_act": "silu"}, "hidden_act 'silu'"),
    "bias": ("vision_config", {"attention_bias": 1}, "attention_bias is 1"),
    "pooling": ("vision_config", {"use_mean_pooling": "no"}, "use_mean_pooling is 'no'"),
    "q and k": ("vision_config", {"use_qk_norm": 0}, "use_qk_norm is 0"),
    "tower": (None, {"vision_config": 7}, "vision_config is 7"),
    "strategy": (None, {"vision_feature_select_strategy": "full"}, "'full' is not supported"),
    "layer": (None, {"vision_feature_layer": 4}, "vision_feature_layer is 4"),
    "no layer": (None, {"vision_feature_layer": 0}, "vision_feature_layer is 0"),
    "several layers": (None, {"vision_feature_layer": [-1, -2]}, "vision_feature_layer is [-1, -2]"),
    "ratio": (None, {"downsample_ratio": 0.4}, "downsample_ratio is 0.4"),
    "small ratio": (None, {"downsample_ratio": 5e-324}, "downsample_ratio is 5e-324"),
    "smaller ratio": (None, {"downsample_ratio": 1e-300}, "downsample_ratio is 1e-300"),
    "ratio above 1": (None, {"downsample_ratio": 2}, "downsample_ratio is 2"),
    "blocks": (None, {"downsample_ratio": 1 / 3}, "blocks of 3 x 3 patches do not fit"),
    "projector": (None, {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
    "token": (None, {"image_token_id": "<img>"}, "image_token_id is '<img>'"),
    "decoder": ("text_config", {"model_type": "qwen3_moe"}, "decoder 'qwen3_moe'"),
    "crop": ("vision_config", {"image_size": 260, "patch_size": 2}, "16,384 patches of a crop"),
    "most": ("pre", {"max_patches": 257}, "max_patches is 257"),
    "no tiles": ("pre", {"max_patches": 0}, "max_patches is 0"),
    "least": ("pre", {"min_patches": 13}, "min_patches is 13"),
    "size": ("pre", {"size": {"height": 448, "width": 448}}, "size is {'height': 448, 'width': 448}"),
    "edge": ("pre", {"size": {"shortest_edge": 56}}, "expected the height and width of 56"),
    "mean": ("pre", {"image_mean": [0.5]}, "image_mean is [0.5]"),
    "std": ("pre", {"image_std": [0, 1, 1]}, "image_std is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_values(folder: Callable, name: str, tmp_path: Path) -> None:
    where, change, sentence = BAD[name]
    raw = config_of(folder("intern3"))
    pre = json.loads((folder("intern3") / "preprocessor_config.json").read_text())
    {"pre": pre, None: raw}.get(where, raw.get(where or "")).update(change)
    write(tmp_path, pre, "preprocessor_config.json")
    refused(write(tmp_path, raw), sentence)


@pytest.mark.parametrize(("size", "patch", "most"), [(2048, 64, 16), (896, 14, 64), (56, 14, 256)])
def test_each_ceiling_of_a_picture(size: int, patch: int, most: int, tmp_path: Path) -> None:
    """Pixels, patches, crops: the most that is allowed, and one more."""
    raw = {"model_type": "internvl", "text_config": {}}
    raw |= {"vision_config": {"image_size": size, "patch_size": patch}}
    settings = {"size": {"height": size, "width": size}, "max_patches": most}
    write(tmp_path, settings, "preprocessor_config.json")
    assert read_config(write(tmp_path, raw)).vision.max_tiles == most
    write(tmp_path, settings | {"max_patches": most + 1}, "preprocessor_config.json")
    refused(tmp_path, f"max_patches is {most + 1}" if most == 256 else "are too much: zipvl makes")


def test_any_value_anywhere_is_read_or_refused(folder: Callable, tmp_path: Path) -> None:
    """Damaged settings and configs: a sound record whose module can be made, or a ModelError."""
    chance, base, read, told = random.Random(7), folder("intern3"), 0, []
    names = ("config.json", "preprocessor_config.json")
    for _ in range(120):
        for name in names:
            (tmp_path / name).write_bytes((base / name).read_bytes())
        name = chance.choice(names)
        (tmp_path / name).write_bytes(retell(chance, (base / name).read_bytes()))
        try:
            config = read_config(tmp_path)
        except ModelError as e:
            told.append(str(e))
            continue
        if isinstance(config.vision, InternConfig):
            read += 1
            with torch.device("meta"):
                family = InternVL(config.vision, 64)
            shapes = [family.plan(high, wide) for high, wide in ((30, 40), (1, 5000))]
            assert all(0 < family.count(shape) <= 2**18 + 2**14 for shape in shapes)
    assert read > 20
    assert not any("\n" in sentence or len(sentence) > 600 for sentence in told)


# --- engine, sessions, pages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["dense", "zipvl:tau=0.9", "fastv", "hired", "h2o:heavy=20,recent=8"]
)
def test_ragged_batch_equals_one_by_one(engine: Callable, method: str) -> None:
    names = ("one", "text", "both placed", "small", "three frames", "two")
    batch = [ask(CASES.get(name) or MORE[name], 2).prepare(engine("intern35")) for name in names]
    options = {"method": method, "max_new_tokens": 8, "ignore_eos": True}
    together = engine("intern35").generate(batch, **options)
    alone = [engine("intern35").generate(inputs, **options) for inputs in batch]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({tuple(r.tokens) for r in alone}) == len(batch)


def test_chunks_change_nothing(folder: Callable) -> None:
    check_chunks(folder("intern35"), ask(CASES["both"]).prepare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [32, 50])
def test_long_videos_are_short_ones_in_parts(
    engine: Callable, monkeypatch: pytest.MonkeyPatch, kind: str, frames: int
) -> None:
    own = engine(kind)
    video = np.random.default_rng().integers(0, 256, (frames, 40, 60, 3), dtype=np.uint8)
    whole = own.prepare("what", video=video, frames=frames)
    monkeypatch.setattr(engine_inputs, "HELD", 32)
    inputs = own.prepare("what", video=video, frames=frames)
    assert len(inputs.media[0].crops) == (frames if frames <= 32 else 0)
    assert torch.equal(own.encode(inputs)[0], own.encode(whole)[0])
    assert torch.equal(inputs.input_ids, whole.input_ids)


METHODS_OF_SESSIONS = ("dense", "zipvl:tau=0.9", "zipvl-stream:tau=0.9", "hired")


@pytest.mark.parametrize("method", METHODS_OF_SESSIONS)
def test_turns_are_fresh_runs_and_a_film_is_the_session(
    engine: Callable, method: str, tmp_path: Path
) -> None:
    """Two questions about pictures and a video; the same again after the session was saved."""
    own, case = engine("intern35"), ask(CASES["both"])
    one = own.session(case.images, case.video, frames=None, method=method, reuse="media")
    talk, answers = [], []
    for question in ("What is shown?", "What comes last?"):
        talk.append({"role": "user", "content": question})
        result = one.ask(question, max_new_tokens=6)
        answers.append(result.tokens)
        if method == "dense":
            fresh = own.prepare(talk, case.images, case.video, frames=None)
            assert own.generate(fresh, "dense", max_new_tokens=6).tokens == result.tokens
        talk.append({"role": "assistant", "content": result.text})
    assert result.stats.reused > 0
    one.save(tmp_path / "a.zipvl")
    two = own.open_session(tmp_path / "a.zipvl")
    assert [m.kind for m in two.inputs.media] == ["image", "video"]
    for m in (m for m in talk if m["role"] == "user"):
        assert two.ask(m["content"], max_new_tokens=6).tokens == answers.pop(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(90, 40), (40, 41), (30, 300)])
def test_every_token_has_its_place_on_a_page(engine: Callable, kind: str, size: tuple) -> None:
    own, rng = engine(kind), np.random.default_rng()
    image = picture(rng, *size)
    inputs = own.prepare("What?", [image], rng.integers(0, 255, (3, 40, 50, 3), dtype=np.uint8))
    shown = page.panels(inputs, own.model.vision, [None])
    for medium in inputs.media:
        spots = page.places(medium, own.model.vision)
        assert len(spots) == medium.tokens
        assert ((spots[:, 1:] > 0) & (spots[:, 1:] < 1)).all()
        assert len(np.unique(spots.round(5), axis=0)) == len(spots)
    placed = np.concatenate([p.tokens.flatten() for p in shown])
    assert sorted(placed) == inputs.is_visual.nonzero()[:, 0].tolist()  # no hole, none twice
    geometry = inputs.media[0].geometry
    side = own.model.vision.config.grid // 2
    sides = [(1, side, side), (1, geometry.rows * side, geometry.cols * side), (3, side, side)]
    assert [p.tokens.shape for p in shown] == (sides if geometry.rows else sides[::2])
    for p in shown:
        assert (np.diff(p.tokens[:, 0, :side]) == 1).all()


def test_a_server_counts_what_is_made(engine: Callable, tmp_path: Path) -> None:
    own, root = engine("intern35"), tmp_path
    picture(np.random.default_rng(1), 300, 61).save(root / "a.png")
    store = Store(str(root), Limits(), own.model.vision, 6)
    found = {"image": (str(root / "a.png"), {}), "video": (str(zipvl.demo_clip()), {})}
    for kind, (path, _) in found.items():
        size = store.measure(Medium(kind, "here", path, None, kind), Ask([], []), alone=True)
        given: Any = {"images": [path]} if kind == "image" else {"video": path, "frames": 6}
        inputs = own.prepare("What?", **given)
        [medium] = inputs.media
        assert (size.tokens, size.frames) == (medium.tokens, medium.geometry.frames)
        assert size.tokens == len(own.encode(inputs)[0]) == int(inputs.is_visual.sum())
        assert size.placed == own.model.vision.place(medium)


def test_markers_typed_as_text_are_told(engine: Callable) -> None:
    with pytest.raises(UsageError, match="<IMG_CONTEXT> as text"):
        engine("intern3").prepare("What is <IMG_CONTEXT>?")


def test_without_a_template_of_its_own(folder: Callable, tmp_path: Path) -> None:
    """The built-in one takes content as one string, with the markers in it."""
    tiny.copy_rest(folder("intern35"), tmp_path)
    (tmp_path / "model.safetensors").hardlink_to(folder("intern35") / "model.safetensors")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    write(tmp_path, settings, "tokenizer_config.json")
    own = zipvl.load(tmp_path, device="cpu", dtype="float32")
    assert own.chat.template_name == "qwen_1_5"
    inputs = ask(CASES["both"]).prepare(own)
    tokens = [m.tokens for m in inputs.media]
    text = own.chat.tokenizer.decode(inputs.input_ids.tolist(), skip_special_tokens=False)
    run = "<IMG_CONTEXT>" * (tokens[1] // 3)
    frames = "\n".join(f"Frame{n}: <img>{run}</img>" for n in (1, 2, 3))
    picture = f"<img>{'<IMG_CONTEXT>' * tokens[0]}</img>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{picture} {frames}\n{CASES['both'].words}<|im_end|>\n<|im_start|>assistant\n"
    )


# --- methods, where text stands between frames ------------------------------------------------------


def spans(visual: Tensor) -> int:
    return int((visual.int().diff() == 1).sum())


@pytest.mark.parametrize(
    "method", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_method(engine: Callable, method: str) -> None:
    """A video in three spans and a picture: as many tokens as asked for, in a batch as alone."""
    own, policy = engine("intern35"), load_policy(method, **NEEDS.get(method, {}))
    batch = [mixed(own), ask(CASES["small"]).prepare(own)]
    assert [spans(i.is_visual) for i in batch] == [4, 1]
    options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
    together = cast(list[Result], own.generate(batch, policy, **options))
    for inputs, result in zip(batch, together, strict=True):
        assert len(result.tokens) == 4
        alone = cast(Result, own.generate(inputs, policy, **options))
        assert alone.tokens == result.tokens
        assert alone.stats.ratio == result.stats.ratio


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [("hired:ratio=0.4", 3, 3), ("visionzip_like:dominant=3,contextual=2", 5, 5),
     ("vidcom2_like:ratio=0.4", 1, 8)],
)  # fmt: skip
def test_what_enters_is_chosen_of_each_frame(
    engine: Callable, method: str, least: int, most: int
) -> None:
    """As if no text stood between the frames: what stands there has no part in it."""
    own = engine("intern35")
    inputs, policy = mixed(own), load_policy(method)
    features = torch.cat(own.encode(inputs))
    kept = []
    for visual in (inputs.is_visual, torch.ones(len(features) + 1) > 0):
        visual[-1] = False
        x = torch.zeros(len(visual), features.shape[1])
        x[visual] = features
        here = replace(inputs, input_ids=torch.zeros(len(visual)), is_visual=visual)
        view = PromptView(x, visual, Notes(len(visual)))
        view.notes.origin = Shown(here, own.model)
        with torch.inference_mode():
            stream = policy.start(view).stream
        assert stream[~visual].all()
        kept.append(stream[visual])
        counts = [int(stream[frame].sum()) for frame in view.crops()[0]]
        assert all(least <= count <= most for count in counts), counts
    assert torch.equal(*kept)


def test_anchors_end_frames_and_crops(engine: Callable) -> None:
    own = engine("intern35")
    inputs = mixed(own)
    seen = page.watch(own, inputs, load_policy("anchor_like"), 4)
    visual, each = inputs.is_visual.numpy(), own.model.vision.config.grid**2 // 4
    at = np.flatnonzero(visual)
    ends = np.isin(np.arange(len(visual)), at[each - 1 :: each])
    assert (seen.cached == (ends | ~visual)).all()
    assert len(at) == each * sum(m.geometry.crops for m in inputs.media)
