"""The public API of the engine, on tiny checkpoints: what users call, and what may go wrong."""

import copy
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import zipvl
from zipvl import MediaError, ModelError, OutOfMemory, UsageError, errors
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.engine import Engine
from zipvl.model.cache import LayerCache
from zipvl.model.vlm import VLM

STAGES = {"video", "vision", "prefill", "decode"}


@pytest.fixture(scope="module")
def folder(oracle: Callable) -> Path:
    return oracle("llava_onevision").folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return zipvl.load(folder, device="cpu")


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng().integers(0, 256, (90, 130, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def video() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (6, 60, 80, 3), dtype=np.uint8)


def with_stops(engine: Engine, *stops: int) -> Engine:
    """The same engine, whose answers end at any of `stops`."""
    other = copy.copy(engine)
    other.chat = dataclasses.replace(engine.chat, stop_ids=frozenset(stops))
    return other


def with_own_weights(engine: Engine) -> Engine:
    """The same engine with a copy of the weights, for tests that damage them."""
    other = copy.copy(engine)
    other.model = copy.deepcopy(engine.model)
    return other


def runs(inputs: zipvl.Inputs) -> list[str]:
    """What the prompt is made of, in order: "text" or "visual" stretches."""
    flags = inputs.is_visual.tolist()
    changes = [f for i, f in enumerate(flags) if i == 0 or f != flags[i - 1]]
    return ["visual" if f else "text" for f in changes]


# --- names and types --------------------------------------------------------------------------


def test_inputs_and_logits(engine: Engine, picture: Image.Image, video: np.ndarray) -> None:
    inputs = engine.prepare("What happens?", images=[picture], video=video, frames=4)
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.is_visual.dtype == torch.bool
    assert inputs.input_ids.shape == inputs.is_visual.shape == (len(inputs),)
    image, clip = inputs.media
    config = engine.config
    assert (inputs.input_ids == config.image_token).sum() == image.tokens > 0
    assert (inputs.input_ids == config.video_token).sum() == clip.tokens > 0
    assert inputs.is_visual.sum() == image.tokens + clip.tokens
    logits = engine.logits(inputs)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(inputs), config.text.vocab_size)
    assert logits.isfinite().all()


def test_result(engine: Engine, picture: Image.Image) -> None:
    out = engine.generate("What is it?", images=[picture], max_new_tokens=5, ignore_eos=True)
    assert isinstance(out, zipvl.Result)
    assert isinstance(out.text, str)
    assert len(out.tokens) == 5
    assert all(type(t) is int for t in out.tokens)
    assert out.finish_reason == "length"
    assert out.text == engine.chat.decode(out.tokens)


def test_steps_equal_one_forward(
    engine: Engine, video: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's logits are those of one dense forward over the prompt and the answer so far."""
    inputs, steps = engine.prepare("Describe the video.", video=video), []
    logits = VLM.logits
    with monkeypatch.context() as patch:
        patch.setattr(VLM, "logits", lambda *a: steps.append(logits(*a)) or steps[-1].clone())
        out = engine.generate(inputs, method="dense", max_new_tokens=6, ignore_eos=True)
    longer = copy.copy(inputs)
    longer.input_ids = torch.cat([inputs.input_ids, torch.tensor(out.tokens)])
    longer.is_visual = torch.cat([inputs.is_visual, torch.zeros(6, dtype=torch.bool)])
    whole = engine.logits(longer)[len(inputs) - 1 : -1]
    torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-4)
    assert whole[:, : engine.chat.vocab_size].argmax(-1).tolist() == out.tokens


def test_prompt_direct_equals_prepared(
    engine: Engine, picture: Image.Image, video: np.ndarray
) -> None:
    media = {"images": [picture], "video": video}
    inputs = engine.prepare("Look.", **media)
    options = {"method": "dense", "max_new_tokens": 4}
    wanted = engine.generate(inputs, **options).tokens
    assert engine.generate("Look.", **options, **media).tokens == wanted
    streamed = [p.token for p in engine.stream("Look.", **options, **media)]
    assert streamed == [*wanted, None]
    assert torch.equal(engine.logits("Look.", **media), engine.logits(inputs))


def test_faults_of_the_words_are_told_before_media_are_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipvl.engine.run.read_clip", None)
    for prompt, words in (("<video> or <video>?", "2 <video> markers"), ("bad \ud800", "Unicode")):
        with pytest.raises(UsageError, match=words):
            engine.prepare(prompt, video="film.mp4")


def test_media_sources_are_equal(engine: Engine, picture: Image.Image, tmp_path: Path) -> None:
    """A path, a Path in odd letters, a PIL picture, alone or in a list."""
    path = tmp_path / "ein Bild 写真.png"
    picture.save(path)
    ids = [engine.prepare("x", images=i) for i in ([str(path)], [path], [picture], path, picture)]
    for other in ids[1:]:
        assert torch.equal(ids[0].input_ids, other.input_ids)
        assert torch.equal(ids[0].media[0].crops, other.media[0].crops)


