"""Links of a request as files that may be read: data: URLs, and file:// below one root.

    fetch: base64 length -> bytes or a walk below the root -> hash -> head of the file -> frames
           -> visual tokens -> Medium

No address is ever fetched. A file is a regular one whose resolved path lies below the root. The
walk down to it follows no link, so that one swapped in meanwhile is not followed either. Behind the
queue it is walked again, and has to be the same file as before.
"""

import base64
import binascii
import hashlib
import os
import re
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch

from ..errors import MediaError, UsageError
from ..vision.family import Family, Media, Placed
from ..vision.index import check_tables, opened
from ..vision.source import local_file, opened_image
from ..vision.video import Reading
from .request import Ask, Limits, Link, Refusal

DATA = re.compile(r"data:(image|video)/[A-Za-z0-9.+-]{1,64};base64,")
SPOOL = 2**30  # bytes of data: URLs that wait on disk, of all requests
MEMORY = 4096  # files whose hashes and counts are remembered
BLOCK = 2**20
PATH = 4096  # characters: each folder of a path is looked at
DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
REGULAR = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

Identity = tuple[int, int, int, int, int]  # device, inode, size, times of contents and of all


@dataclass(frozen=True)
class Medium:
    """A picture or video of a request."""

    kind: str  # image | video
    where: str  # the field that names it
    file: str  # its path, below the root or in the folder of the server
    identity: Identity | None  # None: the server wrote it
    digest: str  # sha256 of its bytes
    size: int = 0  # of what the server wrote


@dataclass(frozen=True)
class Size:
    """What the head of a file says."""

    frames: int  # 0 of a picture
    tokens: int  # visual ones
    placed: Placed


