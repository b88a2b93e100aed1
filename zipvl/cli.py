"""The command: `zipvl`, `python -m zipvl` and generate.py are this program.

Answers and JSON go to stdout and nothing else does; progress, statistics and errors go to stderr.
Exit codes: 0, 1 input or model error, 2 usage, 3 out of memory, 130 Ctrl-C.

Nothing here imports torch before the command line is known to make sense, so that --help and usage
errors are quick: types are imported for checkers only, and `zipvl` loads its names on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zipvl

from .errors import ZipvlError
from .report import as_json, headline, summary

if TYPE_CHECKING:
    from .engine.engine import Engine, Result
    from .engine.inputs import ImageSource, Inputs, Message, VideoSource
    from .policy import Policy

HELP = (
    "/image FILE and /video FILE add media; /clear forgets the talk; "
    "/stats shows the last answer's statistics; /quit leaves"
)

# Every option: its names and what its value is called; its default, or the type of a value without
# one (False: a switch without a value, []: may be repeated); help.
OPTIONS: dict[str, list[tuple[str, Any, str]]] = {
    "what to ask": [
        ("-m --model MODEL", str, "checkpoint folder or hub id (default: bundled demo)"),
        ("-v --video FILE", [], "a video; may be repeated"),
        ("-i --image FILE", [], "a picture; may be repeated"),
        ("-p --prompt TEXT", str, "the question; - reads stdin; none on a terminal: chat"),
        ("--system TEXT", str, "system prompt"),
        ("--template NAME", str, "prompt template: a built-in name or a .jinja file"),
    ],
    "frames of a video": [
        ("-n --frames FRAMES", 32, "how many, uniformly spread (default 32)"),
        ("--fps FPS", float, "frames a second instead; --frames is then the most"),
        ("--start S", float, "from this second"),
        ("--end S", float, "up to this second"),
        ("--reader NAME", "pyav", "how videos are decoded: pyav (default) or decord"),
    ],
    "the answer": [
        ("--max-new-tokens N", 256, "at most so many (default 256)"),
        ("--temperature T", 0.0, "0: the likeliest token (default)"),
        ("--top-p P", 1.0, "likeliest tokens of total mass P (default 1)"),
        ("--top-k K", 0, "the K likeliest tokens; 0: all (default)"),
        ("--seed SEED", 0, "of the sampling (default 0)"),
    ],
    "which tokens to keep": [
        ("--method NAME", str, "zipvl (default), dense, ...; my_file.py:Class; NAME:option=value"),
        ("--dense", False, "same as --method dense"),
        ("--tau TAU", float, "share of attention mass a layer keeps (zipvl; default 0.975)"),
        ("--keep-ratio R", float, "share of tokens kept (methods with a ratio)"),
        ("--probe R+R", str, "probe rows, recent+random (zipvl; default 64+64)"),
        ("--kv-bits B", str, "cache bits: 4; or 4,2 to keep all, the others at 2 (zipvl)"),
    ],
    "the machine": [
        ("--device DEVICE", "auto", "auto, cpu, cuda, cuda:1, mps (default auto)"),
        (
            "--dtype DTYPE",
            "auto",
            "bfloat16, float32, float16 (default: bfloat16 on CUDA and AMX CPUs, else float32)",
        ),
        ("--attn ATTN", "auto", "auto, sdpa, torch-flash, flash-attn (default auto)"),
        ("--weights KIND", "full", "int8, int4: decode faster on a CPU"),
        ("--compile", False, "torch.compile for prefill; on CUDA graph decoding"),
    ],
    "what to print": [
        ("--stats", False, "seconds by stage and kept tokens by layer, on stderr"),
        ("--json", False, "one JSON object on stdout instead of text"),
        ("-q --quiet", False, "nothing on stderr but errors"),
        ("--verbose", False, "a traceback with every error"),
    ],
}


def build_parser() -> argparse.ArgumentParser:
    called = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog="python -m zipvl" if called == "__main__.py" else called,
        usage="%(prog)s [-m MODEL] [-v FILE] [-i FILE] [-p TEXT] [options]",
        description="Ask a LLaVA-family model about pictures and videos: "
        '%(prog)s -v clip.mp4 -p "What happens?"',
        allow_abbrev=False,
    )
    for title, rows in OPTIONS.items():
        add = parser.add_argument_group(title).add_argument
        for names, value, text in rows:
            *flags, last = names.split()
            if value is False:
                add(*flags, last, action="store_true", help=text)
            elif value == []:
                add(*flags, metavar=last, action="append", default=value, help=text)
            elif isinstance(value, type):
                add(*flags, metavar=last, type=value, help=text)
            else:
                add(*flags, metavar=last, type=type(value), default=value, help=text)
    return parser


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Faults of the command line that need no model to be seen."""
    choices = (args.method, args.tau, args.keep_ratio, args.probe, args.kv_bits)
    if args.dense and any(choice is not None for choice in choices):
        parser.error(
            "--dense keeps every token in full precision: leave out --method, --tau, --keep-ratio, "
            "--probe and --kv-bits"
        )
    interactive = sys.stdin and sys.stdin.isatty()
    if (args.prompt is None and not interactive) or (args.prompt == "-" and not sys.stdin):
        parser.error("no prompt: give -p TEXT, or -p - to read it from standard input")
    if args.prompt is None and args.json:
        parser.error("--json prints one answer and a chat has many: give -p TEXT")
    if args.kv_bits is not None and args.kv_bits.isdecimal():
        args.kv_bits = int(args.kv_bits)
    if args.probe is not None:
        recent, plus, random = args.probe.partition("+")
        if not (plus and recent.isdecimal() and random.isdecimal()):
            parser.error(f"--probe {args.probe}: write recent+random, for example 64+64")
        args.probe = {"recent": int(recent), "random": int(random)}


