"""A prompt with its pictures and videos as token ids; what the model needs before it runs."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import ModelConfig
from ..errors import ModelError, UsageError
from ..model.batch import sent
from ..model.vlm import VLM
from ..model.weights import Progress
from ..vision.family import Family, Geometry, Media, Placed
from ..vision.source import open_image
from ..vision.video import Reading

HELD = 128  # frames that may wait; whole batches, so that waiting does not change features
BATCH = 16  # frames in the tower at a time
MARKER = "(<image>|<video>)"

Message = dict[str, Any]


ImageSource = str | os.PathLike | Image.Image | Media
VideoSource = str | os.PathLike | np.ndarray | Media


@dataclass
class Inputs:
    """One prompt. Visual tokens hold a placeholder id each, as Hugging Face expands them."""

    input_ids: Tensor  # [T] int64
    is_visual: Tensor  # [T] bool
    media: list[Media]  # in the order of their tokens
    turns: Tensor | None = None  # [3, T] rotary ids: time, row, column; None: the tokens' places
    ahead: int = 0  # by how much those of the tokens behind the media are ahead of their places
    seconds: float = 0.0  # spent on reading and resizing media
    vision_seconds: float = 0.0  # spent on encoding frames meanwhile
    warnings: list[str] = field(default_factory=list)
    reported: bool = False  # whether a run has counted these seconds

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Shown:
    """Where a prompt's visual tokens come from, as policy.Origin says."""

    inputs: Inputs
    model: VLM

    @cached_property
    def tiles(self) -> list[tuple[int, int]]:
        return [(m.geometry.rows, m.geometry.cols) for m in self.inputs.media]

    @cached_property
    def medium(self) -> Tensor:
        media = self.inputs.media
        return self.of_all([torch.full((m.tokens,), i) for i, m in enumerate(media)], -1)

    @cached_property
    def crop(self) -> Tensor:
        vision = self.model.vision
        return self.of_all([vision.numbers(m.geometry) for m in self.inputs.media], -1)

    @cached_property
    def received(self) -> Tensor:
        parts = []
        for m in self.inputs.media:
            if m.received is None and not len(m.crops):
                raise UsageError(
                    "start() of the method reads `received`, for which the vision tower looks once "
                    f"more, but frames past {HELD} are not held: use at most {HELD} --frames, or a "
                    "method that needs no pixels"
                )
            if m.received is None:
                m.received = self.model.vision.received(m.crops, m.geometry).cpu()
            parts.append(m.received)
        return self.of_all(parts, -torch.inf, 2)

    def of_all(self, parts: list[Tensor], text: float, *shape: int) -> Tensor:
        """[T, *shape] of `parts` [tokens, *shape], one for each medium, and of `text`."""
        out = torch.full((len(self.inputs), *shape), text)
        if parts:
            out[self.inputs.is_visual] = torch.cat(parts)
        return sent(out, self.model.device)


def read_image(source: ImageSource, vision: Family, alone: bool) -> Media:
    """A picture's crops and token count; Media pass. Raises MediaError."""
    if isinstance(source, Media):
        return source
    if not isinstance(source, str | os.PathLike | Image.Image):
        raise UsageError(
            f"a picture is a {type(source).__name__}: give a path or a PIL image (of an array: "
            "PIL.Image.fromarray)"
        )
    image = open_image(source)
    geometry = vision.plan(image.height, image.width, alone)
    crops = torch.from_numpy(vision.cut(image, geometry))
    return Media("image", crops, geometry, vision.count(geometry))


def read_clip(
    source: VideoSource,
    model: VLM,
    progress: Progress,
    frames: int | None,
    fps: float | None,
    start: float | None,
    end: float | None,
    reader: str,
) -> tuple[Media, float]:
    """A video and the seconds that encoding took of the time; Media pass.

    Raises MediaError, UsageError.
    """
    if isinstance(source, Media):
        return source, 0.0
    if not isinstance(source, str | os.PathLike | np.ndarray):
        kind = type(source).__name__
        raise UsageError(f"a video is a {kind}: give a path or an array uint8 [F, h, w, 3]")
    numbers = {"frames": frames, "fps": fps, "start": start, "end": end}
    for name, number in numbers.items():
        known = Integral if name == "frames" else Real
        if isinstance(number, bool) or not isinstance(number, known | None):
            raise UsageError(f"{name} is {number!r:.60}: give a number")
    if isinstance(source, np.ndarray) and frames is not None:
        frames = min(frames, max(1, len(source)))  # chosen already: no word where they are fewer
    reading = Reading(source, frames, fps, start, end, reader=reader)
    buffer = FrameBuffer(model.vision, reading)
    with progress("read frames", len(reading.targets)) as reading.progress:
        for some in reading:
            buffer.fill(some)
    return buffer.media(), buffer.seconds


