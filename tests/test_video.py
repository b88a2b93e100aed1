"""The video reader: right frames, right times, one sentence for what cannot be read, bounded time."""

import argparse
import dataclasses
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import (
    ENCODED,
    RATE,
    X264,
    X265,
    encode,
    ffmpeg,
    flip_bytes,
    growing_avi,
    huge_png,
    number,
    pictures,
    read_video,
    reference,
    set_matrix,
    table_bomb,
    words,
)
from video_files import video as video  # the fixture

from zipvl.errors import MediaError, UsageError
from zipvl.vision import index as index_module
from zipvl.vision.index import (
    MAX_SAMPLES,
    THREADED_PIXELS,
    check_tables,
    opened,
    read_index,
)
from zipvl.vision.source import seconds
from zipvl.vision.video import (
    MAX_FRAMES,
    Clip,
    decord_frames,
    pyav_frames,
    sample,
)

Video = Callable[[str], Path]

# name: frames that are there, who can read it, mean difference to ffmpeg allowed (0: no pixel)
FILES = {
    "h264.mp4": (100, "both", 0),
    "faststart.mp4": (100, "both", 0),
    "fragmented.mp4": (50, "pyav", 0),
    "h264.mkv": (60, "both", 0),
    "refresh.mkv": (90, "pyav", 0),
    "opengop.mkv": (90, "pyav", 0),
    "hevc.mp4": (90, "both", 0),
    "hevc_opengop.mp4": (90, "pyav", 0),
    "vp8.webm": (60, "both", 0),
    "vp9.webm": (60, "both", 0),
    "av1.mp4": (20, "pyav", 0),
    "stream.ts": (90, "pyav", 0),
    "program.mpg": (90, "pyav", 0),
    "vfr.mp4": (42, "both", 0),
    "tenbit.mp4": (40, "pyav", 1.0),  # another scaler for chroma
    "oddsize.mp4": (30, "pyav", 0),
    "interlaced.mp4": (30, "pyav", 2.0),  # ffmpeg scales the chroma of each field
    "fullrange.mp4": (30, "both", 0),
    "bt709.mp4": (30, "both", 0),
    "mpeg4.mp4": (40, "pyav", 0),
    "mpeg4.avi": (40, "pyav", 0),
    "motion.avi": (40, "pyav", 0),
    "raw.h264": (40, "pyav", 0),
    "animated.gif": (20, "pyav", 0),
    "late.mp4": (40, "pyav", 0),
    "one.mp4": (1, "both", 0),
    "longgop.mp4": (600, "both", 0),
    "picture.png": (1, "pyav", 0),
    "cut_short.mp4": (None, "pyav", 0),
    "trimmed_end.mp4": (None, "both", 0),
}


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_ffmpeg(video: Video, name: str) -> None:
    path, (total, _, tolerance) = video(name), FILES[name]
    count = int(np.random.default_rng().integers(5, 40))
    clip = read_video(path, frames=count)
    expected = reference(path, *clip.frames.shape[1:3])
    assert clip.total == len(expected)
    assert total in (None, clip.total)
    taken = min(count, clip.total)
    assert list(clip.indices) == np.linspace(0, clip.total - 1, taken, dtype=int).tolist()
    for index, picture in zip(clip.indices, clip.frames, strict=True):
        assert number(picture) == number(expected[index])
        assert np.abs(picture.astype(int) - expected[index]).mean() <= tolerance
    assert clip.decoder == "pyav"
    assert (clip.warning == "") == (count <= clip.total)


@pytest.mark.parametrize("name", [name for name in FILES if name != "animated.gif"])
def test_times_are_those_of_the_pictures(video: Video, name: str) -> None:
    """A picture's number over the rate it was fed in with is its time, also after `select` and cuts."""
    clip = read_video(video(name), frames=None)
    numbers = [number(picture) for picture in clip.frames]
    assert numbers == sorted(set(numbers))
    for n, time in zip(numbers, clip.times, strict=True):
        assert time == pytest.approx((n - numbers[0]) / RATE, abs=0.002)
    assert clip.duration == pytest.approx(clip.times[-1] + 1 / RATE, abs=0.05)
    assert clip.fps == pytest.approx(clip.total / clip.duration)


