"""A video as a clip: the frames a model looks at, and which and when they really are.

path  -> video_index.read_index -> sample -> decode.decode, each frame through `fit` -> Clip
array ---------------------------> sample ----------------- each frame through `fit` -> Clip
"""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import MediaError, UsageError
from .decode import decode
from .local_file import local_file
from .video_index import Index, read_index

MAX_FPS = 1000.0
SLACK = 1e-6  # seconds: timestamps are ticks times a fraction, and users type 3.3


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one video, in order; frame numbers and times are the source's own."""

    frames: np.ndarray  # uint8 [F, H, W, 3], or what `fit` made of them
    indices: tuple[int, ...]  # [F] frame numbers in presentation order; repeated when F > total
    times: tuple[float, ...]  # [F] seconds from the first frame of the source
    fps: float  # average frame rate of the source
    duration: float  # of the source, seconds
    total: int  # frames in the source
    decoder: str  # decord | pyav | array
    warning: str = ""  # one sentence when something was repaired


def sample(
    times: Sequence[float],
    frames: int | None = 32,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Ascending rows of `times` (ascending seconds, not empty) to look at, within [start, end].

    Uniform: `np.linspace(first, last, frames, dtype=int)`, as LongVA and LLaVA-OneVision do; rows
    repeat when there are fewer. With `fps`: the frame nearest to each moment of that grid, each
    frame once, and uniform when that gives more than `frames`. None for both: every frame. An
    interval between two frames gives the one on screen. UsageError for impossible values.
    """
    _check(frames, fps, start, end)
    first = 0 if start is None else bisect_left(times, start - SLACK)
    last = len(times) - 1 if end is None else bisect_right(times, end + SLACK) - 1
    if last < first:
        first = last = max(0, min(first, last))
    rows = np.arange(first, last + 1)
    if fps is not None:
        stamps = np.asarray(times[first : last + 1], dtype=float) - times[first]
        # How many moments k / fps are nearest to a frame or an earlier one: a rise takes the frame.
        borders = np.append((stamps[1:] + stamps[:-1]) / 2, stamps[-1])
        moments = np.floor(borders * fps + SLACK)
        rows = rows[np.diff(moments, prepend=-1) > 0]
    if frames is not None and (fps is None or len(rows) > frames):
        rows = np.linspace(first, last, frames, dtype=int)
    return rows.tolist()


def _check(frames: int | None, fps: float | None, start: float | None, end: float | None) -> None:
    if frames is not None and frames < 1:
        raise UsageError(f"frames is {frames}: give 1 or more")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise UsageError(f"fps is {fps}: give frames a second, above 0 and at most {MAX_FPS:.0f}")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} is {value}: give seconds from the start of the video")
    if start is not None and end is not None and start > end:
        raise UsageError(f"start {start:g} lies after end {end:g}: give the earlier moment first")


def _identity(picture: np.ndarray) -> np.ndarray:
    return picture


def read_video(
    source: str | os.PathLike | np.ndarray,
    frames: int | None = 32,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    fit: Callable[[np.ndarray], np.ndarray] = _identity,
    progress: Callable[[int], object] | None = None,
) -> Clip:
    """Frames of a local video file, or of an array uint8 [F, h, w, 3], chosen by `sample`.

    `fit` brings one picture, uint8 [h, w, 3], to the model's size as soon as it is decoded, so that
    memory grows neither with the file's resolution nor its length. `progress(1)` is called for each
    picture decoded. An array counts as one frame a second.

    Raises MediaError for a source without usable frames, UsageError for impossible options; what
    decodes of a damaged file is used, and `Clip.warning` says how much that was.
    """
    _check(frames, fps, start, end)
    index = (
        _array_index(source) if isinstance(source, np.ndarray) else read_index(local_file(source))
    )
    if start is not None and start >= index.duration:
        raise UsageError(
            f"start {start:g} lies behind the end of {index.path}: give a moment before "
            f"{index.duration:.2f} s"
        )
    rows = sample(index.times, frames, fps, start, end)
    targets, back = np.unique(rows, return_inverse=True)
    if isinstance(source, np.ndarray):
        pictures, decoder, intact = _taken(source, targets, fit, progress), "array", len(targets)
    else:
        pictures, decoder, intact = decode(index, targets.tolist(), fit, progress)
    return Clip(
        frames=_stacked(pictures, back.tolist()),
        indices=tuple(rows),
        times=tuple(index.times[i] for i in rows),
        fps=len(index.times) / index.duration,
        duration=index.duration,
        total=len(index.times),
        decoder=decoder,
        warning=_warning(index, len(rows), len(targets), intact),
    )


def _array_index(array: np.ndarray) -> Index:
    """The table of an array of frames, one a second."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise MediaError(
            f"the video array is {array.dtype} {list(array.shape)}: give uint8 [F, h, w, 3], F >= 1"
        )
    ranks = np.arange(len(array))
    return Index(
        path="the video array",
        ticks=ranks,
        times=tuple(ranks.astype(float).tolist()),
        duration=float(len(array)),
        keys=ranks,
        counted=True,
        plain=False,
        promised=len(array),
    )


def _taken(
    array: np.ndarray,
    targets: np.ndarray,
    fit: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[int], object] | None,
) -> list[np.ndarray]:
    pictures = []
    for target in targets:
        pictures.append(fit(array[target]))
        if progress:
            progress(1)
    return pictures


def _stacked(pictures: list[np.ndarray], rows: list[int]) -> np.ndarray:
    """[F, ...] of the ascending `rows`; takes the list apart, so that no picture is held
    twice."""
    frames = np.empty((len(rows), *pictures[0].shape), dtype=pictures[0].dtype)
    for place in reversed(range(len(rows))):
        frames[place] = pictures[rows[place]]
        del pictures[rows[place] + 1 :]
    return frames


def _warning(index: Index, wanted: int, distinct: int, intact: int) -> str:
    """What was repaired, in one sentence; empty if nothing."""
    total, lost = len(index.times), distinct - intact
    if index.promised > total:
        found = f"decoded {total - lost} of {index.promised} frames of {index.path}"
        return f"{found}: it is damaged or cut short"
    if lost:
        found = f"decoded {intact} of {distinct} frames of {index.path} intact"
        return f"{found}: it is damaged, the others are neighbours or show the damage"
    if wanted > distinct:
        return f"frames of {index.path} were repeated to make {wanted}: only {distinct} are there"
    return ""
