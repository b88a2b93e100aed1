"""Every family and layout against its oracle: pixels, ids, features, logits everywhere, greedy tokens.

The oracle gets the rendered prompt written out here by hand, the engine the user's words.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_original
import torch
import transformers
from oracles import HFOracle, Oracle, OriginalOracle
from PIL import Image
from torch import Tensor

import zipvl
from zipvl.config import TextConfig
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.errors import ModelError
from zipvl.model.batch import rope_table
from zipvl.model.decoder import Decoder
from zipvl.policy import Policy

HUMAN, USER = (
    f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives "
    f"helpful, detailed, and polite answers to the {who}'s questions. USER: {{}} ASSISTANT:"
    for who in ("human", "user")
)
SHIPPED_VICUNA, INST = "USER: {} ASSISTANT:", "[INST] {} [/INST]"
SHIPPED_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + SHIPPED_CHATML
# kind -> (prompt around the user's words, what joins media in front of them, what ends these)
PROMPTS = {
    "llava": (SHIPPED_VICUNA, "\n", "\n"),
    "llava_next": (HUMAN, " ", "\n"),
    "llava_next_mistral": (INST, " ", "\n"),
    "llava_next_video": (SHIPPED_VICUNA, "\n", "\n"),
    "llava_onevision": (SHIPPED_CHATML, "", "\n"),
    "llava_onevision_tied": (CHATML, " ", "\n"),
    "original_15": (USER, " ", "\n"),
    "original_16": (USER, " ", "\n"),
    "original_16_mistral": (INST, " ", "\n"),
    "original_onevision": (CHATML, " ", "\n"),
    "original_video": (CHATML, " ", "\n"),
    "original_longva": (CHATML, " ", "\n"),
}
WITHOUT_VIDEO = {"llava", "llava_next", "llava_next_mistral", "original_15"}


@dataclass(frozen=True)
class Case:
    """The user's words, the sizes (width, height) of the pictures, and frames of video."""

    words: str
    sizes: tuple[tuple[int, int], ...] = ()
    frames: int = 0


CASES = {
    "one": Case("What is shown in this image?", ((100, 75),)),
    "small": Case("What is shown?", ((40, 40),)),
    "tile": Case("What is shown?", ((56, 56),)),
    "wide": Case("What is shown?", ((300, 60),)),
    "tall": Case("Wie heißt 北京? 🙂", ((61, 200),)),
    "rounded": Case("What is shown?", ((188, 47),)),  # HF unpads to other rows than the original,
    "rounded 5": Case("What is shown?", ((245, 49),)),  # on a grid of 4 and on one of 5
    "large": Case("Describe it in detail.", ((430, 430),)),
    "larger": Case("Describe it.", ((803, 417),)),
    "two": Case("What differs?", ((100, 75), (60, 60))),
    "between": Case("Here is <image> and here\n<image> What differs?", ((80, 50), (50, 120))),
    "after": Case("What is shown here? <image>", ((73, 91),)),
    "text": Case("How many people are there?  Two  or 3?\n"),
    "video": Case("What happens in the video?", frames=5),
    "one frame": Case("What happens?", frames=1),
    "video between": Case("In this\n<video> what happens?", frames=4),
    "both": Case("Is this picture in the video?", ((64, 48),), frames=3),
    "both placed": Case("The video <video>, then <image>.", ((64, 48),), frames=3),
}
KINDS = [*tiny.FAMILIES, *tiny_original.ORIGINALS]


@dataclass(frozen=True)
class Asked:
    """A case with its media drawn, as the engine takes it and as the oracle does."""

    words: str
    text: str
    images: list[Image.Image]
    video: np.ndarray | None

    def prepare(self, engine: Engine) -> Inputs:
        frames = None if self.video is None else len(self.video)
        return engine.prepare(self.words, self.images, self.video, frames=frames)


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coarse colours under fine noise: resampling, cropping and padding all leave a mark."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-40, 41, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def ask(kind: str, case: Case, seed: int = 0) -> Asked:
    rng = np.random.default_rng([seed, *map(ord, kind + case.words)])
    images = [picture(rng, *size) for size in case.sizes]
    video = None
    if case.frames:
        video = np.stack([np.asarray(picture(rng, 90, 61)) for _ in range(case.frames)])
    around, join, end = PROMPTS[kind]
    marks = ["<image>"] * len(images) + ["<video>"] * (video is not None)
    placed = not marks or "<image>" in case.words or "<video>" in case.words
    said = case.words if placed else join.join(marks) + end + case.words
    return Asked(case.words, around.format(said), images, video)


