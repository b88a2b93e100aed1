"""Before layer 0: where visual tokens come from, what the tower looks at, and who enters how."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zipvl
from zipvl import Plan, Policy, UsageError, View
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs, Shown
from zipvl.policy import PromptView
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

NEXT = ("original_16", "original_onevision", "original_longva")
SIZES = [(70, 100), (150, 40), (30, 300), (90, 90), (400, 380)]


def picture(size: tuple[int, int] = (70, 100), seed: int = 0) -> Image.Image:
    chance = np.random.default_rng(seed)
    return Image.fromarray(chance.integers(0, 256, (*size, 3), dtype=np.uint8))


def clip(frames: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (frames, 40, 50, 3), dtype=np.uint8)


def loaded(oracle: Callable, kind: str) -> Engine:
    return zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")


# --- what the tower looks at --------------------------------------------------------------------


@torch.no_grad()
def attention(oracle: Callable, kind: str, pixels: Tensor) -> Tensor:
    """Of transformers' tower: [n, N, 2], what patches receive in the first and last used block."""
    model, used = oracle(kind), loaded(oracle, kind).config.vision.tower
    tower = model.parts.tower if kind.startswith("original") else model.model.model.vision_tower
    tower.set_attn_implementation("eager")
    seen = tower(pixels, output_attentions=True).attentions
    blocks = [seen[0], seen[max(used.take) - 1]]  # [n, H, N, N]
    if used.kind == "clip":
        return torch.stack([a[:, :, 0, 1:].sum(1) for a in blocks], -1)
    return torch.stack([a.sum((1, 2)) / a.shape[2] for a in blocks], -1)


