"""The table of a video's frames: which there are and when they are shown, none decoded.

Headers lie, packets do not: after an edit list 146 of 467 promised frames may be left, a file cut
short has fewer than it says, a variable frame rate has no rate. So a file is demuxed once for the
table of its frames, and only then decoded, from the keyframe before each frame that is wanted. A
long MP4 or MOV, of which a part is wanted, has a table of its own that tells what lies before.
"""

import math
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, dropwhile, islice
from typing import Any, BinaryIO

import numpy as np

from ..errors import MediaError
from . import source as ceilings
from .source import named

# What a file may be taken for. Playlists (hls, concat, dash) are left out: they open other files.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,h264,"
    "hevc,obu,m4v,mjpeg,mxf,nut,rm,wtv,dv,yuv4mpegpipe,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
)
SEEKABLE = ("mov", "matroska", "avi")  # program and transport streams have no index
THREADED_PIXELS = 8192 * 4320  # of a frame where each thread holds one; larger come one by one
LONG = 20_000  # frames; shorter files are demuxed whole
SPARE = 2  # keyframes more on either side: frames are decoded before they are shown
MAX_SAMPLES = 2**24  # frames and packets of sound in all: 24 hours at 60 frames a second
PARENTS = frozenset(
    (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"dinf", b"moof", b"traf",
     b"mvex", b"free", b"hoov", b"wave", b"tref")  # as libavformat descends, whoever holds them
)  # fmt: skip


@dataclass(frozen=True)
class Index:
    """Frames of one source in presentation order."""

    path: str
    times: np.ndarray  # float64 [frames], seconds from the first frame
    duration: float  # seconds
    promised: int  # frames by the header, more than the table has when the file was cut short
    ticks: np.ndarray  # int64 [frames], timestamps in container units
    counted: bool = True  # frames are known by their rank, because the timestamps mislead
    keys: Sequence[int] = ()  # ticks where decoding may start; none: only at the beginning
    note: str = ""  # what is odd about the table, for Clip.warning

    @property
    def name(self) -> str:
        return named(self.path)


