"""Damaged and hostile videos and pictures, and who reads them."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import video_files
from fuzz_damage import STRANGE, Files, Random, damage
from PIL import Image

from zipvl.config import MediaConfig
from zipvl.engine.load import DEMO
from zipvl.vision.llava import crops, fit_frame, plan
from zipvl.vision.source import open_image
from zipvl.vision.video import Reading

# --- videos -------------------------------------------------------------------------------------

X264 = [*video_files.X264, "-g", "10"]
VIDEOS = {
    "h264.mp4": X264, "faststart.mp4": [*X264, "-movflags", "+faststart"],
    "fragmented.mp4": [*X264, "-movflags", "frag_keyframe+empty_moov"], "h264.mkv": X264,
    "vp9.webm": [*video_files.VPX, "-c:v", "libvpx-vp9"], "stream.ts": X264,
    "program.mpg": ["-c:v", "mpeg2video", "-q:v", "3"], "mpeg4.avi": ["-c:v", "mpeg4", "-q:v", "3"],
    "motion.avi": ["-c:v", "mjpeg", "-q:v", "3"], "animated.gif": [], "small.mov": ["-c:v", "qtrle"],
    "flash.flv": ["-c:v", "flv"], "large.mp4": [*X264, "-vf", "scale=640:480"],
}  # fmt: skip


def build_videos(root: Path) -> None:
    """The bundled clip, and where there is ffmpeg thirteen more."""
    root.mkdir()
    shutil.copy(DEMO / "clip.mp4", root)
    for name, options in VIDEOS.items() if shutil.which("ffmpeg") else ():
        same = ["-threads", "1", "-fflags", "+bitexact", "-flags", "+bitexact"]
        video_files.encode(root / name, video_files.pictures(16), [*options, *same])


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def numbers(*values: int) -> bytes:
    return b"".join((value % 2**32).to_bytes(4, "big") for value in values)


def tables(rng: Random) -> bytes:
    """An MP4 whose tables promise more samples, chunks, edits, fragments or pixels than it holds."""

    def many() -> int:
        return rng.choice((1, 2, 10, 1000, 10**6, 80_000_000, 2**31 - 1, 2**32 - 1))

    def full(name: bytes, *values: int) -> bytes:
        return box(name, numbers(0, *values))

    side, count = rng.choice((16, 16, 16, 4000, 65535)), many()
    codec = rng.choice((b"raw ", b"raw ", b"png ", b"jpeg", b"avc1", b"rle "))
    entry = (
        bytes(6)
        + numbers(1)[2:]
        + bytes(18)
        + struct.pack(">HHIIIH32sHh", side, side, 72 << 16, 72 << 16, 0, 1, b"", 24, -1)
    )
    start = rng.choice((40, 0, 2**31))
    stbl = box(
        b"stbl", box(b"stsd", numbers(0, 1), box(codec, entry)), full(b"stts", 1, count, rng.choice((1, 0, 2**31))),
        full(b"stsz", rng.choice((1, 768)), count), full(b"stsc", 1, 1, rng.choice((1, count)), 1),
        full(b"stco", 1, start) if rng.random() < 0.7 else full(b"stco", many(), start, start),
        full(b"ctts", many(), count, 5) if rng.random() < 0.3 else b"", full(b"stss", many(), 1) if rng.random() < 0.3 else b"",
    )  # fmt: skip
    handler = box(b"hdlr", numbers(0, 0), b"vide", bytes(12), b"v\0")
    minf = box(
        b"minf", full(b"vmhd", 0, 0), box(b"dinf", box(b"dref", numbers(0, 1), full(b"url "))), stbl
    )
    mdia = box(
        b"mdia", full(b"mdhd", 0, 0, 1000, rng.choice((1000, count)), 0x55C40000), handler, minf
    )
    matrix = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    edits = box(b"edts", full(b"elst", many(), 1000, 0, 1 << 16)) if rng.random() < 0.3 else b""
    trak = box(
        b"trak",
        full(b"tkhd", 0, 0, 1, 0, 1000, 0, 0, 0, 0, *matrix, side << 16, side << 16),
        edits,
        mdia,
    )
    mvhd = full(b"mvhd", 0, 0, 1000, 1000, 1 << 16, 1 << 24, 0, 0, *matrix, 0, 0, 0, 0, 0, 0, 2)
    pieces = box(b"moof", full(b"mfhd", 1), box(b"traf", fragment(rng, many())))
    tracks = trak * rng.choice((1, 1, 4))
    return b"".join((
        box(b"ftyp", b"isom\0\0\2\0isommp41"), box(b"mdat", bytes(768)), box(b"moov", mvhd, tracks),
        pieces * rng.choice((0, 0, 1, 100)),
    ))  # fmt: skip


def fragment(rng: Random, count: int) -> bytes:
    """A fragment's track header and run: `count` samples, of which none has a size of its own."""
    return box(b"tfhd", numbers(0x20038, 1, 1, 1, 0)) + box(
        b"trun", numbers(rng.choice((0, 1)), count, 40)
    )