def test_cut_of_a_long_gop_ends_in_time(video: Video) -> None:
    """Where a decoder never returns from this file, it cannot be interrupted: hence a process."""
    code = (
        "import sys; from tests.video_files import read_video; c = read_video(sys.argv[1]);"
        "print(c.total, c.decoder, c.indices[-1], *c.frames[:, 8, 8::16].mean(-1).ravel().round())"
    )
    path = video("cut.mp4")
    run = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True
    )
    expected = reference(path, 64, 96)
    total, decoder, last, *blocks = run.stdout.split()
    assert (int(total), decoder, int(last)) == (len(expected), "pyav", len(expected) - 1)
    chosen = expected[np.linspace(0, len(expected) - 1, 32, dtype=int)]
    assert [float(b) for b in blocks] == chosen[:, 8, 8::16].mean(-1).ravel().round().tolist()


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][1] == "both"])
def test_both_decoders_give_the_same_pixels(video: Video, name: str) -> None:
    pytest.importorskip("decord")
    index, random = read_index(str(video(name))), np.random.default_rng()
    total = len(index.ticks)
    targets = np.sort(random.choice(total, min(total, 12), replace=False)).tolist()
    decord = [picture for picture, _ in decord_frames(index, targets)]
    for threads in ("AUTO", "SLICE"):
        pyav = list(pyav_frames(index, targets, threads))
        assert len(pyav) == len(decord) == len(targets)
        assert all(intact for _, intact in pyav)
        assert all((a == b).all() for (a, _), b in zip(pyav, decord, strict=True))


@pytest.mark.slow
def test_both_decoders_agree_however_a_file_is_encoded(video: Video, tmp_path: Path) -> None:
    pytest.importorskip("decord")
    random, plain = np.random.default_rng(), 0
    video("one.mp4")  # skips without ffmpeg
    for round_ in range(40):
        codec, gop, b = (
            random.choice(["libx264", "libx265"]),
            random.integers(1, 80),
            random.integers(5),
        )
        params = f"keyint={gop}:bframes={b}:open-gop={random.integers(2)}"
        flag = "-x264-params" if codec == "libx264" else "-x265-params"
        options = ["-pix_fmt", "yuv420p", "-c:v", str(codec), "-preset", "ultrafast", flag, params]
        path = tmp_path / f"{round_}.{random.choice(['mp4', 'mkv'])}"
        frames = pictures(int(random.integers(2, 120)))
        index = read_index(str(encode(path, frames, options)))
        count = random.integers(1, min(20, len(frames)) + 1)
        targets = np.sort(random.choice(len(frames), count, replace=False)).tolist()
        pyav = list(pyav_frames(index, targets, "AUTO"))
        assert [(number(p), intact) for p, intact in pyav] == [(t, True) for t in targets]
        with suppress(MediaError):
            decord = [picture for picture, _ in decord_frames(index, targets)]
            assert all((a == b).all() for (a, _), b in zip(pyav, decord, strict=True)), options
            plain += 1
    assert plain > 5


