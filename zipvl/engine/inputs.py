"""A prompt with its pictures and videos as token ids; what the model needs before it runs."""

import os
import re
import time
from collections.abc import Iterable, Sequence
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
from ..vision.image import Geometry, crops, fit_frame, open_image
from ..vision.merge import count_tokens_image, count_tokens_video, merge_video
from ..vision.video import Clip, Reading

HELD = 128  # frames that may wait; whole batches, so that waiting does not change features
BATCH = 16  # frames in the tower at a time
MARKER = "(<image>|<video>)"

Message = dict[str, Any]


@dataclass
class Media:
    """One picture or video, cut to crops, not yet encoded."""

    kind: str  # image | video
    crops: Tensor  # uint8 [n, S, S, 3]; none of a long video (FrameBuffer)
    geometry: Geometry | None  # None for a video
    tokens: int
    clip: Clip | None = None  # which frames a video gave; its pixels are `crops`
    features: Tensor | None = None  # [tokens, C] once encoded, so that a second question is cheaper
    received: Tensor | None = None  # [tokens, 2] once a method asked (PromptView.received)
    sha256: str = ""  # of its features, where a session's file stands for them and the pixels


ImageSource = str | os.PathLike | Image.Image | Media
VideoSource = str | os.PathLike | np.ndarray | Media


@dataclass
class Inputs:
    """One prompt. Visual tokens hold a placeholder id each, as Hugging Face expands them."""

    input_ids: Tensor  # [T] int64
    is_visual: Tensor  # [T] bool
    media: list[Media]  # in the order of their tokens
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
        return [(g.rows, g.cols) if g else (0, 0) for g in (m.geometry for m in self.inputs.media)]

    @cached_property
    def medium(self) -> Tensor:
        media = self.inputs.media
        return self.of_all([torch.full((m.tokens,), i) for i, m in enumerate(media)], -1)

    @cached_property
    def crop(self) -> Tensor:
        media = ((m.clip.indices if m.clip else m.crops, m.geometry) for m in self.inputs.media)
        return self.of_all([self.model.numbers(len(crops), g) for crops, g in media], -1)

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
                m.received = self.model.received(m.crops, m.geometry).cpu()
            parts.append(m.received)
        return self.of_all(parts, -torch.inf, 2)

    def of_all(self, parts: list[Tensor], text: float, *shape: int) -> Tensor:
        """[T, *shape] of `parts` [tokens, *shape], one for each medium, and of `text`."""
        out = torch.full((len(self.inputs), *shape), text)
        if parts:
            out[self.inputs.is_visual] = torch.cat(parts)
        return sent(out, self.model.device)


def read_image(source: ImageSource, config: ModelConfig, alone: bool) -> Media:
    """A picture's crops and token count; Media pass. Raises MediaError."""
    if isinstance(source, Media):
        return source
    if not isinstance(source, str | os.PathLike | Image.Image):
        raise UsageError(
            f"a picture is a {type(source).__name__}: give a path or a PIL image (of an array: "
            "PIL.Image.fromarray)"
        )
    pixels, geometry = crops(open_image(source), config.media, alone)
    tokens = count_tokens_image(geometry, config.media, config.vision)
    return Media("image", torch.from_numpy(pixels), geometry, tokens)


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
    buffer = FrameBuffer(model)
    reading = Reading(source, frames, fps, start, end, reader=reader)
    with progress("read frames", len(reading.targets)) as reading.progress:
        for some in reading:
            buffer.fill(some)
    return buffer.media(reading), buffer.seconds


class FrameBuffer:
    """Frames on their way into a model: a short video waits as pixels, a long one never does.

    When HELD are waiting and more come, they are encoded, and only their pooled features stay.
    """

    def __init__(self, model: VLM):
        size = model.config.media.size
        self.model, self.seconds = model, 0.0  # spent on encoding
        self.pixels = torch.empty(HELD, size, size, 3, dtype=torch.uint8)  # filled again and again
        self.waiting = 0  # frames in them
        self.parts: list[Tensor] = []  # features [n, N, C] of those before

    def fill(self, frames: Iterable[np.ndarray]) -> None:
        """Takes a video's frames, uint8 [h, w, 3], resized at once; earlier ones are forgotten."""
        self.waiting, self.parts = 0, []
        for frame in frames:
            if self.waiting == HELD:
                self.encode()
            self.pixels[self.waiting] = torch.from_numpy(fit_frame(frame, self.model.config.media))
            self.waiting += 1

    @torch.inference_mode()
    def encode(self) -> None:
        began, pixels = time.perf_counter(), self.pixels[: self.waiting]
        self.parts += [self.model.features(some, pool=True) for some in pixels.split(BATCH)]
        self.waiting = 0
        self.seconds += time.perf_counter() - began

    def media(self, reading: Reading) -> Media:
        """The video whose frames were taken."""
        config, features = self.model.config, None
        tokens = count_tokens_video(len(reading.targets), config.media, config.vision)
        pixels = self.pixels.numpy()[: 0 if self.parts else self.waiting].copy()
        if self.parts:
            if self.waiting:
                self.encode()
            x, self.parts = torch.cat(self.parts), []
            with torch.inference_mode():
                features = merge_video(x, config.media, self.model.image_newline)
        clip = reading.clip(pixels)
        return Media("video", torch.from_numpy(pixels), None, tokens, clip, features)


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


def build_inputs(config: ModelConfig, runs: Iterable[list[int] | str], images: list[Media],
                 videos: list[Media]) -> Inputs:  # fmt: skip
    """Token ids of a prompt: `runs` of ids, and every medium's placeholder ids in its place."""
    left = {"image": iter(images), "video": iter(videos)}
    tokens = {"image": config.image_token, "video": config.video_token}
    ids: list[int] = []
    visual: list[bool] = []
    media: list[Media] = []
    for run in runs:
        if isinstance(run, str):
            medium = next(left[run])
            media.append(medium)
            ids += [tokens[run]] * medium.tokens
            visual += [True] * medium.tokens
        else:
            ids += run
            visual += [False] * len(run)
    inputs = Inputs(torch.tensor(ids), torch.tensor(visual), media)
    inputs.warnings += [m.clip.warning for m in media if m.clip and m.clip.warning]
    check_length(inputs, config)
    return inputs


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
