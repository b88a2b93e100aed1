"""The report page: what it shows is what the run did, nothing of a run is markup, and in a real
browser it works."""

import base64
import html.parser
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import zipvl
from lab.shot import browser, opened
from tests.methods.untrained import NEEDS
from zipvl import cli, page
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.engine.run import Result
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Policy
from zipvl.report import Trial
from zipvl.vision.video import Reading

HOSTILE = "</script><script>document.title='taken'</script><b>&amp; \u2028 'x' \"y\""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zipvl.load(device="cpu", dtype="float32")


def trial(engine: Engine, inputs: Inputs, name: str, policy: Policy, new: int = 4) -> Trial:
    return Trial(name, cast(Result, engine.generate(inputs, policy, new)))


def gathered(engine: Engine, inputs: Inputs, methods: list[str], question: str = "What?",
             videos: list[Reading | None] | None = None) -> dict[str, Any]:  # fmt: skip
    """The page's content for an answer of each method."""
    policies = [load_policy(method) for method in methods]
    trials = [trial(engine, inputs, m, p) for m, p in zip(methods, policies, strict=True)]
    videos = videos or [None for m in inputs.media if m.clip]
    return page.content(engine, inputs, question, trials, policies, videos, 4, {})


def bits(part: dict[str, Any]) -> np.ndarray:
    """What a method kept, [layers, cells]."""
    rows = [np.frombuffer(base64.b64decode(text), np.uint8) for text in part["bits"]]
    return np.unpackbits(np.stack(rows), axis=1, bitorder="little")


# --- what was kept ----------------------------------------------------------------------------

FEW = ("dense", "zipvl", "zipvl-stream", "hired", "fastv", "sparsevlm", "minference_ref", "h2o",
       "snapkv", "elastic")  # fmt: skip


@pytest.mark.parametrize(
    "method", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_watched_methods_keep_what_the_run_counted(engine: Engine, method: str) -> None:
    inputs = engine.prepare("List all objects in order.", video=zipvl.demo_clip(), frames=16)
    policy = load_policy(method, **NEEDS.get(method, {}))
    result = cast(Result, engine.generate(inputs, policy, max_new_tokens=4))
    seen = page.watch(engine, inputs, policy, 4)
    attended = [layer["attended"] for layer in result.stats.layers]
    assert seen.attended.sum(1).tolist() == attended
    for row, layer in zip(seen.cached, result.stats.layers, strict=True):
        assert row.sum() >= layer["cached"]  # of several heads' choices the union
        assert row.sum() <= layer["tokens"]
    assert seen.looked.sum() == pytest.approx(1, abs=1e-5)


def test_what_a_method_trims_later_is_not_in_its_cache(engine: Engine) -> None:
    class Trims(zipvl.Policy):
        def trim(self, layer: int, notes: zipvl.policy.Notes) -> dict[int, torch.Tensor]:
            return {0: torch.arange(5)} if layer == 1 else {}

    inputs = engine.prepare("What comes first?", video=zipvl.demo_clip(), frames=4)
    seen = page.watch(engine, inputs, Trims(), 4)
    assert seen.cached.sum(1).tolist() == [5] + 7 * [len(inputs)]
    assert seen.cached[0, :5].all()


def test_the_last_token_looks_as_dense_attention_does(engine: Engine) -> None:
    inputs = engine.prepare("What comes first?", video=zipvl.demo_clip(), frames=4)
    seen = page.watch(engine, inputs, load_policy("dense"), 4)
    wanted = np.zeros(len(inputs))

    class Whole(zipvl.Policy):
        def plan(self, view: zipvl.View) -> zipvl.Plan:
            q, k = view.q.double(), view.k.double().repeat_interleave(2, 0)
            logits = (q[:, -1:] @ k.mT)[:, 0] / view.q.shape[-1] ** 0.5
            wanted[:] += logits.softmax(-1).mean(0).numpy() / view.num_layers
            return zipvl.Plan()

    engine.logits(inputs, Whole())
    assert np.allclose(seen.looked, wanted, atol=1e-6)


def test_watching_changes_no_run(engine: Engine) -> None:
    inputs = engine.prepare("What comes last?", video=zipvl.demo_clip(), frames=16)
    before = cast(Result, engine.generate(inputs, "zipvl-stream", max_new_tokens=4))
    page.watch(engine, inputs, load_policy("zipvl-stream"), 4)
    after = cast(Result, engine.generate(inputs, "zipvl-stream", max_new_tokens=4))
    assert before.tokens == after.tokens
    assert before.stats.work == after.stats.work


# --- where tokens lie -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_next_video", "llava_onevision",
                                  "original_16", "original_longva", "original_video"])  # fmt: skip
