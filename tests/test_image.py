"""Crops equal transformers' Pillow processors pixel for pixel, and bad files end in one sentence."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import load_image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from zipvl.config import MediaConfig
from zipvl.errors import MediaError
from zipvl.model.layouts import HALF, NEXT_PINPOINTS
from zipvl.vision import llava
from zipvl.vision.family import CLIP_MEAN, CLIP_STD, Geometry, normalise
from zipvl.vision.llava import best_canvas, crops, fit_frame, plan
from zipvl.vision.source import FORMATS, MAX_PIXELS, check_image, open_image, opened_image

SIZES = [(1, 1), (1, 50), (50, 1), (56, 56), (72, 72), (100, 75), (61, 200), (300, 60), (57, 113),
         (430, 431), (640, 480)]  # fmt: skip
NEXT = tuple((56 * a, 56 * b) for a, b in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
ONEVISION = tuple((72 * a, 72 * b) for a in range(1, 7) for b in range(1, 7))
CLIP_PIXELS = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SIGLIP_PIXELS = {"size": {"height": 72, "width": 72}, "image_mean": HALF, "image_std": HALF}


def clip(image: str, **more) -> MediaConfig:
    return MediaConfig(size=56, resize="crop", mean=CLIP_MEAN, std=CLIP_STD, image=image, **more)


def siglip(image: str, **more) -> MediaConfig:
    return MediaConfig(size=72, resize="squash", mean=HALF, std=HALF, image=image, **more)


def picture(width: int, height: int) -> Image.Image:
    """Noise over a gradient: any shift, swap or other filter shows."""
    rng = np.random.default_rng()
    slope = np.linspace(0, 155, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    noise = rng.integers(0, 60, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))


def cropped(image: Image.Image, media: MediaConfig, alone: bool) -> tuple[np.ndarray, Geometry]:
    geometry = plan(image.height, image.width, media, alone)
    return crops(image, media, geometry), geometry


def normalised(cut: torch.Tensor, media: MediaConfig, dtype: torch.dtype) -> torch.Tensor:
    return normalise(cut, media.mean, media.std, dtype, torch.device("cpu"))


def ours(image: Image.Image, media: MediaConfig, alone: bool = True) -> torch.Tensor:
    cut, _ = cropped(image, media, alone)
    assert cut.dtype == np.uint8
    return normalised(torch.from_numpy(cut), media, torch.float32)


def equal(found: torch.Tensor, expected) -> None:
    torch.testing.assert_close(found, torch.as_tensor(np.array(expected)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_plain_crops_equal_the_processors(size):
    image = picture(*size)
    equal(ours(image, clip("crop")), CLIPImageProcessorPil(**CLIP_PIXELS)(image)["pixel_values"])
    expected = SiglipImageProcessorPil(**SIGLIP_PIXELS, resample=3)(image)["pixel_values"]
    equal(ours(image, siglip("crop")), expected)
    padded = LlavaImageProcessorPil(**CLIP_PIXELS, do_pad=True)
    equal(ours(image, clip("pad")), padded(image)["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_any_resolution_equals_the_processors(size):
    image = picture(*size)
    hf = LlavaNextImageProcessorPil(**CLIP_PIXELS, image_grid_pinpoints=[list(p) for p in NEXT])
    equal(ours(image, clip("anyres", pinpoints=NEXT)), hf(image)["pixel_values"][0])
    hf = LlavaOnevisionImageProcessorPil(
        **SIGLIP_PIXELS, image_grid_pinpoints=[list(p) for p in ONEVISION]
    )
    media = siglip("anyres", pinpoints=ONEVISION, several="pad")
    equal(ours(image, media), hf(image)["pixel_values"][0])
    pair = hf([[image, picture(33, 90)]])["pixel_values"]
    equal(ours(image, media, alone=False), pair[0])


@pytest.mark.parametrize("media", [clip("crop"), siglip("crop")], ids=["crop", "squash"])
def test_a_frame_is_fitted_as_a_plain_picture(media):
    image = picture(131, 83)
    fitted = fit_frame(np.asarray(image), media)
    assert (fitted == cropped(image, media, True)[0][0]).all()
    fitted[:] = 0  # the caller owns it


def test_padding_has_the_mean_colour_of_the_original():
    cut, _ = cropped(Image.new("RGB", (560, 280), (255, 0, 0)), clip("pad"), True)
    assert cut[0, 0, 0].tolist() == cut[0, -1, -1].tolist() == [122, 116, 104]
    cut, _ = cropped(Image.new("RGB", (72, 144)), siglip("anyres", several="pad"), False)
    assert cut.shape == (1, 72, 72, 3)
    assert cut[0, 0, 0].tolist() == [127] * 3


def test_small_pictures_show_the_order_of_the_pinpoints():
    """The original reads the same list as (width, height): other tiles for every small picture."""
    hf = tuple((h, w) for h, w in NEXT_PINPOINTS)
    original = tuple((h, w) for w, h in NEXT_PINPOINTS)
    for width, height in [(1, 1), (336, 336), (200, 300), (300, 200)]:
        assert best_canvas(height, width, hf) == (336, 672)
        assert best_canvas(height, width, original) == (672, 336)
    for width, height in [(640, 480), (1000, 300), (300, 1000)]:
        assert best_canvas(height, width, hf) == best_canvas(height, width, original)


SIDES = st.integers(1, 700)


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6))
def test_the_best_canvas_is_transformers(height, width, canvases):
    canvases = [*canvases, (50, 40), (40, 50), (30, 30)]  # small pictures fit all of these
    found = best_canvas(height, width, tuple(canvases))
    assert found == select_best_resolution((height, width), canvases)


def test_normalise_works_in_fp32_and_casts_last():
    media, pixels = clip("crop"), torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8)
    full = normalised(pixels, media, torch.float32)
    low = normalised(pixels, media, torch.bfloat16)
    assert low.shape == (3, 3, 56, 56)
    assert torch.equal(low, full.to(torch.bfloat16))
    assert torch.equal(full[1:2], normalised(pixels[1:2], media, torch.float32))


@pytest.mark.parametrize("size", [(1, 20000), (65535, 1), (3, 65535)])
@pytest.mark.parametrize(
    "media",
    [clip("crop"), clip("pad"), siglip("crop"), clip("anyres", pinpoints=NEXT)],
    ids=["crop", "pad", "squash", "anyres"],
)
def test_extreme_shapes_stay_small(size, media):
    cut, geometry = cropped(Image.new("RGB", size, (9, 99, 199)), media, True)
    assert cut.shape == (geometry.crops, media.size, media.size, 3)
    assert geometry == plan(size[1], size[0], media, True)
    if media.image != "pad":
        assert (cut[0] == (9, 99, 199)).all()


@pytest.mark.parametrize("size", [(40, 300), (400, 30), (90, 91)])
def test_the_shortcut_for_extreme_shapes_is_the_same_picture(size, monkeypatch):
    image, media = picture(*size), clip("crop")
    exact = cropped(image, media, True)[0].astype(int)
    monkeypatch.setattr(llava, "EXACT_SIDE", 0)
    off = np.abs(cropped(image, media, True)[0] - exact)
    assert off.max() <= 4  # Pillow may take the two axes in the other order
    assert off.mean() < 0.5


def test_pictures_of_every_mode_open_as_transformers_opens_them(tmp_path):
    image = picture(40, 30)
    for mode in ("RGB", "L", "1", "P", "CMYK", "LA", "RGBA", "PA", "YCbCr", "HSV", "LAB"):
        assert open_image(image.convert(mode)).mode == "RGB"
    for mode, name in [("RGBA", "a.png"), ("P", "p.gif"), ("CMYK", "c.jpg"), ("1", "b.tif")]:
        image.convert(mode).save(tmp_path / name)
        expected = np.asarray(load_image(str(tmp_path / name)))
        assert (np.asarray(open_image(tmp_path / name)) == expected).all()


def test_sixteen_bit_greys_keep_their_shades(tmp_path):
    shades = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    assert (np.asarray(open_image(str(tmp_path / "deep.png")))[..., 0] == shades >> 8).all()


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_as_in_transformers(turn, ending, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"turned.{ending}"
    exif[0x0112] = turn
    picture(40, 24).save(path, exif=exif)
    expected = np.asarray(load_image(str(path)))
    assert (np.asarray(open_image(path)) == expected).all()
    given = Image.open(path)
    assert (np.asarray(open_image(given)) == expected).all()
    if ending != "tif":  # Pillow itself turns these
        assert given.size == (40, 24)  # the caller's own is left alone
    assert expected.shape[:2] == ((24, 40) if turn < 5 else (40, 24))


def bomb(side: int = 20000) -> bytes:
    """A PNG of a few bytes that declares 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    picture(200, 200).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_picture_is_one_sentence(form, tmp_path):
    data = encoded(form)
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="cut"):
        open_image(tmp_path / "cut")


