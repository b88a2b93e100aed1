"""Sessions: media read once, questions that extend the caches, and what may go wrong between them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from methods.untrained import NEEDS
from test_parity import CASES, KINDS, WITHOUT_VIDEO, ask
from test_parity import engine as engines

import zipvl
from zipvl.engine.engine import Engine
from zipvl.engine.sampler import Sampling
from zipvl.engine.session import Session
from zipvl.errors import UsageError
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Plan, Policy, View

every_engine = engines
LIST, FIRST, LAST = "List all objects in order.", "What comes first?", "What comes last?"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zipvl.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def clip(engine: Engine) -> zipvl.Inputs:
    """The demo's clip, read and encoded once."""
    inputs = engine.prepare("", video=zipvl.demo_clip(), frames=32)
    engine.encode(inputs)
    return inputs


def session(engine: Engine, clip: zipvl.Inputs, method: str | Policy = "dense",
            reuse: str = "media") -> Session:  # fmt: skip
    options = NEEDS.get(method, {}) if isinstance(method, str) else {}
    policy = load_policy(method, **options)
    return Session(engine, replace(clip, media=list(clip.media)), policy, reuse)


def asked_alone(engine: Engine, clip: zipvl.Inputs, talk: list, method: str = "dense",
                new: int = 12) -> zipvl.Result:  # fmt: skip
    return engine.generate(engine.prepare(talk, video=clip.media), method, new)


def turns(questions: list[str], answers: list[str]) -> list[dict[str, str]]:
    """The talk up to the last question."""
    talk = []
    for question, answer in zip(questions, [*answers, ""], strict=True):
        talk += [{"role": "user", "content": question}]
        talk += [{"role": "assistant", "content": answer}] if answer else []
    return talk


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", ["media", "general", "first", "none"])
def test_dense_answers_are_those_of_whole_prompts(
    engine: Engine, clip: zipvl.Inputs, reuse: str
) -> None:
    """Three turns; from the second on, what was there is not computed again."""
    held, answers, questions = session(engine, clip, reuse=reuse), [], []
    for number, question in enumerate((LIST, FIRST, LAST)):
        questions.append(question)
        result = held.ask(question, max_new_tokens=12)
        want = asked_alone(engine, clip, turns(questions, answers))
        assert (result.text, result.tokens) == (want.text, want.tokens)
        assert result.finish_reason == want.finish_reason
        before = result.stats.prompt_tokens - result.stats.reused
        assert result.stats.prompt_tokens == want.stats.prompt_tokens
        assert before < 30 if number and reuse != "none" else result.stats.reused == 0
        answers.append(result.text)
    assert [m["content"] for m in held.talk[1::2]] == answers


RARE = ("llava_onevision_tied", "original_15", "original_16_mistral", "original_onevision")


