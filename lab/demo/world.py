"""Clips and pictures of the demo world, with everything known about them.

A clip is a background that wanders and up to five stickers that appear one after the other, drift
and vanish. No two stickers of a clip are of the same kind, so every question has one answer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .backgrounds import bundled, window
from .things import (
    DIGITS,
    KINDS,
    NAMES,
    RADIUS,
    ROAM,
    SHAPES,
    TILT,
    Placed,
    Thing,
    colour_rgb,
    draw,
)

MOST = 5  # stickers in a clip
Path = tuple[float, float, float, float]  # x, y at the start, x, y at the end


@dataclass(frozen=True)
class Event:
    """One sticker in frames start .. stop - 1, drifting; places and radius as shares of a side."""

    thing: Thing
    start: int
    stop: int
    path: Path
    radius: float
    angle: float


@dataclass(frozen=True)
class Clip:
    """Everything about a clip but its pixels."""

    frames: int
    events: tuple[Event, ...]
    tile: int  # which background, counted in the tiles a clip is drawn over
    pan: Path  # the window's centre in the first and the last frame
    zoom: float

    @property
    def things(self) -> tuple[Thing, ...]:
        """What appears, in order."""
        return tuple(event.thing for event in self.events)


def some_things(count: int, rng: np.random.Generator) -> list[Thing]:
    """Random things, no kind twice; a third of them digits."""
    digits = rng.binomial(count, 1 / 3)
    shapes = rng.choice(SHAPES, count - digits, replace=False)
    kinds = [*shapes, *rng.choice(DIGITS, digits, replace=False)]
    return [Thing(str(kinds[i]), str(rng.choice(NAMES))) for i in rng.permutation(count)]


def spans(frames: int, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Start and stop of `count` events in order within `frames`, each at least one frame long.

    Gaps between events may be empty.
    """
    spare = frames - count
    cuts = np.sort(rng.integers(0, spare + 1, 2 * count))
    shares = np.diff(cuts, prepend=0)  # gap, event, gap, event, ..
    at, out = 0, []
    for gap, extra in zip(shares[::2], shares[1::2], strict=True):
        start = at + int(gap)
        at = start + 1 + int(extra)
        out.append((start, at))
    return out


def random_clip(frames: int, rng: np.random.Generator, tiles: int, most: int = MOST) -> Clip:
    """A clip with 0 (rarely) to `most` events, fewer where it is too short for them."""
    top = max(1, min(most, frames // 2))
    count = 0 if rng.random() < 0.03 else int(rng.integers(1, top + 1))
    events = []
    for thing, at in zip(some_things(count, rng), spans(frames, count, rng), strict=True):
        path, radius = corners(rng, 0.5 - ROAM, 0.5 + ROAM), float(rng.uniform(*RADIUS))
        events.append(Event(thing, *at, path, radius, float(rng.uniform(-TILT, TILT))))
    tile, pan, zoom = int(rng.integers(tiles)), corners(rng, -1, 1), float(rng.uniform(0.5, 0.9))
    return Clip(frames, tuple(events), tile, pan, zoom)


def corners(rng: np.random.Generator, low: float, high: float) -> Path:
    """A random way from one place to another."""
    x0, y0, x1, y1 = (float(v) for v in rng.uniform(low, high, 4))
    return x0, y0, x1, y1


def clip(seed: int, frames: int, most: int = MOST) -> Clip:
    """The held-out clip number `seed` of the world as shipped; the same in every run."""
    return random_clip(frames, np.random.default_rng([7, seed, frames]), len(bundled()), most)


def placed(clip: Clip) -> Placed:
    """Where the sticker of each frame is."""
    f = clip.frames
    kind, rgb = torch.full((f,), -1), torch.zeros(f, 3)
    x, y, angle = torch.zeros(3, f)
    radius = torch.ones(f)
    for event in clip.events:
        at = slice(event.start, event.stop)
        along = torch.linspace(0, 1, event.stop - event.start)
        kind[at] = KINDS.index(event.thing.kind)
        rgb[at] = colour_rgb([event.thing.colour])
        x[at] = event.path[0] + (event.path[2] - event.path[0]) * along
        y[at] = event.path[1] + (event.path[3] - event.path[1]) * along
        radius[at], angle[at] = event.radius, event.angle
    return Placed(kind, rgb, x, y, radius, angle)


def render(clip: Clip, side: int, tiles: Tensor | None = None) -> Tensor:
    """The frames of a clip over `tiles`, the bundled ones by default. # uint8 [F, side, side, 3]"""
    tiles = bundled() if tiles is None else tiles
    along = torch.linspace(0, 1, clip.frames)
    x, y = (clip.pan[i] + (clip.pan[i + 2] - clip.pan[i]) * along for i in (0, 1))
    picture, where = [], placed(clip)
    for part in torch.arange(clip.frames).split(64):  # memory grows with 64 frames, not with all
        stack = tiles[clip.tile].expand(len(part), -1, -1, -1)
        zoom = torch.full((len(part),), clip.zoom)
        here = Placed(*(getattr(where, name)[part] for name in Placed.__dataclass_fields__))
        picture.append(draw(window(stack, x[part], y[part], zoom, side), here)[0])
    return (torch.cat(picture) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
