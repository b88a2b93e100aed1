"""Qwen2-VL and Qwen2.5-VL against transformers, whole and after dropping; rotary ids that are no
positions, on every way through the engine."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_qwen
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_parity import close, picture
from tiny_qwen import END, IMAGE, KINDS, START, TOWERS, VIDEO, Oracle
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

import zipvl
from zipvl import page
from zipvl.config import Section
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.errors import MediaError, ModelError
from zipvl.model.layouts import read_config
from zipvl.vision.qwen import FRAME, PICTURE, QwenVL, read_25, resized

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
AROUND = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MARKS = {"<image>": START + IMAGE + END, "<video>": START + VIDEO + END}


@dataclass(frozen=True)
class Case:
    """The user's words, sizes (width, height) of pictures, frames of each video."""

    words: str
    sizes: tuple[tuple[int, int], ...] = ()
    frames: tuple[int, ...] = ()


CASES = {
    "one": Case("<image>What is shown in this image?", ((100, 75),)),
    "small": Case("<image>What is shown?", ((20, 30),)),
    "wide": Case("<image>What is shown?", ((300, 60),)),
    "tall": Case("<image>Wie heißt 北京? 🙂", ((61, 200),)),
    "two": Case("Here <image> and here <image>: what differs?", ((100, 75), (60, 130))),
    "after": Case("What is shown here? <image>", ((73, 91),)),
    "text": Case("How many people are there?"),
    "1 frame": Case("<video>What happens?", frames=(1,)),
    "3 frames": Case("In this <video> what happens?", frames=(3,)),
    "4 frames": Case("<video>What happens?", frames=(4,)),
    "9 frames": Case("<video>What happens in the video?", frames=(9,)),
    "all": Case("The <video>, <image> and <video>: what <image>?", ((64, 48), (90, 200)), (3, 6)),
}


class Asked:
    """A case with its media drawn, as the engine takes it and as the oracle does."""

    def __init__(self, case: Case, seed: int = 0):
        rng = np.random.default_rng([seed, *map(ord, case.words)])
        self.images = [picture(rng, *size) for size in case.sizes]
        self.videos = [np.stack([np.asarray(picture(rng, 150, 121)) for _ in range(n)])
                       for n in case.frames]  # fmt: skip
        self.words, self.text, media = case.words, case.words, []
        left = {"<image>": iter(self.images), "<video>": iter([(v, len(v)) for v in self.videos])}
        for mark, written in MARKS.items():
            self.text = self.text.replace(mark, written)
        for part in case.words.replace(">", "> ").replace("<", " <").split():
            media += [next(left[part])] if part in left else []
        self.media: list[Any] = media

    def prepare(self, engine: Engine) -> Inputs:
        return engine.prepare(self.words, self.images, self.videos, frames=None)

    def given(self, oracle: Oracle) -> dict[str, Any]:
        return oracle.given(AROUND.format(self.text), self.media)


@dataclass
class Made:
    engine: Engine
    oracle: Oracle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """made("Qwen2VL") -> the engine and the oracle of that tiny checkpoint, built once."""
    found: dict[str, Made] = {}

    def build(kind: str) -> Made:
        if kind not in found:
            folder = tmp_path_factory.mktemp("qwen") / kind
            tiny_qwen.build(kind, folder)
            engine = zipvl.load(folder, device="cpu", dtype="float32")
            found[kind] = Made(engine, Oracle(kind, folder))
        return found[kind]

    return build


def by_block(patches: Tensor) -> Tensor:
    """[P, rows, cols, numbers] -> [P * N, numbers], as transformers orders them."""
    blocks = patches.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    return blocks.transpose(2, 3).flatten(0, 4)


@pytest.fixture
def qwen(made: Callable) -> Made:
    return made("Qwen2_5_VL")


# --- parity -------------------------------------------------------------------------------------