def test_every_token_has_its_place(oracle: Callable, kind: str) -> None:
    model = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
    rng = np.random.default_rng()
    picture = Image.fromarray(rng.integers(0, 255, (90, 40, 3), dtype=np.uint8))
    video = rng.integers(0, 255, (3, 40, 50, 3), dtype=np.uint8)
    inputs = model.prepare("What?", images=[picture], video=video)
    shown = page.panels(inputs, model.model.vision, [None])
    for medium in inputs.media:
        spots = page.places(medium, model.model.vision)
        assert len(spots) == medium.tokens
        known = spots[~np.isnan(spots[:, 0])]
        assert ((known[:, 1:] > 0) & (known[:, 1:] < 1)).all()
        assert len(np.unique(known.round(5), axis=0)) == len(known)  # no place is given twice
    placed = np.concatenate([p.tokens[p.tokens >= 0] for p in shown])
    visual = inputs.is_visual.nonzero()[:, 0].numpy()
    assert len(set(placed)) == len(placed)
    assert set(placed) <= set(visual)
    newlines = sum(np.isnan(page.places(m, model.model.vision)[:, 0]).sum() for m in inputs.media)
    assert len(visual) - len(placed) == newlines
    for p in shown:
        assert len(p.pictures) == len(p.tokens)
        y, x, high, wide = p.box
        assert min(y, x) > -1e-3
        assert max(y + high, x + wide) < 1 + 1e-3


def test_bits_lie_over_their_frames(engine: Engine) -> None:
    """Of a clip whose kept tokens are known: of frame 1 the second row, of frame 2 all."""

    class Some(zipvl.Policy):
        def plan(self, view: zipvl.View) -> zipvl.Plan:
            index = torch.tensor([0, 1 + 4 + 2, 1 + 4 + 3, *range(9, 13), view.length - 1])
            return zipvl.Plan(attend=index, cache=index)

    inputs = engine.prepare("What?", video=zipvl.demo_clip(), frames=4)
    policy = Some()
    some = trial(engine, inputs, "some", policy)
    got = page.content(engine, inputs, "What?", [some], [policy], [None], 4, {})
    assert got["panels"][0]["shape"] == (4, 2, 2)
    kept = bits(got["methods"][0])[:, :16].reshape(-1, 4, 4)
    assert (kept == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).all()
    assert got["methods"][0]["share"] == pytest.approx([8 / len(inputs)] * 8, abs=1e-4)
    assert not got["methods"][0]["all"]


def test_a_method_that_keeps_all_says_so(engine: Engine) -> None:
    inputs = engine.prepare("What?", video=zipvl.demo_clip(), frames=4)
    parts = gathered(engine, inputs, ["dense", "kivi", "snapkv", "zipvl-stream"])["methods"]
    assert [part["all"] for part in parts] == [True, True, True, False]
    assert parts[2]["what"] == "stay in the cache"  # all 17 do, of so short a prompt
    assert gathered(engine, engine.prepare("What?"), ["dense"])["panels"] == []  # no media at all


def test_long_videos_are_thinned_and_read_again(engine: Engine, tmp_path: Path) -> None:
    frames = np.random.default_rng().integers(0, 255, (1500, 48, 48, 3), dtype=np.uint8)
    inputs = engine.prepare("What?", video=frames, frames=1500)
    assert not len(inputs.media[0].crops)
    got = gathered(engine, inputs, ["zipvl-stream"], videos=[Reading(frames, None)])
    panel = got["panels"][0]
    assert panel["title"] == "Video 1: 1500 frames, 1000 shown"
    assert panel["shape"] == (1000, 2, 2)
    assert len(panel["sheets"]) == 42
    looks = got["methods"][0]["looks"][0]
    assert len(looks["bins"]) == page.BINS
    assert sum(looks["bins"]) == pytest.approx(looks["total"], rel=0.01)
    page.write_page(tmp_path / "page.html", got)
    assert (tmp_path / "page.html").stat().st_size < 5e6
    plain = page.panels(inputs, engine.model.vision, [None])[0]
    assert plain.pictures == []  # nothing to read again: cells without pictures