# --- markers and messages ---------------------------------------------------------------------


def test_markers_place_media(engine: Engine, picture: Image.Image, video: np.ndarray) -> None:
    other = picture.resize((40, 200))
    inputs = engine.prepare(
        "First <image> then <video> or <image> and <video>?",
        images=[picture, other], video=[video, video[:2]], frames=2,
    )  # fmt: skip
    assert [m.kind for m in inputs.media] == ["image", "video", "image", "video"]
    assert inputs.media[0].geometry.width == picture.width
    assert inputs.media[2].geometry.width == other.width
    assert inputs.media[3].clip.total == 2
    assert runs(inputs) == ["text", "visual"] * 4 + ["text"]
    sizes = [m.tokens for m in inputs.media]
    edges = inputs.is_visual.int().diff().nonzero()[:, 0].tolist()
    assert [b - a for a, b in zip(edges[::2], edges[1::2], strict=True)] == sizes


def test_without_markers_media_come_first(engine: Engine, picture: Image.Image) -> None:
    first = engine.prepare("Which is red?", images=[picture, picture])
    assert [m.kind for m in first.media] == ["image", "image"]
    tail = engine.chat.tokenizer.decode(
        first.input_ids[first.is_visual.nonzero()[-1] + 1 :].tolist()
    )
    assert "Which is red?" in tail


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "named"),
    [
        ("<image> <image>", 1, 0, "2 <image> markers but 1 images"),
        ("<image>", 2, 0, "1 <image> markers but 2 images"),
        ("<video>", 0, 2, "1 <video> markers but 2 videos"),
        ("see <image>", 0, 0, "1 <image> markers but 0 images"),
        ("<video> and", 1, 0, "1 <video> markers but 0 videos"),
    ],
)
def test_markers_must_match(
    engine: Engine, picture: Image.Image, video: np.ndarray, prompt: str, images: int,
    videos: int, named: str,
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=named):
        engine.prepare(prompt, images=[picture] * images, video=[video] * videos)


def test_messages_with_history(engine: Engine, picture: Image.Image) -> None:
    talk = [
        {"role": "user", "content": "What is <image>?"},
        {"role": "assistant", "content": "A door."},
        {"role": "user", "content": "And <image>?"},
    ]
    inputs = engine.prepare(talk, images=[picture, picture], system="Be brief.")
    text = engine.chat.tokenizer.decode(
        inputs.input_ids[~inputs.is_visual].tolist(), skip_special_tokens=False
    )
    places = [text.index(t) for t in ("Be brief.", "What is", "A door.", "And", "assistant\n")]
    assert places[:4] == sorted(places[:4])
    assert text.endswith("assistant\n")
    assert runs(inputs) == ["text", "visual", "text", "visual", "text"]


def test_a_second_question_encodes_nothing(engine: Engine, video: np.ndarray) -> None:
    inputs = engine.prepare("What happens?", video=video)
    engine.generate(inputs, max_new_tokens=1)
    features = inputs.media[0].features
    assert features is not None
    second = engine.prepare("And then?", video=inputs.media)
    out = engine.generate(second, method="dense", max_new_tokens=4)
    assert second.media[0].features is features
    fresh = engine.generate("And then?", video=video, method="dense", max_new_tokens=4)
    assert out.tokens == fresh.tokens
    assert out.stats.frames == fresh.stats.frames