OLD = ("wide", "two", "text", "3 frames", "9 frames", "all")  # of Qwen2-VL, each time
PAIRS = [
    pytest.param(kind, case, marks=[pytest.mark.slow] * (kind == "Qwen2VL" and case not in OLD))
    for kind in KINDS
    for case in CASES
]


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_parity(made: Callable, kind: str, case: str) -> None:
    """Pixels, ids, rotary ids, features, logits everywhere, and of some 64 greedy tokens."""
    engine, oracle, asked = made(kind).engine, made(kind).oracle, Asked(CASES[case])
    inputs, given = asked.prepare(engine), asked.given(oracle)
    assert inputs.input_ids.tolist() == given["input_ids"][0].tolist()
    assert torch.equal(inputs.is_visual, given["mm_token_type_ids"][0] > 0)
    turns = oracle.turns(given)
    if inputs.media:
        assert torch.equal(inputs.turns, turns)
        assert inputs.ahead == int(turns.max()) + 1 - len(inputs)
    else:
        assert inputs.turns is None
        assert torch.equal(turns, torch.arange(len(inputs)).expand(3, -1))
    vision = engine.model.vision
    for mine, medium in zip(inputs.media, asked.media, strict=True):
        patches, _ = oracle.pixels(medium)
        close(by_block(vision.pixels(mine.crops, mine.geometry)), patches, 1e-5)
    with torch.inference_mode():
        engine.encode(inputs)
    ordered = sorted(inputs.media, key=lambda m: m.kind == "video")
    for mine, wanted in zip(ordered, oracle.features(given), strict=True):
        close(mine.features, wanted, 1e-4)
    logits = engine.logits(inputs)
    close(logits, oracle.logits(given), 1e-4)
    assert logits.std() > 0.3, "flat logits: any engine would agree"
    if case in ("two", "text", "9 frames", "all"):
        wanted = oracle.greedy(given)
        assert len(set(wanted)) > 3
        assert engine.generate(inputs, "dense", 64, ignore_eos=True).tokens == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_64_tokens_of_generate(made: Callable, kind: str) -> None:
    """transformers' own loop, for pictures, on whose rotary ids its version 5 agrees."""
    engine, oracle, asked = made(kind).engine, made(kind).oracle, Asked(CASES["two"], 1)
    given = asked.given(oracle)
    with torch.no_grad():
        done = oracle.model.generate(**given, do_sample=False, max_new_tokens=64, pad_token_id=0)
    wanted = done[0, given["input_ids"].shape[1] :].tolist()
    assert engine.generate(asked.prepare(engine), "dense", 64, ignore_eos=True).tokens == wanted


@pytest.mark.parametrize("size", [(56, 56), (640, 480), (300, 60), (61, 200), (1, 50), (1400, 900)])
def test_pictures_are_cut_as_by_transformers(size: tuple[int, int]) -> None:
    """With the sizes of hub checkpoints."""
    config = read_25(Section({"vision_config": TOWERS["Qwen2_5_VL"]}, "x"), Section({}, "y"))
    vision, asked = QwenVL(config, 64), picture(np.random.default_rng(3), *size)
    at = vision.plan(size[1], size[0])
    crops = torch.from_numpy(vision.cut(asked, at))
    theirs = Qwen2VLImageProcessorPil()
    _, rows, cols = theirs(images=asked, return_tensors="pt")["image_grid_thw"][0].tolist()
    assert (rows, cols) == vision.grid(at)
    assert vision.count(at) == rows * cols // 4
    assert list(crops.shape) == [1, 14 * rows, 14 * cols, 3]
    patches = theirs(images=asked, return_tensors="pt")["pixel_values"]
    close(by_block(vision.pixels(crops, at)), patches, 1e-5)


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(5)
    for pixels in (PICTURE, FRAME, (784, 784), (3136, 12845056)):
        for high, wide in rng.integers(1, 700, (300, 2)).tolist():
            if max(high, wide) <= 200 * min(high, wide):
                assert resized(high, wide, 28, pixels) == smart_resize(high, wide, 28, *pixels)