class Store:
    """Files of requests. Only fetch() waits for disks; it is called by one thread."""

    def __init__(self, root: str | None, limits: Limits, family: Family, usual: int):
        """`usual`: frames of a video where nobody says. Raises UsageError for another root."""
        self.limits, self.family, self.usual = limits, family, usual
        self.root = root and os.path.realpath(root)
        if self.root and not os.path.isdir(self.root):
            raise UsageError(f"--media-root {root} is no folder: name one that is there")
        if self.root and os.open not in os.supports_dir_fd:
            raise UsageError("--media-root needs a system that opens files below a folder")
        self.folder = tempfile.TemporaryDirectory(prefix="zipvl-")  # 0700
        self.spooled, self.lock = 0, Lock()
        self.digests: OrderedDict[Identity, str] = OrderedDict()
        self.sizes: OrderedDict[Any, Size] = OrderedDict()

    def close(self) -> None:
        """Deletes whatever was written."""
        self.folder.cleanup()

    def fetch(self, ask: Ask, check: Callable[[], object]) -> tuple[list[Medium], list[Placed]]:
        """The media of a request and what stands for them in the prompt; every ceiling of theirs
        holds. `check()` may end it by raising.

        Raises Refusal; what was written is gone then.
        """
        encoded = sum(len(link.url) for link in ask.links if link.url[:5] == "data:")
        if encoded * 3 // 4 > self.limits.media:
            where = ask.links[0].where
            raise Refusal(413, f"the data: URLs hold about {encoded * 3 // 4} bytes: "
                          f"at most {self.limits.media} are allowed", where)  # fmt: skip
        media: list[Medium] = []
        placed: list[Placed] = []
        try:
            frames = tokens = 0
            alone = sum(link.kind == "image" for link in ask.links) == 1
            for link in ask.links:
                check()
                media.append(self.find(link, check))
                size = self.measure(media[-1], ask, alone)
                frames, tokens = frames + size.frames, tokens + size.tokens
                placed.append(size.placed)
                self.hold(frames, self.limits.frames, "video frames", media[-1], ask)
                self.hold(tokens, self.limits.visual, "visual tokens", media[-1], ask)
        except BaseException:
            self.release(media)
            raise
        return media, placed

    def hold(self, count: int, most: int, what: str, medium: Medium, ask: Ask) -> None:
        if count > most:
            field = ask.rate if what == "video frames" and ask.frames is None else ""
            raise Refusal(
                400, f"the media up to {medium.where} have {count} {what}: this server looks at "
                f"no more than {most}, ask for fewer frames or pictures", field or medium.where,
            )  # fmt: skip

    def release(self, media: list[Medium]) -> None:
        """Deletes what the server wrote of a request."""
        for medium in media:
            if medium.identity is None:
                with suppress(FileNotFoundError):
                    os.unlink(medium.file)
                with self.lock:
                    self.spooled -= medium.size

    # --- links to files -----------------------------------------------------------------------

    def find(self, link: Link, check: Callable[[], object]) -> Medium:
        if link.url[:5] == "data:":
            return self.write(link)
        if link.url[:7].lower() == "file://":
            return self.below(link, check)
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", link.url)
        raise Refusal(
            400, f"{link.where} is {f'a {scheme[0]:.20} URL' if scheme else 'no URL'}: give data:, "
            "or file:// below the server's media root; nothing is fetched", link.where,
        )  # fmt: skip

    def write(self, link: Link) -> Medium:
        """The bytes of a data: URL in a private file."""
        head = DATA.match(link.url)
        if not head or head[1] != link.kind:
            raise Refusal(
                400, f"{link.where} is no data:{link.kind}/...;base64, URL: write it so", link.where
            )
        try:
            raw = base64.b64decode(link.url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(
                400, f"{link.where} is not valid base64: write it without spaces and line ends",
                link.where,
            ) from None  # fmt: skip
        full = Refusal(503, "too many bytes of other requests are waiting here: ask again later")
        with self.lock:
            if self.spooled + len(raw) > SPOOL:
                raise full
            self.spooled += len(raw)
        number, path = tempfile.mkstemp(dir=self.folder.name)  # 0600
        digest = hashlib.sha256(raw).hexdigest()
        medium = Medium(link.kind, link.where, path, None, digest, len(raw))
        try:
            with open(number, "wb") as file:
                file.write(raw)
        except OSError:  # no room on the disk
            self.release([medium])
            raise full from None
        return medium

    def below(self, link: Link, check: Callable[[], object]) -> Medium:
        """A file below the root; whatever else it is, or is not, the sentence is the same."""
        path = unquote(link.url[7:], errors="surrogateescape")
        path = path.removeprefix("localhost") if path.startswith("localhost/") else path
        absent = Refusal(
            400, f"{link.where} is no regular file below this server's media root", link.where
        )
        if self.root is None:
            raise Refusal(
                400, f"{link.where} is a file:// URL: this server has no media root", link.where
            )
        if not path.startswith("/") or len(path) > PATH or ".." in path.split("/"):
            raise absent
        try:
            real = os.path.realpath(path)
            with self.walked(real) as (number, identity):
                digest = self.digest(number, identity, check)
        except (OSError, ValueError):
            raise absent from None
        return Medium(link.kind, link.where, real, identity, digest)

    @contextmanager
    def walked(self, path: str) -> Iterator[tuple[int, Identity]]:
        """A regular file open for reading, reached from the root without following a link. Raises
        OSError, ValueError."""
        assert self.root is not None
        inside = os.path.relpath(path, self.root).split(os.sep)
        if not os.path.isabs(path) or ".." in inside:
            raise ValueError(path)
        here = os.open(self.root, DIRECTORY)
        try:
            for name in inside[:-1]:
                deeper = os.open(name, DIRECTORY, dir_fd=here)
                os.close(here)
                here = deeper
            # A device is not even opened; what took the file's place in between is seen behind.
            if not stat.S_ISREG(os.stat(inside[-1], dir_fd=here, follow_symlinks=False).st_mode):
                raise ValueError(path)
            number = os.open(inside[-1], REGULAR, dir_fd=here)
        finally:
            os.close(here)
        try:
            s = os.fstat(number)
            if not stat.S_ISREG(s.st_mode):
                raise ValueError(path)
            yield number, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        finally:
            os.close(number)

    def digest(self, number: int, identity: Identity, check: Callable[[], object]) -> str:
        """sha256 of an open file, remembered for as long as nobody touches it."""
        if identity not in self.digests:
            state = hashlib.sha256()
            with open(number, "rb", closefd=False) as file:
                while block := file.read(BLOCK):
                    check()
                    state.update(block)
            remember(self.digests, identity, state.hexdigest())
        return self.digests[identity]

    @contextmanager
    def path(self, medium: Medium) -> Iterator[str]:
        """A path at which libraries read the medium. MediaError where it is not what it was."""
        with ExitStack() as stack:
            path = medium.file
            if medium.identity is not None:
                try:
                    number, identity = stack.enter_context(self.walked(path))
                except (OSError, ValueError):
                    number, identity = -1, None
                if identity != medium.identity:
                    raise MediaError(f"{medium.where} changed while it was asked about: ask again")
                own = f"/proc/self/fd/{number}"  # this very file, whatever its name leads to now
                path = own if os.path.exists(own) else path
            yield path

    # --- heads of files -----------------------------------------------------------------------

    def rate(self, ask: Ask) -> int | None:
        """Frames of a video, at most; None: all that `fps` gives."""
        return self.usual if ask.frames is None and ask.fps is None else ask.frames

    def measure(self, medium: Medium, ask: Ask, alone: bool) -> Size:
        """What the head of a file, or the table of a video's frames, says; pixels are not decoded.
        Raises Refusal."""
        key = (medium.digest, medium.kind, alone, ask.frames, ask.fps)
        if key not in self.sizes:
            path = ""
            try:
                with self.path(medium) as path:
                    picture = medium.kind == "image"
                    size = self.picture(path, alone) if picture else self.film(path, ask)
            except (MediaError, UsageError) as e:  # the latter: more frames than any clip has
                sentence = plainly(str(e), {path: medium.where})
                raise Refusal(422, sentence, medium.where) from None
            remember(self.sizes, key, size)
        return self.sizes[key]

    def picture(self, path: str, alone: bool) -> Size:
        with opened_image(path) as (image, _):
            self.check_pixels(path, image.width, image.height)
            sides = {(image.height, image.width), (image.width, image.height)}  # it may be turned
        plans = [self.family.plan(h, w, alone) for h, w in sides]
        return self.sized(Media("image", torch.empty(0), max(plans, key=self.family.count), 0))

    def film(self, path: str, ask: Ask) -> Size:
        check_tables(local_file(path))
        with opened(path) as (_, stream):
            high, wide = stream.codec_context.height, stream.codec_context.width
            self.check_pixels(path, wide, high)
        reading = Reading(path, self.rate(ask), ask.fps)
        plans = [self.family.plan(*side, frames=len(reading.targets))
                 for side in {(high, wide), (wide, high)}]  # fmt: skip
        most = max(plans, key=self.family.count)
        return self.sized(Media("video", torch.empty(0), most, 0, reading.clip(np.empty(0))))

    def sized(self, medium: Media) -> Size:
        """Of a medium whose pixels nobody has read."""
        medium.tokens = self.family.count(medium.geometry)
        return Size(medium.geometry.frames, medium.tokens, self.family.place(medium))

    def check_pixels(self, path: str, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise MediaError(
                f"{path} has {width} x {height} pixels: this server takes {self.limits.pixels}"
            )


def remember(found: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Adds to what is remembered; the oldest is forgotten."""
    found[key] = value
    if len(found) > MEMORY:
        found.popitem(last=False)


def plainly(sentence: str, names: dict[str, str]) -> str:
    """`sentence` with the client's names for files in place of the server's."""
    for path in sorted(names, key=len, reverse=True):
        sentence = sentence.replace(path, names[path]) if path else sentence
    return sentence