def test_what_is_no_picture_is_one_sentence(tmp_path):
    for name, data in [("text.jpg", b"not a picture"), ("empty.png", b""), ("bomb.png", bomb())]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=name):
            open_image(tmp_path / name)
    for source in [tmp_path / "missing.png", tmp_path, "http://host/a.png", "x" * 5000, "a\0b", 7]:
        with pytest.raises(MediaError) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)
    for size in [(0, 5), (5, 0), (65536, 1)]:
        with pytest.raises(MediaError, match="pixels"):
            open_image(Image.new("RGB", size))


# --- pictures that strangers made ---------------------------------------------------------------


def test_no_picture_runs_a_program(tmp_path, monkeypatch):
    """An EPS would start Ghostscript, whatever its name; a program of that name tells."""
    ran, tool = tmp_path / "ran", tmp_path / "gs"
    tool.write_text(f"#!/bin/sh\ntouch {ran}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n")
    for read in (open_image, check_image):
        with pytest.raises(MediaError, match=r"photo\.jpg cannot be read as a picture \(it is"):
            read(path)
    assert not ran.exists()
    assert {"EPS", "WMF", "GRIB", "HDF5", "BUFR", "MPEG", "PSD"}.isdisjoint(FORMATS)


def test_looking_at_a_picture_decodes_nothing(tmp_path, monkeypatch):
    picture(20, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: 1 / 0)
    check_image(tmp_path / "a.png")
    with pytest.raises(MediaError, match="division"):
        open_image(tmp_path / "a.png")