def test_extreme_shapes_are_one_sentence(qwen: Made, tmp_path: Path) -> None:
    long = Image.new("RGB", (201, 1))
    with pytest.raises(MediaError, match=r"^201 x 1 pixels are too long for this model, over 200"):
        qwen.engine.prepare("What?", [long])
    with pytest.raises(MediaError, match="1 x 201 pixels"):
        qwen.engine.prepare("What?", video=np.zeros((2, 201, 1, 3), np.uint8))
    assert len(qwen.engine.prepare("What?", [Image.new("RGB", (200, 1))]).media) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_processors(made: Callable, kind: str) -> None:
    """How often transformers' processor repeats a placeholder: without torchvision it is not made
    whole."""
    name = {"Qwen2VL": "Qwen2VLProcessor", "Qwen2_5_VL": "Qwen2_5_VLProcessor"}[kind]
    cls, merge = getattr(transformers, name), SimpleNamespace(merge_size=2)
    alone = SimpleNamespace(image_processor=merge, video_processor=merge, image_token=IMAGE,
                            video_token=VIDEO)  # fmt: skip
    asked, oracle = Asked(CASES["all"]), made(kind).oracle
    text = asked.text
    for medium in asked.media:
        grid = {"image_grid_thw": oracle.pixels(medium)[1][None]}
        if isinstance(medium, Image.Image):
            text = text.replace(IMAGE, cls.replace_image_token(alone, grid, 0).replace("|", "!"), 1)
        else:
            grid = {"video_grid_thw": grid["image_grid_thw"]}
            text = text.replace(VIDEO, cls.replace_video_token(alone, grid, 0).replace("|", "!"), 1)
    text = text.replace("<!", "<|").replace("!>", "|>")
    ids = oracle.tokenizer.encode(AROUND.format(text), add_special_tokens=False).ids
    assert asked.prepare(made(kind).engine).input_ids.tolist() == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("fps", [0.7, 1.0, 2.3, 29.97])
def test_rotary_ids_at_odd_rates(made: Callable, kind: str, frames: int, fps: float) -> None:
    """Those of get_rope_index, up to the text behind a video whose time is larger than its sides:
    that is behind all of it, as when the models were trained."""
    engine, oracle = made(kind).engine, made(kind).oracle
    asked = Asked(Case("A <video> and <image>: what?", ((64, 48),), (frames,)))
    media = {m.kind: m for m in asked.prepare(engine).media}
    media["video"].clip = replace(media["video"].clip, span=frames / fps)
    inputs = engine.prepare(asked.words, [media["image"]], [media["video"]])
    asked.media[0] = (asked.media[0][0], frames / fps)
    given = asked.given(oracle)
    assert torch.equal(inputs.turns, oracle.turns(given))
    known = {key: value for key, value in given.items() if "pixel" not in key}
    theirs, delta = oracle.model.model.get_rope_index(**known)
    [behind] = (inputs.input_ids == engine.config.video_token).nonzero()[-1].tolist()
    mine = inputs.turns[:, : behind + 1]
    assert torch.equal(mine, theirs[:, 0, : behind + 1])
    time, row, col = mine.amax(1).tolist()
    if time <= max(row, col):
        assert torch.equal(inputs.turns, theirs[:, 0])
        assert inputs.ahead == int(delta)
    else:
        assert int(inputs.turns[0, behind + 1]) == time + 1
    assert kind == "Qwen2VL" or fps > 1 or time > max(row, col) or frames < 5


def test_a_clips_span_is_what_its_frames_stand_for(qwen: Made) -> None:
    """The whole film, or from start to end; not how many frames of it were taken."""
    film = np.zeros((20, 30, 40, 3), np.uint8)
    for options, span in (({"frames": 4}, 20), ({"fps": 0.5}, 20), ({"start": 5, "end": 12}, 8),
                          ({"start": 19.0}, 1)):  # fmt: skip
        [medium] = qwen.engine.prepare("What?", video=film, **options).media
        assert medium.clip.span == pytest.approx(span)
        n = len(medium.clip.times)
        step = int(torch.tensor(2 * span / n) * 4)
        assert qwen.engine.model.vision.turn(medium)[0].max() == step * ((n + 1) // 2 - 1)
    clip = qwen.engine.prepare("What?", video=zipvl.demo_clip(), frames=6).media[0].clip
    assert clip.span == pytest.approx(clip.duration)


# --- folders ------------------------------------------------------------------------------------

SPELLINGS: dict[str, dict[str, str]] = {  # what begins a name of the hub's, and there
    "hub": {},
    "4.52": {"visual.": "model.visual.", "model.": "model.language_model."},
    "nested": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
}


def spelt(name: str, spelling: dict[str, str]) -> str:
    for old, new in spelling.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*SPELLINGS, "sharded", "flat", "v4"])
