"""A video as a clip: the frames a model looks at, and which and when they really are.

source -> read_index: the table of its frames -> sample: rows of the table
       -> Reading: attempts to decode these, each an iterator of frames -> Clip
"""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MediaError, UsageError
from . import source as ceilings
from .index import Index, array_index, demuxed, opened, packets, read_index, seek
from .source import local_file

READERS = ("pyav", "decord")
MAX_FPS = 1000.0
MAX_FRAMES = 2**17  # of a clip: what a model looks at, not what a file holds
SLACK = 1e-6  # seconds: timestamps are ticks times a fraction, and users type 3.3

Frames = Generator[tuple[np.ndarray, bool], None, None]  # uint8 [h, w, 3], is it intact


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one video, in order; frame numbers and times are the source's own."""

    frames: np.ndarray  # uint8 [F, H, W, 3] after resizing
    indices: tuple[int, ...]  # [F] frame numbers in presentation order, each once
    times: tuple[float, ...]  # [F] seconds from the first frame of the source
    fps: float  # average frame rate of the source
    duration: float  # of the source, seconds
    span: float  # seconds of it that the frames are spread over: all, or from start to end
    total: int  # frames in the source
    decoder: str  # pyav | decord | array
    warning: str = ""  # one line when something was repaired or is not as it was asked for


class Reading:
    """Frames of a local video file, or of an array uint8 [F, h, w, 3], chosen by `sample`.

        reading = Reading("film.mp4", frames=64)
        for frames in reading:
            taken = [work(frame) for frame in frames]  # uint8 [h, w, 3]
        clip = reading.clip(np.stack(taken))

    Frames come one by one as they are decoded, so that memory grows neither with the file's
    resolution nor its length. Threads over frames are fast but lose healthy frames next to a
    damaged one: where frames show damage, a second attempt without these gives all of them anew.
    `progress(1)` is called for each; an array counts as one frame a second; `reader`: see READERS.

    Raises MediaError for a source without usable frames, UsageError for impossible options; what
    decodes of a damaged file is used, and `Clip.warning` says how much that was.
    """

    def __init__(
        self,
        source: str | os.PathLike | np.ndarray,
        frames: int | None = 32,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Callable[[int], object] | None = None,
        reader: str = "pyav",
    ):
        _check(frames, fps, start, end)
        if reader not in READERS:
            raise UsageError(f"unknown reader {reader!r}: give {' or '.join(READERS)}")
        if isinstance(source, np.ndarray):
            index, self.decoder = array_index(source), "array"
        else:
            index, self.decoder = read_index(local_file(source), start, end), reader
        if start is not None and start >= index.duration:
            raise UsageError(
                f"start {start:g} lies behind the end of {index.name}: give a moment before "
                f"{index.duration:.2f} s"
            )
        self.index, self.progress, self.notes = index, progress, [index.note]
        self.targets = sample(index.times, frames, fps, start, end)  # rows of the frames that come
        first, last = interval(index.times, start, end)
        self.span = (last - first + 1) * index.duration / len(index.times)
        if len(self.targets) > MAX_FRAMES:
            raise UsageError(
                f"{len(self.targets)} frames of {index.name} are asked for, at most {MAX_FRAMES} "
                "may be: give frames, a lower fps, or start and end"
            )
        if frames is not None and fps is None and len(self.targets) < frames:
            self.notes.append(
                f"{frames} frames of {index.name} were asked for, only {len(self.targets)} are "
                "there"
            )
        elif frames is not None and fps is not None:
            every = len(sample(index.times, None, fps, start, end))
            if every > frames:
                self.notes.append(
                    f"{fps:g} frames a second of {index.name} are {every}: {frames} were taken, "
                    "spread evenly"
                )
        self.decoded = self.intact = self.reported = 0  # frames: in this attempt; in any
        if isinstance(source, np.ndarray):
            self.attempts: list[Frames] = [((source[i], True) for i in self.targets)]
        elif reader == "decord":
            self.attempts = [decord_frames(index, self.targets)]
        else:
            self.attempts = [pyav_frames(index, self.targets, t) for t in ("AUTO", "SLICE")]

    def __iter__(self) -> Iterator[Iterator[np.ndarray]]:
        for attempt in self.attempts:
            with closing(attempt):
                yield self._frames(attempt)
            if self.intact == len(self.targets):
                return
        if not self.decoded:
            raise MediaError(
                f"{self.index.name} has no frame that decodes: it is damaged, of a kind that "
                f"FFmpeg does not read, or its frames have more than {ceilings.MAX_PIXELS} pixels"
            )

    def _frames(self, attempt: Frames) -> Iterator[np.ndarray]:
        self.decoded = self.intact = 0
        for picture, whole in attempt:
            yield picture
            self.decoded += 1
            self.intact += whole
            if self.progress and self.decoded > self.reported:
                self.reported = self.decoded
                self.progress(1)

    def clip(self, frames: np.ndarray) -> Clip:
        """What was read, with `frames` [F, ...] made of it."""
        index, rows = self.index, self.targets
        return Clip(
            frames=frames,
            indices=tuple(rows),
            times=tuple(index.times[rows].tolist()),
            fps=len(index.times) / index.duration,
            duration=index.duration,
            span=self.span,
            total=len(index.times),
            decoder=self.decoder,
            warning="; ".join(filter(None, [self._repairs(), *self.notes])),
        )

    def _repairs(self) -> str:
        """What was repaired, in one sentence; empty if nothing."""
        index, wanted, total = self.index, len(self.targets), len(self.index.times)
        lost = wanted - self.intact
        if index.promised > total:
            found = f"decoded {total - lost} of {index.promised} frames of {index.name}"
            return f"{found}: it is damaged or cut short"
        if lost:
            found = f"decoded {self.intact} of {wanted} frames of {index.name} intact"
            return f"{found}: it is damaged, the others are neighbours or show the damage"
        return ""