def test_prompt_faults(engine: Engine, picture: Image.Image) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.prepare("")
    with pytest.raises(UsageError, match="not valid Unicode"):
        engine.prepare("caf\udce9")
    with pytest.raises(UsageError, match="inputs are prepared"):
        engine.generate(engine.prepare("x"), images=[picture])
    with pytest.raises(UsageError, match="inputs is a dict"):
        engine.generate([{"role": "user", "content": "x"}])
    with pytest.raises(MediaError, match=r"gone\.png"):
        engine.prepare("x", images=["gone.png"])
    with pytest.raises(MediaError, match=r"float64 \[2, 3\]"):
        engine.prepare("x", video=np.zeros((2, 3)))
    for wrong in (2.5, "5", None):
        with pytest.raises(UsageError, match=f"max_new_tokens is {wrong!r}: give a whole number"):
            engine.generate("What?", max_new_tokens=wrong)  # type: ignore[arg-type]
    for wrong in (None, 5, [None]):
        with pytest.raises(UsageError, match="give text or prepared inputs"):
            engine.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give text or prepared inputs"):  # at once
        engine.stream(5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        engine.generate("x", max_new_tokens=0)
    assert len(engine.prepare("", images=[picture]).media) == 1


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "no message from the user"),
        ([{"role": "system", "content": "Be brief."}], "no message from the user"),
        ([{"role": "usr", "content": "x"}], "'usr'.* is no message"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "'text': 5} is no part"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "is no part"),
        ([{"role": "user", "content": ["x"]}], "'x' is no part"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "images="),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://a"}}],
                }
            ],
            "images=",
        ),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "is no part"),
        ([{"role": "user", "content": 5}], "is no message"),
        ([{"role": "user"}], "is no message"),
        (["What?"], "'What\\?' is no message"),
    ],
)
def test_messages_at_fault(
    engine: Engine, picture: Image.Image, messages: list, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        engine.prepare(messages, images=[picture])


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["What is shown?", "image"], "What is shown?<image>"),
        (["image", "What is shown?"], "<image>\nWhat is shown?"),
        (["First ", "image", " then ", "video", " which?"], "First <image> then <video> which?"),
        (["video", "image", "a", " b"], "<video><image>a b"),
    ],
)
def test_content_in_parts(
    engine: Engine, picture: Image.Image, video: np.ndarray, parts: list[str], text: str
) -> None:
    """As Hugging Face and OpenAI write it: the ids of the same text with markers."""
    kinds = ("image", "video")
    content = [{"type": p} if p in kinds else {"type": "text", "text": p} for p in parts]
    media = {"images": [picture], "video": [video] if "video" in parts else None, "frames": 2}
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    apart = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in before]
    found = engine.prepare([*apart, {"role": "user", "content": content}], **media)
    want = engine.prepare([*before, {"role": "user", "content": text}], **media)
    assert torch.equal(found.input_ids, want.input_ids)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prompt": None}, "the prompt is a NoneType"),
        ({"prompt": 5}, "the prompt is a int"),
        ({"system": 5}, "system is a int"),
        ({"images": [np.zeros((900, 900, 3), dtype=np.uint8)]}, r"ndarray.*PIL\.Image\.fromarray"),
        ({"images": 5}, "a picture is a int"),
        ({"video": 5}, "a video is a int"),
        ({"video": [None]}, "a video is a NoneType"),
        ({"frames": 2.5}, "frames is 2.5"),
        ({"frames": "5"}, "frames is '5'"),
        ({"fps": "1"}, "fps is '1'"),
        ({"start": []}, r"start is \[\]"),
        ({"end": True}, "end is True"),
    ],
)
def test_arguments_of_a_wrong_kind(
    engine: Engine, video: np.ndarray, given: dict, named: str
) -> None:
    asked = {"prompt": "What?"} | ({} if "images" in given else {"video": video}) | given
    with pytest.raises(UsageError, match=named) as e:
        engine.prepare(**asked)
    assert len(str(e.value)) < 150
    assert "\n" not in str(e.value)


def test_numbers_of_numpy_are_numbers(engine: Engine, video: np.ndarray) -> None:
    assert engine.prepare("x", video=video, frames=np.int64(2), fps=np.float32(1)).media


@pytest.mark.parametrize(
    "given", [{"model": 5}, {"device": []}, {"dtype": []}, {"attn": []}, {"template": 5}]
)
def test_load_with_arguments_of_a_wrong_kind(given: dict) -> None:
    with pytest.raises(UsageError):
        zipvl.load(**{"device": "cpu"} | given)


def test_a_bar_while_weights_load(capfd: pytest.CaptureFixture) -> None:
    zipvl.load(device="cpu", show_progress=True)
    assert re.search(r"load weights .*\d+/\d+", capfd.readouterr().err)
    zipvl.load(device="cpu")
    assert capfd.readouterr().err == ""


# --- streaming, stopping, batches -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava_onevision", "llava"])
def test_stream_is_generate(oracle: Callable, kind: str, picture: Image.Image) -> None:
    engine = zipvl.load(oracle(kind).folder)
    inputs = engine.prepare("What is shown?", images=[picture])
    for seed in range(3):  # hot sampling makes broken characters
        options = {"max_new_tokens": 40, "temperature": 3.0, "seed": seed}
        out = engine.generate(inputs, **options)
        *pieces, last = engine.stream(inputs, **options)
        assert [p.token for p in pieces] == out.tokens
        assert "".join(p.text for p in pieces) + last.text == out.text == last.result.text
        assert all(p.result is None for p in pieces)
        assert last.token is None
        assert last.result.tokens == out.tokens


