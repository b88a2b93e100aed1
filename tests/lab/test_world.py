"""The demo world: what it says about its clips is what the pixels show."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.demo.backgrounds import SIDE, bundled, cut
from lab.demo.questions import CHANCE, PHRASES, Question, _missing, ask, corpus
from lab.demo.things import COLOURS, KINDS, NAMES, Placed, Thing, atlas, colour_rgb, draw
from lab.demo.world import MOST, Clip, Event, clip, random_clip, render, some_things, spans

seeds = st.integers(0, 2**32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.data())
def test_spans_are_ordered_and_inside(frames: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(MOST, frames)))
    got = spans(frames, count, np.random.default_rng(data.draw(seeds)))
    edges = [0, *(e for span in got for e in span), frames]
    assert len(got) == count
    assert edges == sorted(edges)
    assert all(start < stop for start, stop in got)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, MOST))
def test_things_of_a_clip_differ_in_kind(seed: int, count: int) -> None:
    things = some_things(count, np.random.default_rng(seed))
    assert len({t.kind for t in things}) == count
    assert all(t.kind in KINDS and t.colour in COLOURS for t in things)


def visible(frames: torch.Tensor, empty: torch.Tensor) -> list[bool]:
    """In which frames something covers the background."""
    return ((frames.float() - empty.float()).abs().amax((1, 2, 3)) > 8).tolist()


@pytest.mark.parametrize("number", range(4))
def test_events_are_in_the_pixels(number: int) -> None:
    """Frames of an event, and no others, differ from the bare background; the most frequent colour
    among the changed pixels is the sticker's. Other clips in every run."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"clip {number}: seed {seed}")
    rng = np.random.default_rng(seed)
    made = random_clip(16, rng, len(bundled()))
    frames = render(made, 48)
    bare = render(Clip(16, (), made.tile, made.pan, made.zoom), 48)
    expected = [any(e.start <= f < e.stop for e in made.events) for f in range(16)]
    assert visible(frames, bare) == expected
    for event in made.events:
        frame, plain = frames[event.start].float() / 255, bare[event.start].float() / 255
        changed = frame[(frame - plain).abs().amax(-1) > 0.02]
        table = colour_rgb(list(NAMES))
        gap = (changed[:, None] - table).abs().amax(-1)
        votes = torch.bincount(gap.argmin(1)[gap.amin(1) < 0.02], minlength=len(NAMES))
        votes[[NAMES.index(c) for c in ("white", "black") if c != event.thing.colour]] = 0
        assert NAMES[votes.argmax()] == event.thing.colour


def test_kinds_look_different() -> None:
    masks = atlas(32)[:, 0].flatten(1)
    both = masks @ masks.T
    overlap = both / (masks.sum(1) + masks.sum(1)[:, None] - both)
    overlap.fill_diagonal_(0)
    assert overlap.max() < 0.85
    assert masks.sum(1).min() > 0.05 * 32 * 32  # nothing is empty


def test_draw_puts_the_sticker_where_it_says() -> None:
    x, y = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    where = Placed(
        torch.tensor([0, -1]), torch.ones(2, 3), x, y, torch.full((2,), 0.2), torch.zeros(2)
    )
    _, cover = draw(torch.zeros(2, 3, 100, 100), where)
    ys, xs = torch.nonzero(cover[0, 0] > 0.5, as_tuple=True)
    assert abs(xs.float().mean() / 100 - 0.3) < 0.02
    assert abs(ys.float().mean() / 100 - 0.6) < 0.02
    assert abs((xs.max() - xs.min()) / 100 - 0.4) < 0.05  # the diameter, and a thin outline
    assert cover[1].max() == 0


def test_motion_moves() -> None:
    event = Event(Thing("star", "red"), 0, 8, (0.4, 0.5, 0.6, 0.5), 0.3, 0.0)
    frames = render(Clip(8, (event,), 0, (0, 0, 0, 0), 0.8), 64)
    assert (frames[0] != frames[7]).any()


def test_render_is_repeatable_and_scales() -> None:
    assert torch.equal(render(clip(3, 8), 48), render(clip(3, 8), 48))
    assert render(clip(3, 5), 96).shape == (5, 96, 96, 3)
    assert clip(3, 8) != clip(4, 8)
    long = Clip(130, (), 0, (0, 0, 1, 1), 0.5)
    assert len(render(long, 16)) == 130


def worked_out(q: Question, things: tuple[Thing, ...]) -> str:
    """The answer from the question's text alone."""
    names, words = [str(t) for t in things], q.text.rstrip("?.").split()
    kind = next((w for w in words if w in KINDS), None)
    colour = next((w for w in words if w in COLOURS), None)
    return {
        "what": lambda: "".join(names),
        "colour": lambda: next(t.colour for t in things if t.kind == kind),
        "object": lambda: " ".join(t.kind for t in things if t.colour == colour),
        "first": lambda: names[0],
        "last": lambda: names[-1],
        "after": lambda: names[[t.kind for t in things].index(kind) + 1],
        "before": lambda: names[[t.kind for t in things].index(kind) - 1],
        "count": lambda: str(len(names)),
        "digit": lambda: " ".join(t.kind for t in things if t.kind.isdigit()),
        "list": lambda: ", ".join(names) or "nothing",
        "yesno": lambda: "yes" if f"{colour} {kind}" in names else "no",
    }[q.kind]()


@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(0, MOST))
def test_answers_are_right(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    things = tuple(some_things(count, rng))
    questions = ask(things, 99, rng)
    assert {q.kind for q in questions} >= {"count", "list", "yesno"}
    assert len({q.kind for q in questions}) == len(questions)
    for q in questions:
        assert q.answer == worked_out(q, things), q


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(0, MOST))
def test_negatives_are_absent(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    things = tuple(some_things(count, rng))
    assert _missing(things, rng) not in things


def test_asked_kinds_only() -> None:
    rng = np.random.default_rng(0)
    things = (Thing("star", "red"), Thing("7", "blue"))
    assert {q.kind for q in ask(things, 9, rng, ("digit", "after"))} == {"digit", "after"}
    assert ask(things, 9, rng, ("what",)) == []


def test_every_kind_has_phrases_and_a_chance() -> None:
    assert PHRASES.keys() == CHANCE.keys()
    assert all(len(set(p)) >= 3 for p in PHRASES.values())
    assert all(0 < c <= 0.5 for c in CHANCE.values())
    assert len(corpus()) > 200


def test_backgrounds_are_not_trivial() -> None:
    tiles = bundled()
    assert tiles.dtype == torch.uint8
    assert tiles.shape[1:] == (3, SIDE, SIDE)
    assert len(tiles) >= 40
    assert (tiles.float().flatten(1).std(1) > 4).all()


def test_cut_takes_tiles_row_by_row() -> None:
    from PIL import Image

    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    sheet.paste((10, 20, 30), (SIDE, 0, 2 * SIDE, SIDE))
    tiles = cut(sheet)
    assert tiles.shape == (4, 3, SIDE, SIDE)
    assert tiles[1, :, 5, 5].tolist() == [10, 20, 30]
    assert tiles[[0, 2, 3]].max() == 0