def test_folders(made: Callable, kind: str, form: str, tmp_path: Path) -> None:
    """Every spelling of tensors; config.json as the hub's files have it, flat, and nested as
    transformers 4.57 wrote it; the same logits."""
    source, folder = made(kind).oracle.folder, tmp_path / "x"
    if form == "sharded":
        tiny.shard(source, folder)
    else:
        tiny.copy_rest(source, folder)
        tensors = load_file(source / "model.safetensors")
        names = SPELLINGS.get(form, {})
        tiny.save({spelt(n, names): x for n, x in tensors.items()}, folder / "model.safetensors")
    if form in ("flat", "v4"):
        config = json.loads((source / "config.json").read_text())
        text, tower = config.pop("text_config"), config["vision_config"]
        for section in (text, tower):
            rope = section.pop("rope_parameters")
        rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
        text |= {"rope_theta": 10000.0, "rope_scaling": rope}
        tower |= {"in_chans": 3, "spatial_patch_size": 14}
        text.pop("model_type")
        config = text | config if form == "flat" else config | {"text_config": text}
        tiny.write_json(folder / "config.json", config)
    engine, asked = zipvl.load(folder, device="cpu", dtype="float32"), Asked(CASES["all"])
    close(
        engine.logits(asked.prepare(engine)),
        made(kind).oracle.logits(asked.given(made(kind).oracle)),
        1e-4,
    )


def test_tied(tmp_path: Path) -> None:
    """The 3B has one table; its files hold no head. And a tower whose positions turn faster."""
    rope = {"rope_type": "axial", "rope_theta": 50.0}
    tiny_qwen.build("Qwen2_5_VL", tmp_path, 2, tied=True, tower={"rope_parameters": rope})
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    oracle, asked = Oracle("Qwen2_5_VL", tmp_path), Asked(CASES["one"])
    engine = zipvl.load(tmp_path, device="cpu", dtype="float32")
    assert engine.config.text.tied
    close(engine.logits(asked.prepare(engine)), oracle.logits(asked.given(oracle)), 1e-4)


HUB_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 152064, "image_token_id": 151655,
    "video_token_id": 151656, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip


def written(folder: Path, config: dict[str, Any], **others: dict[str, Any]) -> Path:
    for name, raw in {"config": config, **others}.items():
        tiny.write_json(folder / f"{name}.json", raw)
    return folder