def test_a_picture_is_decoded_once(tmp_path, monkeypatch):
    picture(20, 30).save(tmp_path / "a.png")
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    open_image(tmp_path / "a.png")
    assert len(opened) == 1


@pytest.mark.parametrize("side", [11000, 11700, 13300, 20000, 60000])
def test_large_pictures_are_a_sentence_and_no_warning(side, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(bomb(side))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(MediaError, match=r"large\.png") as error:
            open_image(path)
    assert not seen
    assert (f"more than {MAX_PIXELS}" in str(error.value)) == (side**2 > MAX_PIXELS)


def test_the_ceiling_of_pixels_is_the_callers(tmp_path, monkeypatch):
    picture(30, 30).save(tmp_path / "a.png")
    monkeypatch.setattr("zipvl.vision.source.MAX_PIXELS", 899)
    with pytest.raises(MediaError, match="30 x 30 pixels, more than 899 in all: scale it down"):
        check_image(tmp_path / "a.png")
    monkeypatch.setattr("zipvl.vision.source.MAX_PIXELS", 900)
    check_image(tmp_path / "a.png")


def test_damaged_exif_is_no_warning(tmp_path):
    path = tmp_path / "odd.jpg"
    picture(30, 20).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert open_image(path).size == (30, 20)
    assert not seen


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparency_lies_on_white(mode):
    source = picture(30, 20).convert("RGBA")
    source.putalpha(Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)))
    image = {"PA": source.convert("LA"), "La": source.convert("LA")}.get(mode, source).convert(mode)
    full = image.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
    pixels = np.asarray(full).astype(float)
    alpha = pixels[..., 3:] / 255
    want = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(open_image(image)) - want).max() <= 1
    opaque = picture(30, 20)
    assert (np.asarray(open_image(opaque.convert("RGBA"))) == np.asarray(opaque)).all()


