"""Rotary ids that are no positions, on every way through the engine: methods that drop, batches,
chunks, sessions, films, static steps. A place taken for an id would be silently wrong."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods.untrained import NEEDS
from test_parity import check_chunks, close
from test_qwen_vl import CASES, Asked, Case, Made
from test_qwen_vl import made as made
from test_qwen_vl import qwen as qwen
from torch import Tensor

import zipvl
from zipvl import cli, page
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs, turned
from zipvl.engine.sampler import Sampling
from zipvl.engine.session import GENERAL, Session
from zipvl.engine.speed import StaticStep
from zipvl.errors import UsageError
from zipvl.model import batch as batches
from zipvl.model.decoder import Decoder
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Plan, Policy, PromptView, View
from zipvl.serve.media import Medium, Store
from zipvl.serve.request import Ask, Limits
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Watch

MANY = Case("The <video> and <image>: what happens?", ((90, 140),), (9,))
QUESTIONS = "What happens?", "And then?", "How many people?"


class Seen(Watch):
    """What a method answered, and where its tokens lay."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.scout, self.places = policy.scout, []

    def __repr__(self) -> str:
        return "seen"

    def plan(self, view: View) -> Plan:
        self.places.append(view.positions.tolist())
        return super().plan(view)


class Turned(Oracle):
    """The slow decoder in float64 with rotary ids of its own: a table [3, n] by position."""

    def __init__(self, decoder: Decoder, table: Tensor):
        super().__init__(decoder)
        self.table = table

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        half = self.config.head_dim // 2
        rate = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        rows = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])  # time, row, column
        angles = self.table[rows][:, at].T.double() * rate
        a, b = x[..., :half], x[..., half:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@torch.inference_mode()
def check(made: Made, asked: Asked, policy: Policy, new: int = 64) -> None:
    """Greedy tokens of the engine under a method are those of the slow decoder that follows the
    method's plans, with the ids that transformers gives."""
    engine, seen = made.engine, Seen(policy)
    inputs = asked.prepare(engine)
    result = engine.generate(inputs, seen, new, ignore_eos=True)
    assert len(set(result.tokens)) > 3
    turns = made.oracle.turns(asked.given(made.oracle))
    follow = int(turns.max()) + 1 + torch.arange(new)
    entered = seen.started.stream if seen.started.renumber else slice(None)
    table = torch.cat((turns[:, entered], follow.expand(3, -1)), dim=1)
    slow = Turned(engine.model.text, table)
    x = engine.embed([inputs], [engine.encode(inputs)])
    hidden, first = slow.prefill(x, seen.plans, seen.started, seen.trims), table.shape[1] - new
    layers, head = engine.config.text.num_layers, engine.model.lm_head.weight.double()
    size = engine.chat.vocab_size
    for step, token in enumerate(result.tokens):
        logits = (hidden[-1] @ head.T)[:size]
        assert int(logits.argmax()) == token, f"token {step}"
        plans = seen.steps[step * layers : (step + 1) * layers] or [Plan()] * layers
        x = engine.model.text.embed_tokens.weight[token][None]
        hidden = slow.step(x, first + step, plans)


# --- after dropping -----------------------------------------------------------------------------

DROPPING = [
    "dense", "fixed:ratio=0.3", "zipvl:tau=0.8", "zipvl-stream:tau=0.8", "fastv:ratio=0.4",
    "h2o:heavy=16,recent=16", "hired:ratio=0.4", "hired:ratio=0.4,renumber=True",
    "visionzip_like:dominant=3,contextual=2,renumber=True",
]  # fmt: skip


@pytest.mark.parametrize("method", DROPPING)
def test_64_tokens_after_dropping(qwen: Made, method: str) -> None:
    check(qwen, Asked(MANY), load_policy(method))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL"])
@pytest.mark.parametrize("method", METHODS)
def test_64_tokens_of_every_method(made: Callable, kind: str, method: str) -> None:
    policy = load_policy(method, **NEEDS.get(method, {}))
    if policy.storage is None:  # what rounds keys is held to its own, by check_policy
        check(made(kind), Asked(MANY, 2), policy)


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_methods_know_the_order_alone(
    qwen: Made, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions are places in the prompt though rotary ids repeat; and where ids turn nothing, so
    that keys are the same, every answer of a method is the same with and without them."""
    engine, found = qwen.engine, []
    inputs = Asked(MANY).prepare(engine)
    assert inputs.turns[0].unique().numel() < 0.8 * len(inputs) != inputs.ahead + len(inputs)

    def flat(turns: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = turns.shape[-1], 1, config.head_dim // 2
        return torch.ones(shape), torch.zeros(shape)

    monkeypatch.setattr(batches, "rope_table", flat)
    for given in (inputs, replace(inputs, turns=None, ahead=0)):
        seen = Seen(load_policy(method, **NEEDS.get(method, {})))
        tokens = engine.generate(given, seen, 4, ignore_eos=True).tokens
        started = [] if seen.started.stream is None else [seen.started]
        found.append((tokens, [*started, *seen.plans, *seen.steps], seen.places))
    (tokens, plans, places), (others, same, again) = found
    assert tokens == others
    assert places == again
    assert len(plans) == len(same)
    for one, two in zip(plans, same, strict=True):
        for part in ("attend", "cache", "stream", "leave", "precise", "channels"):
            mine, other = getattr(one, part), getattr(two, part)
            assert mine is other is None or torch.equal(mine, other)
    for layer in places:
        assert layer == sorted(set(layer))
        assert layer[-1] < len(inputs)
    if load_policy(method, **NEEDS.get(method, {})).start is None:
        assert places[0] == list(range(len(inputs)))


def test_what_is_renumbered_keeps_its_angles(qwen: Made) -> None:
    """Positions count what entered; rows and columns, and what follows, are as they were."""
    engine = qwen.engine
    inputs = Asked(MANY).prepare(engine)

    class Half(Policy):
        def start(self, view: PromptView) -> Plan:
            kept = ~view.is_visual | (torch.arange(view.length) % 2 == 0)
            return Plan(stream=kept, renumber=True)

    asked: list[tuple[list[int], int]] = []

    class Spy(Half):
        def plan(self, view: View) -> Plan:
            asked.append((view.positions.tolist(), view.notes.ahead))
            return Plan()

    engine.generate(inputs, Spy(), 2, ignore_eos=True)
    n = int((~inputs.is_visual | (torch.arange(len(inputs)) % 2 == 0)).sum())
    assert asked[0] == (list(range(n)), int(inputs.turns.max()) + 1 - n)
    check(qwen, Asked(MANY), Half())


# --- the engine's ways --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "fixed:ratio=0.4", "hired:ratio=0.4,renumber=True"])
def test_ragged_batches(qwen: Made, method: str) -> None:
    """With a prompt of text alone beside, and one that stops early."""
    names = ("all", "text", "one", "3 frames")
    inputs = [*(Asked(CASES[name], 2).prepare(qwen.engine) for name in names)]
    options = {"method": method, "max_new_tokens": 16, "ignore_eos": True}
    together = qwen.engine.generate(inputs, **options)
    alone = [qwen.engine.generate(one, **options) for one in inputs]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({tuple(r.tokens) for r in alone}) == len(inputs)
    ids = turned(inputs, torch.device("cpu"))
    assert ids.shape == (3, sum(map(len, inputs)))
    assert turned(inputs[1:2], torch.device("cpu")) is None


def test_chunks_and_batches_of_the_tower(qwen: Made) -> None:
    check_chunks(qwen.oracle.folder, Asked(MANY).prepare)


@pytest.mark.parametrize("method", ["dense", "fixed:ratio=0.4", "hired:ratio=0.4,renumber=True"])
def test_static_steps(qwen: Made, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [Asked(CASES[name], 3).prepare(qwen.engine) for name in ("all", "text", "two")]
    want = qwen.engine.generate(inputs, method, 20, ignore_eos=True)
    monkeypatch.setattr(qwen.engine, "step", StaticStep)
    got = qwen.engine.generate(inputs, method, 20, ignore_eos=True)
    assert [r.tokens for r in got] == [r.tokens for r in want]


@torch.inference_mode()
def test_a_prefill_in_pieces_is_one(qwen: Made) -> None:
    engine, inputs = qwen.engine, Asked(MANY).prepare(qwen.engine)
    model, whole, T = engine.model, engine.logits(inputs), len(inputs)
    cut = int(inputs.is_visual.nonzero()[-1]) + 1
    start = Inputs(inputs.input_ids[:cut], inputs.is_visual[:cut], inputs.media,
                   inputs.turns[:, :cut], inputs.ahead)  # fmt: skip
    for pieces in ([T - cut], [3, 1, T - cut - 4]):
        notes = engine.take_notes([start], Policy(), T)
        out = engine.prefill([start], Policy(), T, {}, notes)
        hidden, first = [out.hidden], cut
        for n in pieces:
            x = model.text.embed_tokens(inputs.input_ids[first : first + n])
            at = torch.arange(first, first + n)
            hidden.append(model.text.extend(x, [n], at, out.caches, Policy(), engine.attend, notes))
            first += n
        close(model.logits(torch.cat(hidden)), whole, 1e-4)


# --- sessions -----------------------------------------------------------------------------------


def talk(held: Session) -> list[list[int]]:
    return [held.ask(question, 8).tokens for question in QUESTIONS]


def alone(engine: Engine, inputs: Inputs, method: str) -> list[list[int]]:
    """The same talk, each time as a whole prompt."""
    said, out = list[dict[str, str]](), list[list[int]]()
    pictures, videos = ([m for m in inputs.media if m.kind == kind] for kind in ("image", "video"))
    for question in QUESTIONS:
        said.append({"role": "user", "content": question})
        result = engine.generate(engine.prepare(said, pictures, videos), method, 8)
        said.append({"role": "assistant", "content": result.text})
        out.append(result.tokens)
    return out


def held(engine: Engine, method: str, reuse: str) -> Session:
    asked = Asked(MANY)
    return engine.session(asked.images, asked.videos, None, method=method, reuse=reuse)


OF_MEDIA = "hired:ratio=0.4,renumber=True"  # chooses the same whatever is asked


@pytest.mark.parametrize("method", ["dense", OF_MEDIA])
@pytest.mark.parametrize("reuse", ["first", "general", "media", "none"])
def test_sessions_answer_as_whole_prompts(qwen: Made, method: str, reuse: str) -> None:
    one = held(qwen.engine, method, reuse)
    want = alone(qwen.engine, one.inputs, method)
    assert talk(one) == want
    one.rewind()
    assert talk(one)[0] == want[0]
    two = one.fork()
    assert two.ask("Why?", 10).tokens == one.ask("Why?", 10).tokens
    assert len({tuple(tokens) for tokens in want}) == 3


def test_64_tokens_of_a_session(qwen: Made) -> None:
    case = CASES["9 frames"]
    asked, wanted = Asked(case, 1), qwen.oracle.greedy(Asked(case, 1).given(qwen.oracle))
    for reuse in ("media", "first"):
        one = qwen.engine.session([], asked.videos, None, method="dense", reuse=reuse)
        for _ in range(2):
            turn = one.turn([{"role": "user", "content": case.words}], Sampling())
            assert len(list(turn.steps(64, True))) == 64
            assert turn.tokens[0] == wanted
            one.rewind()


@pytest.mark.parametrize("reuse", ["first", "general", "media"])
def test_media_amid_the_words_of_a_session(qwen: Made, reuse: str) -> None:
    asked = Asked(CASES["9 frames"], 1)
    one = qwen.engine.session([], asked.videos, None, method="dense", reuse=reuse)
    words = "What comes first in this <video>, and what last?"
    want = qwen.engine.generate(qwen.engine.prepare(words, video=asked.videos, frames=None),
                                "dense", 24)  # fmt: skip
    assert one.ask(words, 24).tokens == want.tokens


def test_a_general_question_has_its_own_ids(qwen: Made) -> None:
    """What is kept of the media for it is what a prompt with it keeps."""
    engine, policy = qwen.engine, load_policy("zipvl-stream:tau=0.8")
    one = held(engine, "zipvl-stream:tau=0.8", "general")
    one.ask("Why?", 4)
    inputs = Asked(replace(MANY, words="<image><video>" + GENERAL[True])).prepare(engine)
    inputs.media[:] = one.inputs.media
    with torch.inference_mode():
        out = engine.prefill([inputs], policy, 0, {}, ends=True)
    for mine, whole in zip(one.held.caches, out.caches, strict=True):
        slots = whole.before(one.held.read)
        assert slots < one.held.read
        for a, b in zip(mine.view(0), whole.view(0), strict=True):
            assert torch.equal(a[:slots], b[:slots])


@pytest.mark.parametrize("method", ["dense", OF_MEDIA])
def test_films(qwen: Made, method: str, tmp_path: Path) -> None:
    """Saved, opened and asked: a clip's times and the numbers behind it are in the file."""
    one = held(qwen.engine, method, "media")
    one.save(tmp_path / "a.zipvl")
    two = qwen.engine.open_session(tmp_path / "a.zipvl")
    want = alone(qwen.engine, one.inputs, method)
    assert talk(two) == want
    assert two.held.notes.ahead == one.held.notes.ahead != 0
    spans = [[m.clip and m.clip.span for m in s.inputs.media] for s in (one, two)]
    assert spans[0] == spans[1]


# --- frames and patches -------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [9, 8, 5])
@torch.inference_mode()
def test_long_videos_are_short_ones(
    qwen: Made, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = qwen.engine
    video = np.random.default_rng(frames).integers(0, 256, (frames, 61, 90, 3), np.uint8)
    short = engine.prepare("What?", video=video, frames=None)
    [want] = engine.encode(short)
    monkeypatch.setattr("zipvl.engine.inputs.HELD", 4)
    monkeypatch.setattr("zipvl.engine.inputs.BATCH", 2)
    long = engine.prepare("What?", video=video, frames=None)
    assert not len(long.media[0].crops)
    close(long.media[0].features, want, 1e-5)
    assert torch.equal(long.turns, short.turns)
    with pytest.raises(UsageError, match="frames past 4 are not held"):
        engine.generate(long, "hired", 2)


@torch.inference_mode()
def test_places_and_numbers_of_tokens(qwen: Made) -> None:
    """A pair's tokens are its first frame's, each in the middle of its block."""
    inputs, vision = Asked(MANY).prepare(qwen.engine), qwen.engine.model.vision
    for medium in inputs.media:
        rows, cols = (n // 2 for n in vision.grid(medium.geometry))
        at = page.places(medium, vision)
        numbers = list(range(0, medium.geometry.frames, 2)) or [0]
        assert at.shape == (len(numbers) * rows * cols, 3) == (medium.tokens, 3)
        grid = at.reshape(len(numbers), rows, cols, 3)
        np.testing.assert_allclose(grid[:, 0, 0, 0], numbers)
        np.testing.assert_allclose(grid[0, :, 0, 1], (np.arange(rows) + 0.5) / rows, atol=1e-6)
        np.testing.assert_allclose(grid[0, 0, :, 2], (np.arange(cols) + 0.5) / cols, atol=1e-6)
        shown = vision.numbers(medium.geometry).view(len(numbers), -1)
        assert shown[:, 0].tolist() == shown[:, -1].tolist() == numbers


def test_a_report_shows_them(qwen: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, out = Asked(MANY), tmp_path / "out.html"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    asked.images[0].save(tmp_path / "a.png")
    code = cli.main(["-m", str(qwen.oracle.folder), "-i", str(tmp_path / "a.png"), "-v",
                     str(zipvl.demo_clip()), "--frames", "5", "-p", "What?", "-q",
                     "--max-new-tokens", "3", "--device", "cpu", "--report", str(out)])  # fmt: skip
    assert code == 0
    assert "Picture 1, whole" in out.read_text()
    assert "Video 2: 5 frames" in out.read_text()


@torch.inference_mode()
def test_what_patches_receive(qwen: Made) -> None:
    """transformers' own queries and keys, window by window, in the first and the last layer."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_window_index

    inputs = Asked(MANY).prepare(qwen.engine)
    tower = qwen.oracle.model.model.visual
    ends = tower.blocks[0].attn, tower.blocks[-1].attn
    given: list[tuple[Tensor, dict[str, Any]]] = []
    hooks = [layer.register_forward_pre_hook(lambda _, x, more: given.append((x[0], more)),
                                             with_kwargs=True) for layer in ends]  # fmt: skip
    for medium, drawn in zip(inputs.media, Asked(MANY).media, strict=True):
        given.clear()
        patches, grid = qwen.oracle.pixels(drawn)
        tower(patches, grid[None])
        means = []
        for layer, (x, more) in zip(ends, given, strict=True):
            q, k, _ = layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(1)
            q, k = apply_rotary_pos_emb_vision(q, k, *more["position_embeddings"])
            windows = more["cu_seqlens"].diff().tolist()
            each = [torch.einsum("ihd,jhd->hij", a, b) / 4
                    for a, b in zip(q.split(windows), k.split(windows), strict=True)]  # fmt: skip
            means.append(torch.cat([scores.softmax(-1).mean(1).sum(0) for scores in each]))
        order, _ = get_vision_window_index(grid[None], 2, 56, 14)
        blocks = torch.stack(means, -1).unflatten(0, (-1, 4)).mean(1)[order.argsort()]
        found = qwen.engine.model.vision.received(medium.crops, medium.geometry)
        close(found, blocks, 1e-5)
        assert found.std(0).min() > 1e-3
    for hook in hooks:
        hook.remove()


def test_a_server_counts_the_same(qwen: Made, tmp_path: Path) -> None:
    """Before anything is read, from the head of the file."""
    vision, asked = qwen.engine.model.vision, Asked(MANY)
    asked.images[0].save(tmp_path / "a.png")
    inputs = qwen.engine.prepare("", [str(tmp_path / "a.png")], zipvl.demo_clip(), frames=5)
    store = Store(None, Limits(), vision, 5)
    for medium, name in zip(inputs.media, ("a.png", ""), strict=True):
        path = str(tmp_path / name) if name else str(zipvl.demo_clip())
        measured = store.measure(Medium(medium.kind, "x", path, None, name), Ask([], []), True)
        assert (measured.tokens, measured.frames) == (medium.tokens, medium.geometry.frames)
        assert measured.placed == [medium.tokens]
    store.close()