def run(args: argparse.Namespace) -> int:
    """Everything after parsing. Returns the exit code."""
    from .vision.image import open_image
    from .vision.video import local_file

    a, probe = args, args.probe or {}
    for path in a.video:
        local_file(path)  # a mistyped name is told before a large model is loaded
    for path in a.image:
        open_image(path)
    method = "dense" if a.dense else a.method or "zipvl"
    policy = zipvl.load_policy(method, tau=a.tau, ratio=a.keep_ratio, kv_bits=a.kv_bits, **probe)
    show = sys.stderr.isatty() and not a.quiet
    engine = zipvl.load(a.model, a.device, a.dtype, a.attn, a.template, show, a.weights, a.compile)
    if a.model is None and not a.video and not a.image:
        a.video = [str(zipvl.demo_clip())]
    session = Session(engine, policy, a)
    if a.prompt is None:
        return session.chat()
    return session.ask(sys.stdin.read().strip() if a.prompt == "-" else a.prompt)


def main(argv: list[str] | None = None) -> int:
    """The program with arguments `argv` (None: of this process). Returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(args, parser)
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our stdout has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if args.verbose:
            raise
        if isinstance(e, ZipvlError):
            say(f"error: {e}")
            return e.code
        say(f"error: {type(e).__name__}: {e} (--verbose shows where)")
        return 1


class Session:
    """One engine, its media and options, asked once or in a chat."""

    def __init__(self, engine: Engine, policy: Policy, args: argparse.Namespace) -> None:
        self.engine, self.policy, self.args = engine, policy, args
        self.images: list[ImageSource] = args.image  # files; once they are read, what they hold
        self.videos: list[VideoSource] = args.video
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        if sys.stdin:  # bytes that are no UTF-8 come as they do on the command line
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]

    def prepare(
        self,
        prompt: str | list[Message],
        images: list[ImageSource] | None = None,
        videos: list[VideoSource] | None = None,
    ) -> Inputs:
        """`prompt` with its media (None: as before), which later prompts take as they were read;
        says what will run."""
        a = self.args
        images, videos = images or self.images, videos or self.videos
        inputs = self.engine.prepare(
            prompt, images, videos, a.frames, a.fps, a.start, a.end, a.system, a.reader
        )
        self.images = [m for m in inputs.media if m.kind == "image"]
        self.videos = [m for m in inputs.media if m.kind == "video"]
        if not a.quiet:
            say(headline(self.engine, self.policy, inputs))
            for warning in inputs.warnings:
                say(f"warning: {warning}")
        return inputs

    def add(self, command: str, path: str) -> None:
        """One more medium, read at once; nothing changes where that fails."""
        if command == "/video":
            self.prepare("", videos=[*self.videos, path])
        else:  # pictures are read again, as some models cut a lone one differently
            files = [*self.args.image, path]
            self.prepare("", images=files)
            self.args.image = files

    def answer(self, inputs: Inputs) -> tuple[str, list[int], Result | None]:
        """Streams one answer; (text, tokens, None) when Ctrl-C ended it."""
        a, text, tokens, result = self.args, "", [], None
        pieces = self.engine.stream(
            inputs, self.policy, a.max_new_tokens, a.temperature, a.top_p, a.top_k, a.seed
        )
        with suppress(KeyboardInterrupt):
            for piece in pieces:
                text += piece.text
                tokens += [] if piece.token is None else [piece.token]
                result = piece.result
                if not a.json:
                    print(piece.text, end="", flush=True)
        if not a.json:
            print(flush=True)
        return text, tokens, result

    def ask(self, prompt: str) -> int:
        """One question; returns the exit code."""
        a, inputs = self.args, self.prepare(prompt)
        text, tokens, result = self.answer(inputs)
        if a.json:
            run = as_json(self.engine, inputs, text, tokens, result, a.model, a.seed)
            print(json.dumps(run), flush=True)
        if result and a.stats:
            say(summary(result.stats))
        return 0 if result else 130

    def chat(self) -> int:
        """Questions about the same media until /quit or end of input."""
        if self.images or self.videos:
            self.prepare("")
        if not self.args.quiet:
            say(HELP)
        talk: list[Message] = []
        last: Result | None = None
        while True:
            try:
                line = read_line()
            except (EOFError, KeyboardInterrupt) as e:
                say()
                return 130 if isinstance(e, KeyboardInterrupt) else 0
            command, _, rest = line.partition(" ")
            try:
                if command == "/quit":
                    return 0
                if command == "/clear":
                    talk = []
                elif command == "/stats":
                    say(summary(last.stats) if last else "nothing asked yet")
                elif command in ("/image", "/video") and rest:
                    self.add(command, rest.strip())
                    talk = []
                elif line.startswith("/"):
                    say(HELP)
                elif line:
                    asked = [*talk, {"role": "user", "content": line}]
                    text, _, result = self.answer(self.prepare(asked))
                    last = result or last
                    talk = [*asked, {"role": "assistant", "content": text}]
            except ZipvlError as e:
                say(f"error: {e}")


def read_line() -> str:
    """A line from the user; the prompt goes to stderr when stdout is not the terminal."""
    if sys.stdout.isatty():
        return input("> ").strip()
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)