def test_transparency_of_files_lies_on_white(tmp_path):
    """Palettes, greys and colours that a file calls transparent, at 8 and at 16 bits."""
    shades = np.array([[0, 1], [2, 200]], dtype=np.uint8)
    Image.fromarray(shades).save(tmp_path / "grey.png", transparency=1)
    Image.fromarray(np.stack([shades] * 3, -1)).save(tmp_path / "rgb.png", transparency=(1, 1, 1))
    coloured = Image.fromarray(shades, "P")
    coloured.putpalette([i for n in range(256) for i in (n, n, n)])
    for name in ("palette.png", "palette.gif"):
        coloured.save(tmp_path / name, transparency=1)
    Image.fromarray(shades.astype(np.uint16) << 8).save(tmp_path / "deep.png", transparency=256)
    for name in ("grey.png", "rgb.png", "palette.png", "palette.gif", "deep.png"):
        found = np.asarray(open_image(tmp_path / name))
        assert found[..., 0].tolist() == [[0, 255], [2, 200]], name


def test_shades_without_a_known_white_are_refused(tmp_path):
    ramp = np.tile(np.arange(256) * 257, (8, 1))
    for dtype, name in [(np.int32, "g32.tif"), (np.float32, "float.tif")]:
        Image.fromarray(ramp.astype(dtype)).save(tmp_path / name)
        with pytest.raises(MediaError, match=f"{name} has 32-bit shades"):
            open_image(tmp_path / name)
    (tmp_path / "deep.pgm").write_bytes(b"P5 256 8 65535\n" + ramp.astype(">u2").tobytes())
    assert (np.asarray(open_image(tmp_path / "deep.pgm"))[..., 1] == np.arange(256)).all()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\0\0\0\x20ftypisom", "is a video: use -v"),
        (b"\0\0\0\x14ftypqt  ", "is a video: use -v"),
        (b"\x1aE\xdf\xa3", "is a video: use -v"),
        (b"RIFF\0\0\0\0AVI LIST", "is a video: use -v"),
        (b"G".ljust(188, b"\0") + b"G", "is a video: use -v"),
        (b"\0\0\0\x18ftypheic", "is a HEIC picture.* save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1", "is a HEIC picture.* save it as JPEG or PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as a picture .it is"),
    ],
)
def test_what_a_file_is_instead(head, words, tmp_path):
    (tmp_path / "a.jpg").write_bytes(head + bytes(300))
    with pytest.raises(MediaError, match=f"a.jpg {words}"):
        check_image(tmp_path / "a.jpg")


def test_names_of_pictures(tmp_path, monkeypatch):
    for name in (b"caf\xe9.png", "漢 é.png".encode(), b"\x1b[31mred.png"):
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        picture(20, 10).save(path)
        assert open_image(path).size == open_image(os.fsencode(path)).size == (20, 10)
        with open(path, "wb") as file:
            file.write(b"no picture")
        with pytest.raises(MediaError) as error:
            open_image(path)
        assert str(error.value).isprintable()
        assert ("漢 é.png cannot" in str(error.value)) == ("漢" in path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(MediaError, match="may not be read: change its permissions"):
            open_image(path)
    faults = [("/dev/zero", "device"), (tmp_path, "directory"), ("http://h/a.png", "local file")]
    for source, words in faults:
        with pytest.raises(MediaError, match=words):
            open_image(source)


def test_no_memory_is_not_a_damaged_picture(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    with pytest.raises(MemoryError), opened_image(tmp_path / "a.png"):
        raise MemoryError
