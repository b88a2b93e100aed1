"""The command `zipvl serve`: options, the model, the socket, and the end.

Nothing is listened to before the model answers. The first SIGTERM or Ctrl-C lets requests that are
there finish, for so many seconds; the second ends them. Exit codes: those of cli.py.
"""

import argparse
import importlib
import ipaddress
import math
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import OPTIONS, Help, Options, Parser, add_options
from ..errors import UsageError, ZipvlError
from ..report import fault, say
from .request import Limits

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..policy import Policy
    from .routes import Server

usual = Limits()
GIB = 2**30
# "first" is not among them: the first question would have a say in the answers to all others.
REUSE = ("general", "media", "none")
SHUT_SECONDS = 5.0  # for the engine to leave the layer it is in
# Every option, as in cli.py.
ROWS: Options = {
    "what answers": [
        ("-m --model MODEL", str, "checkpoint folder or hub id (default: bundled demo)"),
        ("--name NAME", str, "what requests call it (default: the model's last name)"),
        ("--method NAME", "zipvl", "which tokens to keep, as generate.py takes it (zipvl)"),
        ("--reuse KIND", str, "of media: general (default), media or none, docs/serve.md"),
        ("--template NAME", str, "prompt template: a built-in name or a .jinja file"),
        ("--frames N", int, "of a video, where a request does not say (mostly 32)"),
    ],
    "who may ask": [
        ("--host HOST", "127.0.0.1", "address to listen on (default 127.0.0.1)"),
        ("--port PORT", 8000, "0: any that is free (default 8000)"),
        ("--token TEXT", str, "what requests must bear; or ZIPVL_TOKEN, or a file"),
        ("--token-file FILE", str, "the token is its first line"),
        ("--anyone", False, "no token although other machines may ask"),
        ("--media-root DIR", str, "file:// may name files below it (default: none)"),
    ],
    "ceilings of a request": [
        ("--max-body BYTES", usual.body, f"of a body ({usual.body})"),
        ("--max-parts N", usual.parts, f"messages and their parts ({usual.parts})"),
        ("--max-media BYTES", usual.media, f"in data: URLs, decoded ({usual.media})"),
        ("--max-pixels N", usual.pixels, f"of a picture or a frame ({usual.pixels})"),
        ("--max-frames N", usual.frames, f"of all videos ({usual.frames})"),
        ("--max-visual-tokens N", usual.visual, f"of all media ({usual.visual})"),
        ("--max-context N", int, "tokens of prompt and answer (the model's own)"),
        ("--max-new-tokens N", usual.answer, f"of an answer ({usual.answer})"),
    ],
    "ceilings of the server": [
        ("--queue N", 64, "requests that may wait; one more gets a 503 (default 64)"),
        ("--cache-bytes BYTES", 2 * GIB, f"that sessions hold between requests ({2 * GIB})"),
        ("--drain-seconds S", 60.0, "for what is under way at the end (default 60)"),
    ],
    "the machine": [*OPTIONS["the machine"], ("--verbose", False, "a traceback with every error")],
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zipvl serve",
        usage="%(prog)s [-m MODEL] [--port PORT] [--media-root DIR] [options]",
        description="Answer requests of OpenAI's chat API about pictures and videos: "
        "docs/serve.md has the requests, SECURITY.md the promises.",
        allow_abbrev=False,
        formatter_class=Help,
    )
    add_options(parser, ROWS)
    return parser


def check(a: argparse.Namespace) -> None:
    """Faults of the command line that need no torch to be seen; puts the token into `a.token`."""
    for name, value in vars(a).items():
        least = 0 if name in ("port", "queue", "cache_bytes", "drain_seconds") else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is {value}: give {least} or more")
    if a.port > 65535:
        raise UsageError(f"--port is {a.port}: give at most 65535")
    if a.frames and a.frames > a.max_frames:
        raise UsageError(f"--frames is {a.frames}, more than the {a.max_frames} of --max-frames")
    if a.reuse not in (None, *REUSE):
        raise UsageError(f"--reuse is {a.reuse!r}: give one of {', '.join(REUSE)}")
    a.token = read_token(a)
    if a.token is None and not a.anyone and not is_loopback(a.host):
        raise UsageError(
            f"--host {a.host} lets other machines ask and there is no token: give --token-file, or "
            "--anyone if that is meant"
        )