def test_a_video_read_again_shows_what_the_tower_saw(oracle: Callable) -> None:
    """CLIP's processor cuts the middle out of a wide frame: the cells lie over that middle."""
    model = zipvl.load(oracle("llava").folder, device="cpu", dtype="float32")
    assert model.config.vision.media.resize == "crop"
    frames = np.zeros((2, 40, 120, 3), dtype=np.uint8)
    frames[:, :, :30] = frames[:, :, 90:] = 255  # white edges, which it never sees
    inputs = model.prepare("What?", video=frames)
    shown = np.array([0, 1])
    small = page.again(Reading(frames, None), shown, model.model.vision, inputs.media[0].geometry)
    assert [picture.max() for picture in small] == [0, 0]
    held = page.panels(inputs, model.model.vision, [None])[0].pictures
    assert [picture.size for picture in held] == [picture.shape[1::-1] for picture in small]


# --- the file ---------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def test_no_text_of_a_run_is_markup(engine: Engine, tmp_path: Path) -> None:
    inputs = engine.prepare("What?", video=zipvl.demo_clip(), frames=4)
    got = gathered(engine, inputs, ["dense"], HOSTILE)
    page.write_page(tmp_path / "page.html", got)
    text = (tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert [tag for tag, _ in tags.seen].count("script") == 2
    assert "b" not in {tag for tag, _ in tags.seen}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in tags.seen)
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text
    data = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert data
    assert json.loads(data[1])["question"] == HOSTILE


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(
        zipvl.errors.ZipvlError, match=r"page.html cannot be written: No space left"
    ):
        page.write_page(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(autouse=True)
def _no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))


def ask(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    try:
        code = cli.main(["-p", "What comes first?", "-n", "8", "--max-new-tokens", "4", *args])
    except SystemExit as e:
        code = cast(int, e.code)
    return code, capsys.readouterr().err


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "page.html"
    code, err = ask(capsys, "--compare", "dense,zipvl-stream", "--report", str(path))
    assert code == 0
    assert err.endswith(f"report: {path}\n")
    data = re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)
    assert data
    said = json.loads(data[1])
    assert said["question"] == "What comes first?"
    assert [m["name"] for m in said["methods"]] == ["dense", "zipvl-stream"]
    assert f"--report {path}" in said["settings"]["command"]
    assert ask(capsys, "-q", "--json", "--report", str(path)) == (0, "")


@pytest.mark.parametrize(
    "where", ["", "no/such/page.html", "clip.mp4/page.html", "pipe.html", "folder.html", "clip.mp4"]
)
def test_a_place_for_no_page_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipvl.engine.load.load", None)
    (tmp_path / "clip.mp4").write_bytes(b"film")
    (tmp_path / "folder.html").mkdir()
    os.mkfifo(tmp_path / "pipe.html")
    code, err = ask(capsys, "--report", str(tmp_path / where))
    assert code == 2
    assert "cannot be written: name an .html file" in err
    assert err.count("\n") == 1
    assert (tmp_path / "clip.mp4").read_bytes() == b"film"


