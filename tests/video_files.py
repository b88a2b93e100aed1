"""Odd video files, made by ffmpeg from pictures that carry their own number.

Every frame shows its number in twelve black or white blocks, so a test reads from the pixels which
frame it was given, whatever codec, container, edit list or timestamps lie between.
"""

import io
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zipvl.vision.video import Clip, Reading

WIDTH, HEIGHT, RATE = 96, 64, 25
X264 = ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "veryfast"]
VPX = ["-pix_fmt", "yuv420p", "-deadline", "realtime", "-cpu-used", "8", "-g", "30"]
X265 = ["-pix_fmt", "yuv420p", "-c:v", "libx265", "-preset", "ultrafast", "-x265-params"]

# name: frames fed in, ffmpeg's options
ENCODED: dict[str, tuple[int, list[str]]] = {
    "h264.mp4": (100, [*X264, "-g", "24"]),
    "faststart.mp4": (100, [*X264, "-g", "24", "-movflags", "+faststart"]),
    "fragmented.mp4": (50, [*X264, "-movflags", "frag_keyframe+empty_moov"]),
    "h264.mkv": (60, [*X264, "-g", "24"]),
    "refresh.mkv": (90, [*X264, "-g", "20", "-bf", "0", "-x264-params", "intra-refresh=1"]),
    "opengop.mkv": (90, [*X264, "-g", "20", "-bf", "3", "-x264-params", "open-gop=1:scenecut=0"]),
    "hevc.mp4": (90, [*X265, "log-level=none:keyint=20:open-gop=0"]),
    "hevc_opengop.mp4": (90, [*X265, "log-level=none:keyint=20:open-gop=1:bframes=4"]),
    "vp8.webm": (60, [*VPX, "-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16"]),
    "vp9.webm": (60, [*VPX, "-c:v", "libvpx-vp9"]),
    "av1.mp4": (20, [*VPX, "-c:v", "libaom-av1"]),
    "stream.ts": (90, [*X264, "-g", "24"]),
    "program.mpg": (90, ["-c:v", "mpeg2video", "-q:v", "3", "-bf", "2"]),
    "vfr.mp4": (90, [*X264, "-vf", "select='not(mod(n,5))+gt(n,60)'", "-vsync", "vfr"]),
    "tenbit.mp4": (40, ["-pix_fmt", "yuv420p10le", "-c:v", "libx264"]),
    "oddsize.mp4": (30, ["-pix_fmt", "yuv444p", "-c:v", "libx264", "-vf", "scale=97:65"]),
    "interlaced.mp4": (30, [*X264, "-flags", "+ilme+ildct"]),
    "fullrange.mp4": (30, ["-pix_fmt", "yuvj420p", "-c:v", "libx264"]),
    "bt709.mp4": (30, [*X264, "-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709"]),
    "mpeg4.mp4": (40, ["-c:v", "mpeg4", "-q:v", "3", "-bf", "2"]),
    "mpeg4.avi": (40, ["-c:v", "mpeg4", "-q:v", "3", "-bf", "2"]),
    "motion.avi": (40, ["-c:v", "mjpeg", "-q:v", "3"]),
    "raw.h264": (40, X264),
    "animated.gif": (20, []),
    "late.mp4": (40, [*X264, "-vf", "setpts=PTS+2/TB"]),
    "one.mp4": (1, X264),
    "longgop.mp4": (600, [*X264, "-g", "600", "-sc_threshold", "0"]),
    "picture.png": (1, []),
    "zero.mp4": (5, [*X264, "-frames:v", "0"]),
}  # fmt: skip

# name: the file it is cut from without encoding again, ffmpeg's options before and after -i
CUT: dict[str, tuple[str, list[str], list[str]]] = {
    "cut.mp4": ("longgop.mp4", ["-ss", "13"], ["-t", "6"]),
    "cut_short.mp4": ("h264.mp4", ["-ss", "1.3"], ["-t", "1.5"]),
    "trimmed_end.mp4": ("h264.mp4", [], ["-t", "2"]),
}


def pictures(count: int) -> np.ndarray:
    """Moving gradients with the frame's number in blocks, uint8 [count, HEIGHT, WIDTH, 3]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    n = np.arange(count)[:, None, None]
    red, green, blue = 2 * x + 3 * n, 3 * y + n, x + y - 2 * n
    frames = np.stack([red % 256, green % 256, blue % 256], axis=-1).astype(np.uint8)
    for bit in range(12):
        row, column = divmod(bit, 6)
        block = np.where(np.arange(count) >> bit & 1, 255, 0).astype(np.uint8)
        frames[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = block[
            :, None, None, None
        ]
    return frames


def number(picture: np.ndarray) -> int:
    """The number that a decoded picture shows, uint8 [h, w, 3] of any size."""
    h, w = picture.shape[0] / HEIGHT, picture.shape[1] / WIDTH
    bits = 0
    for bit in range(12):
        row, column = divmod(bit, 6)
        y, x = int((row * 16 + 8) * h), int((column * 16 + 8) * w)
        bits |= int(picture[y - 2 : y + 3, x - 2 : x + 3].mean() > 128) << bit
    return bits


def ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    """Standard output of one run."""
    command = ["ffmpeg", "-v", "quiet", "-y", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


def reference(path: Path, height: int, width: int) -> np.ndarray:
    """All frames as ffmpeg itself decodes them, uint8 [frames, height, width, 3]."""
    raw = ffmpeg("-i", path, "-vsync", "0", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def encode(path: Path, frames: np.ndarray, options: list[str]) -> Path:
    """A video of `frames`, uint8 [F, h, w, 3]."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    pipe = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(RATE), "-i", "-"]
    ffmpeg(*pipe, *options, path, stdin=frames.tobytes())
    return path