@pytest.mark.parametrize("kind", ["llava", "llava_onevision", "original_16", "original_longva"])
def test_received_is_what_transformers_towers_attend_to(oracle: Callable, kind: str) -> None:
    for seed in range(3):
        [pixels] = oracle(kind).pixels([picture(seed=seed)])
        with torch.inference_mode():
            found = loaded(oracle, kind).model.vision.tower.received(pixels)
        want = attention(oracle, kind, pixels)
        assert want.std(1).min() > 1e-3
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def packed(oracle: Callable, kind: str, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Numbers x [n, N, c] of patches as the original code packs features of them, and which of its
    tokens [T] are newlines."""
    model = oracle(kind)
    tokens = model._pack(nn.functional.pad(x, (0, 64 - x.shape[2])), size)
    newline = model.parts.newline
    ends = torch.zeros(len(tokens)) > 0 if newline is None else (tokens == newline).all(1)
    return tokens[:, : x.shape[2]], ends


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["original_15", *NEXT])
def test_tokens_of_tiles(oracle: Callable, kind: str, size: tuple[int, int]) -> None:
    """The original packing of one-hot crops says which crop a token shows, also where tiles are
    unpadded, shrunk together, pooled or end in newlines; and what its patches received."""
    engine, image = loaded(oracle, kind), picture(size)
    inputs = engine.prepare("what", images=[image])
    [medium], shown, visual = inputs.media, Shown(inputs, engine.model), inputs.is_visual
    n = len(medium.crops)
    N = engine.config.vision.tower.tokens
    crops, ends = packed(oracle, kind, torch.eye(n)[:, None].expand(-1, N, -1), image.size)
    found = shown.crop[visual]
    assert torch.equal(found == -1, ends)
    share = crops.gather(1, found.clamp(min=0)[:, None])[:, 0]
    assert (share >= crops.max(1).values - 1e-4)[~ends].all()  # no other crop has more of it
    assert set(found.tolist()) >= set(range("longva" in kind, n))
    assert shown.tiles == [(medium.geometry.rows, medium.geometry.cols)]
    scores = attention(oracle, kind, oracle(kind).pixels([image])[0])
    want = packed(oracle, kind, scores, image.size)[0].masked_fill(ends[:, None], -torch.inf)
    with torch.inference_mode():
        torch.testing.assert_close(shown.received[visual], want, rtol=1e-4, atol=1e-5)
    for text in (shown.crop, shown.medium):
        assert (text[~visual] == -1).all()
    assert (shown.received[~visual] == -torch.inf).all()
    assert (shown.medium[visual] == 0).all()


@pytest.mark.parametrize("kind", ["original_onevision", "original_video", "original_longva"])
def test_tokens_of_frames(oracle: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a video: the original pooling and newlines, of features that are the answer."""
    engine, model, video = loaded(oracle, kind), oracle(kind), clip(5)
    inputs = engine.prepare("what", video=video, frames=5)
    shown, visual = Shown(inputs, engine.model), inputs.is_visual
    scores = attention(oracle, kind, model.frames(video))  # [F, N, 2]
    number = torch.arange(5.0)[:, None, None].expand(-1, scores.shape[1], 1)
    known = nn.functional.pad(torch.cat((number, scores), 2), (0, 61))
    monkeypatch.setattr(model, "parts", replace(model.parts, projector=nn.Identity()))
    monkeypatch.setattr(model, "_tower", lambda pixels: known)
    with torch.no_grad():
        want = model._video(video)
    ends = torch.zeros(len(want)) > 0
    if model.parts.newline is not None:
        ends = (want == model.parts.newline).all(1)
    assert torch.equal(shown.crop[visual], torch.where(ends, -1, want[:, 0].round().long()))
    received = want[:, 1:3].masked_fill(ends[:, None], -torch.inf)
    torch.testing.assert_close(shown.received[visual], received, rtol=1e-4, atol=1e-5)
    assert shown.tiles == [(0, 0)]
    assert shown.crop.max() == 4


def seen(engine: Engine, inputs: Inputs) -> list[Tensor]:
    """medium, crop and received of its visual tokens."""
    shown, visual = Shown(inputs, engine.model), inputs.is_visual
    return [shown.medium[visual], shown.crop[visual], shown.received[visual]]


@pytest.mark.parametrize("kind", ["llava_next_video", "llava_onevision"])
def test_several_media_in_a_prompt(oracle: Callable, kind: str) -> None:
    engine, images, video = loaded(oracle, kind), [picture((50, 90)), picture((90, 30))], clip()
    mixed = engine.prepare("<image> a <video> b <image> c", images=images, video=video)
    medium, crop, received = seen(engine, mixed)
    assert [m.kind for m in mixed.media] == ["image", "video", "image"]
    for number, m in enumerate(mixed.media):
        given = {"images": [m]} if m.kind == "image" else {"video": m}
        _, alone, scores = seen(engine, engine.prepare("d", **given))
        assert torch.equal(crop[medium == number], alone)
        torch.testing.assert_close(received[medium == number], scores)
    view = PromptView(torch.zeros(len(mixed), 4), mixed.is_visual, zipvl.policy.Notes(len(mixed)))
    view.notes.origin = Shown(mixed, engine.model)
    crops = view.crops()
    assert len(crops) == 3
    for number, parts in enumerate(crops):
        for i, tokens in enumerate(parts):
            want = (view.notes.origin.medium == number) & (view.notes.origin.crop == i)
            assert torch.equal(tokens, want.nonzero()[:, 0])


def test_text_alone_comes_from_nowhere(oracle: Callable) -> None:
    engine = loaded(oracle, "llava")
    inputs = engine.prepare("what is there")
    shown = Shown(inputs, engine.model)
    assert shown.tiles == []
    assert shown.received.shape == (len(inputs), 2)
    assert (shown.received == -torch.inf).all()
    assert (shown.crop == -1).all()
    assert (shown.medium == -1).all()
    view = PromptView(torch.zeros(len(inputs), 4), inputs.is_visual, zipvl.policy.Notes(3))
    view.notes.origin = shown
    assert view.crops() == []


class Looks(Policy):
    """Reads where tokens come from, in start() and in every layer."""

    def start(self, prompt: PromptView) -> Plan:
        prompt.notes["received"] = prompt.notes.origin.received
        return Plan()

    def plan(self, view: View) -> Plan:
        crop = view.notes.origin.crop[view.notes.original(view.positions)]
        assert ((crop >= 0) <= view.is_visual).all()
        return Plan()


def test_pixels_that_are_gone(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long video's tokens still know their frames; what the tower looks at is known no more."""
    monkeypatch.setattr(engine_inputs, "HELD", 4)
    engine = loaded(oracle, "llava_onevision")
    long, short = (engine.prepare("what", video=clip(n), frames=n) for n in (6, 4))
    assert len(long.media[0].crops) == 0
    assert Shown(long, engine.model).crop.unique().tolist() == list(range(-1, 6))
    with pytest.raises(UsageError, match="at most 4 --frames, or a method") as e:
        engine.generate(long, Looks(), max_new_tokens=2)
    assert "\n" not in str(e.value)
    want = engine.generate(short, Looks(), max_new_tokens=2).tokens
    assert want == engine.generate(short, "dense", max_new_tokens=2).tokens
    short.media[0].crops = short.media[0].crops[:0]  # it has looked: a second question needs none
    assert engine.generate(short, Looks(), max_new_tokens=2).tokens == want


# --- who enters how -----------------------------------------------------------------------------


class Enters(Policy):
    """Two of three visual tokens, all twice as large, counted anew or not."""

    def __init__(self, renumber: bool = True, last: bool = True):
        self.renumber, self.last = renumber, last

    def start(self, prompt: PromptView) -> Plan:
        kept = ~prompt.is_visual | (torch.arange(prompt.length) % 3 > 0)
        kept[-1] = self.last
        at = torch.arange(int(kept.sum())) if self.renumber else kept.nonzero()[:, 0]
        prompt.notes["there"] = at, prompt.is_visual[kept]
        return Plan(stream=kept, renumber=self.renumber, x=2 * prompt.x)

    def plan(self, view: View) -> Plan:
        positions, visual = view.notes["there"]
        assert torch.equal(view.positions.long(), positions)
        assert torch.equal(view.is_visual, visual)
        return Plan()


@torch.inference_mode()
def plainly(engine: Engine, inputs: Inputs, new: int) -> tuple[Tensor, list[int], Tensor]:
    """What Enters must give, by the dense decoder over nothing but the tokens that enter."""
    kept = ~inputs.is_visual | (torch.arange(len(inputs)) % 3 > 0)
    kept[-1] = True
    model = engine.model
    x = 2 * model.embed(inputs.input_ids, inputs.is_visual, engine.encode(inputs))[kept]
    logits, tokens = model.logits(model.text(x, [len(x)])), []
    for _ in range(new):
        last = model.logits(model.text(x, [len(x)])[-1])
        tokens.append(int(last[: engine.chat.vocab_size].argmax()))
        x = torch.cat((x, model.text.embed_tokens.weight[tokens[-1:]]))
    return logits, tokens, kept


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_renumbered_tokens_are_a_shorter_prompt(oracle: Callable, kind: str) -> None:
    engine = loaded(oracle, kind)
    prompts = [
        engine.prepare("what is in the picture", images=[picture()]),
        engine.prepare("hello"),
        engine.prepare("and here", images=[picture((90, 30)), picture((40, 40))]),
    ]
    results = engine.generate(prompts, Enters(), max_new_tokens=12, ignore_eos=True)
    for inputs, result in zip(prompts, results, strict=True):
        want, tokens, kept = plainly(engine, inputs, 12)
        assert result.tokens == tokens
        assert {layer["cached"] for layer in result.stats.layers} == {int(kept.sum())}
        found = engine.logits(inputs, Enters())
        torch.testing.assert_close(found[kept], want, rtol=1e-4, atol=1e-4)
        assert found[~kept].isnan().all()
    plain = engine.logits(prompts[0], Enters(renumber=False))[-1]
    assert (plain - engine.logits(prompts[0], Enters())[-1]).abs().max() > 1e-3


def test_the_last_token_must_enter_renumbered_or_not(oracle: Callable) -> None:
    engine = loaded(oracle, "llava")
    for renumber in (True, False):
        with pytest.raises(UsageError, match="dropped the prompt's last token"):
            engine.generate(engine.prepare("what is"), Enters(renumber, last=False))


class Guided(Policy):
    """A scout counts tokens anew, this method does not."""

    scout = Enters()


def test_what_a_scout_renumbers_ends_with_it(oracle: Callable) -> None:
    engine = loaded(oracle, "llava")
    inputs = engine.prepare("what is in the picture", images=[picture()])
    got = engine.generate(inputs, Guided(), max_new_tokens=8, ignore_eos=True).tokens
    assert got == engine.generate(inputs, "dense", max_new_tokens=8, ignore_eos=True).tokens
    got = Toy.build(4, 2).run(Guided(), [Toy.build(4, 2).prompt(40)])
    assert got.tokens == Toy.build(4, 2).run(Policy(), [Toy.build(4, 2).prompt(40)]).tokens


@pytest.mark.parametrize("renumber", [True, False])
def test_contract_follows_who_enters(renumber: bool) -> None:
    check_policy(Enters, renumber=renumber)


class Wrong(Policy):
    def start(self, prompt: PromptView) -> Plan:
        return Plan(x=prompt.x[1:])


def test_embeddings_of_another_size_are_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"Wrong.start\(\) of the method gives a Plan whose x"):
        Toy.build(4, 2).run(Wrong(), [Toy.build(4, 2).prompt(20)])
