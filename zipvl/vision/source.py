"""What a user names and a stranger made, looked at before any library decodes it.

Names, times, and the heads of files; nothing here is slow or imports torch.
"""

import argparse
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**27  # of a picture or a frame, 16K video: a forged header must not fill the memory
MAX_SIDE = 65535  # what JPEG can hold; longer sides are mistakes or attacks
# What a picture may be taken for: no plugin that runs a program (EPS) or opens other files.
PLUGINS = ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", "Mpo", "Ppm", "Avif", "Jpeg2K", "Tga")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000", "TGA")
VIDEO = re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|OggS|\0\0\x01\xba|G.{187}G", re.S)
HEIC = re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.S)


def seconds(text: str) -> float:
    """A moment as the command line takes it: seconds, mm:ss or hh:mm:ss, with a fraction or not."""
    *whole, last = text.split(":")
    try:
        parts = [*map(int, whole), float(last)]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or not all(0 <= part < 60 for part in parts[1:]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no moment: write seconds, mm:ss or hh:mm:ss, as 75.5 or 1:15.5"
        )
    return sum(part * 60**i for i, part in enumerate(reversed(parts)))


def named(source: object) -> str:
    """A file's name for a message: no escape code of it reaches a terminal as it is."""
    name = os.fsdecode(source) if isinstance(source, str | bytes | os.PathLike) else repr(source)
    return name if name.isprintable() else repr(name)


def local_file(source: str | os.PathLike, kind: str = "video") -> str:
    """`source` as the path of a readable regular file; MediaError says what else it is."""
    name = named(source)
    try:
        path = os.fsdecode(source)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
            raise MediaError(f"{name} is not a local file: download it and give its path") from None
        fault = "does not exist" if kind == "video" else "is not a file"
        raise MediaError(f"{name} {fault}: check the path") from None
    except (OSError, TypeError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise MediaError(
            f"the {kind} {source!r:.200} is no path of a file that can be read: {reason}"
        ) from None
    if stat.S_ISDIR(mode):
        raise MediaError(f"{name} is a directory: give the path of one {kind} file")
    if not stat.S_ISREG(mode):
        raise MediaError(f"{name} is a pipe or a device: save the {kind} to a regular file first")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{name} may not be read: change its permissions")
    if not os.path.getsize(path):
        raise MediaError(f"{name} is empty: copy or download it again")
    return path


def check_image(source: str | os.PathLike) -> None:
    """Raises what `opened_image` raises; reads the head of the file only, decodes nothing."""
    with opened_image(source):
        pass


@contextmanager
def opened_image(source: "str | os.PathLike | Image.Image") -> "Iterator[tuple[Image.Image, str]]":
    """A picture not yet decoded, of a size that may be, and its name for messages.

    Whatever Pillow raises meanwhile, its warnings included, is one sentence. Raises MediaError.
    """
    from PIL import Image

    name = "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image):
                check_size(source, name)
                yield source, name
                return
            name, path = named(source), os.path.abspath(local_file(source, "picture"))
            for plugin in PLUGINS:  # not Image.init(), which looks for every plugin there is
                with suppress(ImportError):
                    import_module(f"PIL.{plugin}ImagePlugin")
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                check_size(image, name)
                yield image, name
    except (MediaError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise MediaError(f"{name} has more than {MAX_PIXELS} pixels: scale it down first") from None
    except Image.UnidentifiedImageError:
        raise MediaError(f"{name} {_no_picture(path)}") from None
    except Exception as e:  # Pillow's decoders raise anything, from SyntaxError to struct.error
        raise MediaError(
            f"{name} cannot be read as a picture ({e}): try to open it in a viewer, save it again"
        ) from None


def open_image(source: "str | os.PathLike | Image.Image") -> "Image.Image":
    """RGB picture, first frame, turned as its EXIF says, 16-bit shades scaled, on white where it is
    transparent.

    Raises MediaError for whatever is no readable picture: missing, a folder, text, cut short,
    empty, of another format than FORMATS, of more than MAX_PIXELS, of shades without a known white.
    """
    from PIL import ImageOps

    with opened_image(source) as (image, name):
        image.load()
        check_size(image, name)  # some formats learn it only now
        deep = image.mode.startswith("I;16") or (
            image.mode == "I" and image.format in ("PNG", "PPM")
        )
        if image is source:
            image = ImageOps.exif_transpose(image)
        else:  # ours: no copy
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image, deep, name)


def _rgb(image: "Image.Image", deep: bool, name: str) -> "Image.Image":
    import numpy as np
    from PIL import Image

    if deep:  # convert() would clip nearly all of it to white
        grey = np.asarray(image)
        shades = (grey >> 8).astype(np.uint8)
        shades[grey == image.info.get("transparency", -1)] = 255
        return Image.fromarray(shades).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaError(
            f"{name} has 32-bit shades, and which of them is white is not known: save it with 8 or "
            "16 bits"
        )
    if image.mode not in ("RGBA", "LA"):
        if image.mode not in ("PA", "RGBa", "La") and "transparency" not in image.info:
            return image if image.mode == "RGB" else image.convert("RGB")
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image)  # no copy on the way: pictures may fill half a gigabyte
    return ground


def check_size(image: "Image.Image", name: str) -> None:
    """MediaError where a picture is empty or larger than MAX_SIDE or MAX_PIXELS."""
    (w, h), size = image.size, f"{name} is {image.width} x {image.height} pixels"
    if not (0 < w <= MAX_SIDE and 0 < h <= MAX_SIDE):
        raise MediaError(f"{size}: sides of 1 to {MAX_SIDE} are supported")
    if w * h > MAX_PIXELS:
        raise MediaError(f"{size}, more than {MAX_PIXELS} in all: scale it down first")


def _no_picture(path: str) -> str:
    """What a file is that Pillow does not know, and what to do."""
    with open(path, "rb") as file:
        head = file.read(200)
    if HEIC.match(head):
        return "is a HEIC picture, which zipvl does not read: save it as JPEG or PNG"
    if VIDEO.match(head):
        return "is a video: use -v, or video= in Python"
    known = ", ".join(FORMATS)
    return f"cannot be read as a picture (it is cut short or none of {known}): save it as PNG"