def test_two_streams_at_once(engine: Engine, picture: Image.Image) -> None:
    asked = [engine.prepare("What?"), engine.prepare("Which?", images=[picture])]
    options = {"max_new_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    alone = [engine.generate(i, **options).tokens for i in asked]
    both = zip(*(engine.stream(i, **options) for i in asked), strict=True)
    assert [[p.token for p in pieces][:-1] for pieces in zip(*both, strict=True)] == alone


def test_stop_token_is_left_out(engine: Engine) -> None:
    options = {"method": "dense", "max_new_tokens": 24, "temperature": 1.0, "seed": 4}
    whole = engine.generate("What happens?", **options, ignore_eos=True).tokens
    assert len(whole) == 24
    at = next(i for i, t in enumerate(whole) if i > 3 and t not in whole[:i])
    stopping = with_stops(engine, whole[at])
    out = stopping.generate("What happens?", **options)
    assert (out.tokens, out.finish_reason) == (whole[:at], "stop")
    assert [p.token for p in stopping.stream("What happens?", **options)] == [*whole[:at], None]
    assert stopping.generate("What happens?", **options, ignore_eos=True).tokens == whole
    first = with_stops(engine, whole[0]).generate("What happens?", **options)
    assert (first.text, first.tokens, first.finish_reason) == ("", [], "stop")


def test_stopping_with_the_last_token(engine: Engine) -> None:
    whole = engine.generate("Hi", method="dense", max_new_tokens=3, ignore_eos=True)
    one = engine.generate("Hi", method="dense", max_new_tokens=1, ignore_eos=True)
    assert (one.tokens, one.finish_reason) == (whole.tokens[:1], "length")
    assert one.stats.decode_rate == 0


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.8,always=last"])
def test_batch_is_one_by_one(
    engine: Engine, picture: Image.Image, video: np.ndarray, method: str
) -> None:
    asked = [
        engine.prepare("Short."),
        engine.prepare("What happens in the video?", video=video),
        engine.prepare("Compare <image> with <image>.", images=[picture, picture]),
    ]
    options = {"method": method, "max_new_tokens": 8, "temperature": 0.7, "seed": 9}
    alone = [engine.generate(i, **options, ignore_eos=True) for i in asked]
    together = engine.generate(asked, **options, ignore_eos=True)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.stats.batch for r in together] == [3, 3, 3]
    for one, same in zip(alone, together, strict=True):
        assert same.stats.layers == one.stats.layers
        assert same.stats.kv_bytes_dense == one.stats.kv_bytes_dense
    again = engine.generate(asked[:1], **options, ignore_eos=True)
    assert isinstance(again, list)
    assert again[0].tokens == alone[0].tokens
    assert engine.generate([]) == []
    texts = engine.generate(["Short.", "Short."], **options, ignore_eos=True)
    assert [r.tokens for r in texts] == [alone[0].tokens] * 2