def test_the_7b_is_read(tmp_path: Path) -> None:
    pixels = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2,
              "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}  # fmt: skip
    config = read_config(written(tmp_path, HUB_7B, preprocessor_config=pixels))
    text, tower = config.text, config.vision
    assert (text.kind, text.qkv_bias, text.rope_sections) == ("qwen2", True, (16, 24, 24))
    assert (text.head_dim, text.num_kv_heads, text.rope_theta) == (128, 4, 1e6)
    assert text.sliding_window is None
    assert (config.image_token, config.video_token, config.max_length) == (151655, 151656, 128000)
    assert config.around == (START, END)
    assert (tower.window, tower.whole, tower.pace, tower.theta) == (4, (7, 15, 23, 31), 2, 1e4)
    assert tower.picture == (3136, 12845056)
    assert tower.frame == (128 * 784, 768 * 784)  # not the picture's
    assert tower.mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_what_a_file_leaves_out_is_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    theirs = {"qwen2_vl": transformers.Qwen2VLConfig, "qwen2_5_vl": transformers.Qwen2_5_VLConfig}
    usual = theirs[name]()
    text, tower = usual.text_config, usual.vision_config
    config = read_config(written(tmp_path, {"model_type": name, "vision_config": {}}))
    mine = config.text
    for key in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps"):
        assert getattr(mine, key) == getattr(text, key)
    assert (mine.num_layers, mine.num_heads) == (text.num_hidden_layers, text.num_attention_heads)
    assert mine.num_kv_heads == text.num_key_value_heads
    assert mine.rope_theta == text.rope_parameters["rope_theta"]
    assert mine.rope_sections == (16, 24, 24)
    assert (config.image_token, config.video_token) == (usual.image_token_id, usual.video_token_id)
    found, old = config.vision, name == "qwen2_vl"
    assert (found.depth, found.heads, found.patch) == (
        tower.depth, tower.num_heads, tower.patch_size)  # fmt: skip
    assert found.width == (tower.embed_dim if old else tower.hidden_size)
    assert found.inner == (found.width * tower.mlp_ratio if old else tower.intermediate_size)
    assert found.out == (tower.hidden_size if old else tower.out_hidden_size)
    assert found.act == tower.hidden_act
    assert (found.window, found.pace) == ((0, 0) if old else (4, tower.tokens_per_second))
    assert found.whole == (() if old else tuple(tower.fullatt_block_indexes))
    pixels = Qwen2VLImageProcessorPil()
    assert found.picture == (pixels.size["shortest_edge"], pixels.size["longest_edge"])
    assert (found.mean, found.std) == (tuple(pixels.image_mean), tuple(pixels.image_std))


def test_sizes_of_videos(tmp_path: Path) -> None:
    """A file of their own, or a part of the one of all processors; both spellings of a range."""
    for others, frame in (
        ({"video_preprocessor_config": {"min_pixels": 1000, "max_pixels": 5000}}, (1000, 5000)),
        ({"processor_config": {"video_processor": {"size": {
            "shortest_edge": 2000, "longest_edge": 9000}}}}, (2000, 9000)),
        ({"preprocessor_config": {"size": {"min_pixels": 3000, "max_pixels": 4000}}}, FRAME),
    ):  # fmt: skip
        folder = tmp_path / str(frame[0])
        folder.mkdir()
        config = read_config(written(folder, HUB_7B, **others))
        assert config.vision.frame == frame
        assert config.vision.picture == ((3000, 4000) if frame == FRAME else PICTURE)


WRONG: list[tuple[str, Any, str]] = [  # where, what, a part of the sentence
    ("vision_config", 3, r"vision_config is 3, expected an object"),
    ("vision_config.depth", 0, r"depth is 0"),
    ("vision_config.depth", "4", r"depth is '4'"),
    ("vision_config.depth", 10**6, r"depth is 1000000"),
    ("vision_config.num_heads", 7, r"width 1280 and num_heads 7 do not fit"),
    ("vision_config.num_heads", 640, r"4 must divide each head"),
    ("vision_config.hidden_act", "relu", r"hidden_act 'relu' is not supported"),
    ("vision_config.patch_size", [14, 14], r"patch_size is \[14, 14\]"),
    ("vision_config.temporal_patch_size", 1, r"temporal_patch_size is 1"),
    ("vision_config.in_chans", 4, r"in_chans is 4"),
    ("vision_config.spatial_merge_size", 999, r"spatial_merge_size is 999"),
    ("vision_config.window_size", 27, r"window_size is 27"),
    ("vision_config.window_size", None, r"window_size is None"),
    ("vision_config.fullatt_block_indexes", 7, r"fullatt_block_indexes is 7"),
    ("vision_config.fullatt_block_indexes", ["7"], r"fullatt_block_indexes is \['7'\]"),
    ("vision_config.tokens_per_second", 2.5, r"tokens_per_second is 2.5"),
    ("vision_config.rope_parameters", {"rope_theta": 0}, r"rope_theta is 0"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}, r"rope type 'yarn' is not supported"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24]}, r"mrope_section is \[16, 24\]"),
    (
        "rope_scaling",
        {"type": "mrope", "mrope_section": [1, 2, 3]},
        r"three numbers that sum to 64",
    ),
    ("head_dim", 64, r"mrope_section is \[16, 24, 24\], expected three numbers that sum to 32"),
    ("image_token_id", -1, r"image_token_id is -1"),
]