@pytest.mark.parametrize(
    "matrix",
    [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)],
)
def test_display_matrix(video: Video, tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(video("h264.mp4").read_bytes())
    set_matrix(path, matrix)
    clip = read_video(path, frames=3)
    size = (64, 96) if matrix[0] else (96, 64)
    expected = reference(path, *size)
    assert (clip.frames == expected[list(clip.indices)]).all()


def test_truncated(video: Video, tmp_path: Path) -> None:
    whole = video("faststart.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    clip = read_video(tmp_path / "cut.mp4", frames=10)
    assert 10 < clip.total < 90
    assert "of 100 frames" in clip.warning
    assert "cut.mp4" in clip.warning
    assert [number(p) for p in clip.frames[:-1]] == list(clip.indices[:-1])
    mkv = video("h264.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(mkv[: len(mkv) // 2])
    clip = read_video(tmp_path / "cut.mkv", frames=5)
    assert f"decoded {clip.total} of 60 frames" in clip.warning
    assert [number(p) for p in clip.frames] == list(clip.indices)
    (tmp_path / "half.mp4").write_bytes(video("h264.mp4").read_bytes()[:2000])
    with pytest.raises(MediaError, match=r"half\.mp4"):  # its index stood at the end
        read_video(tmp_path / "half.mp4")


def noisy(count: int) -> np.ndarray:
    """Pictures that compress badly, so that a flipped byte hits a slice and not a header."""
    noise = np.random.default_rng(0).integers(-20, 20, (count, 64, 96, 3))
    return np.clip(pictures(count) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("flips", [4, 40, 400])
def test_flipped_bytes(video: Video, tmp_path: Path, flips: int) -> None:
    """Damage is noticed, also where decord would show it without a word, and nothing hangs."""
    video("one.mp4")
    clean = encode(tmp_path / "clean.mp4", noisy(100), [*X264, "-g", "25", "-crf", "20"])
    path = flip_bytes(clean, tmp_path / "flipped.mp4", flips, seed=flips)
    calls: list[int] = []
    clip, expected = read_video(path, frames=None, progress=calls.append), read_video(clean, None)
    assert clip.frames.shape == expected.frames.shape
    assert calls == [1] * 100
    assert (clip.frames != expected.frames).any()
    assert "flipped.mp4" in clip.warning
    assert 0 <= int(clip.warning.split()[1]) < int(clip.warning.split()[3]) == 100
    assert clip.decoder == "pyav"


def test_a_whole_part_of_a_damaged_file_needs_no_warning(video: Video, tmp_path: Path) -> None:
    data = bytearray(video("faststart.mp4").read_bytes())
    data[-300:] = bytes(300)
    (tmp_path / "tail.mp4").write_bytes(data)
    clip = read_video(tmp_path / "tail.mp4", frames=8, end=2.0)
    assert clip.warning == ""
    assert [number(p) for p in clip.frames] == list(clip.indices)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.mp4": (lambda path: None, "does not exist"),
    "folder.mp4": (lambda path: path.mkdir(), "directory"),
    "pipe.mp4": (lambda path: os.mkfifo(path), "pipe"),
    "empty.mp4": (lambda path: path.touch(), "empty"),
    "text.mp4": (lambda path: path.write_text("hello\n" * 500), "not a readable video"),
    "random.mp4": (lambda path: path.write_bytes(os.urandom(5000)), "not a readable video"),
    "list.mp4": (
        lambda path: path.write_text("#EXTM3U\n#EXTINF:4\nh264.ts\n#EXT-X-ENDLIST\n"),
        "not a readable video",
    ),
    "concat.mp4": (
        lambda path: path.write_text("ffconcat version 1.0\nfile other.mp4\n"),
        "not a readable video",
    ),
    "huge.mp4": (lambda path: huge_png(path, 12000), "more than 134217728 pixels"),
    "nul\0.mp4": (lambda path: None, "path"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_video(tmp_path: Path, name: str) -> None:
    make, words = BAD[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(MediaError, match=words) as error:
        read_video(path)
    assert name.split(".")[0].strip("\0") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", [1, 2])
def test_playlists_are_refused_even_if_what_they_name_is_there(
    video: Video, tmp_path: Path, where: int
) -> None:
    target = video("stream.ts")
    lists = {
        1: f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3.6,\n{target}\n#EXT-X-ENDLIST\n",
        2: f"ffconcat version 1.0\nfile {target}\n",
    }
    path = tmp_path / ("list.m3u8" if where == 1 else "list.ffconcat")
    path.write_text(lists[where])
    with pytest.raises(MediaError, match="not a readable video"):
        read_video(path)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("sizes", table_bomb(3_000_000)),
        ("durations", table_bomb(9, stts=words(2, 2_000_000, 1, 1, 2))),
        ("shifts", table_bomb(9, ctts=words(1, 4_000_000_000, 1))),
        ("chunks of sound", table_bomb(9, b"soun", stsc=words(1, 1, 2**31, 1))),
        ("fragment", table_bomb(9) + b"\0\0\0\x20moof\0\0\0\x18traf\0\0\0\x10trun"
         + words(0, 2**31)),
        ("compressed", table_bomb(9) + b"\0\0\0\x18moov\0\0\0\x10cmov" + bytes(8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_movie_tables_larger_than_the_file(tmp_path: Path, what: str, data: bytes) -> None:
    """libavformat is never asked: it would take up to 2 GB for each of these in under 1 kB."""
    path = tmp_path / "bomb.mp4"
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"bomb\.mp4 claims \d+ frames and sounds in \d+ bytes"):
        read_index(str(path))


def test_movie_tables_of_a_large_file_have_a_ceiling(tmp_path: Path) -> None:
    path = tmp_path / "hole.mp4"
    for samples in (MAX_SAMPLES, MAX_SAMPLES + 1):
        path.write_bytes(table_bomb(samples))
        os.truncate(path, 2 * MAX_SAMPLES)
        if samples == MAX_SAMPLES:
            check_tables(str(path))
        else:
            with pytest.raises(MediaError, match="claims 16777217"):
                check_tables(str(path))


def test_sound_has_more_samples_than_bytes_of_tables(video: Video, tmp_path: Path) -> None:
    video("one.mp4")
    for name, codec in (("pcm.mov", "pcm_u8"), ("ima.mov", "adpcm_ima_qt"), ("aac.mp4", "aac")):
        path = tmp_path / name
        ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x32:d=1:r=5", "-f", "lavfi", "-i", "sine=d=60",
               "-c:v", "mpeg4", "-c:a", codec, path)  # fmt: skip
        assert read_video(path, frames=5).indices == (0, 1, 2, 3, 4)
    nested = b"\0\0\0\x08moov" * 3 + b"\0\0\0\x04moof" + b"\0\0\0\x01mdat"
    (tmp_path / "odd.mp4").write_bytes(nested)
    check_tables(str(tmp_path / "odd.mp4"))  # an end for every odd length


@pytest.mark.parametrize("ceiling", ["MAX_PIXELS", "THREADED_PIXELS"])
def test_frames_that_outgrow_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ceiling: str
) -> None:
    """Past MAX_PIXELS they are refused one by one; past THREADED_PIXELS they come one by one."""
    path = tmp_path / "grow.avi"
    growing_avi(path, 64, 300, frames=8)
    home = "source" if ceiling == "MAX_PIXELS" else "index"
    monkeypatch.setattr(f"zipvl.vision.{home}.{ceiling}", 299 * 300)
    clip = read_video(path, frames=8)
    assert clip.frames.shape == (8, 64, 64, 3)
    assert ("decoded 4 of 8 frames" in clip.warning) == (ceiling == "MAX_PIXELS")
    assert THREADED_PIXELS >= 7680 * 4320


def test_no_memory_is_not_a_damaged_video(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def refuse(*_: object, **__: object) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    path = str(video("h264.mp4"))
    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(MemoryError), opened(path):
        pass


def test_a_stream_that_begins_late_is_no_traceback(video: Video, tmp_path: Path) -> None:
    """PyAV 18 has an IndexError for it."""
    data, path = bytearray(video("stream.ts").read_bytes()), tmp_path / "late.ts"
    pid = data.rindex(b"GA\0", 0, len(data) // 2)  # a packet that begins a picture: its stream
    data[pid + 2] = 0xFF
    path.write_bytes(data)
    assert 80 < read_video(path, frames=4).total < 90


def test_a_frame_that_cannot_be_shown_is_one_sentence(
    video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    def refuse(*_: object) -> None:
        raise av.error.OSError(95, "Operation not supported")

    monkeypatch.setattr("zipvl.vision.video._upright", refuse)
    with pytest.raises(MediaError, match=r"h264\.mp4 has a frame that cannot be shown"):
        read_video(video("h264.mp4"))


@pytest.mark.parametrize(("ending", "size"), [("ts", None), ("mpg", None), ("ts", (48, 32))])
def test_joined_files_keep_all_their_frames(
    video: Video, tmp_path: Path, ending: str, size: tuple[int, int] | None
) -> None:
    """`cat a.ts b.ts c.ts`: the time stamps begin anew, also where the size changes."""
    video("one.mp4")
    codec = X264 if ending == "ts" else ENCODED["program.mpg"][1]
    path, whole = tmp_path / f"joined.{ending}", pictures(90)
    with open(path, "wb") as file:
        for part in range(3):
            scale = ["-vf", "scale={}:{}".format(*size)] if size and part == 1 else []
            some = whole[30 * part : 30 * part + 30]
            file.write(encode(tmp_path / f"part.{ending}", some, [*codec, *scale]).read_bytes())
    clip = read_video(path, frames=None)
    assert clip.total == 90
    assert [number(picture) for picture in clip.frames] == list(range(90))
    assert clip.times == pytest.approx([n / RATE for n in range(90)])
    assert f"time stamps of {path} jump back" in clip.warning
    assert "its 90 frames are counted, 25 a second" in clip.warning


def test_joined_matroska_gives_what_its_demuxer_finds(video: Video, tmp_path: Path) -> None:
    path = tmp_path / "joined.mkv"
    path.write_bytes(2 * video("h264.mkv").read_bytes())
    clip = read_video(path, frames=None)
    assert [number(picture) for picture in clip.frames] == [*range(60), *range(60)]
    assert "jump back" in clip.warning


def test_video_streams_without_frames(video: Video, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"zero\.mp4"):
        read_video(video("zero.mp4"))
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)
    with pytest.raises(MediaError, match=r"sound\.mp4 has no video"):
        read_video(path)
    cover = tmp_path / "cover.mp4"
    picture = video("picture.png")
    ffmpeg("-i", path, "-i", picture, "-map", "0", "-map", "1", "-c:a", "copy", "-c:v", "mjpeg",
           "-disposition:v:0", "attached_pic", cover)  # fmt: skip
    with pytest.raises(MediaError, match=r"cover\.mp4 has no video"):
        read_video(cover)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/a.mp4", "concat:a.ts|b.ts", "data:video/mp4;base64,AAAA", "rtsp://x/y"],
)
def test_only_local_files_are_read(url: str) -> None:
    with pytest.raises(MediaError, match="local file"):
        read_video(url)


def test_devices_and_wrong_types() -> None:
    with pytest.raises(MediaError, match="device"):
        read_video("/dev/zero")
    with pytest.raises(MediaError, match="path"):
        read_video(["a.mp4"])  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_names_that_look_like_addresses(
    video: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """They are files: no server hears of them, and no other file is read in their place."""
    if reader == "decord":
        pytest.importorskip("decord")
    heard = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    host = f"http:/127.0.0.1:{server.server_port}"
    os.makedirs(host)
    for other in ("q.mp4", "x.mp4"):
        Path(other).write_bytes(video("late.mp4").read_bytes())
    names = [f"{host}/a.mp4", "file:q.mp4", "concat:x.mp4", "data:video,x", "pipe:0",
             "subfile,,start,0,end,9,,:q.mp4"]  # fmt: skip
    for name in [*names, host.replace(":/", "://") + "/a.mp4"]:
        Path(name).write_bytes(video("h264.mp4").read_bytes())
        assert read_video(name, frames=2, reader=reader).total == 100
    server.shutdown()
    server.server_close()
    assert not heard


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_a_movie_that_is_a_playlist_as_well(video: Video, tmp_path: Path, reader: str) -> None:
    """decord's FFmpeg of 2018 would open the file that is named; PyAV may read the movie only."""
    if reader == "decord":
        pytest.importorskip("decord")
    secret, path = video("late.mp4"), tmp_path / "poly.mp4"
    data = bytearray(video("faststart.mp4").read_bytes())
    shift = int.from_bytes(b"#EXT", "big")  # read as the size of the first box
    place = data.index(b"stco") + 8
    count = int.from_bytes(data[place : place + 4], "big")
    for entry in range(place + 4, place + 4 + 4 * count, 4):
        moved = int.from_bytes(data[entry : entry + 4], "big") + shift
        data[entry : entry + 4] = moved.to_bytes(4, "big")
    with open(path, "wb") as file:
        file.write(f"#EXTM3U\n#EXTINF:10.0,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode())
        file.seek(shift)  # a hole
        file.write(data)
    if reader == "pyav":
        assert read_video(path, frames=2).total == 100
    else:
        with pytest.raises(MediaError, match="read it with pyav"):
            read_video(path, reader="decord")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(video: Video, tmp_path: Path) -> None:
    path = tmp_path / "locked.mp4"
    path.write_bytes(video("h264.mp4").read_bytes())
    path.chmod(0)
    with pytest.raises(MediaError, match="permissions"):
        read_video(path)


def test_strange_names(video: Video, tmp_path: Path) -> None:
    for name in ("with space é 漢.mp4", "http:x.mp4", "50%.mp4", "-i.mp4", "picture.png"):
        path = tmp_path / name
        path.write_bytes(video("h264.mp4").read_bytes())
        assert [number(p) for p in read_video(path, frames=3).frames] == [0, 49, 99]


def test_names_in_any_bytes(video: Video, tmp_path: Path) -> None:
    """Such as a Latin-1 locale writes; what a terminal would obey is not in any message."""
    for name in (b"caf\xe9.mp4", b"\x1b[31mred\n.mp4"):
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        Path(path).write_bytes(video("h264.mp4").read_bytes())
        for source in (path, os.fsencode(path)):
            clip = read_video(source, frames=101)
            assert clip.total == 100
            assert clip.warning.isprintable()
        with suppress(MediaError):
            assert read_video(path, reader="decord").total == 100
        messages = [f"{path}.missing", path]
        Path(path).write_bytes(b"no video at all")
        for source in messages:
            with pytest.raises(MediaError) as error:
                read_video(source)
            assert str(error.value).isprintable()


def test_png_named_mp4_is_one_frame(video: Video, tmp_path: Path) -> None:
    path = tmp_path / "still.mp4"
    path.write_bytes(video("picture.png").read_bytes())
    clip = read_video(path, frames=None)
    assert (clip.total, clip.indices, clip.times) == (1, (0,), (0.0,))
    assert (clip.frames[0] == pictures(1)[0]).all()


def test_interval_and_rate(video: Video) -> None:
    path = video("h264.mp4")  # 100 frames, 4 s
    assert read_video(path, frames=5, start=1, end=2).indices == (25, 31, 37, 43, 50)
    assert read_video(path, frames=None, fps=1).indices == (0, 25, 50, 75)
    assert read_video(path, frames=8, fps=2, start=1).indices == (25, 37, 50, 62, 75, 87)
    assert read_video(path, frames=3, fps=25).indices == (0, 49, 99)
    assert read_video(path, frames=4, start=3.9, end=9).indices == (98, 99)
    assert read_video(path, frames=1, start=3.99).indices == (99,)
    with pytest.raises(UsageError, match=r"start 4 .*h264\.mp4"):
        read_video(path, start=4)


LONG = {
    "closed.mp4": [*X264, "-g", "10"],
    "open.mp4": [*X264, "-g", "10", "-x264-params", "open-gop=1:scenecut=0"],
    "hevc.mov": [*X265, "log-level=none:keyint=12:open-gop=1:bframes=4"],
    "intra.mp4": ["-c:v", "mjpeg"],
    "vfr.mp4": [*X264, "-g", "10", "-vf", "select='not(mod(n,5))+gt(n,200)'", "-vsync", "vfr"],
}  # fmt: skip


SHORT = ("h264.mp4", "late.mp4", "longgop.mp4", "one.mp4", "trimmed_end.mp4")  # some, each time


@pytest.mark.parametrize(
    "name",
    [*LONG, *(n if n in SHORT else pytest.param(n, marks=pytest.mark.slow)
              for n in FILES if n.endswith("mp4"))],
)  # fmt: skip
def test_a_part_of_a_long_movie_is_read_as_from_the_whole(
    video: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Numbers, times, pixels, warnings: as if all had been demuxed, which it was not."""
    random, seeking = np.random.default_rng(), 0
    path = str(encode(tmp_path / name, pictures(300), LONG[name]) if name in LONG else video(name))
    whole = read_index(path)
    for _ in range(6):
        start = random.uniform(0, whole.duration)
        options = random.choice([None, start]), start + random.uniform(0, whole.duration / 5)
        monkeypatch.setattr("zipvl.vision.index.LONG", 10**9)
        want = read_video(path, 7, None, *options)
        monkeypatch.setattr("zipvl.vision.index.LONG", 1)
        found = read_video(path, 7, None, *options)
        assert (found.frames == want.frames).all()
        assert dataclasses.replace(found, frames=None) == dataclasses.replace(want, frames=None)
        index = read_index(path, *options)
        seeking += len(index.keys) < len(whole.keys)
        assert (np.diff(index.ticks) >= 0).all()
    assert seeking or name not in LONG or name == "open.mp4"  # which has one IDR picture only


def test_a_part_of_a_long_movie_demuxes_little(
    video: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video("one.mp4")
    path, seen = encode(tmp_path / "long.mp4", pictures(400), [*X264, "-g", "20"]), []
    monkeypatch.setattr("zipvl.vision.index.LONG", 1)
    monkeypatch.setattr("zipvl.vision.index.SPARE", 0)
    real = index_module.packets
    monkeypatch.setattr(index_module, "packets", lambda *a: (seen.append(p) or p for p in real(*a)))
    assert read_video(path, 2, start=8.2, end=8.48).indices == (205, 212)
    assert len(seen) < 150


@pytest.mark.parametrize(
    ("text", "moment"),
    [("75", 75), ("75.5", 75.5), ("1:15", 75), ("01:15.25", 75.25), ("1:00:00", 3600),
     ("90:00", 5400), ("0:05", 5), ("2:03:04.5", 7384.5), ("-1", -1), ("nan", None)],
)  # fmt: skip
def test_moments_as_people_write_them(text: str, moment: float | None) -> None:
    assert seconds(text) == moment or moment is None


@pytest.mark.parametrize("text", ["", ":", "1:", ":5", "1:60", "1:75:00", "1:2:3:4", "1:-5", "5s"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write seconds, mm:ss or hh:mm:ss"):
        seconds(text)


def test_a_rate_is_not_cut_in_silence(video: Video) -> None:
    path = video("h264.mp4")  # 100 frames, 4 s
    clip = read_video(path, frames=3, fps=5)
    assert clip.indices == (0, 49, 99)
    assert clip.warning == f"5 frames a second of {path} are 20: 3 were taken, spread evenly"
    assert read_video(path, frames=20, fps=5).warning == ""
    clip = read_video(path, frames=None, fps=12.5)
    assert (len(clip.indices), clip.warning) == (50, "")


def test_never_more_frames_than_there_are(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video("h264.mp4")
    clip = read_video(path, frames=MAX_FRAMES)
    assert clip.indices == tuple(range(100))
    assert clip.warning == f"{MAX_FRAMES} frames of {path} were asked for, only 100 are there"
    assert read_video(path, frames=9, start=4.0 - 0.01).indices == (99,)
    for frames in (MAX_FRAMES + 1, 2 * 10**9, 10**24):
        with pytest.raises(UsageError, match=f"frames is {frames}: give 1 to {MAX_FRAMES}"):
            read_video(path, frames=frames)
    monkeypatch.setattr("zipvl.vision.video.MAX_FRAMES", 99)
    with pytest.raises(UsageError, match=r"100 frames of .*h264\.mp4 are asked for, at most 99"):
        read_video(path, frames=None)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 0}, {"frames": -3}, {"fps": 0}, {"fps": -1}, {"fps": NAN}, {"fps": INF},
        {"start": -1}, {"end": -0.1}, {"start": NAN}, {"end": INF}, {"start": 2, "end": 1},
    ],
)  # fmt: skip
def test_impossible_options(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        read_video("never-opened.mp4", **options)
    with pytest.raises(UsageError, match=next(iter(options))):
        sample([0.0, 1.0], **options)


def test_variable_rate_by_time(video: Video) -> None:
    """The frame shown at each moment, though the file has few frames early and many late."""
    clip = read_video(video("vfr.mp4"), frames=None, fps=5)
    assert [number(p) for p in clip.frames] == list(range(0, 90, 5))


def test_fit_and_progress(video: Video) -> None:
    seen: list[tuple] = []
    calls: list[int] = []

    def fit(picture: np.ndarray) -> np.ndarray:
        seen.append((picture.shape, picture.dtype))
        return picture[::2, ::4]

    for name in ("h264.mp4", "stream.ts", "one.mp4"):
        seen.clear()
        calls.clear()
        clip = read_video(video(name), frames=6, fit=fit, progress=calls.append)
        assert clip.frames.shape == (1 if name == "one.mp4" else 6, 32, 24, 3)
        assert seen == [((64, 96, 3), np.uint8)] * len(set(clip.indices))
        assert calls == [1] * len(set(clip.indices))
    with pytest.raises(ZeroDivisionError):  # an error of `fit` is the caller's, and leaves no lock
        read_video(video("h264.mp4"), fit=lambda picture: 1 // 0)
    assert read_video(video("h264.mp4"), frames=1).total == 100


def test_decord_for_who_asks(video: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same clip of a plain file, also where its name looks like an address."""
    pytest.importorskip("decord")
    odd = tmp_path / "http:" / "host" / "a.mp4"
    odd.parent.mkdir(parents=True)
    odd.write_bytes(video("h264.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    for path in (video("h264.mkv"), "http:/host/a.mp4"):
        calls: list[int] = []
        first = read_video(path, frames=9, start=0.5)
        clip = read_video(path, frames=9, start=0.5, progress=calls.append, reader="decord")
        assert (clip.frames == first.frames).all()
        assert (clip.decoder, first.decoder, calls) == ("decord", "pyav", [1] * 9)
        assert dataclasses.replace(clip, frames=None, decoder="pyav") == dataclasses.replace(
            first, frames=None
        )


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][1] != "both"])
def test_decord_is_refused_what_it_gets_wrong(video: Video, name: str) -> None:
    pytest.importorskip("decord")
    with pytest.raises(MediaError, match=f"decord .*{name}: read it with pyav"):
        read_video(video(name), reader="decord")


def test_decord_never_waits_for_frames_that_are_not_there(video: Video, tmp_path: Path) -> None:
    """A cut that keeps a long GOP, headers that promise more: in a process, because decord cannot be
    interrupted."""
    pytest.importorskip("decord")
    whole = video("faststart.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    mkv = video("h264.mkv").read_bytes()
    (tmp_path / "short.mkv").write_bytes(mkv[: len(mkv) // 2])
    code = (
        "import sys; from tests.video_files import read_video; from zipvl.errors import MediaError\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_video(path, reader='decord')\n"
        "    except MediaError as e: print(e)"
    )
    paths = [video("cut.mp4"), tmp_path / "short.mp4", tmp_path / "short.mkv"]
    run = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert run.stdout.splitlines() == [
        f"decord would hang or err on {path}: read it with pyav" for path in paths
    ]


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "vp9.webm", "stream.ts"])
def test_without_decord(video: Video, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_video(video(name), frames=9)
    monkeypatch.setitem(sys.modules, "decord", None)
    second = read_video(video(name), frames=9)
    assert (first.frames == second.frames).all()
    assert second.decoder == "pyav"
    assert dataclasses.replace(second, frames=None) == dataclasses.replace(first, frames=None)
    with pytest.raises(MediaError, match=rf"{name} needs the package decord: pip install decord"):
        read_video(video(name), reader="decord")


def test_unknown_reader() -> None:
    for source in ("never-opened.mp4", pictures(2)):
        with pytest.raises(UsageError, match="unknown reader 'opencv': give pyav or decord"):
            read_video(source, reader="opencv")


def test_without_av(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match="package av"):
        read_video(video("h264.mp4"))
    assert read_video(pictures(3), frames=2).total == 3


def test_arrays() -> None:
    array = pictures(10)
    clip = read_video(array, frames=4)
    assert (clip.indices, clip.times) == ((0, 3, 6, 9), (0.0, 3.0, 6.0, 9.0))
    assert (clip.frames == array[[0, 3, 6, 9]]).all()
    assert (clip.decoder, clip.total, clip.fps, clip.duration) == ("array", 10, 1.0, 10.0)
    assert read_video(array, frames=None).indices == tuple(range(10))
    assert read_video(array, frames=3, start=4, end=6).indices == (4, 5, 6)
    more = read_video(array[:2], frames=5)
    assert more.indices == (0, 1)
    assert more.warning == "5 frames of the video array were asked for, only 2 are there"
    assert isinstance(more, Clip)
    shapes = [(0, 4, 4, 3), (2, 0, 4, 3), (4, 4, 3), (2, 4, 4, 4), ()]
    for bad in [*(np.zeros(s, np.uint8) for s in shapes), np.zeros((2, 4, 4, 3), np.float32)]:
        with pytest.raises(MediaError, match=r"uint8 \[F, h, w, 3\]"):
            read_video(bad)


times_of = st.lists(st.floats(0.001, 3.0), max_size=60).map(
    lambda gaps: np.cumsum([0, *gaps]).tolist()
)
moments = st.none() | st.floats(0, 100)


@settings(deadline=None)
@given(times_of, st.none() | st.integers(1, 80), st.none() | st.floats(0.01, 100), moments, moments)
def test_sample_properties(times, frames, fps, start, end) -> None:
    if start is not None and end is not None and start > end:
        start, end = end, start
    rows = sample(times, frames, fps, start, end)
    assert rows == sorted(rows)
    assert 0 <= rows[0] <= rows[-1] < len(times)
    inside = [
        i for i, t in enumerate(times)
        if (start is None or t >= start - 1e-6) and (end is None or t <= end + 1e-6)
    ]  # fmt: skip
    assert len(set(rows)) == len(rows)
    if not inside:  # between two frames or behind the last: the one on screen
        assert rows == [max(i for i, t in enumerate(times) if t <= (start or 0) + 1e-6)]
        return
    assert set(rows) <= set(inside)
    assert rows[0] == inside[0]
    count = min(frames or 0, len(inside))
    uniform = [inside[0] + i * (inside[-1] - inside[0]) // max(1, count - 1) for i in range(count)]
    if fps is None:
        assert rows == (uniform if frames else inside)
    else:
        assert frames is None or len(rows) <= frames


@settings(deadline=None)
@given(times_of, st.floats(0.01, 100))
def test_sample_by_rate_takes_the_nearest_frames(times: list[float], fps: float) -> None:
    """Against a plain loop over the moments of the grid."""
    rows, stamps = sample(times, None, fps), np.array(times)
    grid = [k / fps for k in range(int(times[-1] * fps) + 1)]
    near = [np.abs(stamps - moment) for moment in grid]
    assert all(
        any(distance[r] < distance.min() + 2e-6 / fps + 1e-9 for distance in near) or r == rows[-1]
        for r in rows
    )
    assert all(distance[rows].min() < distance.min() + 2e-6 / fps + 1e-9 for distance in near)


def test_sample_matches_the_families() -> None:
    assert sample(range(100), 8) == [0, 14, 28, 42, 56, 70, 84, 99]  # LongVA, LLaVA-OneVision
    ntsc = [i * 1001 / 30000 for i in range(300)]
    assert sample(ntsc, None, 1) == list(range(0, 300, 30))  # LLaVA-NeXT-Video: every round(fps)-th


@pytest.mark.slow
def test_memory_does_not_grow_with_frames_of_full_size(video: Video, tmp_path: Path) -> None:
    """300 frames of 1280 x 720 are 830 MB; kept at 32 x 32 they must cost next to nothing."""
    video("one.mp4")
    path = tmp_path / "large.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=1280x720:d=12", *X264[:4], "-preset", "ultrafast", path)
    code = (
        "import sys, resource\n"
        "from tests.video_files import read_video\n"
        "clip = read_video(sys.argv[1], int(sys.argv[2]), fit=lambda p: p[:32, :32].copy())\n"
        "print(clip.decoder, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for frames in (4, 300):
        run = [sys.executable, "-c", code, str(path), str(frames)]
        decoder, peak = subprocess.run(
            run, capture_output=True, text=True, check=True
        ).stdout.split()
        assert decoder == "pyav"
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 100


def test_every_made_file_is_tested() -> None:
    assert set(ENCODED) - {"zero.mp4"} <= set(FILES)