def read_token(a: argparse.Namespace) -> str | None:
    """The token of the command line, a file or the environment. Raises UsageError."""
    token = a.token
    if a.token_file is not None:
        if token is not None:
            raise UsageError("--token and --token-file are both given: leave one out")
        try:
            token = Path(a.token_file).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or "it is no text"
            raise UsageError(f"--token-file {a.token_file} cannot be read: {reason}") from None
    elif token is None:
        token = os.environ.get("ZIPVL_TOKEN")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError("the token is empty or has characters other than printable ASCII")
    return token


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet. Raises UsageError."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as e:
        raise UsageError(f"cannot listen on {host}, port {port}: {e}") from None
    return found


def limits(a: argparse.Namespace, engine: "Engine") -> Limits:
    """Ceilings of a request; prompts end where the model's window does."""
    text, own = engine.config.text, engine.config.max_length
    context = a.max_context or own or usual.context
    return Limits(
        a.max_body, a.max_parts, a.max_media, a.max_pixels, a.max_frames, a.max_visual_tokens,
        min(context, text.sliding_window or context), a.max_new_tokens,
    )  # fmt: skip


def pick_reuse(engine: "Engine", policy: "Policy", asked: str | None) -> str:
    """What sessions keep: as asked, or the first that the method can do. Raises UsageError."""
    for reuse in () if asked else REUSE[:-1]:
        with suppress(UsageError):
            engine.session(method=policy, reuse=reuse)
            return reuse
    engine.session(method=policy, reuse=asked or REUSE[-1])
    return asked or REUSE[-1]


def build(a: argparse.Namespace, engine: "Engine") -> "Server":
    """A server that has an engine's thread and listens to nothing yet. Raises UsageError."""
    from ..policies import load_policy
    from .media import Store
    from .routes import Server, Service
    from .worker import Worker

    policy, most = load_policy(a.method), limits(a, engine)
    reuse = pick_reuse(engine, policy, a.reuse)
    frames = a.frames or min(engine.model.vision.frames, most.frames)
    store = Store(a.media_root, most, engine.model.vision, frames)
    worker = Worker(engine, store, policy, reuse, a.queue, a.cache_bytes)
    name = a.name or Path(a.model or "zipvl-demo").resolve().name
    hosts = {"localhost", "127.0.0.1", "[::1]", a.host, f"[{a.host}]"}
    names = hosts if is_loopback(a.host) else None
    worker.start()
    return Server(Service(worker, name), names, a.token, a.drain_seconds)


def run(a: argparse.Namespace) -> int:
    """Everything after the checks. Returns the exit code."""
    from ..engine.load import load

    here = bound(a.host, a.port)
    engine = load(a.model, a.device, a.dtype, a.attn, a.template, False, a.weights, a.kernels)
    server = build(a, engine)
    host, port = here.getsockname()[:2]
    server.greeting = f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    server.run(sockets=[here])
    server.worker.close(SHUT_SECONDS)
    server.worker.store.close()
    return server.code


def main(argv: list[str] | None = None) -> int:
    """The program with arguments `argv` (None: of this process). Returns the exit code."""
    a = argparse.Namespace(verbose=False)
    try:
        build_parser().parse_args(argv, a)
        check(a)
        try:
            importlib.import_module("zipvl.serve.routes")
        except ImportError as e:
            raise ZipvlError(f"{e}: pip install 'zipvl[serve]'") from None
        return run(a)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if a.verbose:
            raise
        code, sentence = fault(e)
        say("error: " + sentence)
        return code