def test_finished_sequences_leave(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["What is it?", "How many people are there?", "The cat is black."]
    asked = [engine.prepare(p) for p in prompts]
    options = {"method": "dense", "max_new_tokens": 12, "temperature": 1.5, "seed": 2}
    whole = [r.tokens for r in engine.generate(asked, **options, ignore_eos=True)]
    stop = whole[1][2]
    wanted = [t[: t.index(stop)] if stop in t else t for t in whole]
    sizes = []
    decode = type(engine.model.text).decode

    def spy(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(x))
        return decode(self, x, *rest)

    monkeypatch.setattr(type(engine.model.text), "decode", spy)
    out = with_stops(engine, stop).generate(asked, **options)
    assert [r.tokens for r in out] == wanted
    reasons = ["stop" if stop in t else "length" for t in whole]
    assert [r.finish_reason for r in out] == reasons
    live = [sum(len(t) > step for t in wanted) for step in range(12)]
    assert sizes == [n for n in live[:11] if n]


# --- seeds and sampling -----------------------------------------------------------------------


def test_padding_rows_are_never_sampled(engine: Engine) -> None:
    size = engine.chat.vocab_size
    assert engine.config.text.vocab_size > size, "the test needs an embedding with padding rows"
    loud = with_own_weights(engine)
    loud.model.lm_head.weight[size:] = loud.model.lm_head.weight[:size].mean(0) * 100
    for options in ({}, {"temperature": 50.0}):
        tokens = loud.generate("What?", max_new_tokens=40, ignore_eos=True, **options).tokens
        assert max(tokens) < size


def test_same_seed_in_two_processes(engine: Engine, folder: Path) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 77}
    code = (
        "import json, sys, torch, zipvl; torch.rand(3); torch.set_num_threads(2);"
        "e = zipvl.load(sys.argv[1]);"
        "print(json.dumps([e.generate('What happens?', **json.loads(sys.argv[2])).tokens"
        " for _ in range(2)]));"
        "v = zipvl.load(device='cpu').prepare('What?', video=str(zipvl.demo_clip()), frames=4);"
        "assert 'sympy' not in sys.modules, 'PyTorch has imported its compiler: a second of each start'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(options)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    here = engine.generate("What happens?", **options).tokens
    assert json.loads(done.stdout) == [here, here]
    assert engine.generate("What happens?", **options | {"seed": 78}).tokens != here


def test_requests_leave_no_trace(engine: Engine, picture: Image.Image, video: np.ndarray) -> None:
    """A, B, A: the second A answers as the first, also with a policy object that B used."""
    policy = zipvl.load_policy("zipvl:tau=0.9,always=last,recent=8,random=8")
    a, b = engine.prepare("What?", video=video), engine.prepare("Who?", images=[picture])
    options = {"method": policy, "max_new_tokens": 6, "ignore_eos": True}
    first = engine.generate(a, **options)
    engine.generate(b, **options)
    list(engine.stream(b, **options))
    second = engine.generate(a, **options)
    assert first.tokens == second.tokens
    assert first.stats.layers == second.stats.layers


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.7,always=last"])
def test_stats(engine: Engine, video: np.ndarray, method: str) -> None:
    inputs = engine.prepare("What happens in the video?", video=video, frames=5)
    stats = engine.generate(inputs, method=method, max_new_tokens=7, ignore_eos=True).stats
    raw = stats.to_dict()
    assert json.loads(json.dumps(raw, allow_nan=False)) == raw
    assert set(stats.seconds) >= STAGES
    assert all(s >= 0 for s in stats.seconds.values())
    assert stats.seconds["video"] == inputs.seconds > 0
    again = engine.generate(inputs, method=method, max_new_tokens=7, ignore_eos=True).stats
    assert again.seconds["video"] == 0  # counted once
    assert stats.seconds["prefill"] >= sum(
        s for name, s in stats.seconds.items() if name.startswith("prefill_")
    )
    assert (stats.prompt_tokens, stats.new_tokens) == (len(inputs), 7)
    assert stats.visual_tokens == int(inputs.is_visual.sum())
    assert [f["index"] for f in stats.frames] == np.linspace(0, 5, 5, dtype=int).tolist()
    assert stats.peak_memory > 10**7
    assert len(stats.layers) == engine.config.text.num_layers
    dense = method == "dense"
    for layer in stats.layers:
        assert layer["tokens"] == len(inputs)
        assert (layer["attended"] == len(inputs)) == dense
        assert layer["cached"] == layer["attended"]
        assert layer["ratio"] == layer["attended"] / len(inputs)
        assert layer["work"] == pytest.approx(layer["ratio"] ** 2)
    assert stats.ratio == pytest.approx(np.mean([x["ratio"] for x in stats.layers]))
    assert (stats.kv_bytes == stats.kv_bytes_dense) == dense
    assert stats.kv_bytes <= stats.kv_bytes_dense
    assert stats.prefill_rate == pytest.approx(len(inputs) / stats.seconds["prefill"])
    assert stats.decode_rate == pytest.approx(6 / stats.seconds["decode"])


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.7,always=last"])
@pytest.mark.parametrize("count", [1, 3])
def test_kv_bytes_are_real_storage(
    engine: Engine, video: np.ndarray, method: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LayerCache] = []
    start = LayerCache.__init__

    def spy(self: LayerCache, *args: object, **named: object) -> None:
        start(self, *args, **named)
        made.append(self)

    monkeypatch.setattr(LayerCache, "__init__", spy)
    asked = [engine.prepare("What? " * (b + 1), video=video) for b in range(count)]
    out = engine.generate(asked, method=method, max_new_tokens=5, ignore_eos=True)
    bytes_held = sum(
        t.untyped_storage().nbytes() for cache in made[: engine.config.text.num_layers]
        for t in (cache.k, cache.v)
    )  # fmt: skip
    assert len(made) == engine.config.text.num_layers
    assert sum(r.stats.kv_bytes for r in out) == bytes_held


def test_caches_die_with_the_answer(engine: Engine, video: np.ndarray) -> None:
    def caches() -> set[int]:
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) is LayerCache}

    before = caches()  # of other tests
    out = engine.generate("What?", video=video, max_new_tokens=3)
    stream = engine.stream("What?", video=video, max_new_tokens=9)
    next(stream)
    assert caches() - before
    stream.close()
    assert not caches() - before
    assert out.tokens


