"""The frame tables of an MP4 or MOV by its own boxes, before libavformat builds them.

Tables are run-length coded: a file of 2.7 kB can claim 320 million samples, which take 9 GB. Every
sample takes bytes of its own, so a file that claims more samples than it has bytes is forged.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from ..errors import MediaError
from .source import named

MAX_SAMPLES = 2**24  # frames and packets of sound in all: 24 hours at 60 frames a second
PARENTS = frozenset(
    (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"dinf", b"moof", b"traf",
     b"mvex", b"free", b"hoov", b"wave", b"tref")  # as libavformat descends, whoever holds them
)  # fmt: skip


def check_tables(path: str) -> None:
    """MediaError where the file at `path` claims more samples than it can hold, or MAX_SAMPLES."""
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
