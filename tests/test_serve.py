"""The endpoint, asked by OpenAI's own client and by raw sockets, mostly with bad intentions."""

import base64
import gc
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import zipvl
from zipvl import MediaError, OutOfMemory, UsageError
from zipvl.serve import app, media, routes
from zipvl.serve.request import Limits, Link, Refusal, parse
from zipvl.serve.routes import Server
from zipvl.serve.worker import Cut

ROOT = Path(__file__).parent.parent
CLIP = zipvl.demo_clip()
PICTURE = CLIP.with_name("picture.png")
ASKED = "List all objects in order."
MODEL = "zipvl-demo"
ABSENT = "is no regular file below this server's media root"

Message = dict[str, Any]


def text(words: str) -> Message:
    return {"type": "text", "text": words}


def link(kind: str, url: str | Path, **more: Any) -> Message:
    url = url if isinstance(url, str) else url.as_uri()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url, **more}}


def data(path: Path, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def user(*parts: Message | str) -> list[Message]:
    return [{"role": "user", "content": list(parts)}]


def body(messages: Any = None, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages or user(text("hello")), **more}


# --- the body of a request, without a server --------------------------------------------------


def refusal(raw: bytes | dict[str, Any], limits: Limits | None = None) -> Refusal:
    raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    with pytest.raises(Refusal) as e:
        parse(raw, limits or Limits(), MODEL)
    return e.value


VIDEO = {"type": "video_url", "video_url": {"url": "file:///a"}}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"mm_processor_kwargs": {"fps": 1}}, "mm_processor_kwargs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"1": 100}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"method": "dense"}, "method"),
        ({"guide": "/etc/passwd"}, "guide"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1e9}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": user() * 300}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": {}, "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        ({"messages": user({"type": "input_audio"})}, "messages[0].content[0]"),
        ({"messages": user({"type": {}, "text": "a"})}, "messages[0].content[0]"),
        ({"messages": user({"text": "a", **VIDEO})}, "messages[0].content[0]"),
        ({"messages": user(text("\ud800"))}, "messages[0].content[0].text"),
        ({"messages": [{"role": "system", "content": [VIDEO]}]}, "messages[0].content[0]"),
        ({"messages": user(link("image", "data:", detail="high"))}, "messages[0].content[0].image_url.detail"),
        ({"messages": user(link("image", "data:", fps=1))}, "messages[0].content[0].image_url.fps"),
        ({"messages": user(link("video", "data:", min_pixels=1))}, "messages[0].content[0].video_url.min_pixels"),
        ({"messages": user(link("video", "data:", nframe=-1))}, "messages[0].content[0].video_url.nframe"),
        ({"messages": user(link("video", "data:", nframe=4), link("video", "data:", nframe=5))}, "messages[0].content[1].video_url.nframe"),
        ({"media_io_kwargs": {"audio": {}}}, "media_io_kwargs.audio"),
        ({"media_io_kwargs": {"video": {"backend": "a"}}}, "media_io_kwargs.video.backend"),
        ({"media_io_kwargs": {"video": {"fps": 0}}}, "media_io_kwargs.video.fps"),
        *(({"media_io_kwargs": {"video": {"num_frames": n}}}, "media_io_kwargs.video.num_frames")
          for n in (-1, 0, 1e9, 10**9, 129, True, "8", 8.0, [8])),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_named(more: dict[str, Any], field: str) -> None:
    e = refusal(body() | more)
    assert (e.status, e.param) == (400, field)
    assert str(e).startswith(field)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "a list"),
        (b"1", "is 1"),
        (b'{"model": NaN}', "NaN is no number"),
        (b'{"temperature": Infinity}', "Infinity is no number"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"model": "a", "model": "b"}', "comes twice"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"tools": ' + b"[" * 900 + b"]" * 900 + b"}", ""),
        (b"[" + b"[]," * 700_000 + b"1]", "brackets and commas"),
        (b'{"a": ' * 1000 + b"1" + b"}" * 1000, ""),
    ],
)
def test_what_is_no_json(raw: bytes, says: str) -> None:
    e = refusal(raw)
    assert e.status == 400
    assert says in str(e)


def test_keys_of_any_size_make_short_messages() -> None:
    e = refusal(body() | {"\ud800\n\x1b[31m" + "x" * 100_000: 1})
    assert len(str(e)) < 3000
    assert len(str(e.param)) <= 200
    assert "\x1b" not in f"{e}{e.param}"


def test_what_means_nothing_is_taken() -> None:
    plain = {"n": 1, "tools": [], "logprobs": False, "store": False, "presence_penalty": 0.0,
             "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"},
             "service_tier": "auto", "logit_bias": None, "seed": None, "stop": None}  # fmt: skip
    ask = parse(json.dumps(body(**plain)).encode(), Limits(answer=7), MODEL)
    assert (ask.max_new_tokens, ask.temperature, ask.stop, ask.stream) == (7, 0.0, (), False)