class FrameBuffer:
    """Frames on their way into a model: a short video waits as pixels, a long one never does.

    When HELD are waiting and more come, they are encoded, and only what join() needs stays.
    """

    def __init__(self, vision: Family, reading: Reading):
        self.vision, self.reading = vision, reading
        self.seconds = 0.0  # spent on encoding
        self.geometry: Geometry | None = None  # known with the first frame
        self.pixels = torch.empty(0)  # HELD crops, filled again and again
        self.waiting = 0  # frames in them
        self.parts: list[Tensor] = []  # features of those before

    def fill(self, frames: Iterable[np.ndarray]) -> None:
        """Takes a video's frames, uint8 [h, w, 3], cut at once; earlier ones are forgotten."""
        self.waiting, self.parts = 0, []
        for frame in frames:
            if self.geometry is None:
                count = len(self.reading.targets)
                high, wide, _ = frame.shape
                self.geometry = self.vision.plan(high, wide, frames=count)
            if self.waiting == HELD:
                self.encode()
            crop = torch.from_numpy(self.vision.fit(frame, self.geometry))
            if not len(self.pixels):
                self.pixels = crop.new_empty(HELD, *crop.shape)
            self.pixels[self.waiting] = crop
            self.waiting += 1

    @torch.inference_mode()
    def encode(self) -> None:
        assert self.geometry is not None
        began, pixels = time.perf_counter(), self.pixels[: self.waiting]
        self.parts += [self.vision.features(some, self.geometry) for some in pixels.split(BATCH)]
        self.waiting = 0
        self.seconds += time.perf_counter() - began

    def media(self) -> Media:
        """The video whose frames were taken."""
        geometry, features = self.geometry, None
        assert geometry is not None, "a Reading without frames raises"
        pixels = self.pixels[: 0 if self.parts else self.waiting].clone()
        if self.parts:
            if self.waiting:
                self.encode()
            x, self.parts = torch.cat(self.parts), []
            with torch.inference_mode():
                features = self.vision.join(x, geometry)
        clip = self.reading.clip(pixels.numpy())
        return Media("video", pixels, geometry, self.vision.count(geometry), clip, features)


def as_list(media: Any) -> Sequence[Any]:
    """None, one medium or several, as several."""
    if media is None:
        return []
    return media if isinstance(media, list | tuple) else [media]


