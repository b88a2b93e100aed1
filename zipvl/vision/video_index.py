"""The table of frames of a video file, from demuxing it once: headers lie, packets do not.

After an edit list 146 of 467 promised frames may be left; a file cut short has fewer than it says;
a variable frame rate has no rate. What is read here decides who may decode (`Index.plain`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MediaError

# What a file may be taken for. Playlists (hls, concat, dash) are left out: they open other files.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,h264,"
    "hevc,obu,m4v,mjpeg,mxf,nut,rm,wtv,dv,yuv4mpegpipe,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
)
SEEKABLE = ("mov", "matroska", "avi")  # program and transport streams have no index
MAX_PIXELS = 2**27  # of one frame, 16K video: a forged header must not fill the memory


@dataclass(frozen=True)
class Index:
    """Frames of one file in presentation order; `ticks` and `keys` in container units."""

    path: str
    ticks: np.ndarray  # int64 [frames]
    times: tuple[float, ...]  # seconds from the first frame [frames]
    duration: float  # seconds
    keys: np.ndarray  # int64, the ticks at which decoding may start; empty: only at the beginning
    counted: bool  # frames are known by their rank, because the container's timestamps mislead
    plain: bool  # decord finds the same frames
    promised: int  # frames by the header, more than the table has when the file was cut short


@contextmanager
def opened(path: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and first real video stream; no other file or address is ever opened."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise MediaError(f"{path} cannot be read without the package av: pip install av") from None
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
        container = av.open(f"file:{path}", options=options)
    except (FFmpegError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise MediaError(
            f"{path} is not a readable video ({reason}): it is damaged, cut short or no video"
        ) from None
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams or streams[0].codec_context is None:
            raise MediaError(f"{path} has no video that can be decoded: give a file with pictures")
        context = streams[0].codec_context
        if context.width * context.height > MAX_PIXELS:
            raise MediaError(
                f"{path} declares frames of {context.width} x {context.height} pixels, more than "
                f"{MAX_PIXELS} in all: scale it down first"
            )
        yield container, streams[0]


def _packets(container: Any) -> Iterator[Any]:
    """Packets with content, of all streams, up to the first place that cannot be read."""
    from av.error import FFmpegError

    try:
        yield from (packet for packet in container.demux() if packet.size)
    except FFmpegError:
        return


def frames_of(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from where the container stands, and None for each packet that does not decode."""
    from av.error import FFmpegError

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = [] if packet is None else packet.decode()
        except FFmpegError:
            yield None
            continue
        if packet is None:
            return
        yield from frames


def seek(container: Any, stream: Any, tick: int) -> None:
    """To the keyframe at or before `tick`; a container that cannot goes on where it stands."""
    from av.error import FFmpegError

    with suppress(FFmpegError):
        container.seek(tick, stream=stream, backward=True)


def read_index(path: str) -> Index:
    """The table of frames of the video at `path`; MediaError where there are none."""
    with opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        rows, reach, torn, restarts = [], 0.0, False, True
        h264 = stream.codec_context.codec.canonical_name == "h264"
        for packet in _packets(container):
            torn |= packet.is_corrupt
            if packet.pts is not None:
                reach = max(reach, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream:
                key = packet.is_keyframe and (not h264 or _is_idr(bytes(packet)))
                restarts &= key == packet.is_keyframe
                rows.append((packet.pts, key, packet.is_discard, packet.duration))
        shown = [row for row in rows if not row[2]]
        if not shown:
            raise MediaError(f"{path} has no frames: record or download it again")
        kind = container.format.name.split(",")[0]
        timed = all(row[0] is not None for row in shown)
        # AVI stamps packets in decoding order: with B-frames the stamps name the wrong pictures.
        counted = not timed or bool(kind == "avi" and stream.codec_context.has_b_frames)
        ticks = np.unique([row[0] for row in shown]) if timed else np.arange(len(shown))
        unit = float(stream.time_base) if timed else 1 / rate
        keys = [row[0] for row in shown if row[1] and not counted and kind in SEEKABLE]
        times = tuple(((ticks - ticks[0]) * unit).tolist())
        length, start = (container.duration or 0) / 1e6, (container.start_time or 0) / 1e6
        short = torn or (timed and reach - start < 0.95 * length - 1 / rate)
        return Index(
            path=path,
            ticks=ticks,
            times=times,
            duration=times[-1] + (shown[-1][3] * unit if timed and shown[-1][3] else 1 / rate),
            keys=np.unique(np.array(keys, dtype=np.int64)),
            counted=counted,
            plain=timed and not short and restarts and _is_plain(container, stream, rows),
            promised=max(stream.frames, round(length * rate)) if short else len(ticks),
        )


def _is_idr(data: bytes) -> bool:
    """Whether an H.264 packet (units behind 4-byte lengths) lets decoding start afresh.

    After other keyframes (intra refresh) pictures are incomplete, and decord miscounts them.
    """
    place = 0
    while place + 4 < len(data):
        if data[place + 4] & 31 == 5:
            return True
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    return False


def _is_plain(container: Any, stream: Any, rows: list[tuple]) -> bool:
    """Whether decord finds the same frames; measured with decord 0.6.0.

    It does not, or hangs, with counts that disagree, edit lists, leading pictures after a keyframe
    (open GOP), MPEG-4 part 2 and most containers.
    """
    stamps = np.array([row[0] for row in rows])
    keys = np.array([row[1] for row in rows])
    closed = np.minimum.accumulate(stamps[::-1])[::-1] == stamps  # nothing earlier comes later
    return bool(
        container.format.name.split(",")[0] in ("mov", "matroska")
        and stream.codec_context.codec.canonical_name in ("h264", "hevc", "vp8", "vp9")
        and len(container.streams.video) == 1
        and stream.frames in (0, len(rows))
        and not any(row[2] for row in rows)
        and len(np.unique(stamps)) == len(rows)
        and stamps[0] == 0
        and keys[0]
        and closed[keys].all()
    )
