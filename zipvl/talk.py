"""A conversation in the terminal, or one question, over a session: media are read once."""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Protocol

from .engine.session import Session, Turn
from .errors import ZipvlError
from .report import fault, read_line, say, summary

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.inputs import ImageSource, Inputs, Message, VideoSource
    from .engine.run import Result
    from .engine.sampler import Sampling
    from .policy import Policy

HELP = (
    "/image FILE and /video FILE add media; /clear forgets the talk; /save FILE.zipvl keeps what "
    "was read; /stats shows the last answer's statistics; /quit leaves"
)


class Screen(Protocol):
    """What the command line does for one question, too."""

    policies: list[Policy]

    def announce(self, inputs: Inputs, policies: list[Policy]) -> None: ...
    def sampling(self) -> Sampling: ...
    def follow(self, run: Turn, silent: bool) -> Result: ...
    def tell(self, inputs: Inputs, result: Result) -> int: ...


class Talk:
    """Questions to one session, which another one replaces when media are added."""

    def __init__(self, engine: Engine, screen: Screen, args: Namespace) -> None:
        self.engine, self.screen, self.args = engine, screen, args
        self.images: list[ImageSource] = list(args.image)  # files: a lone one may be cut otherwise
        self.last: Result | None = None
        self.save = args.save  # until it is done
        if args.open:
            named = self.screen.policies[0] if args.chosen else None
            self.session = engine.open_session(args.open, named)
        else:
            self.session = self.begin(self.images, list(args.video))

    def begin(self, images: list[ImageSource], videos: list[VideoSource]) -> Session:
        a = self.args
        frames: int | Literal["auto"] = a.frames or "auto"
        return self.engine.session(
            images, videos, frames, a.fps, a.start, a.end, a.system, self.screen.policies[0],
            a.reuse, a.reader,
        )  # fmt: skip

    def run(self) -> int:
        """One question, or all that come; returns the exit code."""
        if self.args.prompt is None:
            return self.chat()
        turn, result = self.ask(self.args.prompt)
        return self.screen.tell(turn.inputs[0], result)

    def ask(self, question: str) -> tuple[Turn, Result]:
        """The next question of the talk; what Ctrl-C left of an answer belongs to it, too."""
        asked: list[Message] = [*self.session.talk, {"role": "user", "content": question}]
        turn = self.session.turn(asked, self.screen.sampling())
        self.screen.announce(turn.inputs[0], [self.session.policy])
        result = self.screen.follow(turn, silent=self.args.json)
        self.session.talk = [*asked, {"role": "assistant", "content": result.text}]
        self.last = result
        if self.save and turn.opened:
            self.keep(self.save)
            self.save = None
        return turn, result

    def keep(self, path: str) -> None:
        self.session.save(path)
        if not self.args.quiet:
            say(f"saved {path}: {os.path.getsize(path) / 2**20:.2f} MiB")

    def chat(self) -> int:
        """Questions about the same media until /quit or end of input."""
        with suppress(ImportError):  # Windows
            import readline  # noqa: F401  input() then edits lines and remembers them
        if self.session.inputs.media:
            self.screen.announce(self.session.inputs, [self.session.policy])
        if not self.args.quiet:
            say(HELP)
        while True:
            try:
                line = read_line()
            except (EOFError, KeyboardInterrupt) as e:
                say()
                return 130 if isinstance(e, KeyboardInterrupt) else 0
            if line in ("/quit", "quit", "exit"):
                return 0
            try:
                self.obey(line)
            except KeyboardInterrupt:  # while media were read or a prompt was prepared
                say()
            except ZipvlError as e:
                say(f"error: {fault(e)[1]}")

    def obey(self, line: str) -> None:
        """One line of a chat: a command, or a question."""
        command, _, path = line.partition(" ")
        if command in ("/image", "/video") and path:
            self.add(command, path.strip())
        elif command == "/save" and path:
            self.keep(path.strip())
        elif command == "/clear":
            self.session.rewind()
        elif command == "/stats":
            say(summary(self.last.stats) if self.last else "nothing asked yet")
        elif command in ("/help", "/image", "/video", "/save"):
            say(HELP)
        elif line.startswith("/"):
            say(f"unknown command {command}; {HELP}")
        elif line:
            self.ask(line)

    def add(self, command: str, path: str) -> None:
        """One more medium, read at once; nothing changes where that fails."""
        images = self.images + [path] * (command == "/image")
        videos: list[VideoSource] = [m for m in self.session.inputs.media if m.kind == "video"]
        fresh = self.begin(images, videos + [path] * (command == "/video"))
        if self.session.talk:
            say("the talk so far is forgotten: its answers did not know this file")
        self.images, self.session = images, fresh
        self.screen.announce(fresh.inputs, [fresh.policy])