def sample(
    times: Sequence[float] | np.ndarray,
    frames: int | None = 32,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Ascending rows of `times` (ascending seconds, not empty) to look at, within [start, end].

    Uniform: `np.linspace(first, last, frames, dtype=int)`, as LongVA and LLaVA-OneVision do, or
    every frame where there are fewer. With `fps`: the frame nearest to each moment of that grid,
    and uniform when that gives more than `frames`. None for both: every frame. An interval between
    two frames gives the one on screen. UsageError for impossible values.
    """
    _check(frames, fps, start, end)
    first, last = interval(times, start, end)
    rows = np.arange(first, last + 1)
    if fps is not None:
        stamps = np.asarray(times[first : last + 1], dtype=float) - times[first]
        # How many moments k / fps are nearest to a frame or an earlier one: a rise takes the frame.
        borders = np.append((stamps[1:] + stamps[:-1]) / 2, stamps[-1])
        moments = np.floor(borders * fps + SLACK)
        rows = rows[np.diff(moments, prepend=-1) > 0]
    if frames is not None and (fps is None or len(rows) > frames):
        rows = np.linspace(first, last, min(frames, last - first + 1), dtype=int)
    return rows.tolist()


def interval(
    times: Sequence[float] | np.ndarray, start: float | None, end: float | None
) -> tuple[int, int]:
    """The first and the last row of `times` within [start, end], or the one on screen then."""
    first = 0 if start is None else bisect_left(times, start - SLACK)
    last = len(times) - 1 if end is None else bisect_right(times, end + SLACK) - 1
    if last < first:
        first = last = max(0, min(first, last))
    return first, last


def _check(frames: int | None, fps: float | None, start: float | None, end: float | None) -> None:
    if frames is not None and not 1 <= frames <= MAX_FRAMES:
        raise UsageError(f"frames is {frames}: give 1 to {MAX_FRAMES}")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise UsageError(f"fps is {fps}: give frames a second, above 0 and at most {MAX_FPS:.0f}")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} is {value}: give seconds from the start of the video")
    if start is not None and end is not None and start > end:
        raise UsageError(f"start {start:g} lies after end {end:g}: give the earlier moment first")


# --- pictures, by PyAV --------------------------------------------------------------------------


def frames_of(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from where the container stands, and None for each packet that does not decode."""
    from av.error import FFmpegError

    try:
        for packet in demuxed(container, stream):
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                frames = [None]
            yield from frames
    except FFmpegError:
        yield None


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """a, b, c, d of the display matrix: shown at x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")  # rows (a b u), (c d v), (x y w)
    a, b, _, c, d = (1, 0, 0, 0, 1) if data is None else np.frombuffer(data, np.int32)[:5].tolist()
    return a, b, c, d


def _upright(frame: Any, size: tuple[int, int], matrix: tuple[int, int, int, int]) -> np.ndarray:
    """RGB picture, uint8 [h, w, 3], of `size` (w, h) before the matrix turns it upright."""
    picture = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _from_key(container: Any, stream: Any, keys: Sequence[int], want: int) -> Iterator[Any]:
    """Frames from a keyframe at or before `want`; seeking by decoding time may overshoot it."""
    for key in [*keys[:-4:-1], keys[0]]:
        seek(container, stream, key)
        frames = frames_of(container, stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= want:
            break
    yield first
    yield from frames


def pyav_frames(index: Index, targets: list[int], threads: str) -> Frames:
    """The targets, ascending; in a lost one's place the frame after it, or else the last."""
    with opened(index.path, threads == "AUTO") as (container, stream):
        from av.error import FFmpegError

        stream.thread_type = threads
        size = stream.codec_context.width, stream.codec_context.height
        source = enumerate(frames_of(container, stream))
        frame, at, hurt, matrix = None, int(index.ticks[0]) - 1, False, None
        for want in targets if index.counted else index.ticks[targets].tolist():
            usable = bisect_right(index.keys, want)
            if usable and max(at, index.ticks[0]) < index.keys[usable - 1]:
                source = enumerate(_from_key(container, stream, index.keys[:usable], want))
            while frame is None or at < want:
                rank, following = next(source, (None, None))
                if rank is None:
                    break
                if following is None:
                    hurt = True  # and so are the frames that build on this one, up to a keyframe
                    continue
                frame, stamp = following, rank if index.counted else following.pts
                at = at if stamp is None else stamp
                hurt = frame.is_corrupt or (hurt and not frame.key_frame)
            if frame is None:
                return
            matrix = matrix or _matrix(frame)  # once: to ask keeps a frame alive until collected
            try:
                picture = _upright(frame, size, matrix)
            except MemoryError:
                raise
            except FFmpegError as e:  # damage made it a pixel format that nothing converts
                raise MediaError(
                    f"{index.name} has a frame that cannot be shown ({e.strerror}): it is damaged"
                ) from None
            yield picture, at == want and not hurt


# --- pictures, by decord, for who asks for it ---------------------------------------------------


def decord_frames(index: Index, targets: list[int]) -> Frames:
    """The targets, ascending: the pixels that PyAV gives. MediaError where decord would err.

    It does not tell which are damaged, and decodes ahead of its caller: gigabytes of long videos.
    """
    try:
        import decord
    except (ImportError, OSError):
        raise MediaError(f"{index.name} needs the package decord: pip install decord") from None
    decord.logging.set_level(decord.logging.QUIET)
    with suppress(decord.DECORDError, RuntimeError, StopIteration, UnicodeEncodeError):
        reader = decord.VideoReader(os.path.abspath(index.path)) if _is_plain(index) else ()
        if len(reader) == len(index.ticks):
            for target in targets:
                yield reader[target].asnumpy(), True  # get_batch would let the heap grow
            return
    raise MediaError(f"decord would hang or err on {index.name}: read it with pyav")


def _is_plain(index: Index) -> bool:
    """Whether decord 0.6.0 finds the same frames and pixels, as measured, and does not wait for
    ever for frames that only a header knows of."""
    with open(index.path, "rb") as file, opened(index.path) as (container, stream):
        head, context = file.read(8), stream.codec_context
        found = [(p.pts, p.is_keyframe) for p in packets(container) if p.stream is stream]
        stamps, keys = np.array(found, dtype=float).T
        closed = np.minimum.accumulate(stamps[::-1])[::-1] == stamps  # nothing earlier comes later
        seek(container, stream, int(index.ticks[0]))
        first: Any = next(frames_of(container, stream), None)
        a, b, c, d = _matrix(first) if first else (0, 0, 0, 0)
        return bool(
            (head[4:] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3")  # MP4, Matroska
            and context.codec.canonical_name in ("h264", "hevc", "vp8", "vp9")
            and context.pix_fmt in ("yuv420p", "yuvj420p")
            and len(container.streams.video) == 1
            and stream.frames in (0, len(found))
            and len(found) == len(index.ticks) == index.promised  # none cut away or missing
            and stamps[0] == 0
            and keys.sum() == len(index.keys) == closed[keys > 0].sum()
            and a * d > b * c  # mirrored pictures it does not mirror back
            and not first.interlaced_frame
        )
