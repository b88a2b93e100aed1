"""Pictures of chosen frames, by decord for plain files and by PyAV for all others: the same pixels.

decord believes a file's header and hangs for ever when there are fewer frames than it promises, so
it is asked only where `Index.plain` holds, and whatever it finds damaged is read again by PyAV.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from ..errors import MediaError
from .video_index import Index, frames_of, opened, seek


def _upright(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """RGB picture, uint8 [h, w, 3], of `size` (w, h) before its display matrix turns it upright."""
    picture = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # x' = a x + c y and y' = b x + d y, from rows (a b u), (c d v), (x y w)
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5]
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
    yield from chain([] if first is None else [first], frames)


def pyav_frames(index: Index, targets: list[int]) -> Iterator[tuple[np.ndarray, bool]]:
    """(picture, intact) of each target, ascending; for a lost one the next, or else the last."""
    with opened(index.path) as (container, stream):
        size = stream.codec_context.width, stream.codec_context.height
        source = enumerate(frames_of(container, stream))
        frame, at = None, int(index.ticks[0]) - 1
        for want in targets if index.counted else index.ticks[targets].tolist():
            keys = index.keys[index.keys <= want]
            if len(keys) and at < keys[-1] and keys[-1] > index.ticks[0]:
                source = enumerate(_from_key(container, stream, keys, want))
            while frame is None or at < want:
                rank, following = next(source, (0, None))
                if following is None:
                    break
                frame, stamp = following, rank if index.counted else following.pts
                at = at if stamp is None else stamp
            if frame is None:
                raise MediaError(f"{index.path} has no frame that decodes: download it again")
            yield _upright(frame, size), at == want and not frame.is_corrupt


def _same_colours(index: Index) -> bool:
    """Whether decord gives the pixels PyAV gives: 8-bit 4:2:0 of even size, progressive, upright."""
    with opened(index.path) as (container, stream):
        frame = next(frames_of(container, stream), None)
        return (
            frame is not None
            and frame.format.name in ("yuv420p", "yuvj420p")
            and not (frame.width % 2 or frame.height % 2 or frame.interlaced_frame)
            and frame.side_data.get("DISPLAYMATRIX") is None
        )


def decord_frames(index: Index, targets: list[int]) -> Iterator[np.ndarray]:
    """Pictures of the targets, ending early where decord is absent or finds fault with the file."""
    try:
        import decord
    except (ImportError, OSError):
        return
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(index.path, ctx=decord.cpu(0), num_threads=0)
        for target in targets if len(reader) == len(index.ticks) else []:
            yield reader.get_batch([target]).asnumpy()[0]
    except decord.DECORDError:
        return


def decode(
    index: Index,
    targets: list[int],
    fit: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[int], object] | None,
) -> tuple[list[np.ndarray], str, int]:
    """Frames of the ascending `targets` through `fit`, the decoder's name, how many were intact."""
    frames: list[np.ndarray] = []
    for picture in decord_frames(index, targets) if index.plain and _same_colours(index) else ():
        frames.append(fit(picture))
        if progress:
            progress(1)
    if len(frames) == len(targets):
        return frames, "decord", len(frames)
    reported, frames, intact = len(frames), [], 0
    for picture, whole in pyav_frames(index, targets):
        frames.append(fit(picture))
        intact += whole
        if progress and len(frames) > reported:
            progress(1)
    return frames, "pyav", intact