def test_a_request_lowers_ceilings_and_never_raises_them() -> None:
    limits = Limits(answer=100, frames=16)
    for asked, want in ((32768, 100), (10**30 // 10**11, 100), (5, 5)):
        for name in ("max_tokens", "max_completion_tokens"):
            ask = parse(json.dumps(body(**{name: asked})).encode(), limits, MODEL)
            assert ask.max_new_tokens == want
    ask = parse(
        json.dumps(body(media_io_kwargs={"video": {"num_frames": 16}})).encode(), limits, MODEL
    )
    assert ask.frames == 16
    assert refusal(body(media_io_kwargs={"video": {"num_frames": 17}}), limits).status == 400


def test_shapes_of_parts() -> None:
    """vLLM's bare strings and parts without a type, VLMEvalKit's frames inside a video_url."""
    parts = [
        "one",
        {"text": "two"},
        {"image_url": "data:i"},
        VIDEO,
        link("video", "data:v", nframe=4, fps=2),
    ]
    ask = parse(json.dumps(body(user(*parts))).encode(), Limits(), MODEL)
    assert ask.messages[0]["content"] == [
        text("one"), text("two"), {"type": "image"}, {"type": "video"}, {"type": "video"},
    ]  # fmt: skip
    assert [(n.kind, n.url) for n in ask.links] == [
        ("image", "data:i"),
        ("video", "file:///a"),
        ("video", "data:v"),
    ]
    assert (ask.frames, ask.fps) == (4, 2)


def test_another_model_is_not_found() -> None:
    e = refusal(body() | {"model": "gpt-5"})
    assert (e.status, e.param, e.reason) == (404, "model", "model_not_found")
    assert refusal({"messages": []}).param == "model"


letters = st.text("ab", min_size=0, max_size=12)


@given(st.lists(letters, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_a_stop_is_cut_wherever_the_pieces_end(pieces: list[str], stops: list[str]) -> None:
    def shown(pieces: list[str]) -> str:
        cut, out = Cut(tuple(stops)), ""
        for piece in pieces:
            out += cut.push(piece)
            if cut.done:
                break
        return out + cut.flush()

    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    want = whole[: min(ends)[1]] if ends else whole
    assert shown(pieces) == shown(list(whole)) == want


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--host", "0.0.0.0"], "there is no token"),
        (["--host", "example.org"], "there is no token"),
        (["--queue", "-1"], "--queue is -1"),
        (["--max-frames", "0"], "--max-frames is 0"),
        (["--frames", "999"], "more than the 128"),
        (["--port", "70000"], "--port is 70000"),
        (["--token", "a b"], "the token"),
        (["--token", "a", "--token-file", "b"], "leave one out"),
        (["--token-file", "nowhere"], "cannot be read"),
        (["--reuse", "all"], "--reuse"),
        (["--drain-seconds", "nan"], "--drain-seconds"),
        (["--host", "203.0.113.1", "--anyone"], "cannot listen"),
    ],
)
def test_usage_errors(argv: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert app.main(argv) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "zipvl.serve.routes")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert app.main([]) == 1
    assert "pip install 'zipvl[serve]'" in capsys.readouterr().err


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def token(*argv: str) -> str | None:
        a = app.build_parser().parse_args(argv)
        app.check(a)
        return a.token

    monkeypatch.delenv("ZIPVL_TOKEN", raising=False)
    assert token() is None
    monkeypatch.setenv("ZIPVL_TOKEN", "s3cret")
    assert token() == "s3cret"
    (tmp_path / "t").write_text("other\n")
    assert token("--token-file", str(tmp_path / "t")) == "other"
    assert token("--host", "0.0.0.0", "--token", "third") == "third"


# --- a server ---------------------------------------------------------------------------------


@dataclass
class Served:
    server: Server
    engine: zipvl.Engine
    root: Path
    port: int

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0
        )

    def ask(self, messages: list[Message], **more: Any) -> Any:
        return self.client.chat.completions.create(model=MODEL, messages=messages, **more)

    def refused(self, messages: Any, status: int = 400, **more: Any) -> dict[str, Any]:
        with pytest.raises(openai.APIStatusError) as e:
            self.ask(messages, **more)
        assert e.value.status_code == status, e.value.message
        assert str(self.root) not in e.value.message
        assert "zipvl-" not in e.value.message
        assert "/proc" not in e.value.message
        return e.value.body

    def raw(self, head: str, content: bytes = b"") -> bytes:
        """All that comes back for some bytes."""
        with self.connect() as s:
            s.sendall(head.encode("latin-1") + content)
            return self.rest(s)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def rest(self, s: socket.socket) -> bytes:
        got = b""
        while more := s.recv(2**16):
            got += more
        return got

    def post(self, content: bytes, *headers: str, close: bool = True) -> str:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", *headers]
        lines += ["Content-Type: application/json"] * (not any("Type" in h for h in headers))
        lines += [f"Content-Length: {len(content)}"] * (
            not any("ength" in h or "ncoding" in h for h in headers)
        )
        return "\r\n".join([*lines, *["Connection: close"] * close, "", ""])

    def idle(self, seconds: float = 3.0) -> bool:
        worker, until = self.server.worker, time.monotonic() + seconds
        while not worker.idle and time.monotonic() < until:
            time.sleep(0.01)
        return worker.idle

    @property
    def spool(self) -> list[str]:
        return os.listdir(self.server.worker.store.folder.name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("media")
    for source in (CLIP, PICTURE):
        (root / source.name).write_bytes(source.read_bytes())
    a = app.build_parser().parse_args(["--media-root", str(root), "--queue", "64"])
    app.check(a)
    engine = zipvl.load(device="cpu")
    server = app.build(a, engine)
    here = app.bound("127.0.0.1", 0)
    here.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [here]})
    thread.start()
    served = Served(server, engine, root, here.getsockname()[1])
    yield served
    served.client.close()
    folder = Path(server.worker.store.folder.name)
    server.should_exit = True
    thread.join(20)
    server.worker.close(5)
    server.worker.store.close()
    assert not thread.is_alive()
    assert not folder.exists()


