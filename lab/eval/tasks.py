"""What is asked: clips of the demo world, or needles hidden in long ones. Same seed, same items."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zipvl.errors import UsageError

from ..demo.backgrounds import bundled
from ..demo.questions import CHANCE, PHRASES, ask
from ..demo.things import RADIUS
from ..demo.world import Clip, Event, corners, random_clip, render, some_things

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TWO_EVENTS = 4  # frames from which on a clip may hold two events (world.py, random_clip)
SCENE = 16  # frames of one background in a haystack
LARGEST = 384  # side of a rendered frame in pixels; smaller for towers that see less


@dataclass(frozen=True)
class Item:
    """One question about one clip. `group` is what accuracies are listed by."""

    group: str
    question: str
    answer: str
    chance: float  # of a guess among the answers that fit the question's form
    clips: tuple[Clip, ...]  # shown one after the other
    frames: int

    def scenes(self, side: int) -> Iterator[Tensor]:
        """The clips' frames, drawn as they are asked for. # uint8 [F, side, side, 3] each"""
        return (render(clip, side) for clip in self.clips)

    def video(self, side: int) -> Tensor:
        """uint8 [F, side, side, 3]"""
        return torch.cat(list(self.scenes(side)))


def world_items(kinds: tuple[str, ...], frames: int, samples: int, seed: int) -> list[Item]:
    """`samples` questions, of each kind in turn, each about a clip of its own."""
    items = []
    for number in range(samples):
        rng, kind = np.random.default_rng([seed, frames, number]), kinds[number % len(kinds)]
        while True:
            clip = random_clip(frames, rng, len(bundled()))
            if questions := ask(clip.things, 1, rng, (kind,)):
                break
        q = questions[0]
        items.append(Item(q.kind, q.text, q.answer, CHANCE[q.kind], (clip,), frames))
    return items


def needle_items(frames: int, samples: int, seed: int,
                 depths: Sequence[float] = DEPTHS) -> list[Item]:  # fmt: skip
    """V-NIAH: one frame with a sticker, at each depth in turn, in changing scenes without any."""
    items = []
    for number in range(samples):
        rng, depth = np.random.default_rng([seed, frames, number, 1]), depths[number % len(depths)]
        at, thing = round(depth * (frames - 1)), some_things(1, rng)[0]
        clips = []
        for start in range(0, frames, SCENE):
            length, pan = min(SCENE, frames - start), corners(rng, -1, 1)
            events: tuple[Event, ...] = ()
            if start <= at < start + length:
                radius = sum(RADIUS) / 2
                events = (Event(thing, at - start, at - start + 1, (0.5,) * 4, radius, 0.0),)
            tile = int(rng.integers(len(bundled())))
            clips.append(Clip(length, events, tile, pan, 0.7))
        question = str(rng.choice(PHRASES["what"]))
        group, chance = f"depth {depth:.0%}", CHANCE["what"]
        items.append(Item(group, question, str(thing), chance, tuple(clips), frames))
    return items


def task_items(task: str, frames: int, samples: int, seed: int) -> list[Item]:
    """Items of `all` kinds of question, of one kind, or of `niah`. Raises UsageError."""
    if task == "niah":
        return needle_items(frames, samples, seed)
    if task != "all" and task not in PHRASES:
        raise UsageError(f"unknown task {task!r}: use all, niah, {', '.join(PHRASES)}")
    kinds = tuple(PHRASES) if task == "all" else (task,)
    if frames < TWO_EVENTS:
        kinds = tuple(kind for kind in kinds if kind not in ("after", "before"))
    if not kinds:
        raise UsageError(f"task {task!r} needs two objects: use --frames {TWO_EVENTS} or more")
    return world_items(kinds, frames, samples, seed)


def same_answer(given: str, right: str) -> bool:
    """Exact match, but for case, an article in front, and a full stop behind."""
    words = given.strip().rstrip(".").strip().lower()
    for article in ("a ", "an ", "the "):
        words = words.removeprefix(article)
    return words == right