def growing(rng: Random) -> bytes:
    """An AVI whose header says 64 x 64, and whose later pictures are as large as they like."""
    sides = [64] * 10 + [rng.choice((100, 3000, 9000, 16000))] * rng.choice((1, 4, 8))

    def chunk(name: bytes, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    shape = struct.pack("<IiiHH4sIiiII", 40, 64, 64, 1, 24, b"MPNG", 64 * 64 * 3, 0, 0, 0, 0)
    strh = struct.pack(
        "<4s4s12I4H", b"vids", b"MPNG", 0, 0, 0, 1, 25, 0, len(sides), 0, 0, 0, 0, 0, 0, 0, 64, 64
    )
    avih = struct.pack("<14I", 40000, 0, 0, 16, len(sides), 0, 1, 0, 64, 64, 0, 0, 0, 0)
    strl = chunk(b"LIST", b"strl", chunk(b"strh", strh), chunk(b"strf", shape))
    pictures = [chunk(b"00dc", flat_png(side)) for side in sides]
    return chunk(
        b"RIFF",
        b"AVI ",
        chunk(b"LIST", b"hdrl", chunk(b"avih", avih), strl),
        chunk(b"LIST", b"movi", *pictures),
    )


def video(rng: Random, base: Path) -> Files:
    path = rng.choice(sorted(base.iterdir()))
    match rng.randrange(14):
        case 0:
            return {"tables.mp4": tables(rng)}
        case 1:
            return {"growing.avi": growing(rng)}
        case 2:
            other = rng.choice(sorted(base.iterdir())).read_bytes()  # two files joined, or halves
            data, cut = path.read_bytes(), rng.random()
            return {
                path.name: data[: int(len(data) * cut)]
                + other[int(len(other) * cut * rng.randrange(2)) :]
            }
        case 3:
            return {path.name: rng.choice(STRANGE) + path.read_bytes() * rng.randrange(2)}
    return {path.name: damage(rng, path.read_bytes())}


# LLaVA-1.5's and NeXT's ways with a picture
PLAIN = MediaConfig(28, "crop", (0.5,) * 3, (0.5,) * 3, "pad")
TILED = MediaConfig(28, "squash", (0.5,) * 3, (0.5,) * 3, "anyres", ((28, 56), (56, 28), (56, 56)))


def watch(folder: Path) -> None:
    """Four frames of a video."""
    (path,) = folder.iterdir()
    reading, taken = Reading(path, frames=4), []
    for frames in reading:
        taken = [fit_frame(frame, PLAIN) for frame in frames]
    reading.clip(np.stack(taken))


# --- pictures -----------------------------------------------------------------------------------


USUAL = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")


def build_pictures(root: Path) -> None:
    """A small picture in every format that Pillow writes, the usual ones in every mode."""
    root.mkdir()
    Image.init()
    pixels = video_files.pictures(2)
    usual, second = (Image.fromarray(frame) for frame in pixels)
    deep = Image.fromarray(pixels[0, :, :, 0].astype(np.uint16) * 257)
    for kind in sorted(Image.SAVE.keys() - {"PDF"}):  # which writes the time of day
        for mode in MODES if kind in USUAL else ("RGB", "1"):
            path = root / f"{kind}-{mode.replace(';', '')}.jpg"
            try:
                (deep if mode == "I;16" else usual.convert(mode)).save(path, kind)
            except (OSError, ValueError, KeyError, AttributeError):  # not in this mode
                path.unlink(missing_ok=True)
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        usual.save(root / f"{kind}-many.jpg", kind, save_all=True, append_images=[second] * 3)
    turned = usual.getexif()
    turned[0x112] = 6
    usual.save(root / "JPEG-turned.jpg", "JPEG", progressive=True, exif=turned)
    for how in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        picture = usual.convert("1") if how == "group4" else usual
        picture.save(root / f"TIFF-{how}.jpg", "TIFF", compression=how)
    for name, text in TEXTS.items():
        (root / f"{name}.jpg").write_bytes(text)


TEXTS = {
    "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{ } loop\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "xpm": b'/* XPM */ static char *a[] = {"60000 60000 1 1", "a c #ff0000", "a"};',
    "xbm": b"#define a_width 60000\n#define a_height 60000\nstatic char a_bits[] = {0};",
    "ppm": b"P6 60000 60000 255\n", "pam": b"P7\nWIDTH 9\nHEIGHT 9\nENDHDR\n", "fits": b"SIMPLE  = T",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100), "html": b"<html><img src=/etc/passwd></html>",
}  # fmt: skip