@pytest.mark.parametrize(("where", "value", "sentence"), WRONG)
def test_wrong_values_are_one_sentence(
    where: str, value: object, sentence: str, tmp_path: Path
) -> None:
    raw = json.loads(json.dumps(HUB_7B))
    *outer, key = where.split(".")
    (raw[outer[0]] if outer else raw)[key] = value
    with pytest.raises(ModelError, match=sentence) as caught:
        read_config(written(tmp_path, raw))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"min_pixels": 0}, "min_pixels is 0"),
    ({"max_pixels": 2**40}, "max_pixels is"),
    ({"size": {"shortest_edge": 9999, "longest_edge": 999}}, "max_pixels is 999"),
    ({"size": [1, 2]}, "size is"),
    ({"min_pixels": 9, "max_pixels": 700}, "max_pixels is 700"),  # less than a block
])  # fmt: skip
@pytest.mark.parametrize("name", ["preprocessor_config", "video_preprocessor_config"])
def test_wrong_settings_are_one_sentence(
    settings: dict[str, Any], sentence: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        read_config(written(tmp_path, HUB_7B, **{name: settings}))
    assert str(tmp_path) in str(caught.value)


def test_wrong_colours_are_one_sentence(tmp_path: Path) -> None:
    settings = {"image_mean": [0.5, 0.5]}
    with pytest.raises(ModelError, match=r"image_mean is \[0.5, 0.5\], expected three numbers"):
        read_config(written(tmp_path, HUB_7B, preprocessor_config=settings))


def test_pictures_have_a_ceiling_of_patches(tmp_path: Path) -> None:
    raw = HUB_7B | {"vision_config": HUB_7B["vision_config"] | {"patch_size": 1}}
    with pytest.raises(ModelError, match=r"max_pixels is 1003520, .* from 3136 to 131072"):
        read_config(written(tmp_path, raw))


def test_a_guide_must_count_time_alike(qwen: Made) -> None:
    one = qwen.engine.model.vision
    for change in ({"pace": 9}, {"patch": 7}, {"frame": (784, 9999)}):
        assert QwenVL(replace(one.config, **change), 64).cuts != one.cuts
    assert QwenVL(replace(one.config, depth=1), 64).cuts == one.cuts


def test_parts_that_do_not_fit_are_told(made: Callable, tmp_path: Path) -> None:
    raw = json.loads((made("Qwen2_5_VL").oracle.folder / "config.json").read_text())
    raw["vision_config"]["out_hidden_size"] = 60
    tiny.copy_rest(made("Qwen2_5_VL").oracle.folder, tmp_path)
    written(tmp_path, raw)
    with pytest.raises(ModelError, match=r"config\.json: the tower makes tokens of 60 numbers"):
        zipvl.load(tmp_path, device="cpu")


def test_two_frames_that_share_tokens_are_one_on_the_page(qwen: Made) -> None:
    """The first of each pair is shown, with all tokens of both."""
    inputs = qwen.engine.prepare("What?", video=picture_frames(5), frames=5)
    panel = page.panels(inputs, qwen.engine.model.vision, [None])[0]
    assert panel.title == "Video 1: 5 frames, 3 shown"
    assert panel.labels == ["0:00.0", "0:02.0", "0:04.0"]
    assert len(panel.pictures) == 3
    medium = inputs.media[0]
    assert np.array_equal(np.asarray(panel.pictures[1]), medium.crops[2].numpy())
    assert sorted(panel.tokens.flatten()) == inputs.is_visual.nonzero()[:, 0].tolist()
    assert panel.frame.tolist() == sorted(panel.frame.tolist())
    assert set(panel.frame.tolist()) == {0, 1, 2}


def picture_frames(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 60, 80, 3), dtype=np.uint8)
