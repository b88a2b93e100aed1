"""Pictures of chosen frames, by decord for plain files and by PyAV for all others: the same pixels.

decord believes a file's header and hangs for ever when there are fewer frames than it promises, so
it is asked only where `Index.plain` holds, and whatever it finds damaged is read again by PyAV. It
also decodes ahead without end while its caller resizes (gigabytes of a few minutes in 1280 x 720),
so it is asked for stretches only that would fit in memory as a whole.
"""

import ctypes
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from threading import Lock
from typing import Any

import numpy as np

from ..errors import MediaError
from .video_index import Index, frames_of, opened, seek

AHEAD = 1 << 28  # bytes of decoded pictures that decord may come to hold
FFMPEG_ERROR = 16  # AV_LOG_ERROR; lower is worse
ONE_LISTENER = Lock()  # FFmpeg's log callback is one for the whole process

Frames = Generator[tuple[np.ndarray, bool], None, None]  # uint8 [h, w, 3], is it intact


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """a, b, c, d of the display matrix: shown at x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")  # rows (a b u), (c d v), (x y w)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data, dtype=np.int32)[:5].tolist()
    return a, b, c, d


def _upright(frame: Any, size: tuple[int, int], matrix: tuple[int, int, int, int]) -> np.ndarray:
    """RGB picture, uint8 [h, w, 3], of `size` (w, h) before the matrix turns it upright."""
    picture = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _from_key(container: Any, stream: Any, keys: np.ndarray, want: int) -> Iterator[Any]:
    """Frames from a keyframe at or before `want`; seeking by decoding time may overshoot it."""
    for key in [*keys[:-4:-1], keys[0]]:
        seek(container, stream, int(key))
        frames = frames_of(container, stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= want:
            break
    yield first
    yield from frames


def pyav_frames(index: Index, targets: list[int], threads: str) -> Frames:
    """The targets, ascending; in a lost one's place the frame after it, or else the last."""
    with opened(index.path) as (container, stream):
        stream.thread_type = threads
        size = stream.codec_context.width, stream.codec_context.height
        source = enumerate(frames_of(container, stream))
        frame, at, hurt, matrix = None, int(index.ticks[0]) - 1, False, None
        for want in targets if index.counted else index.ticks[targets].tolist():
            keys = index.keys[index.keys <= want]
            if len(keys) and at < keys[-1] and keys[-1] > index.ticks[0]:
                source = enumerate(_from_key(container, stream, keys, want))
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
            yield _upright(frame, size, matrix), at == want and not hurt


def _for_decord(index: Index, targets: list[int]) -> bool:
    """Whether decord gives the pixels PyAV gives (even 8-bit 4:2:0, progressive, upright), and all
    frames from the first target to the last are few enough bytes."""
    with opened(index.path) as (container, stream):
        frame = next(frames_of(container, stream), None)
        return (
            frame is not None
            and frame.format.name in ("yuv420p", "yuvj420p")
            and not (frame.width % 2 or frame.height % 2 or frame.interlaced_frame)
            and _matrix(frame) == (1, 0, 0, 1)
            and frame.width * frame.height * 3 * (targets[-1] - targets[0]) <= AHEAD
        )


@contextmanager
def _complaints(library: Any) -> Iterator[list[int]]:
    """Levels of the errors that decord's FFmpeg reports; decord itself keeps damage to itself."""
    levels: list[int] = []

    def note(_context: int, level: int, _format: bytes, _arguments: int) -> None:
        if level <= FFMPEG_ERROR:
            levels.append(level)

    signature = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p
    callback = ctypes.CFUNCTYPE(None, *signature)(note)
    with ONE_LISTENER:
        library.av_log_set_callback(callback)
        try:
            yield levels
        finally:
            library.av_log_set_callback(library.av_log_default_callback)


def decord_frames(index: Index, targets: list[int]) -> Frames:
    """The targets, ending early where decord is absent or finds fault with the file.

    A decord whose FFmpeg cannot be listened to counts as absent.
    """
    try:
        import decord

        library = decord._ffi.base._LIB
        library.av_log_set_callback.restype = None
    except (ImportError, OSError, AttributeError):
        return
    decord.logging.set_level(decord.logging.QUIET)
    with _complaints(library) as errors:
        try:
            reader = decord.VideoReader(index.path, ctx=decord.cpu(0), num_threads=0)
        except decord.DECORDError:
            return
        try:
            for target in targets if len(reader) == len(index.ticks) else []:
                picture = reader[target].asnumpy()  # get_batch would let the heap grow
                if errors:
                    return
                yield picture, True
        except (decord.DECORDError, StopIteration):
            return
        finally:
            del reader  # its threads end here, while there is someone to call back


def decode(
    index: Index,
    targets: list[int],
    fit: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[int], object] | None,
) -> tuple[list[np.ndarray], str, int]:
    """Frames of the ascending `targets` through `fit`, the decoder's name, how many are intact.

    Threads over frames are fast but lose healthy frames next to a damaged one: a file that shows
    damage is read once more without them.
    """
    attempts = [
        ("pyav", pyav_frames(index, targets, "AUTO")),
        ("pyav", pyav_frames(index, targets, "SLICE")),
    ]
    if index.plain and _for_decord(index, targets):
        attempts.insert(0, ("decord", decord_frames(index, targets)))
    reported = 0
    for name, reader in attempts:
        frames: list[np.ndarray] = []
        decoder, intact = name, 0
        with closing(reader):
            for picture, whole in reader:
                frames.append(fit(picture))
                intact += whole
                if progress and len(frames) > reported:
                    reported = len(frames)
                    progress(1)
        if intact == len(targets):
            break
    if not frames:
        raise MediaError(f"{index.path} has no frame that decodes: download it again")
    return frames, decoder, intact
