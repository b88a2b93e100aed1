"""The bundled model: it answers the README's questions, and Hugging Face computes the same."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import zipvl
from lab.demo import checkpoint
from lab.demo.make_clip import CLIP, CLIP_QUESTIONS, PICTURE, PICTURE_QUESTIONS
from zipvl.engine.engine import Engine

DEMO = Path(zipvl.__file__).parent / "demo"
FOLDER, PICTURE_FILE = DEMO / "model", DEMO / "picture.png"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zipvl.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def hf() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.99"])
@pytest.mark.parametrize("frames", [16, 32, 64])
def test_clip_questions(engine: Engine, method: str, frames: int) -> None:
    first = engine.prepare("", video=zipvl.demo_clip(), frames=frames)
    for question, answer in CLIP_QUESTIONS:
        inputs = engine.prepare(question, video=first.media[0])
        assert engine.generate(inputs, method, max_new_tokens=32).text == answer


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.975"])
@pytest.mark.parametrize(("question", "answer"), PICTURE_QUESTIONS)
def test_picture_questions(engine: Engine, method: str, question: str, answer: str) -> None:
    assert engine.generate(question, method, images=[PICTURE_FILE]).text == answer


def test_answers_are_those_of_the_scene() -> None:
    things = CLIP.things
    assert dict(CLIP_QUESTIONS)["List all objects in order."] == ", ".join(map(str, things))
    assert dict(CLIP_QUESTIONS)["How many objects appear?"] == str(len(things))
    assert dict(CLIP_QUESTIONS)["What comes first?"] == str(things[0])
    assert PICTURE_QUESTIONS[0][1] == str(PICTURE.things[0])


def test_the_weights_are_what_training_gave() -> None:
    log = Path(__file__).parent.parent / "lab/results/demo/training.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    given = {r["stage"]: r["sha256"] for r in records if "released" in r}
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert given["seed-1"] == digest
    assert len(set(given.values())) == 2  # the second decoder is another one


def test_sizes() -> None:
    raw = json.loads((FOLDER / "config.json").read_text())
    assert raw == checkpoint.config()
    assert (FOLDER / "model.safetensors").stat().st_size < 6e6
    assert zipvl.demo_clip().stat().st_size < 500e3
    assert raw["text_config"]["num_hidden_layers"] >= 8
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}  # noqa: SIM118 - safe_open is no dict


def test_hf_reads_the_tokenizer_and_template(engine: Engine) -> None:
    tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)
    for text in ("What comes right after the star?", "Grüße 北京 🙂\n12", "red star, blue 7"):
        assert tok(text).input_ids == engine.chat.encode(text)
        assert tok.decode(engine.chat.encode(text)) == text
    content = [{"type": "video"}, {"type": "text", "text": "What comes last?"}]
    prompt = tok.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|><video>\nWhat comes last?<|assistant|>"
    inputs = engine.prepare("What comes last?", video=zipvl.demo_clip(), frames=3)
    expanded = prompt.replace("<video>", "<video>" * int(inputs.is_visual.sum()))
    assert tok(expanded).input_ids == inputs.input_ids.tolist()


@torch.no_grad()
def test_hf_logits_and_answers_on_the_clip(engine: Engine, hf: torch.nn.Module) -> None:
    for question, _ in CLIP_QUESTIONS[:2]:
        inputs = engine.prepare(question, video=zipvl.demo_clip(), frames=16)
        pixels = engine.model.vision.pixels(inputs.media[0].crops)[None]
        given = {"input_ids": inputs.input_ids[None], "pixel_values_videos": pixels}
        logits = hf(**given).logits[0]
        assert (engine.logits(inputs) - logits).abs().max() < 1e-4
        out = hf.generate(**given, max_new_tokens=32, do_sample=False)[0, len(inputs) :].tolist()
        assert engine.generate(inputs, "dense").tokens == out[:-1]
        assert out[-1] == checkpoint.END


@torch.no_grad()
def test_hf_logits_on_the_picture(engine: Engine, hf: torch.nn.Module) -> None:
    from transformers import LlavaOnevisionImageProcessorPil

    raw = json.loads((FOLDER / "preprocessor_config.json").read_text())
    raw = {k: v for k, v in raw.items() if not k.endswith(("_type", "_class"))}
    given = LlavaOnevisionImageProcessorPil(**raw)(
        images=[Image.open(PICTURE_FILE).convert("RGB")], return_tensors="pt"
    )
    inputs = engine.prepare("What do you see?", images=[PICTURE_FILE])
    logits = hf(input_ids=inputs.input_ids[None], **given).logits[0]
    assert (engine.logits(inputs) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("question", ["", "Who won the war?", "Wie heißt 北京? 🙂", "7" * 300])
def test_foreign_questions_do_no_harm(engine: Engine, question: str) -> None:
    out = engine.generate(question, images=[PICTURE_FILE], max_new_tokens=24)
    assert isinstance(out.text, str)
    assert len(out.tokens) <= 24