def set_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes the 2 x 2 part of the display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def flip_bytes(source: Path, target: Path, count: int, seed: int) -> Path:
    """`source` with `count` random bytes of its pictures replaced."""
    data, random = bytearray(source.read_bytes()), np.random.default_rng(seed)
    first = data.index(b"mdat") + 8
    for place in random.integers(first, data.index(b"moov", first) - 4, count):
        data[place] = int(random.integers(256))
    target.write_bytes(data)
    return target


def huge_png(path: Path, side: int) -> None:
    """A picture that declares `side` x `side` pixels in a few bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))


def box(kind: bytes, *parts: bytes) -> bytes:
    """One box of an MP4."""
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def table_bomb(samples: int, handler: bytes = b"vide", **tables: bytes) -> bytes:
    """An MP4 of some 700 bytes whose one track claims `samples` of one byte each.

    `tables` replace its own by name: stts, stsz, stsc, stco, without version and flags.
    """
    matrix = words(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    ftyp, mdat = box(b"ftyp", b"isom\0\0\2\0isommp41"), box(b"mdat", bytes(64))
    entry = struct.pack(">6xH16xHHIIIH32sHh", 1, 16, 16, 0x480000, 0x480000, 0, 1, b"", 24, -1)
    sound = struct.pack(">6xH8xHHIHH", 1, 1, 8, 0, 8000, 0)
    kinds = {
        "stsd": words(1) + (box(b"raw ", sound if handler == b"soun" else entry)),
        "stts": words(1, samples, 1),
        "stsz": words(1, samples),
        "stsc": words(1, 1, samples, 1),
        "stco": words(1, len(ftyp) + 8),
    } | tables
    stbl = box(b"stbl", *(box(k.encode(), bytes(4), v) for k, v in kinds.items()))
    head = box(b"smhd", bytes(8)) if handler == b"soun" else box(b"vmhd", bytes(12))
    url = box(b"dinf", box(b"dref", words(0, 1), box(b"url ", words(1))))
    mdhd = box(b"mdhd", words(0, 0, 0, 1000, 1000, 0x55C40000))
    hdlr = box(b"hdlr", struct.pack(">II4s12x", 0, 0, handler), b"v\0")
    mdia = box(b"mdia", mdhd, hdlr, box(b"minf", head, url, stbl))
    sizes = words(16 << 16, 16 << 16)
    tkhd = box(b"tkhd", words(0, 0, 0, 1, 0, 1000), bytes(16), matrix, sizes)
    mvhd = box(b"mvhd", words(0, 0, 0, 1000, 1000, 0x10000, 0x1000000), bytes(8), matrix,
               bytes(24), words(2))  # fmt: skip
    return ftyp + mdat + box(b"moov", mvhd, box(b"trak", tkhd, mdia))


def growing_avi(path: Path, small: int, large: int, frames: int) -> None:
    """An AVI of PNG pictures: half of them as large as the header says, half of them larger."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)

    def png(side: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, "PNG")
        return file.getvalue()

    half = frames // 2
    body = [png(small)] * half + [png(large)] * half
    avih = struct.pack("<14I", 40000, 0, 0, 16, frames, 0, 1, 0, small, small, 0, 0, 0, 0)
    strh = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"MPNG", 0, 0, 0, 0, 1, 25, 0, frames,
                       0, 0, 0, 0, 0, small, small)  # fmt: skip
    strf = struct.pack("<IiiHH4sIiiII", 40, small, small, 1, 24, b"MPNG", small**2 * 3, 0, 0, 0, 0)
    strl = chunk(b"LIST", b"strl" + chunk(b"strh", strh) + chunk(b"strf", strf))
    hdrl = chunk(b"LIST", b"hdrl" + chunk(b"avih", avih) + strl)
    movi = chunk(b"LIST", b"movi" + b"".join(chunk(b"00dc", picture) for picture in body))
    path.write_bytes(chunk(b"RIFF", b"AVI " + hdrl + movi))


def read_video(
    source: str | os.PathLike | np.ndarray,
    frames: int | None = 32,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    fit: Callable[[np.ndarray], np.ndarray] = lambda picture: picture,
    progress: Callable[[int], object] | None = None,
    reader: str = "pyav",
) -> Clip:
    """All frames of a `Reading` as one array; `fit` brings each, uint8 [h, w, 3], to a size first."""
    reading = Reading(source, frames, fps, start, end, progress, reader)
    pictures: list[np.ndarray] = []
    for attempt in reading:
        pictures = [fit(frame) for frame in attempt]
    return reading.clip(np.stack(pictures))


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """video("h264.mp4") -> that file, made when first asked for; treat it as read-only."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg makes the test videos")
    folder = tmp_path_factory.mktemp("videos")

    @cache
    def make(name: str) -> Path:
        if name in CUT:
            source, before, after = CUT[name]
            ffmpeg(*before, "-i", make(source), *after, "-c", "copy", folder / name)
            return folder / name
        count, options = ENCODED[name]
        return encode(folder / name, pictures(count), options)

    return make