@pytest.mark.parametrize(
    "kind", [k if k not in RARE else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_64_tokens_of_hugging_face(every_engine: Callable, oracle: Callable, kind: str) -> None:
    """The first and a second question over caches, of every family."""
    case = ask(kind, CASES["two" if kind in WITHOUT_VIDEO else "both"], seed=1)
    one = every_engine(kind).session(case.images, case.video, frames=None, method="dense")
    wanted = oracle(kind).greedy(case.text, case.images, case.video)
    said = [{"role": "user", "content": case.words}]
    for n in (64, 12):
        turn = one.turn(said, Sampling())
        assert len(list(turn.steps(n, True))) == n
        assert turn.tokens[0] == wanted[:n]
        one.rewind()
        again = one.ask("What else?", max_new_tokens=5)
        assert again.stats.reused == one.held.read
        one.rewind()


FEW = (
    "dense",
    "zipvl",
    "zipvl-stream",
    "zipvl-quant",
    "hired",
    "fastv",
    "sgl",
    "h2o",
    "snapkv",
    "think",
)


@pytest.mark.parametrize(
    "method", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
@pytest.mark.parametrize("reuse", ["media", "general", "first"])
def test_every_method_goes_on(engine: Engine, clip: zipvl.Inputs, method: str, reuse: str) -> None:
    """Three questions, a rewind, and the same again: nothing of a talk stays behind."""
    policy = load_policy(method, **NEEDS.get(method, {}))
    if (reuse == "media" and policy.scout) or (
        reuse == "general" and (policy.step or policy.storage)
    ):
        with pytest.raises(UsageError, match="first or none"):
            session(engine, clip, method, reuse)
        return
    held, answers = session(engine, clip, method, reuse), []
    for _ in range(2):
        results = [held.ask(q, max_new_tokens=6) for q in (LIST, FIRST, LAST)]
        answers.append([r.tokens for r in results])
        assert all(r.stats.reused > 0 for r in results[1:])
        held.rewind()
        assert held.talk == []
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.8", "zipvl:tau=0.9,kv_bits=4", "h2o"])
def test_media_first_is_a_prompt_cut_behind_them(
    engine: Engine, clip: zipvl.Inputs, method: str
) -> None:
    """What the media's own prefill leaves, and the question decoded token by token over it."""
    policy = load_policy(method)
    inputs = engine.prepare(LIST, video=clip.media)
    n = int(inputs.is_visual.nonzero()[-1]) + 1
    start = zipvl.Inputs(inputs.input_ids[:n], inputs.is_visual[:n], inputs.media)
    with torch.inference_mode():
        out = engine.prefill(
            [start], policy, 100, {}, notes := engine.take_notes([start], policy, 256)
        )
        tokens, text, x = [], engine.model.text, inputs.input_ids[n:]
        for step, token in enumerate(x.tolist() + [0] * 8):
            token = tokens[-1] if tokens else token
            at = torch.tensor([n + step])
            hidden = text.decode(text.embed_tokens(torch.tensor([token])), at, out.caches, policy,
                                 engine.attend, notes)  # fmt: skip
            if step >= len(x) - 1:
                tokens.append(int(engine.model.logits(hidden).argmax()))
    held = session(engine, clip, method)
    assert held.ask(LIST, max_new_tokens=9).tokens == tokens[: len(held.last.tokens[0])]


def test_a_general_question_is_asked_and_forgotten(engine: Engine, clip: zipvl.Inputs) -> None:
    """What a prompt with it keeps of the media, whatever is asked."""
    method, policy = "zipvl-stream:tau=0.8", load_policy("zipvl-stream:tau=0.8")
    inputs = engine.prepare("Describe the video.", video=clip.media)
    with torch.inference_mode():
        out = engine.prefill([inputs], policy, 0, {}, ends=True)
    held = session(engine, clip, method, "general")
    first = held.ask(LAST, max_new_tokens=12)
    n = held.held.read
    for mine, whole in zip(held.held.caches, out.caches, strict=True):
        slots = whole.before(n)
        for one, two in zip(mine.view(0), whole.view(0), strict=True):
            assert torch.equal(one[:slots], two[:slots])
    other = session(engine, clip, method, "general")
    other.ask(FIRST, max_new_tokens=12)
    other.rewind()
    assert other.ask(LAST, max_new_tokens=12).tokens == first.tokens
    with pytest.raises(UsageError, match="no question is cut off"):
        session(engine, clip, Each(), "general").ask(LAST)


class Each(Policy):
    """The first head keeps the first half of the tokens, the others the last."""

    def plan(self, view: View) -> Plan:
        G, T = len(view.k), view.length
        half = torch.arange(T // 2)
        return Plan(cache=torch.stack([half] + [half + T - T // 2] * (G - 1)))


def test_the_first_question_may_choose(engine: Engine, clip: zipvl.Inputs) -> None:
    """reuse=first answers it as the method does, and reuse=none every question."""
    method, talk = "zipvl-stream:tau=0.9", turns([LIST], [])
    want = asked_alone(engine, clip, talk, method)
    for reuse in ("first", "none"):
        held = session(engine, clip, method, reuse)
        assert held.ask(LIST, max_new_tokens=12).tokens == want.tokens
    talk = turns([LIST, FIRST], [want.text])
    second = asked_alone(engine, clip, talk, method)
    assert held.ask(FIRST, max_new_tokens=12).tokens == second.tokens


def test_a_session_without_media(engine: Engine) -> None:
    held = engine.session(system="Be brief.", method="dense")
    first = held.ask("What is a cat?", max_new_tokens=5)
    second = held.ask("And a dog?", max_new_tokens=5)
    assert first.stats.reused == 0 < second.stats.reused
    talk = [{"role": "system", "content": "Be brief."},
            *turns(["What is a cat?", "And a dog?"], [first.text])]  # fmt: skip
    want = engine.generate(engine.prepare(talk), "dense", 5)
    assert second.tokens == want.tokens
    held.rewind()
    assert held.ask("What is a cat?", max_new_tokens=5).tokens == first.tokens


def test_replies_leave_the_talk_alone(engine: Engine, clip: zipvl.Inputs) -> None:
    held = session(engine, clip)
    told = turns([LIST, FIRST], ["a blue cat"])
    *_, last = held.reply(told, max_new_tokens=12)
    assert held.talk == []
    assert last.result.tokens == asked_alone(engine, clip, told).tokens
    parts = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": LIST}]}]
    *_, last = held.reply(parts, max_new_tokens=12)
    assert last.result.text == held.ask(LIST, max_new_tokens=12).text


def test_a_medium_in_another_place_is_read_again(engine: Engine, clip: zipvl.Inputs) -> None:
    held = session(engine, clip)
    held.ask(LIST, max_new_tokens=4)
    moved = "What comes first in <video>?"
    result = held.ask(moved, max_new_tokens=12)  # in the second message: the first has none now
    assert result.stats.reused < held.held.read
    want = asked_alone(engine, clip, turns([LIST, moved], [held.talk[1]["content"]]))
    assert result.tokens == want.tokens


# --- rewind, fork -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "zipvl", "zipvl:kv_bits=4", "h2o", "hired"])
@pytest.mark.parametrize("reuse", ["media", "first"])
def test_forks_go_their_own_way(
    engine: Engine, clip: zipvl.Inputs, method: str, reuse: str
) -> None:
    one = session(engine, clip, method, reuse)
    one.ask(LIST, max_new_tokens=6)
    two = one.fork()
    assert two.talk == one.talk
    a, b = one.ask(FIRST, max_new_tokens=6), two.ask(LAST, max_new_tokens=6)
    assert a.stats.reused > 0 < b.stats.reused
    assert len(one.talk) == len(two.talk) == 4
    three = session(engine, clip, method, reuse)
    three.ask(LIST, max_new_tokens=6)
    assert three.ask(LAST, max_new_tokens=6).tokens == b.tokens
    assert one.nbytes > 0


def test_rewinding_gives_the_same_answer(engine: Engine, clip: zipvl.Inputs) -> None:
    held = session(engine, clip)
    first = held.ask(LIST, max_new_tokens=12)
    held.ask(FIRST, max_new_tokens=12)
    held.rewind()
    again = held.ask(LIST, max_new_tokens=12)
    assert again.tokens == first.tokens
    assert again.stats.reused == held.held.read
    assert len(held.talk) == 2


# --- what comes between -----------------------------------------------------------------------


class Stop(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("method", ["dense", "zipvl", "zipvl:kv_bits=4", "h2o", "streaming"])
@pytest.mark.parametrize("layer", [0, 3])
def test_an_interrupted_step_leaves_nothing(
    engine: Engine, clip: zipvl.Inputs, method: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a decode step, when some layers have the token and others have not."""
    want = session(engine, clip, method).ask(LIST, max_new_tokens=12)
    held = session(engine, clip, method)
    pieces = held.stream(LIST, max_new_tokens=12)
    next(pieces)
    block = list(engine.model.text.blocks())[layer]

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(block, "feed_forward", stop)
        with pytest.raises(Stop):
            list(pieces)
    assert held.talk == []
    again = held.ask(LIST, max_new_tokens=12)
    assert again.tokens == want.tokens
    assert again.stats.reused > 100


def test_a_broken_extension_leaves_nothing(
    engine: Engine, clip: zipvl.Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = session(engine, clip)
    held.ask(LIST, max_new_tokens=12)
    want = held.fork().ask(FIRST, max_new_tokens=12)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model), "logits", lambda *_: torch.full((1, 400), torch.nan))
        with pytest.raises(zipvl.ModelError, match="first logits"):
            held.ask(FIRST)
    assert held.ask(FIRST, max_new_tokens=12).tokens == want.tokens


def test_answers_that_are_not_taken_to_the_end(engine: Engine, clip: zipvl.Inputs) -> None:
    held = session(engine, clip)
    pieces = held.stream(LIST, max_new_tokens=12)
    next(pieces), next(pieces)
    pieces.close()
    assert held.talk == []
    assert (
        held.ask(LIST, max_new_tokens=12).text == asked_alone(engine, clip, turns([LIST], [])).text
    )


def test_two_answers_at_a_time_are_told(engine: Engine, clip: zipvl.Inputs) -> None:
    held = session(engine, clip)
    pieces = held.stream(LIST, max_new_tokens=12)
    next(pieces)
    other = held.ask(FIRST, max_new_tokens=12)
    with pytest.raises(UsageError, match="another question"):
        list(pieces)
    assert held.ask(LIST, max_new_tokens=12).tokens
    assert other.text == asked_alone(engine, clip, turns([FIRST], [])).text


@pytest.mark.parametrize("method", ["dense", pytest.param("zipvl-quant:interval=3", marks=pytest.mark.slow),
                         "h2o:heavy=9,recent=9"])  # fmt: skip
def test_long_talks_find_room(
    engine: Engine, clip: zipvl.Inputs, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(held: Session) -> Iterator[list[int]]:
        for question in (LIST, FIRST, LAST, LIST):
            yield held.ask(question, max_new_tokens=12).tokens

    want = list(talk(session(engine, clip, method)))
    monkeypatch.setattr("zipvl.engine.run.ROOM", 3)
    monkeypatch.setattr("zipvl.engine.session.ROOM", 3)
    assert list(talk(session(engine, clip, method))) == want


def test_sampling_and_faults(engine: Engine, clip: zipvl.Inputs) -> None:
    held = session(engine, clip)
    warm = held.ask(LIST, 12, temperature=2.0, seed=3).tokens
    held.rewind()
    assert held.ask(LIST, 12, temperature=2.0, seed=3).tokens == warm
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(UsageError):
            held.ask(LIST, **wrong)
    with pytest.raises(UsageError, match="unknown reuse 'all'"):
        engine.session(reuse="all")
    with pytest.raises(UsageError, match="markers"):
        held.ask("<image> What?")
    with pytest.raises(UsageError, match="unknown method"):
        engine.session(method="nope")


def test_statistics_are_of_what_is_held(engine: Engine) -> None:
    frames = np.full((6, 40, 40, 3), 90, np.uint8)
    held = engine.session(video=frames, frames=None, method="zipvl")
    first, second = held.ask(LIST, 5).stats, held.ask(FIRST, 5).stats
    assert first.seconds["video"] > second.seconds["video"]  # of which words are all
    assert second.seconds["vision"] == 0 < second.seconds["prefill"]
    caches = held.held.caches
    assert second.kv_bytes == sum(cache.nbytes for cache in caches)
    assert [row["attended"] for row in second.layers] == [row["attended"] for row in first.layers]
    assert second.prefill_rate == pytest.approx(
        (second.prompt_tokens - second.reused) / second.seconds["prefill"]
    )
    assert 0 < second.ratio <= 1
