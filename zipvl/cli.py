"""What the command line prints: answers and JSON on stdout, everything else on stderr."""

import argparse
import json
import sys

from .engine.engine import Engine
from .engine.inputs import ImageSource, Inputs, Message, VideoSource
from .engine.run import Result
from .errors import ZipvlError
from .policy import Policy
from .report import as_json, headline, summary

HELP = (
    "/image FILE and /video FILE add media; /clear forgets the talk; "
    "/stats shows the last answer's statistics; /quit leaves"
)


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


class Session:
    """One engine, its media and options, asked once or in a chat."""

    def __init__(self, engine: Engine, policy: Policy, args: argparse.Namespace):
        self.engine, self.policy, self.args = engine, policy, args
        # A video is read once. Pictures are read again when one is added, as some models cut a
        # lone picture differently; else they are taken from the last prompt.
        self.images: list[ImageSource] = list(args.image)
        self.videos: list[VideoSource] = list(args.video)
        self.known: Inputs | None = None  # the last prompt
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        if sys.stdin:  # bytes that are no UTF-8 come as they do on the command line
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]

    def prepare(self, prompt: str | list[Message]) -> Inputs:
        args, images = self.args, self.images
        if self.known:
            images = [m for m in self.known.media if m.kind == "image"]
        self.known = self.engine.prepare(
            prompt, images, self.videos, args.frames, args.fps, args.start, args.end, args.system
        )
        self.videos = [m for m in self.known.media if m.kind == "video"]
        if not args.quiet:
            say(headline(self.engine, self.policy, self.known))
            for warning in self.known.warnings:
                say(f"warning: {warning}")
        return self.known

    def answer(self, inputs: Inputs) -> tuple[str, list[int], Result | None]:
        """Streams one answer; (text, tokens, None) when Ctrl-C ended it."""
        a, text, tokens = self.args, "", []
        pieces = self.engine.stream(
            inputs, self.policy, a.max_new_tokens, a.temperature, a.top_p, a.top_k, a.seed
        )
        result = None
        try:
            for piece in pieces:
                text += piece.text
                tokens += [] if piece.token is None else [piece.token]
                result = piece.result
                if not a.json:
                    print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            pass
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
        if result and self.args.stats:
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
            if command == "/quit":
                return 0
            if command == "/clear":
                talk = []
            elif command == "/stats":
                say(summary(last.stats) if last else "nothing asked yet")
            elif command in ("/image", "/video") and rest:
                talk = [] if self.add(command, rest.strip()) else talk
            elif line.startswith("/"):
                say(HELP)
            elif line:
                asked = [*talk, {"role": "user", "content": line}]
                try:
                    text, _, result = self.answer(self.prepare(asked))
                except ZipvlError as e:
                    say(f"error: {e}")
                    continue
                last = result or last
                talk = [*asked, {"role": "assistant", "content": text}]

    def add(self, command: str, path: str) -> bool:
        """One more medium, read at once; a file at fault is reported and forgotten."""
        media: list = self.images if command == "/image" else self.videos
        known = self.known
        media.append(path)
        self.known = None
        try:
            self.prepare("")
        except ZipvlError as e:
            say(f"error: {e}")
            media.pop()
            self.known = known
            return False
        return True


def read_line() -> str:
    """A line from the user; the prompt goes to stderr when stdout is not the terminal."""
    if sys.stdout.isatty():
        return input("> ").strip()
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()