def conversation(prompt: str | Sequence[Message], system: str | None) -> list[Message]:
    """Chat messages with text content; a plain prompt is one user message.

    Content may be a list of parts, as Hugging Face and OpenAI write it: {"type": "text", "text":
    TEXT}, and {"type": "image"} or {"type": "video"} where a medium stands. Raises UsageError.
    """
    if not isinstance(prompt, Sequence):
        raise UsageError(
            f"the prompt is a {type(prompt).__name__}: give text, or messages in a list"
        )
    if not isinstance(system, str | None):
        raise UsageError(f"system is a {type(system).__name__}: give text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for i, m in enumerate(messages):
        known = isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
        if not known or not isinstance(m.get("content"), str | list | tuple):
            raise UsageError(
                f"{m!r:.80} is no message: give {{'role': 'user', 'content': TEXT}}, or the same "
                "from system or assistant"
            )
        if not isinstance(m["content"], str):
            text = "".join(part_text(part, m["role"] == "user") for part in m["content"])
            messages[i] = m | {"content": text}
    if not any(m["role"] == "user" for m in messages):
        raise UsageError("the conversation has no message from the user")
    head = [{"role": "system", "content": system}] if system else []
    return head + messages


def part_text(part: object, media: bool) -> str:
    """A content part as text, the marker of a medium where `media` are allowed."""
    if isinstance(part, dict):
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            return text
        if kind in ("image", "video") and media and len(part) == 1:
            return f"<{kind}>"
    raise UsageError(
        f"{part!r:.80} is no part of a message: give {{'type': 'text', 'text': TEXT}}, and in a "
        "user's message {'type': 'image'} or {'type': 'video'}; the pictures and videos go to "
        "images= and video=, in the same order"
    )


def place_media(messages: list[Message], images: int, videos: int) -> list[Message]:
    """Messages with content parts: text, and a place for each medium.

    `<image>` and `<video>` in a user's text say where media go; a kind without any marker goes
    first in the first user message. Raises UsageError when markers and media do not match.
    """
    if not any(m["content"] for m in messages) and not images + videos:
        raise UsageError("the prompt is empty: give some text, a picture or a video")
    text = "".join(m["content"] for m in messages if m["role"] == "user")
    first: list[dict] = []
    for kind, given in (("image", images), ("video", videos)):
        marked = text.count(f"<{kind}>")
        if marked == 0:
            first += [{"type": kind}] * given
        elif marked != given:
            raise UsageError(
                f"the prompt has {marked} <{kind}> markers but {given} {kind}s were given"
            )
    placed = []
    for message in messages:
        parts: list[dict] = [{"type": "text", "text": message["content"]}]
        if message["role"] == "user":
            parts, first = first + split_markers(message["content"]), []
        placed.append({"role": message["role"], "content": parts})
    return placed


def split_markers(text: str) -> list[dict]:
    """Content parts of a user's text. White space around media that come first is left to the
    template, which writes its own: "<image>\\nWhat?" and a picture with "What?" are the same."""
    text = re.sub(rf"^({MARKER}\s*)+", lambda found: "".join(found[0].split()), text)
    pieces = enumerate(re.split(MARKER, text))
    return [{"type": p[1:-1]} if i % 2 else {"type": "text", "text": p} for i, p in pieces if p]


def build_inputs(config: ModelConfig, vision: Family, runs: Iterable[list[int] | str],
                 media: list[Media], placed: list[Placed]) -> Inputs:  # fmt: skip
    """Token ids of a prompt: `runs` of ids, and the media's placeholder ids where `runs` name one;
    rotary ids where a medium has its own."""
    tokens = {"image": config.image_token, "video": config.video_token}
    counts = [part for one in placed for part in one if isinstance(part, int)]
    left, ids, visual = iter(counts), list[int](), list[Tensor]()
    for run in runs:
        some = [tokens[run]] * next(left) if isinstance(run, str) else run
        ids += some
        visual.append(torch.full((len(some),), isinstance(run, str)))
    inputs = Inputs(torch.tensor(ids), torch.cat(visual), media)
    own = [turns for turns in map(vision.turn, media) if turns is not None]
    if own:
        shapes = iter(torch.cat(own, dim=1).split(counts, dim=1))
        inputs.turns, inputs.ahead = rotary_ids(visual, shapes)
    inputs.warnings += [m.clip.warning for m in media if m.clip and m.clip.warning]
    check_length(inputs, config)
    return inputs


def rotary_ids(runs: list[Tensor], shapes: Iterator[Tensor]) -> tuple[Tensor, int]:
    """[3, T] of a prompt's runs, masks of all or no visual tokens each; and by how much what
    follows is ahead of its place. A run of visual tokens takes the next of `shapes` [3, n] from
    the id behind all before it on, text counts on from there."""
    out, at = [], 0
    for run in runs:
        shape = next(shapes) if bool(run[0]) else torch.arange(len(run)).expand(3, -1)
        out.append(at + shape)
        at = int(out[-1].max()) + 1
    return torch.cat(out, dim=1), at - sum(map(len, runs))


def turned(inputs: Sequence[Inputs], device: torch.device) -> Tensor | None:
    """Rotary ids [3, sum T] of packed prompts; None: they are the tokens' places."""
    if all(one.turns is None for one in inputs):
        return None
    places = [torch.arange(len(one)).expand(3, -1) for one in inputs]
    both = zip(inputs, places, strict=True)
    return sent(torch.cat([at if one.turns is None else one.turns for one, at in both], 1), device)


def check_length(inputs: Inputs, config: ModelConfig) -> None:
    window = config.text.sliding_window
    if window and len(inputs) > window:
        raise ModelError(
            f"the prompt has {len(inputs)} tokens, and this model's attention window is {window}, "
            "which zipvl does not implement: use fewer frames or smaller pictures"
        )
    if config.max_length and len(inputs) > config.max_length:
        inputs.warnings.append(
            f"the prompt has {len(inputs)} tokens, the checkpoint was trained for "
            f"{config.max_length}: answers may degrade; fewer frames help"
        )