@pytest.fixture(scope="module")
def engine(oracle: Callable) -> Callable[[str], Engine]:
    """engine("llava") -> the Engine of that tiny checkpoint, loaded once."""
    loaded: dict[str, Engine] = {}

    def load(kind: str) -> Engine:
        if kind not in loaded:
            loaded[kind] = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
        return loaded[kind]

    return load


def close(found: Tensor, wanted: Tensor, atol: float) -> None:
    assert found.shape == wanted.shape
    worst = (found - wanted).abs().max().item() if found.numel() else 0.0
    assert worst <= atol, f"largest difference {worst:.2e}"


def check(engine: Engine, oracle: Oracle, asked: Asked) -> None:
    inputs = asked.prepare(engine)
    given = asked.images, asked.video
    media = sorted(inputs.media, key=lambda m: m.kind == "video")  # stable: pictures, then video
    pixels = oracle.pixels(asked.images) if asked.images else []
    pixels += [] if asked.video is None else [oracle.frames(asked.video)]
    for medium, wanted in zip(media, pixels, strict=True):
        close(engine.model.vision.pixels(medium.crops), wanted, 1e-5)
    ids = oracle.input_ids(asked.text, *given)
    assert inputs.input_ids.tolist() == ids.tolist()
    assert int(inputs.is_visual.sum()) == sum(m.tokens for m in media)
    with torch.inference_mode():
        engine.encode(inputs)
    for medium, wanted in zip(media, oracle.features(*given), strict=True):
        assert medium.features is not None
        close(medium.features, wanted, 1e-4)
    logits = engine.logits(inputs)
    close(logits, oracle.logits(asked.text, *given), 1e-4)
    assert logits.std() > 0.3, "flat logits: any engine would agree"


PAIRS = [(k, c) for k in KINDS for c in CASES if not (CASES[c].frames and k in WITHOUT_VIDEO)]


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_parity(engine: Callable, oracle: Callable, kind: str, case: str) -> None:
    check(engine(kind), oracle(kind), ask(kind, CASES[case]))


@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_tokens(engine: Callable, oracle: Callable, kind: str) -> None:
    case = CASES["two" if kind in WITHOUT_VIDEO else "both"]
    asked = ask(kind, case, seed=1)
    result = engine(kind).generate(
        asked.prepare(engine(kind)), method="dense", max_new_tokens=64, ignore_eos=True
    )
    wanted = oracle(kind).greedy(asked.text, asked.images, asked.video)
    assert len(set(wanted)) > 3, "a loop of one token: any engine would agree"
    assert result.tokens == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 7])
def test_prefill_equals_shorter_prefill_and_decode(engine: Callable, kind: str, steps: int) -> None:
    model = engine(kind).model
    inputs = ask(kind, CASES["two"]).prepare(engine(kind))
    cut = len(inputs) - steps
    whole = engine(kind).logits(inputs)
    start = Inputs(inputs.input_ids[:cut], inputs.is_visual[:cut], inputs.media)
    with torch.inference_mode():
        out = engine(kind).prefill([start], Policy(), steps, {})
        for t in range(cut, len(inputs)):
            x = model.text.embed_tokens(inputs.input_ids[t : t + 1])
            hidden = model.text.decode(
                x, torch.tensor([t]), out.caches, Policy(), engine(kind).attend
            )
            close(model.logits(hidden), whole[t : t + 1], 1e-4)


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.9"])
@pytest.mark.parametrize(
    "kind", ["llava", "llava_next_mistral", "llava_onevision", "original_longva"]
)
def test_ragged_batch_equals_one_by_one(engine: Callable, kind: str, method: str) -> None:
    names = ["one", "text", "two", "small"]
    names += [] if kind in WITHOUT_VIDEO else ["video"]
    batch = [ask(kind, CASES[name], seed=2).prepare(engine(kind)) for name in names]
    options = {"method": method, "max_new_tokens": 16, "ignore_eos": True}
    together = engine(kind).generate(batch, **options)
    alone = [engine(kind).generate(inputs, **options) for inputs in batch]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({tuple(r.tokens) for r in alone}) == len(batch)