# --- checkpoints and machines -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"attn": "magic"}, "unknown attention backend 'magic'"),
        ({"attn": "torch-flash", "device": "cpu"}, "cannot run here"),
        ({"template": "no-such"}, "template 'no-such' is neither"),
    ],
)
def test_load_options(folder: Path, options: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        zipvl.load(folder, **options)


@pytest.mark.parametrize("name", ["missing/folder/deep", "no such thing", "config.json"])
def test_load_names_what_is_no_checkpoint(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=name.rpartition("/")[2]):
        zipvl.load(folder / name if name == "config.json" else name)


def test_bfloat16_on_the_cpu(folder: Path, engine: Engine, video: np.ndarray) -> None:
    half = zipvl.load(folder, device="cpu", dtype="bf16")
    inputs = half.prepare("What happens?", video=video)
    assert half.model.dtype == torch.bfloat16
    got, wanted = half.logits(inputs), engine.logits(engine.prepare("What happens?", video=video))
    assert got.dtype == torch.float32
    gap = (got - wanted).abs().mean() / wanted.std()
    assert 0 < gap < 0.15
    out = half.generate(inputs, max_new_tokens=4, ignore_eos=True)
    assert out.stats.kv_bytes < engine.generate(inputs, max_new_tokens=4).stats.kv_bytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(engine: Engine, bad: float) -> None:
    broken = with_own_weights(engine)
    broken.model.text.layers[0].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(ModelError, match="--dtype"):
        broken.generate("Hello")
    with pytest.raises(ModelError, match="--dtype"):
        next(broken.stream("Hello"))


def with_config(engine: Engine, window: int | None = None, length: int | None = None) -> Engine:
    other = copy.copy(engine)
    text = dataclasses.replace(engine.config.text, sliding_window=window)
    other.config = dataclasses.replace(engine.config, text=text, max_length=length)
    return other


def test_long_prompts_warn(engine: Engine, video: np.ndarray) -> None:
    count = len(engine.prepare("What?", video=video, frames=6))
    assert with_config(engine, length=count).prepare("What?", video=video, frames=6).warnings == []
    short = with_config(engine, length=count - 1)
    [warning] = short.prepare("What?", video=video, frames=6).warnings
    assert f"has {count} tokens" in warning
    assert f"{count - 1}: " in warning


def test_sliding_windows_refuse(engine: Engine) -> None:
    """A window may hold prompt and answer whole, or the model would compute something else."""
    count = len(engine.prepare("What is in the video?"))
    with pytest.raises(ModelError, match=f"{count} tokens.*window is {count - 1}"):
        with_config(engine, window=count - 1).prepare("What is in the video?")
    tight = with_config(engine, window=count + 2)
    with pytest.raises(UsageError, match="fewer --max-new-tokens"):
        tight.generate("What is in the video?", max_new_tokens=4)
    out = tight.generate("What is in the video?", max_new_tokens=3, ignore_eos=True)
    wanted = engine.generate("What is in the video?", max_new_tokens=3, ignore_eos=True)
    assert out.tokens == wanted.tokens


@pytest.mark.parametrize(
    ("refusal", "number"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB."), "20.50 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"
                      " allocate 76543210 bytes. Error code 12"), "76543210 bytes"),
        (MemoryError(), "no size"),
    ],
    ids=["cuda", "cpu", "python"],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_out_of_memory(
    engine: Engine, refusal: Exception, number: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence with the number and what to lower; the engine answers the next request."""

    def refuse(*_args: object, **_options: object) -> None:
        raise refusal

    before = engine.generate("What?", max_new_tokens=4, ignore_eos=True).tokens
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model.text), stage, refuse)
        with pytest.raises(OutOfMemory, match=number) as caught:
            engine.generate("What?", max_new_tokens=4, ignore_eos=True)
    assert caught.value.code == 3
    assert "--frames" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.generate("What?", max_new_tokens=4, ignore_eos=True).tokens == before


def test_out_of_memory_while_reading(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise MemoryError("Unable to allocate 91.5 GiB for an array with shape (9, 9)")

    monkeypatch.setattr("zipvl.engine.inputs.Reading", refuse)
    with pytest.raises(OutOfMemory, match=r"91\.5 GiB.*--frames"):
        engine.prepare("What?", video="film.mp4")


def test_reader(engine: Engine) -> None:
    pytest.importorskip("decord")
    path = str(zipvl.demo_clip())
    first, second = (engine.prepare("What?", video=path, reader=r) for r in ("pyav", "decord"))
    assert torch.equal(first.media[0].crops, second.media[0].crops)
    assert [i.media[0].clip.decoder for i in (first, second)] == ["pyav", "decord"]
    with pytest.raises(UsageError, match="unknown reader 'opencv'"):
        engine.prepare("What?", video=path, reader="opencv")


def test_other_runtime_errors_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an allocator's refusal is dressed as one."""

    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(engine.model.text), "prefill", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        engine.generate("What?")


def test_methods(engine: Engine, video: np.ndarray, tmp_path: Path) -> None:
    """A method is a name with options, a class in a file, or an object."""
    inputs = engine.prepare("What happens?", video=video)
    own = tmp_path / "mine.py"
    own.write_text("import zipvl\nclass Mine(zipvl.Policy):\n    pass\n")
    options = {"max_new_tokens": 5, "ignore_eos": True}
    dense = engine.generate(inputs, method="dense", **options)
    for same in ("zipvl:tau=1.0", f"{own}:Mine", zipvl.Policy()):
        assert engine.generate(inputs, method=same, **options).tokens == dense.tokens
    with pytest.raises(UsageError, match="unknown method 'dens'"):
        engine.generate(inputs, method="dens")
    with pytest.raises(UsageError, match="no option 'taw'"):
        engine.logits(inputs, method="zipvl:taw=1")
    with pytest.raises(UsageError, match="unknown method"):
        next(engine.stream(inputs, method="nope"))


def test_logits_of_dropped_tokens_are_nan(engine: Engine, video: np.ndarray) -> None:
    inputs = engine.prepare("What happens?", video=video)
    gone = engine.logits(inputs, method="fastv:ratio=0.5").isnan().all(-1)
    assert gone.any()
    assert inputs.is_visual[gone].all()
    assert not gone[-1]


# --- memory and time that nobody should pay ---------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.8,always=last", "h2o:heavy=9,recent=9",
                                    "zipvl-quant:tau=0.9,interval=3", "kivi:group=4,residual=8"])  # fmt: skip
