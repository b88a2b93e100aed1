"""Frames on their way into a model: a short video waits as pixels, a long one never does."""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..model.vlm import VLM
from ..vision.image import fit_frame
from ..vision.merge import count_tokens_video, merge_video
from ..vision.video import Clip, read_video
from .inputs import Media, Progress, VideoSource

HELD = 128  # frames that may wait; whole batches, so that waiting does not change features
BATCH = 16  # frames in the tower at a time


class Watch:
    """Takes frames one by one, resized at once. When HELD are waiting and more come, they are
    encoded, and only their pooled features stay."""

    def __init__(self, model: VLM):
        self.model, self.count, self.seconds = model, 0, 0.0
        size = model.config.media.size
        self.places = torch.empty(HELD, size, size, 3, dtype=torch.uint8)  # filled again and again
        self.waiting = 0  # frames in them
        self.parts: list[Tensor] = []  # features [n, N, C]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """A frame uint8 [h, w, 3]; returns its number [1], which stands for it from now on."""
        if self.waiting == HELD:
            self.encode()
        self.places[self.waiting] = torch.from_numpy(fit_frame(picture, self.model.config.media))
        self.waiting += 1
        self.count += 1
        return np.array([self.count - 1])

    @torch.inference_mode()
    def encode(self) -> None:
        began, crops = time.perf_counter(), self.places[: self.waiting]
        self.parts += [self.model.features(some, pool=True) for some in crops.split(BATCH)]
        self.waiting = 0
        self.seconds += time.perf_counter() - began

    def media(self, clip: Clip) -> Media:
        """The video whose frames [F, 1] are numbers of those seen."""
        config, order = self.model.config, clip.frames[:, 0]
        tokens = count_tokens_video(len(order), config.media, config.vision)
        if not self.parts:
            crops = self.places.numpy()[order]
            clip = replace(clip, frames=crops)
            return Media("video", torch.from_numpy(crops), None, tokens, clip)
        if self.waiting:
            self.encode()
        x, self.parts = torch.cat(self.parts), []
        if not np.array_equal(order, np.arange(len(x))):  # else no second copy of a long video
            x = x[torch.from_numpy(order)]
        with torch.inference_mode():
            features = merge_video(x, config.media, self.model.image_newline)
        nothing = np.empty((0, config.media.size, config.media.size, 3), dtype=np.uint8)
        clip = replace(clip, frames=nothing)
        return Media("video", torch.from_numpy(nothing), None, tokens, clip, features)


def read_clip(source: VideoSource, model: VLM, progress: Progress, frames: int | None,
              fps: float | None, start: float | None,
              end: float | None) -> tuple[Media, float]:  # fmt: skip
    """A video and the seconds that encoding took of the time; Media pass.

    Raises MediaError, UsageError.
    """
    if isinstance(source, Media):
        return source, 0.0
    if isinstance(source, np.ndarray) and frames is not None:
        frames = min(frames, max(1, len(source)))  # chosen already: none is repeated
    watch = Watch(model)
    with progress("read frames", frames or 0) as step:
        clip = read_video(source, frames, fps, start, end, fit=watch, progress=step)
    return watch.media(clip), watch.seconds