def check_chunks(folder: Path, prepare: Callable[[Engine], Inputs]) -> None:
    """Rows of the MLP and crops of the tower a few at a time change nothing."""
    engine = zipvl.load(folder, device="cpu", dtype="float32")
    whole = engine.logits(prepare(engine))
    engine.chunk = 7
    inputs = prepare(engine)
    with torch.inference_mode():
        for medium in inputs.media:
            medium.features = engine.model.vision.encode(medium.crops, medium.geometry, batch=2)
    close(engine.logits(inputs), whole, 1e-5)


def test_chunks_change_nothing(oracle: Callable) -> None:
    asked = ask("llava_onevision", CASES["both"])
    check_chunks(oracle("llava_onevision").folder, asked.prepare)


def test_llava_video_says_when_its_frames_are(tmp_path: Path) -> None:
    """The golden prompt of its page: 64 frames, their times, then the question."""
    told = {"add_time_instruction": True}
    parts = tiny_original.build_original("original_video", tmp_path / "model", extra=told)
    engine = zipvl.load(tmp_path / "model", device="cpu", dtype="float32")
    video = ask("original_video", Case("", frames=5)).video
    sentence = (
        "The video lasts for 5.00 seconds, and 3 frames are uniformly sampled from it. These frames "
        "are located at 0.00s,2.00s,4.00s.Please answer the following questions related to this "
        "video."
    )
    said = CHATML.format(f"<image>\n{sentence}\nWhat happens?")
    inputs = engine.prepare("What happens?", video=video, frames=3)
    oracle, seen = OriginalOracle(tmp_path / "model", parts), video[::2]
    before, behind = (oracle.tokenizer.encode(text).ids for text in said.split("<image>"))
    assert inputs.input_ids.tolist() == before + [-200] * (3 * 3 * 4) + behind
    close(engine.logits(inputs), oracle.logits(said.replace("<image>", "<video>"), (), seen), 1e-4)
    assert len(engine.prepare("What?", video=np.repeat(video, 20, 0)).media[0].clip.times) == 64
    tiny_original.build_original("original_video", tmp_path / "b", extra=dict.fromkeys(told, 3))
    with pytest.raises(ModelError, match="add_time_instruction is 3, expected true or false"):
        zipvl.load(tmp_path / "b", device="cpu")