@pytest.fixture
def limits(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """limits(frames=4): other ceilings for a test."""

    def lower(**more: int) -> None:
        store = served.server.worker.store
        monkeypatch.setattr(store, "limits", replace(store.limits, **more))

    return lower


@pytest.fixture
def gate(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine waits at its next layer until the event is set, or its job has ended."""
    worker, event = served.server.worker, threading.Event()

    @contextmanager
    def wait(label: str, total: int) -> Iterator[Callable[[int], object]]:
        def step(n: int) -> None:
            while not event.wait(0.01):
                worker.job.check()

        step(0)
        yield step

    monkeypatch.setattr(served.engine, "progress", wait)
    yield event
    event.set()
    assert served.idle()


def never(*args: object, **options: object) -> None:
    raise AssertionError("this is not to be called")


def alone(messages: list[Message], **media: Any) -> str:
    """The answer of a session that was asked nothing else."""
    session = zipvl.load(device="cpu").session(**{"method": "zipvl", "reuse": "general", **media})
    *_, last = session.reply(messages, 64)
    return last.result.text


# --- answers ----------------------------------------------------------------------------------


def test_a_video(served: Served) -> None:
    got = served.ask(user(link("video", served.root / "clip.mp4"), text(ASKED)))
    want = alone(user({"type": "video"}, text(ASKED)), video=str(CLIP))
    [choice] = got.choices
    assert choice.message.content == want == "red star, blue 7, yellow heart, green ring"
    assert (choice.finish_reason, choice.message.role, got.object) == (
        "stop",
        "assistant",
        "chat.completion",
    )
    usage = got.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.video_tokens == 129
    assert usage.prompt_tokens_details.image_tokens == 0
    assert 0 < got.zipvl["ratio"] < 1
    assert got.zipvl["kv_bytes"] > 0
    assert len(got.zipvl["frames"]) == 32
    assert {"video", "vision", "prefill", "decode"} <= got.zipvl["seconds"].keys()


def test_media_that_come_again_reuse_their_session(served: Served) -> None:
    """Under another name, and as a data: URL, too."""
    (served.root / "again.mp4").write_bytes(CLIP.read_bytes())
    first, *others = [
        served.ask(
            user(link("video", url), text(ASKED)),
            extra_body={"media_io_kwargs": {"video": {"num_frames": 8}}},
        )
        for url in (served.root / "clip.mp4", served.root / "again.mp4", data(CLIP, "video/mp4"))
    ]
    cached = [r.usage.prompt_tokens_details.cached_tokens for r in (first, *others)]
    assert cached[0] == 0
    assert cached[1] == cached[2] > 32
    assert {r.choices[0].message.content for r in others} == {first.choices[0].message.content}
    assert not served.spool


def test_an_answer_does_not_depend_on_what_was_asked_before(served: Served) -> None:
    asked = [
        user(link("video", served.root / "clip.mp4"), text(t))
        for t in (ASKED, "What is first?", "Colours?")
    ]
    asked.append(
        [
            *asked[0],
            {"role": "assistant", "content": "red star"},
            {"role": "user", "content": "And then?"},
        ]
    )
    asked.append([{"role": "system", "content": "Be short."}, *asked[0]])
    shuffled = [n for n in range(len(asked)) for _ in range(2)]
    random.Random(0).shuffle(shuffled)
    answers: dict[int, set[str]] = {}
    for n in shuffled:
        answers.setdefault(n, set()).add(
            served.ask(asked[n], max_tokens=8).choices[0].message.content
        )
    assert all(len(said) == 1 for said in answers.values())


def test_pictures(served: Served) -> None:
    """By path and by bytes; two of them, which some models cut in another way."""
    path, url = served.root / "picture.png", data(PICTURE, "image/png")
    one = served.ask(user(link("image", path), text("What is the colour?")))
    same = served.ask(user(link("image", url, detail="auto"), text("What is the colour?")))
    assert one.choices[0].message.content == same.choices[0].message.content
    assert one.usage.prompt_tokens_details.image_tokens == 36
    two = served.ask(user(link("image", path), text("and"), link("image", url), text("differ?")))
    assert two.usage.prompt_tokens_details.image_tokens == 34  # padded, no tiles


def test_text_alone_and_a_system_prompt(served: Served) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    got = served.ask(messages, max_completion_tokens=3)
    assert (
        got.choices[0].message.content
        == alone(messages, reuse="none")[: len(got.choices[0].message.content)]
    )
    assert got.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream(served: Served) -> None:
    messages = user(link("video", served.root / "clip.mp4"), text(ASKED))
    whole = served.ask(messages).choices[0].message.content
    chunks = list(served.ask(messages, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in middle) == whole
    assert len(middle) > 5
    assert last.choices[0].finish_reason == "stop"
    assert last.zipvl["ratio"] > 0
    assert usage.choices == []
    assert usage.usage.completion_tokens == 11
    assert {c.id for c in chunks} == {first.id}
    assert all(c.usage is None for c in chunks[:-1])
    assert all(c.choices for c in served.ask(messages, stream=True))  # no usage unless asked for


def test_the_shape_of_a_stream(served: Served) -> None:
    content = json.dumps(body(stream=True)).encode()
    got = served.raw(served.post(content), content)
    head, _, rest = got.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert b"access-control" not in head.lower()
    lines = [line for line in rest.split(b"\r\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]\n\n"
    assert json.loads(lines[0][6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("words", ["<image> what", "<video>", "<image><image>"])
def test_markers_in_a_text_place_nothing(served: Served, words: str) -> None:
    served.refused(user(text(words)))
    served.refused(user(link("image", served.root / "picture.png"), text(words)))


@pytest.mark.parametrize("stream", [False, True])
def test_stops_and_lengths(served: Served, stream: bool) -> None:
    messages = user(link("video", served.root / "clip.mp4"), text(ASKED))

    def said(**more: Any) -> tuple[str, str]:
        got = served.ask(messages, stream=stream, **more)
        if not stream:
            return got.choices[0].message.content, got.choices[0].finish_reason
        choices = [chunk.choices[0] for chunk in got]
        return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason

    assert said(stop=", yellow") == ("red star, blue 7", "stop")
    assert said(stop=["heart", "r, b"]) == ("red sta", "stop")
    assert said(stop="nowhere")[0].endswith("green ring")
    assert said(max_tokens=3) == ("red star,", "length")


def test_sampling_is_seeded(served: Served) -> None:
    def said(seed: int) -> str:
        got = served.ask(
            user(text("hello")),
            temperature=2,
            seed=seed,
            max_tokens=24,
            top_p=0.99,
            extra_body={"top_k": 400},
        )
        return got.choices[0].message.content

    assert said(1) == said(1)
    assert len({said(n) for n in range(4)}) > 1


def test_models_and_health(served: Served) -> None:
    assert [m.id for m in served.client.models.list()] == [MODEL]
    assert served.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    got = served.raw("GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert json.loads(got.partition(b"\r\n\r\n")[2]) == {
        "status": "ok",
        "queue": 0,
        "running": False,
    }


# --- media ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file://localhost/etc/passwd", "file://{root}/../secret.png",
        "file://{root}/%2e%2e/secret.png", "file://{root}/%2E%2e/secret.png", "file://{root}/..%2fsecret.png",
        "file://{root}/sub/../../secret.png", "file://{root}/%252e%252e/secret.png", "file://{root}/..\\secret.png",
        "file://{root}/picture.png%00", "file://{root}/picture.png\0.png", "file://{root}", "file://{root}/",
        "file://{root}/out.png", "file://{root}/out/secret.png", "file://{root}/loop.png", "file://{root}/pipe",
        "file://{root}/sub", "file://{root}/absent.png", "file://picture.png", "file://host/{root}/picture.png",
        "file://", "file:///", "file:///dev/zero", "file:///proc/self/environ", "file://{root}/zero",
        "file://{root}/%ff%fe", "file://{root}/" + "a/" * 100_000,
    ],
)  # fmt: skip
def test_no_file_outside_the_root(served: Served, url: str) -> None:
    """And one sentence for all: it tells nobody what is there."""
    root, secret = served.root, served.root.parent / "secret.png"
    if not secret.exists():
        secret.write_bytes(PICTURE.read_bytes())
        (root / "sub").mkdir()
        (root / "out.png").symlink_to(secret)
        (root / "out").symlink_to(root.parent)
        (root / "loop.png").symlink_to("loop.png")
        (root / "zero").symlink_to("/dev/zero")
        os.mkfifo(root / "pipe")
    said = served.refused(user(link("image", url.replace("{root}", str(root))), text("what")))
    assert said["param"] == "messages[0].content[0].image_url"
    assert said["message"] == f"{said['param']} {ABSENT}"


def test_a_link_inside_the_root_is_a_file(served: Served) -> None:
    (served.root / "deep").mkdir()
    (served.root / "deep/file%20#?.png").write_bytes(PICTURE.read_bytes())
    (served.root / "link.png").symlink_to("deep/file%20#?.png")
    for name in ("link.png", "deep/file%2520#?.png"):
        assert served.ask(
            user(link("image", f"file://{served.root}/{name}"), text("what")), max_tokens=1
        )


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "https://a/b.png", "ftp://a/b", "gopher://a", "picture.png",
                                 "", "//a/b.png", "javascript:1", "data:text/html;base64,AAAA", "data:image/png,AAAA",
                                 "data:video/mp4;base64,AAAA", "DATA:image/png;base64,AAAA", "data:image/png;base64,AA AA",
                                 "data:image/png;base64,AAAA\n", "data:image/png;base64,é", "data:image/png;base64,AAA",
                                 "data:image/png;base64,A,A", "data:image/svg+xml;charset=utf-8;base64,AAAA"])  # fmt: skip
def test_nothing_is_fetched_and_data_is_exact(served: Served, url: str) -> None:
    said = served.refused(user(link("image", url), text("what")))
    assert said["param"] == "messages[0].content[0].image_url"
    assert not served.spool


def test_a_link_swapped_in_after_the_check_is_not_followed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """realpath() says what was there; then a folder, or the file, becomes a link."""
    store, root = served.server.worker.store, served.root
    secret = root.parent / "swapped.png"
    secret.write_bytes(PICTURE.read_bytes())
    (root / "folder").symlink_to(root.parent)
    (root / "swapped.png").symlink_to(secret)
    monkeypatch.setattr(media.os.path, "realpath", lambda path: path)
    for name in ("folder/swapped.png", "swapped.png"):
        with pytest.raises(Refusal, match=ABSENT):
            store.below(Link("image", f"file://{root}/{name}", "here"), lambda: None)


def test_a_file_that_changes_behind_the_queue(served: Served, gate: threading.Event) -> None:
    path = served.root / "changing.png"
    Image.new("RGB", (30, 40), "pink").save(path)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(served.ask, user(text("hello")))
        until(lambda: served.server.worker.job)
        second = pool.submit(served.refused, user(link("image", path), text("what")), 422)
        until(lambda: served.server.worker.queue)
        path.unlink()
        path.symlink_to("/etc/passwd")
        gate.set()
        assert first.result().choices
        assert "changed while it was asked about" in second.result()["message"]


def test_a_file_that_changes_is_another_one(served: Served) -> None:
    path = served.root / "two.png"
    messages = user(link("image", path), text("What is the colour?"))
    for colour in ("red", "blue"):
        Image.new("RGB", (48, 48), colour).save(path)
        assert served.ask(messages, max_tokens=1).usage.prompt_tokens_details.cached_tokens == 0
    assert served.ask(messages, max_tokens=1).usage.prompt_tokens_details.cached_tokens > 0


def png(width: int, height: int) -> bytes:
    """A picture whose head claims another size."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    raw = bytearray(out.getvalue())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(raw)


def url_of(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(raw).decode()


@pytest.mark.parametrize("raw", [b"", b"hello", png(60000, 60000), png(0, 8), png(2**31, 1), PICTURE.read_bytes()[:500],
                                 CLIP.read_bytes(), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"])  # fmt: skip
def test_pictures_that_are_none(served: Served, raw: bytes) -> None:
    said = served.refused(user(link("image", url_of(raw)), text("what")), 422)
    assert "messages[0].content[0].image_url" in said["message"]
    assert not served.spool


@pytest.mark.parametrize("raw", [b"", b"hello", CLIP.read_bytes()[:5000], PICTURE.read_bytes()[:100],
                                 b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"])  # fmt: skip
def test_videos_that_are_none(served: Served, raw: bytes) -> None:
    said = served.refused(user(link("video", url_of(raw, "video/mp4")), text("what")), 422)
    assert "messages[0].content[0].video_url" in said["message"]
    assert not served.spool


def test_heads_come_before_pixels(
    served: Served, limits: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipvl.engine.inputs.open_image", never)
    monkeypatch.setattr("zipvl.engine.inputs.Reading", never)
    store = served.server.worker.store
    monkeypatch.setattr(store, "sizes", type(store.sizes)())
    clip, picture = (
        link("video", served.root / "clip.mp4"),
        link("image", served.root / "picture.png"),
    )
    limits(pixels=1000)
    assert "this server takes 1000" in served.refused(user(picture, text("what")), 422)["message"]
    assert "this server takes 1000" in served.refused(user(clip, text("what")), 422)["message"]
    limits(pixels=2**25, frames=63)
    many = {"media_io_kwargs": {"video": {"num_frames": 32}}}
    said = served.refused(user(clip, clip, text("what")), extra_body=many)
    assert "64 video frames" in said["message"]
    said = served.refused(
        user(clip, text("what")), extra_body={"media_io_kwargs": {"video": {"fps": 16}}}
    )
    assert said["param"] == "media_io_kwargs.video.fps"
    limits(frames=128, visual=100)
    assert "129 visual tokens" in served.refused(user(clip, text("what")))["message"]
    assert "102 visual tokens" in served.refused(user(*[picture] * 6, text("what")))["message"]
    limits(visual=1000, context=150)
    said = served.refused(user(clip, text("what")), max_tokens=60)
    assert said["code"] == "context_length_exceeded"
    said = served.refused(user(text("what " * 200)), max_tokens=1)
    assert said["code"] == "context_length_exceeded"


def test_data_has_a_ceiling_before_it_is_decoded(
    served: Served, limits: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media.base64, "b64decode", never)
    limits(media=1000)
    parts = [link("image", "data:image/png;base64," + "A" * 500)] * 3
    assert (
        served.refused(user(*parts, text("what")), 413)["param"]
        == "messages[0].content[0].image_url"
    )


def test_the_spool_has_a_ceiling(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "SPOOL", 1000)
    served.refused(user(link("image", data(PICTURE, "image/png")), text("what")), 503)
    assert served.server.worker.store.spooled == 0


def test_media_errors_behind_the_queue_name_no_file_of_the_server(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: str) -> None:
        raise MediaError(f"{source} cannot be read")

    monkeypatch.setattr("zipvl.engine.inputs.open_image", broken)
    said = served.refused(
        user(link("image", url_of(png(9, 9)[:-30] + os.urandom(30))), text("what")), 422
    )
    assert said["message"].startswith("messages[0].content[0].image_url cannot")


# --- who may ask, and how much ----------------------------------------------------------------


def until(what: Callable[[], Any], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def status(got: bytes) -> int:
    return int(got.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("header", "code"),
    [("Host: evil.example", 403), ("Host: 127.0.0.1.evil.example", 403), ("Host: localhost@evil", 403), ("Host: ", 403),
     ("Host: 127.0.0.1:1", 200), ("Host: LOCALHOST", 200), ("Host: [::1]:8000", 200),
     ("Host: localhost\r\nOrigin: https://evil.example", 403), ("Host: localhost\r\nOrigin: null", 403),
     ("Host: localhost\r\nOrigin: http://localhost", 200), ("X: y", 400), ("Host: localhost\r\nHost: evil", 400)],
)  # fmt: skip
def test_hosts_and_origins(served: Served, header: str, code: int) -> None:
    """DNS rebinding, and pages of other places that a browser on this machine shows."""
    assert (
        status(served.raw(f"GET /v1/models HTTP/1.1\r\n{header}\r\nConnection: close\r\n\r\n"))
        == code
    )


def test_a_page_cannot_post_without_asking_first(served: Served) -> None:
    content = json.dumps(body()).encode()
    assert status(served.raw(served.post(content, "Content-Type: text/plain"), content)) == 415
    assert (
        status(
            served.raw(
                "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
        )
        == 405
    )


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = routes.Guard(app=routes.Starlette(), hosts=None, token="s3cret")

    def check(authorization: str | None, path: str = "/v1/models") -> int:
        headers = {"authorization": authorization} if authorization is not None else {}
        with suppress(Refusal):
            guard.check(routes.Headers(headers), path)
            return 200
        with pytest.raises(Refusal) as e:
            guard.check(routes.Headers(headers), path)
        assert "s3cret" not in json.dumps(e.value.error())
        return e.value.status

    assert check("Bearer s3cret") == check("bearer s3cret") == check(None, "/health") == 200
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer s3cre",
        "Bearer s3cret2",
        "Basic s3cret",
        "s3cret",
        "Bearer é",
    ):
        assert check(wrong) == 401
    assert check(None, "/v1/chat/completions") == check(None, "/nowhere") == 401


@pytest.mark.parametrize(("path", "code"), [("/", 404), ("/health/", 404), ("/v1/chat/completions", 405), ("/v1//models", 404), ("/v1/models/%00%ff", 404), ("/docs", 404)])  # fmt: skip
def test_other_paths_are_openai_errors(served: Served, path: str, code: int) -> None:
    got = served.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status(got) == code
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_bodies_have_a_ceiling_while_they_come(served: Served, limits: Callable) -> None:
    limits(body=1000)
    assert status(served.raw(served.post(b"", "Content-Length: 1001"))) == 413
    assert status(served.raw(served.post(b"", "Content-Length: 99999999999999999999"))) == 413
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    assert status(served.raw(served.post(b"", "Transfer-Encoding: chunked"), chunk + chunk)) == 413
    content = json.dumps(body(max_tokens=1)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % c for c in content) + b"0\r\n\r\n"
    assert status(served.raw(served.post(b"", "Transfer-Encoding: chunked"), chunks)) == 200


def test_large_bodies_come_a_few_at_a_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever waits is not kept from asking something small."""
    monkeypatch.setattr(routes, "SMALL", 1000)
    big = json.dumps(body(user(text(" " * 3000 + "hello")), max_tokens=1)).encode()
    stuck = [served.connect() for _ in range(routes.LARGE)]
    for s in stuck:
        s.sendall(served.post(big).encode() + big[:2000])
    until(lambda: served.server.service.large.locked())
    late = served.connect()
    late.sendall(served.post(big).encode() + big)
    assert served.ask(user(text("hello")), max_tokens=1)
    stuck[0].close()
    assert status(served.rest(late)) == 200
    for s in (late, *stuck):
        s.close()
    until(lambda: not served.server.service.large.locked())


def test_slow_bodies_and_heads_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(routes, "HEAD_SECONDS", 0.3)
    assert status(served.raw(served.post(b"", "Content-Length: 10"), b"{")) == 408
    with served.connect() as s:
        assert s.recv(10) == b""  # says nothing at all

    def drip(s: socket.socket, piece: bytes) -> None:
        for _ in range(150):
            s.sendall(piece)
            time.sleep(0.01)

    with served.connect() as s:  # a letter now and then
        s.sendall(b"GET / HTTP/1.1\r\nX: ")
        with pytest.raises(OSError):
            drip(s, b"a")
    with served.connect() as s:  # a body that goes on behind its answer
        s.sendall(served.post(b"", "Content-Length: 99999999999", close=False).encode())
        with pytest.raises(OSError):
            drip(s, b" " * 1000)


def test_heads_have_a_ceiling(served: Served) -> None:
    for head in ("X: " + "a" * 2**21, "".join(f"X{n}: y\r\n" for n in range(2**17))):
        with suppress(OSError):  # an answer, or a connection that is cut before it is read
            assert (
                status(served.raw(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n"))
                == 400
            )
    assert status(served.raw("NONSENSE\r\n\r\n")) == 400
    assert served.client.models.list()


def test_a_request_that_turns_into_nonsense(served: Served, capfd: pytest.CaptureFixture) -> None:
    """While it is read, and while it is answered: no word on stderr, nobody works for it."""
    content = json.dumps(body(stream=True, **LONG)).encode()
    chunk = b"%x\r\n%s\r\n" % (len(content), content)
    for good in (b"5\r\n     \r\n", chunk):
        with served.connect() as s:
            s.sendall(served.post(b"", "Transfer-Encoding: chunked").encode() + good)
            time.sleep(0.05)
            with suppress(OSError):
                s.sendall(b"nonsense\r\n")
                served.rest(s)
    content = json.dumps(body(stream=True, **LONG)).encode()
    with served.connect() as s:
        s.sendall(served.post(content).encode() + content)
        assert b"200" in s.recv(1000)
        s.sendall(b"nonsense\r\n\r\n" * 1000)
    assert served.idle()
    assert not served.spool
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_connections_have_a_ceiling(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    there = served.server.server_state.connections
    most = len(there) + 10
    monkeypatch.setattr(routes, "CONNECTIONS", most)
    some = [served.connect() for _ in range(20)]
    time.sleep(0.1)
    assert len(there) <= most
    for s in some:
        s.close()
    until(lambda: len(there) <= most - 10)
    assert served.client.models.list()


def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "WRITE_SECONDS", 0.3)

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})

    config = uvicorn.Config(
        endless, http=routes.Protocol, lifespan="off", log_config=None, log_level="critical"
    )
    server, here = uvicorn.Server(config), app.bound("127.0.0.1", 0)
    here.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [here]})
    thread.start()
    with socket.create_connection(here.getsockname()) as s:
        s.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: server.server_state.connections)
        until(lambda: not server.server_state.connections)
    server.should_exit = True
    thread.join()


def test_ten_thousand_parts(served: Served) -> None:
    for part in (text("a"), link("image", served.root / "picture.png")):
        content = json.dumps(body(user(*[part] * 10_000))).encode()
        got = served.raw(served.post(content), content)
        assert status(got) == 400
        assert b"10001 messages and parts" in got


# --- queue, clients that leave, the end -------------------------------------------------------


LONG: dict[str, Any] = {
    "temperature": 100,
    "seed": 2,
    "max_tokens": 500,
}  # of the 558 it would make


def test_the_queue_has_an_end(
    served: Served, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = served.server.worker
    monkeypatch.setattr(worker, "most", 2)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(served.ask, user(text("hello")), max_tokens=1)
        until(lambda: worker.job)
        others = [pool.submit(served.ask, user(text("hello")), max_tokens=1) for _ in range(2)]
        until(lambda: worker.job and len(worker.queue) == 2)  # all three are in
        assert served.refused(user(text("hello")), 503)["code"] == "queue_full"
        content = json.dumps(body()).encode()  # not even read
        got = served.raw(served.post(content, "Content-Length: 100000000"))
        assert status(got) == 503
        assert b"retry-after" in got.lower()
        gate.set()
        assert all(f.result().choices for f in (first, *others))


def test_clients_that_leave(served: Served, gate: threading.Event) -> None:
    """While the model looks at the prompt, and in the queue: nobody waits for them, or their files."""
    worker = served.server.worker
    new = url_of(png(8, 8) + os.urandom(8))  # whose session nobody has
    content = json.dumps(body(user(link("image", new), text("what")))).encode()
    there = []
    for n in range(3):
        there.append(served.connect())
        there[-1].sendall(served.post(content).encode() + content)
        waiting = lambda n=n: worker.job and len(worker.queue) == n and len(served.spool) == n + 1
        until(waiting)
    there[1].close()
    until(lambda: len(worker.queue) == 1)
    assert len(served.spool) == 2
    there[2].shutdown(socket.SHUT_WR)  # half closed is closed
    until(lambda: len(worker.queue) == 0)
    there[0].close()
    until(lambda: worker.idle)
    assert not served.spool
    there[2].close()


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_a_long_answer(served: Served, stream: bool) -> None:
    content = json.dumps(body(**LONG, stream=stream)).encode()
    with served.connect() as s:
        s.sendall(served.post(content).encode() + content)
        until(lambda: served.server.worker.job)
        if stream:
            assert b"200" in s.recv(1000)
        time.sleep(0.1)
        assert served.server.worker.job
    began = time.monotonic()
    assert served.idle()
    assert time.monotonic() - began < 0.5
    messages = user(link("video", served.root / "clip.mp4"), text(ASKED))
    assert (
        served.ask(messages).choices[0].message.content
        == "red star, blue 7, yellow heart, green ring"
    )


def test_a_session_is_usable_after_its_client_left(served: Served) -> None:
    messages = user(link("video", served.root / "clip.mp4", nframe=31), text(ASKED))
    with served.ask(messages, stream=True) as stream:
        next(iter(stream))
    assert served.idle()
    again, new = (
        served.ask(messages)
        if n == 0
        else served.ask(user(link("video", data(CLIP, "video/mp4"), nframe=31), text(ASKED)))
        for n in range(2)
    )
    assert again.choices[0].message.content == new.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_sessions_leave_where_they_hold_too_much(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = served.server.worker

    def ask(frames: int) -> int:
        more = {"media_io_kwargs": {"video": {"num_frames": frames}}}
        got = served.ask(
            user(link("video", served.root / "clip.mp4"), text(ASKED)),
            max_tokens=1,
            extra_body=more,
        )
        served.idle()
        return got.usage.prompt_tokens_details.cached_tokens

    ask(5)
    monkeypatch.setattr(
        worker, "room", worker.sessions[next(reversed(worker.sessions))].nbytes * 5 // 2
    )
    assert [ask(n) > 0 for n in (5, 6, 5, 7, 5, 6)] == [True, False, True, False, True, False]
    assert sum(s.nbytes for s in worker.sessions.values()) <= worker.room
    monkeypatch.setattr(worker, "room", 0)
    assert [ask(5) > 0, ask(5) > 0] == [True, False]
    assert not worker.sessions


def test_what_is_let_go_is_freed_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector: a GPU's memory knows nothing of it."""
    worker, made = served.server.worker, []
    monkeypatch.setattr(worker, "room", 0)
    session = served.engine.session

    def noted(*args: Any, **options: Any) -> Any:
        new = session(*args, **options)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(served.engine, "session", noted)
    gc.disable()
    try:
        for stream in (False, True):
            got: Any = served.ask(
                user(link("video", served.root / "clip.mp4", nframe=3), text(ASKED)), stream=stream
            )
            if stream:
                next(iter(got))
                got.close()
        served.ask(user(text("hello")), max_tokens=1)
        monkeypatch.setattr(served.engine, "prefill", never)
        served.refused(user(text("hello")), 500)
        monkeypatch.undo()
        assert served.ask(user(text("hello")), max_tokens=1)
        until(lambda: len(made) == 4 and not any(ref() for ref in made))
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("too much"), 400, "too much"),
        (OutOfMemory("out of memory while prefilling"), 503, "out of memory"),
        (zipvl.ModelError("{root}/model is damaged"), 500, "the server's log"),
        (RuntimeError("{root}: oh"), 500, "the server's log"),
        (MemoryError(), 503, "out of memory"),
    ],
)
def test_failures_of_the_engine(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, error: Exception, code: int, says: str
) -> None:  # fmt: skip
    def fail(*a: object, **k: object) -> None:
        raise error

    monkeypatch.setattr(served.engine, "prefill", fail)
    assert says in served.refused(user(text("hello")), code)["message"]
    with pytest.raises(openai.APIError):
        list(served.ask(user(text("hello")), stream=True))
    monkeypatch.undo()
    assert served.ask(user(text("hello"))).choices


def test_a_failure_in_the_middle_of_a_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(10**6))

    def fail(self: Any, *args: Any) -> Any:
        if next(steps) > 3:
            raise OutOfMemory("out of memory while decoding")
        return call(self, *args)

    step = served.engine.step
    call = step.__call__
    monkeypatch.setattr(step, "__call__", fail)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(served.ask(user(text("hello")), stream=True, **LONG))


def test_draining(served: Served, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal does, but for the end of the process: the queue goes on, newcomers are told."""
    server, worker = served.server, served.server.worker
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(served.ask, user(text("hello")), max_tokens=2) for _ in range(3)]
        until(lambda: worker.job and len(worker.queue) == 2)  # all three are in
        worker.drain()
        got = served.raw("GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert status(got) == 503
        assert b'"draining"' in got
        assert "shutting down" in served.refused(user(text("hello")), 503)["message"]
        gate.set()
        assert all(f.result().choices for f in asked)
        worker.draining = False
        gate.clear()
        asked = [pool.submit(served.refused, user(text("hello")), 503) for _ in range(3)]
        until(lambda: worker.job and len(worker.queue) == 2)  # all three are in
        worker.drain((503, "the time is over"))
        assert {f.result()["message"] for f in asked} == {"the time is over"}
    worker.draining = False
    assert not server.should_exit


def test_many_clients_at_once(served: Served) -> None:
    """Mixed media and streams; every answer is the lone one. (Two minutes of it: the slow one.)"""
    crowd(served.port, served.root, clients=12, seconds=1)


# --- crowds -----------------------------------------------------------------------------------


def questions(root: Path) -> list[list[Message]]:
    clip, picture = root / "clip.mp4", root / "picture.png"
    return [
        user(text("hello")),
        user(link("video", clip), text(ASKED)),
        user(link("video", clip, nframe=8), text(ASKED)),
        user(link("video", data(CLIP, "video/mp4")), text("What comes first?")),
        user(link("image", picture), text("What is the colour?")),
        user(link("image", data(PICTURE, "image/png")), link("image", picture), text("differ?")),
    ]


def crowd(port: int, root: Path, clients: int, seconds: float) -> int:
    """Asks by many clients at once; how many answers came, each equal to the lone one."""
    url = f"http://127.0.0.1:{port}/v1"
    asked = questions(root)
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        lone = [
            client.chat.completions.create(model=MODEL, messages=m, max_tokens=16)
            .choices[0]
            .message.content
            for m in asked
        ]
    end, count = time.monotonic() + seconds, 0

    def one(n: int) -> int:
        dice, done = random.Random(n), 0
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            while time.monotonic() < end:
                i, stream = dice.randrange(len(asked)), dice.random() < 0.5
                got: Any = client.chat.completions.create(
                    model=MODEL, messages=asked[i], max_tokens=16, stream=stream
                )
                if stream and dice.random() < 0.2:
                    got.close()  # and leaves
                    continue
                said = (
                    "".join(c.choices[0].delta.content or "" for c in got)
                    if stream
                    else got.choices[0].message.content
                )
                assert said == lone[i]
                done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        count = sum(pool.map(one, range(clients)))
    assert count >= clients
    return count


@contextmanager
def process(*argv: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server of its own, and its port."""
    command = [sys.executable, "-m", "zipvl", "serve", "--port", "0", "--device", "cpu", *argv]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            yield server, int(re.findall(r":(\d+)/v1$", line.strip())[0])
        finally:
            server.kill()


def resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@pytest.mark.slow
def test_fifty_clients_for_two_minutes(served: Served, capsys: pytest.CaptureFixture) -> None:
    """Memory is flat, every answer is the lone one, nothing is left behind."""
    with process("--media-root", str(served.root)) as (server, port):
        crowd(port, served.root, clients=50, seconds=20)
        memory, fds = [resident(server.pid)], len(os.listdir(f"/proc/{server.pid}/fd"))
        count = 0
        for _ in range(4):
            count += crowd(port, served.root, clients=50, seconds=30)
            memory.append(resident(server.pid))
        with capsys.disabled():
            print(f"\n{count} answers, MiB {[round(m) for m in memory]}")
        assert max(memory) - memory[0] < 64
        time.sleep(6)
        assert len(os.listdir(f"/proc/{server.pid}/fd")) <= fds + 2
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_sigterm_in_the_middle(served: Served, stream: bool) -> None:
    """Requests that are there are answered, newcomers are not, the process exits with 0."""
    with process("--media-root", str(served.root)) as (server, port):
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )

        def ask() -> str:
            got: Any = client.chat.completions.create(
                model=MODEL, messages=user(text("hello")), stream=stream, **LONG
            )
            return (
                "".join(c.choices[0].delta.content or "" for c in got)
                if stream
                else got.choices[0].message.content
            )

        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            time.sleep(1)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(openai.APIError):
                ask()
            assert len({f.result() for f in asked}) == 1
        assert server.wait(20) == 0


@pytest.mark.slow
def test_the_end_has_a_bound() -> None:
    with process(
        "--drain-seconds", "0.5", "--max-new-tokens", "100000", "--max-context", "1000000"
    ) as (server, port):
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )
        more = LONG | {"max_tokens": 100000, "temperature": 100}
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(
                    client.chat.completions.create,
                    model=MODEL,
                    messages=user(text("hello")),
                    **more,
                )
                for _ in range(40)
            ]
            time.sleep(1)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            failures = [f.exception() for f in asked]
        assert any(isinstance(e, openai.APIStatusError) and e.status_code == 503 for e in failures)
        assert server.wait(10) == 0
        assert time.monotonic() - began < 5