def zeros(size: int) -> bytes:
    """`size` zero bytes as a zlib stream, without compressing them all."""
    packer, step = zlib.compressobj(9, wbits=-15), 2**20
    block = packer.compress(bytes(step)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(bytes(size % step)) + packer.flush()
    return b"\x78\xda" + block * (size // step) + rest + struct.pack(">HH", size % 65521, 1)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    told = (
        struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


def flat_png(side: int, depth: int = 8, colour: int = 2, *more: tuple[bytes, bytes]) -> bytes:
    """A black square that unpacks to very much more than its file."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    pixels = side * (side * depth * channels // 8 + 1)
    head = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return png((b"IHDR", head), *more, (b"IDAT", zeros(pixels)), (b"IEND", b""))


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    at, found = 8, []
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def picture(rng: Random, base: Path) -> Files:
    path = rng.choice(sorted(base.iterdir()))
    data = path.read_bytes()
    if rng.random() < 0.1:
        side, depth, colour = (
            rng.choice((100, 3000, 9000, 13300, 20000)),
            rng.choice((8, 16)),
            rng.choice((0, 2, 4, 6)),
        )
        text = rng.choice(((b"zTXt", b"a\0\0" + zeros(10**8)), (b"iCCP", b"a\0\0" + zeros(10**8))))
        return {"flat.jpg": flat_png(side, depth, colour, *([text] if rng.random() < 0.3 else []))}
    if rng.random() < 0.05:
        return {path.name: rng.choice(STRANGE)}
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:  # with checksums that are right
        chunks = png_chunks(data)
        at = rng.randrange(len(chunks))
        name, body = chunks[at]
        chunks[at] = (
            rng.choice((name, name, name, b"tRNS", b"acTL", b"eXIf", b"PLTE")),
            damage(rng, body),
        )
        return {path.name: png(*chunks[: at + 1], *rng.choice((chunks[at + 1 :], chunks)))}
    return {path.name: damage(rng, data)}


def look(folder: Path) -> None:
    """The crops of a picture, as two families make them."""
    (path,) = folder.iterdir()
    for media in (PLAIN, TILED):
        image = open_image(path)
        crops(image, media, plan(image.height, image.width, media, True))