@pytest.mark.parametrize("change", ["layers", "full", "pad"])
def test_llava_variants(change: str, tmp_path: Path) -> None:
    """Several feature layers side by side, the class token kept, pictures padded to squares."""
    extra = {
        "layers": {"vision_feature_layer": [-2, 1, -1]},
        "full": {"vision_feature_select_strategy": "full"},
        "pad": {},
    }[change]
    tiny.build_hf("llava", tmp_path, seed=3, extra=extra)
    if change == "pad":
        settings = {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
        tiny.write_json(tmp_path / "preprocessor_config.json", tiny.CLIP_PIXELS | settings)
    loaded = zipvl.load(tmp_path, device="cpu", dtype="float32")
    for name in ("wide", "two"):
        check(loaded, HFOracle(tmp_path), ask("llava", CASES[name], seed=3))


VARIANTS = {
    "linear": ("original_15", {"mm_projector_type": "linear"}),
    "three layers": ("original_15", {"mm_projector_type": "mlp3x_gelu"}),
    "square": ("original_15", {"image_aspect_ratio": None}),
    "flat": ("original_16", {"mm_patch_merge_type": "flat"}),
    "spatial": ("original_16", {"mm_patch_merge_type": "spatial"}),
    "nobase": ("original_16", {"mm_patch_merge_type": "spatial_unpad_nobase"}),
    "before": ("original_16", {"mm_pooling_position": "before"}),
    "max": ("original_16", {"mm_spatial_pool_mode": "max"}),
    "frame": ("original_16", {"mm_newline_position": "frame"}),
    "end": ("original_16", {"mm_newline_position": "one_token"}),
    "clip bilinear": ("original_longva", {"mm_spatial_pool_mode": "bilinear"}),
    "siglip average": ("original_onevision", {"mm_spatial_pool_mode": "average"}),
    "two tiles": ("original_onevision", {"image_aspect_ratio": "anyres_max_2"}),
}


@pytest.mark.parametrize("kind", ["pad", "identity"])
def test_projectors_that_are_none(kind: str, tmp_path: Path) -> None:
    settings = tmp_path / "model/config.json"
    tiny_original.build_original("original_15", settings.parent, 4)
    raw = json.loads(settings.read_text()) | {"mm_projector_type": kind}
    settings.write_text(json.dumps(raw))
    with pytest.raises(zipvl.ModelError, match=rf"config\.json: projector '{kind}'"):
        zipvl.load(settings.parent, device="cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_original_variants(name: str, tmp_path: Path) -> None:
    kind, extra = VARIANTS[name]
    folder = tmp_path / "model"
    asked = OriginalOracle(folder, tiny_original.build_original(kind, folder, 4, extra))
    loaded = zipvl.load(folder, device="cpu", dtype="float32")
    for case in ("wide", "two", *(() if kind in WITHOUT_VIDEO else ("video",))):
        check(loaded, asked, ask(kind, CASES[case], seed=4))


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_next_mistral"])
@pytest.mark.parametrize("case", ["one", "wide", "two", "between"])
def test_oracle_ids_are_those_of_the_processors(oracle: Callable, kind: str, case: str) -> None:
    """The oracle's placeholders against transformers' own processor, where torch alone runs it."""
    hf = oracle(kind)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(hf.folder / "tokenizer.json")
    )
    build = transformers.LlavaProcessor if kind == "llava" else transformers.LlavaNextProcessor
    processor = build(hf.processor, tokenizer, patch_size=14, num_additional_image_tokens=1,
                      vision_feature_select_strategy="default")  # fmt: skip
    asked = ask(kind, CASES[case])
    found = processor(text=asked.text, images=asked.images, return_tensors="pt")["input_ids"][0]
    assert hf.input_ids(asked.text, asked.images).tolist() == found.tolist()


# --- long prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 2.0, 3.7])
@pytest.mark.parametrize(("theta", "D"), [(1e4, 128), (1e6, 64), (1e6, 128), (5e5, 80), (1e9, 16)])
def test_angles_are_those_of_hugging_face(theta: float, D: int, factor: float | None) -> None:
    """To the last bit, at any position, linear scaling included."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": theta}
    if factor:
        rope |= {"rope_type": "linear", "factor": factor}
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, rope_parameters=rope,
        max_position_embeddings=1 << 20,
    ))  # fmt: skip
    positions = torch.cat((torch.arange(4000), torch.randint(1 << 20, (4000,))))
    want = theirs(torch.empty(0), positions[None])
    config = TextConfig("llama", 9, 4 * D, 9, 1, 4, 4, D, 1e-6, theta, factor or 1.0)
    for got, full in zip(rope_table(positions, config, torch.float32), want, strict=True):
        assert torch.equal(got[:, 0], full[0, :, : D // 2])


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, 4.0])
@torch.inference_mode()
def test_logits_of_16000_tokens(factor: float | None) -> None:
    """A random decoder of Qwen2's kind; every position, and no drift with the length."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e6}
    if factor:
        rope |= {"rope_type": "linear", "factor": factor}
    torch.manual_seed(5)
    theirs = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
        max_position_embeddings=32768, tie_word_embeddings=False,
    )).eval()  # fmt: skip
    ours = Decoder(TextConfig("qwen2", 97, 64, 96, 3, 4, 2, 16, 1e-6, 1e6, factor or 1.0,
                              qkv_bias=True))  # fmt: skip
    ours.load_state_dict(theirs.model.state_dict())
    ids = torch.randint(97, (16_000,))
    want = theirs(ids[None]).logits[0]
    got = theirs.lm_head(ours.eval()(ours.embed_tokens(ids), [16_000]))
    close(got, want, 1e-4)
    assert (got - want)[-1000:].abs().max() < 4 * (got - want)[:1000].abs().max() + 1e-6