def test_a_link_to_a_page_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    link, page_there = tmp_path / "link.html", tmp_path / "pages" / "page.html"
    link.symlink_to(page_there)
    page.write_page(link, {"question": "What?"})
    assert link.is_symlink()
    assert '"What?"' in page_there.read_text()
    with pytest.raises(zipvl.errors.ZipvlError, match=r"gone.page.html cannot be written: No such"):
        page.write_page(tmp_path / "gone" / "page.html", {})
    with pytest.raises(zipvl.errors.ZipvlError, match=r"cannot be written: File name too long"):
        page.write_page(tmp_path / ("a" * 300 + ".html"), {})


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two videos and a picture, one method of three failed."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e .[dev]")
    if browser() is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    clip = zipvl.demo_clip()
    picture = Path(zipvl.__file__).parent / "demo/picture.png"
    inputs = engine.prepare(
        "Is <image> in <video> or <video>?", images=[picture], video=[clip, clip], frames=64
    )
    methods = ["dense", "zipvl-stream"]
    policies = [load_policy(method) for method in methods]
    trials = [trial(engine, inputs, m, p) for m, p in zip(methods, policies, strict=True)]
    trials.append(Trial(HOSTILE, None, f"it broke: {HOSTILE}"))
    policies.append(policies[0])
    path = tmp_path_factory.mktemp("page") / "page.html"
    some = page.content(
        engine, inputs, HOSTILE, trials, policies, [None, None], 4, {"files": HOSTILE}
    )
    page.write_page(path, some)
    return path


@pytest.fixture
def tab(shown: Path) -> Iterator[Any]:
    """The page in Chromium; at the end nothing has complained or asked for anything outside."""
    with opened(shown) as tab:
        faults, requests = [], []
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.reload()
        tab.wait_for_timeout(200)
        yield tab
        tab.wait_for_timeout(50)
        assert faults == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def pictures(tab: Any) -> list[str]:
    return tab.evaluate("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")


def test_the_sliders_change_the_pictures(tab: Any) -> None:
    mean = pictures(tab)
    assert len(mean) == 2 * (2 * 24 + 2)  # two methods; two films, a picture and its tile
    tab.focus("#layer")
    for _ in range(8):
        tab.keyboard.press("ArrowRight")
    last = pictures(tab)
    assert tab.input_value("#layer") == "7"
    assert last[: len(last) // 2] == mean[: len(mean) // 2]  # dense keeps all in every layer
    assert last[len(last) // 2 :] != mean[len(mean) // 2 :]
    assert tab.get_attribute("#layer", "aria-valuetext") == "layer 7"
    tab.focus("#sheet")
    tab.keyboard.press("End")
    assert len(pictures(tab)) == 2 * (2 * 16 + 2)  # 64 frames are two sheets of 24 and one of 16
    labels = tab.evaluate("[...document.querySelectorAll('canvas')].map(c => c.ariaLabel)")
    assert all(re.fullmatch(r".+: \d+(\.\d)? % kept", label) for label in labels)


def test_hostile_text_stays_text(tab: Any) -> None:
    assert tab.inner_text("h1").replace("\u2028", " ") == HOSTILE.replace("\u2028", " ")
    assert tab.title() == "zipvl report"
    assert "it broke: </script>" in tab.inner_text("main")
    assert tab.evaluate("document.querySelectorAll('b').length") == 0


@pytest.mark.parametrize(
    ("method", "sliders", "says"),
    [
        ("zipvl-stream:tau=0.5,always=last", ["layer"], "Tokens that took part in attention"),
        pytest.param("dense", [], "Keeps all tokens in every layer.", marks=pytest.mark.slow),
    ],
)
def test_text_alone(engine: Engine, shown: Path, tmp_path: Path, method: str,
                    sliders: list[str], says: str) -> None:  # fmt: skip
    """Bars by layer without pictures, and no slider where there is nothing to slide."""
    page.write_page(
        tmp_path / "page.html", gathered(engine, engine.prepare("Tell me. " * 100), [method])
    )
    with opened(tmp_path / "page.html") as tab:
        assert tab.evaluate("[...document.querySelectorAll('input')].map(i => i.id)") == sliders
        assert says in tab.inner_text("main")
        assert tab.evaluate("document.querySelectorAll('.layers span').length") == 8
        assert tab.evaluate("document.querySelectorAll('canvas').length") == 0
        tab.evaluate("document.querySelectorAll('.layers span')[3].click()")
        assert tab.evaluate("document.querySelectorAll('.layers span.now').length") == 1


@pytest.mark.parametrize(
    ("width", "dark"), [pytest.param(1280, False, marks=pytest.mark.slow), (360, True)]
)
def test_narrow_wide_light_and_dark(shown: Path, width: int, dark: bool) -> None:
    with opened(shown, width, 740, dark) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(22, 22, 20)" if dark else "rgb(255, 255, 255)")