def test_caches_grow_while_decoding(
    engine: Engine, video: np.ndarray, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places for new tokens come in steps; tokens are those of caches that had them all at once."""
    asked = [engine.prepare("What? " * (b + 1), video=video) for b in range(3)]
    options = {"method": method, "max_new_tokens": 23, "ignore_eos": True}
    want = engine.generate(asked, **options)
    stop = want[1].tokens[7]
    some = with_stops(engine, stop).generate(asked, **options | {"ignore_eos": False})
    monkeypatch.setattr("zipvl.engine.run.ROOM", 4)
    got = engine.generate(asked, **options)
    assert [r.tokens for r in got] == [r.tokens for r in want]
    left = with_stops(engine, stop).generate(asked, **options | {"ignore_eos": False})
    assert [r.tokens for r in left] == [r.tokens for r in some]
    if method == "dense":
        assert got[0].stats.kv_bytes == got[0].stats.kv_bytes_dense < want[0].stats.kv_bytes


def test_a_huge_answer_costs_nothing_before_it_comes(engine: Engine) -> None:
    """10^9 tokens may come; two do."""
    inputs = engine.prepare("What?")
    stop = engine.generate(inputs, "dense", max_new_tokens=3, ignore_eos=True).tokens[2]
    result = with_stops(engine, stop).generate(inputs, "dense", max_new_tokens=10**9)
    assert result.finish_reason == "stop"
    assert result.stats.kv_bytes < 2**24


@torch.inference_mode()
def test_sequences_that_stop_free_their_caches_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one leaves, one layer is held twice and no more; afterwards only the others' are held."""
    alive: weakref.WeakSet[LayerCache] = weakref.WeakSet()
    held, start = [], LayerCache.__init__

    def spy(self: LayerCache, *args: object, **named: object) -> None:
        start(self, *args, **named)
        alive.add(self)
        held.append(sum(cache.nbytes for cache in alive))

    asked = [engine.prepare("What? " * n) for n in (40, 41, 42, 43)]
    options = {"method": "dense", "max_new_tokens": 10, "temperature": 1.5}
    free = engine.generate(asked, **options, ignore_eos=True)
    stop = free[1].tokens[2]
    steps, decode = [], type(engine.model.text).decode

    def step(self: torch.nn.Module, *args: object) -> torch.Tensor:
        steps.append(sum(cache.nbytes for cache in alive))
        return decode(self, *args)

    monkeypatch.setattr(LayerCache, "__init__", spy)
    monkeypatch.setattr(type(engine.model.text), "decode", step)
    with_stops(engine, stop).generate(asked, **options)
    layers = engine.config.text.num_layers
    whole = held[layers - 1]
    assert len(held) > layers
    assert max(held[layers:]) <= whole * (1 + 1 / layers)
    assert steps[0] == whole > steps[-1]


def test_the_prompt_is_let_go_when_it_is_prefilled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings do not live through the layers, nor hidden states through decoding."""
    made: list[weakref.ref] = []
    living: dict[str, list[bool]] = {"layer": [], "step": []}
    text, decode = type(engine.model.text), type(engine.model.text).decode
    embed, forward = type(engine.model).embed, type(engine.model.text.norm).forward
    prefill = text.prefill

    def note(tensor: torch.Tensor) -> torch.Tensor:
        made.append(weakref.ref(tensor))
        return tensor

    def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if made and self is engine.model.text.layers[1].input_layernorm and len(x) > 1:
            living["layer"].append(made[0]() is not None)
        return forward(self, x)

    def step(self: torch.nn.Module, *args: object) -> torch.Tensor:
        living["step"].append(made[1]() is not None)
        return decode(self, *args)

    def filled(self: torch.nn.Module, *args: object) -> object:
        out = prefill(self, *args)
        note(out.hidden)
        return out

    inputs = engine.prepare("What? " * 30)
    monkeypatch.setattr(type(engine.model), "embed", lambda *a: note(embed(*a)))
    monkeypatch.setattr(type(engine.model.text.norm), "forward", norm)
    engine.generate(inputs, max_new_tokens=1)
    assert living["layer"] == [False]
    monkeypatch.setattr(text, "prefill", filled)
    monkeypatch.setattr(text, "decode", step)
    made.clear()
    engine.generate(inputs, max_new_tokens=3, ignore_eos=True)
    assert living["step"] == [False, False]


class Large(TorchDispatchMode):
    """Sizes of the tensors made inside the block that have `least` bytes or more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.nbytes >= self.least and not out._is_view():
            self.sizes += [out.nbytes] * (out not in args if not args else out is not args[0])
        return out


def test_logits_take_the_memory_of_their_answer(engine: Engine) -> None:
    inputs = engine.prepare("What? " * 300)
    size = len(inputs) * engine.config.text.vocab_size * 4
    with Large(size // 2) as large:
        engine.logits(inputs)
    assert large.sizes == [size]


def test_three_questions_about_a_video_read_it_once(
    engine: Engine, video: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, encoded = [], []
    read, encode = engine_inputs.Reading, type(engine.model.vision).encode
    monkeypatch.setattr(engine_inputs, "Reading", lambda *a, **k: reads.append(1) or read(*a, **k))
    monkeypatch.setattr(
        type(engine.model.vision), "encode", lambda *a, **k: encoded.append(1) or encode(*a, **k)
    )
    questions = ["What?", "Where is it now?", "Who?"]
    options = {"max_new_tokens": 4, "ignore_eos": True}
    together = engine.generate(questions, video=video, **options)
    assert (len(reads), len(encoded)) == (1, 1)
    alone = [engine.generate(q, video=video, **options) for q in questions]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_samples_of_one_prompt_differ_by_their_seeds(engine: Engine) -> None:
    inputs = engine.prepare("What is it?")
    options = {"max_new_tokens": 8, "temperature": 3.0, "ignore_eos": True}
    many = [r.tokens for r in engine.generate([inputs] * 3, seed=[5, 6, 5], **options)]
    assert many[0] == many[2] != many[1]
    assert many[1] == engine.generate(inputs, seed=6, **options).tokens
    with pytest.raises(UsageError, match="2 seeds for 3 prompts"):
        engine.generate([inputs] * 3, seed=[1, 2], **options)


@pytest.mark.parametrize("method", ["dense", "fastv:ratio=0.3"])
def test_last_logits_are_the_last_rows(engine: Engine, video: np.ndarray, method: str) -> None:
    inputs = engine.prepare("What happens here?", video=video)
    whole = engine.logits(inputs, method)
    for last in (1, 7, len(inputs), 10 * len(inputs)):
        some = engine.logits(inputs, method, last=last)
        torch.testing.assert_close(some, whole[-last:], equal_nan=True, rtol=1e-5, atol=1e-5)


def test_what_a_process_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what the machine, a control group of either version, and the process allow."""
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000 kB\n",
        "/proc/self/cgroup": "4:memory:/box/7\n0::/scope\n",
        "/proc/self/statm": "10 1 1",
    }
    monkeypatch.setattr(errors, "read", lambda path: files[path])
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert errors.available() == 8000 * 1024
    v2 = "/sys/fs/cgroup/scope/memory."
    files |= {v2 + "max": "max", v2 + "current": "1000", v2 + "stat": "anon 5\ninactive_file 400\n"}
    assert errors.available() == 8000 * 1024
    files[v2 + "max"] = "7000"
    assert errors.available() == 7000 - 1000 + 400
    v1 = "/sys/fs/cgroup/memory/box/7/memory."
    files |= {v1 + "limit_in_bytes": "5000", v1 + "usage_in_bytes": "4000",
              v1 + "stat": "inactive_file 1\ntotal_inactive_file 10\n"}  # fmt: skip
    assert errors.available() == 1010
    page = os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr("resource.getrlimit", lambda _: (10 * page + 77, -1))
    assert errors.available() == 77
    files.clear()
    assert errors.available() == sys.maxsize


def test_too_little_memory_is_told_before_it_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = engine.prepare("What? " * 200)
    monkeypatch.setattr(errors, "available", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"before prefilling .* GiB are free.*fewer --frames"):
        engine.generate(inputs)
    text, size = engine.config.text, len(inputs)
    hidden = 3 * size * text.hidden_size * 4
    whole = (size + 3) * text.kv_width * 4
    for free, method, enough in (
        (hidden, "zipvl", True), (hidden, "dense", False), (hidden + whole, "dense", True),
    ):  # fmt: skip
        monkeypatch.setattr(errors, "available", lambda free=free: free)
        if enough:
            engine.generate(inputs, method, max_new_tokens=3)
        else:
            with pytest.raises(OutOfMemory):
                engine.generate(inputs, method, max_new_tokens=3)
    monkeypatch.setattr("zipvl.engine.run.ROOM", 2)
    monkeypatch.setattr(errors, "available", lambda: hidden + whole)
    pieces = engine.stream(inputs, "zipvl", max_new_tokens=9, ignore_eos=True)
    next(pieces), next(pieces)
    monkeypatch.setattr(errors, "available", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"before decoding .*fewer --max-new-tokens"):
        list(pieces)