def array_index(video: np.ndarray) -> Index:
    """The table of an array of frames, one a second."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or not video.size:
        raise MediaError(
            f"the video array is {video.dtype} {list(video.shape)}: give uint8 [F, h, w, 3], F >= 1"
        )
    ranks = np.arange(len(video))
    return Index("the video array", ranks.astype(float), float(len(video)), len(video), ranks)


@contextmanager
def opened(path: str, threaded: bool = False) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and first real video stream; no other file or address is ever opened.

    Whatever the header says, the decoder refuses frames of more than MAX_PIXELS, or of more than
    THREADED_PIXELS where as many are held as there are threads.
    """
    name = named(path)
    try:
        import av
        from av.error import FFmpegError
    except ImportError as e:
        raise MediaError(
            f"{name} cannot be read without the package av ({e}): pip install av"
        ) from None
    largest = ceilings.MAX_PIXELS
    limit = {"max_pixels": str(min(largest, THREADED_PIXELS) if threaded else largest)}
    only = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
    try:
        container = av.open(f"file:{os.path.abspath(path)}", options=only | limit)
    except MemoryError:
        raise
    except (FFmpegError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise MediaError(
            f"{name} is not a readable video ({reason}): it is damaged, cut short or no video"
        ) from None
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams or streams[0].codec_context is None:
            raise MediaError(f"{name} has no video that can be decoded: give a file with pictures")
        context = streams[0].codec_context
        if context.width * context.height > largest:
            raise MediaError(
                f"{name} declares frames of {context.width} x {context.height} pixels, more than "
                f"{largest} in all: scale it down first"
            )
        context.options = limit
        yield container, streams[0]


def demuxed(container: Any, *streams: Any) -> Iterator[Any]:
    """Packets of all streams or of some, where some may begin that the header does not name."""
    more = True
    while more:
        more = False
        try:
            yield from container.demux(*streams)
        except IndexError:  # PyAV meets a stream it has not heard of; the next packet follows
            more = True


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Packets with content, of all streams or of some, up to the first that cannot be read."""
    from av.error import FFmpegError

    with suppress(FFmpegError):
        yield from (packet for packet in demuxed(container, *streams) if packet.size)


def seek(container: Any, stream: Any, tick: int) -> None:
    """To the keyframe at or before `tick`; a container that cannot goes on where it stands."""
    from av.error import FFmpegError

    with suppress(FFmpegError):
        container.seek(tick, stream=stream, backward=True)


@dataclass
class Scan:
    """What the packets of a video stream say, in decoding order."""

    stamps: "array[int]"  # ticks
    keys: "array[int]"  # ticks where decoding may start
    ends: dict[int, int]  # where each stream ends, in its own ticks
    last: int  # ticks that the last frame is shown, 0 if unknown
    torn: bool  # some are damaged
    timed: bool  # all have a time stamp
    joined: bool  # decoding times jump back


def scan(packets: Iterable[Any], stream: Any) -> Scan:
    h264, video = stream.codec_context.codec.canonical_name == "h264", stream.index
    stamps, keys, ends = array("q"), array("q"), {video: 0}
    last, decoded, torn, timed, joined = 0, -math.inf, False, True, False
    for packet in packets:
        pts, at = packet.pts, packet.stream_index
        torn |= packet.is_corrupt
        if pts is not None:
            ends[at] = max(ends.get(at, pts), pts + (packet.duration or 0))
        if at == video and not packet.is_discard:
            timed &= pts is not None
            stamps.append(pts or 0)
            last = packet.duration or 0
            if packet.dts is not None:
                joined |= packet.dts < decoded
                decoded = packet.dts
            if packet.is_keyframe and (not h264 or _is_idr(memoryview(packet))):
                keys.append(pts or 0)
    return Scan(stamps, keys, ends, last, torn, timed, joined)


def read_index(path: str, start: float | None = None, end: float | None = None) -> Index:
    """The table of frames of the video at `path`; MediaError where there are none.

    Where only frames from second `start` to `end` are asked for, the times of others may be rough.
    """
    check_tables(path)
    if start is not None or end is not None:
        with opened(path) as (container, stream):
            index = _part(path, container, stream, start or 0.0, math.inf if end is None else end)
        if index is not None:
            return index
    with opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        found = scan(packets(container), stream)
        total, timed = len(found.stamps), found.timed
        if not total:
            raise MediaError(f"{named(path)} has no frames: record or download it again")
        kind = container.format.name.split(",")[0]
        # AVI stamps packets in decoding order: with B-frames the stamps name the wrong pictures.
        counted = kind == "avi" and bool(stream.codec_context.has_b_frames)
        ticks, note = np.unique(found.stamps), ""
        if timed and (found.joined or len(ticks) < total):
            timed = False
            note = (
                f"time stamps of {named(path)} jump back, as in joined files: its {total} frames "
                f"are counted, {rate:g} a second"
            )
        if not timed:
            ticks, counted = np.arange(total), True
        unit = float(stream.time_base) if timed else 1 / rate
        length, begin = (container.duration or 0) / 1e6, (container.start_time or 0) / 1e6
        bases = [s.time_base for s in container.streams]
        reach = max(float(end * bases[at]) for at, end in found.ends.items() if at < len(bases))
        short = found.torn or (timed and reach - begin < 0.95 * length - 1 / rate)
        times = (ticks - ticks[0]) * unit
        return Index(
            path=path,
            times=times,
            duration=float(times[-1]) + (found.last * unit if timed and found.last else 1 / rate),
            promised=max(stream.frames, round(length * rate)) if short else len(ticks),
            ticks=ticks,
            counted=counted,
            keys=np.unique(found.keys).tolist() if kind in SEEKABLE and not counted else (),
            note=note,
        )


def _part(path: str, container: Any, stream: Any, start: float, end: float) -> Index | None:
    """The table of a long MP4 or MOV, exact at both its ends and from `start` to `end`.

    The container knows every frame's decoding time, and keyframes part the frames before from those
    behind in both orders, so rank and number are right; where nobody looks, decoding times stand
    for the others. None where that is not so, or would not pay.
    """
    table = stream.index_entries
    total, unit = len(table), float(stream.time_base)
    if not container.format.name.startswith("mov") or not LONG <= total == stream.frames:
        return None
    entries = ((e.timestamp, e.is_keyframe, e.is_discard or not e.size) for e in table)
    rows = np.fromiter(entries, "i8, ?, ?", total)
    decoded, cuts = rows["f0"], np.append(np.flatnonzero(rows["f1"]), total)
    if cuts[0] or rows["f2"].any():
        return None

    def demux(first: int, stop: int) -> tuple[int, np.ndarray, Scan] | None:
        """First row, time stamps [frames] and packets of the groups between two keyframes."""
        a, b = int(cuts[first]), int(cuts[stop])
        seek(container, stream, int(decoded[a]))
        late = dropwhile(lambda p: (p.dts or 0) < decoded[a], packets(container, stream))
        some = islice(late, b - a)  # a seek by decoding time comes out a group early
        key = next(some, None)
        if key is None or key.dts != decoded[a] or b - a > total // 2:
            return None
        found = scan(chain([key], some), stream)
        stamps, inner = np.array(found.stamps), cuts[first + 1 : stop] - a
        behind = np.minimum.accumulate(stamps[::-1])[::-1]
        parted = (np.maximum.accumulate(stamps)[inner - 1] < behind[inner]).all()
        plain = found.timed and not found.torn and not found.joined and len(stamps) == b - a
        return (a, np.sort(stamps), found) if plain and parted else None

    groups = len(cuts) - 1
    head, tail = demux(0, 1), demux(groups - 1, groups)
    if not head or not tail:
        return None
    zero = head[1][0]
    low, high = zero + start / unit, zero + end / unit
    first, stop = np.searchsorted(decoded[cuts[:-1]], (low, high), "right")
    first, stop = min(max(0, first - 1 - SPARE), groups - 1), min(stop + SPARE, groups)
    middle = demux(first, stop)
    if not middle or (first and middle[1][0] > low) or (stop < groups and middle[1][-1] <= high):
        return None
    ticks, keys = decoded - decoded[0] + zero, set()
    for row, stamps, found in (head, middle, tail):
        behind = row + len(stamps)
        ticks[:row] = ticks[:row].clip(max=stamps[0] - 1)
        ticks[row:behind] = stamps
        ticks[behind:] = ticks[behind:].clip(stamps[-1] + 1)
        keys |= set(found.keys)
    times = (ticks - zero) * unit
    duration = float(times[-1]) + tail[2].last * unit
    return Index(path, times, duration, total, ticks, False, sorted(keys))


def _is_idr(data: memoryview) -> bool:
    """Whether an H.264 packet (units behind 4-byte lengths) lets decoding start afresh.

    After other keyframes (intra refresh) pictures are incomplete.
    """
    place = 0
    while place + 4 < len(data):
        if data[place + 4] & 31 == 5:
            return True
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    return False


# --- what a movie's own tables claim, before libavformat builds them ----------------------------


def check_tables(path: str) -> None:
    """MediaError where an MP4 or MOV claims more samples than it has bytes, or than MAX_SAMPLES.

    Its tables are run-length coded, and libavformat writes them out: 2.7 kB can claim 320 million
    samples, which take 9 GB.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        claimed = sum(_claims(file, size))
    if claimed > min(size, MAX_SAMPLES):
        raise MediaError(
            f"{named(path)} claims {claimed} frames and sounds in {size} bytes, and {MAX_SAMPLES} "
            "are allowed: it is forged or damaged, or cut it into parts"
        )


def _claims(file: BinaryIO, size: int) -> Iterator[int]:
    """Samples that each track and each fragment claims, as libavformat would count them."""

    def number(after: int) -> int:
        return int.from_bytes(file.read(after + 4)[after:], "big")

    def runs(columns: int) -> np.ndarray:
        row = 4 * columns
        data = file.read(min(number(4) * row, size))
        return np.frombuffer(data[: len(data) // row * row], ">u4").reshape(-1, columns)

    sound, samples, chunked, chunks, constant = False, [0], np.empty((0, 3), ">u4"), 0, False

    def track() -> int:
        first, each, _ = chunked.astype(float).T
        in_chunks = int(each @ np.diff(first, append=chunks + 1.0).clip(0))
        # Sound of a constant rate is packed by 1024 samples, all else sample by sample.
        return in_chunks // 1024 if sound and constant else max(samples)

    for kind in _boxes(file, size):
        if kind == b"trak":
            yield track()
            sound, samples, chunked, chunks, constant = False, [0], chunked[:0], 0, False
        elif kind == b"hdlr":
            holds = file.read(12)[8:]
            sound = holds == b"soun" or (sound and holds != b"vide")
        elif kind in (b"stsz", b"stz2"):
            samples.append(number(8))
        elif kind in (b"stts", b"ctts"):
            table = runs(2)
            samples.append(int(table[:, 0].sum(dtype=np.int64)))
            constant |= kind == b"stts" and table[:, 1].tolist() == [1]
        elif kind == b"stsc":
            chunked = runs(3)
        elif kind in (b"stco", b"co64"):
            chunks = number(4)
        elif kind == b"trun":
            yield number(4)
        elif kind == b"cmov":
            yield 2**63  # compressed tables, of QuickTime 3: what they claim cannot be seen
    yield track()


def _boxes(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Kinds of the boxes at any depth, in order; the file stands behind each one's head."""
    place, ends = 0, [size]
    while ends:
        if place + 8 > ends[-1]:
            place = ends.pop()
            continue
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        body = place + 8
        if length == 1:
            length, body = int.from_bytes(file.read(8), "big"), body + 8
        stop = min(place + length, ends[-1]) if length else ends[-1]
        if stop < body:
            place = ends.pop()
            continue
        yield kind
        if kind in PARENTS:
            ends.append(stop)
            place = body
        else:
            place = stop
