"""One engine, one thread, one request after the other.

    submit -> queue -> [session of the media] -> prompt + answer <= context -> pieces -> Done

A Job is what the rest of the server holds of a request: events come out of it, and cancelling ends
it in the queue, between two layers or between two tokens.
"""

import asyncio
import os
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from ..engine.engine import Engine
from ..engine.inputs import Media, conversation, place_media
from ..engine.run import Piece
from ..engine.sampler import Sampling
from ..engine.session import Session
from ..engine.stats import Stats
from ..errors import MediaError, UsageError, ZipvlError
from ..policy import Policy
from ..report import fault, say
from ..vision.family import Placed
from .media import Medium, Store, plainly
from .request import Ask, Refusal

Reason = tuple[int, str]  # status and sentence of a Refusal
GONE: Reason = (499, "the client left")


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: str  # stop | length
    usage: dict[str, Any]
    zipvl: dict[str, Any]  # what was kept, and what it took


Event = str | Done | Refusal  # some text; the end; a failure, which is an end as well


class Job:
    """A request on its way. Its events are read on the loop that made it."""

    def __init__(self) -> None:
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self.ended: Reason | None = None  # why it need not go on
        self.ask: Ask
        self.media: list[Medium] = []
        self.placed: list[Placed] = []  # what stands for these in the prompt
        self.names: dict[str, str] = {}  # the server's for them -> the client's

    def emit(self, event: Event) -> None:
        """From any thread; where the loop is gone nobody listens."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def check(self, *_: object) -> None:
        """Raises a fresh Refusal, as an old one would hold on to the frames it passed through."""
        if self.ended:
            raise Refusal(*self.ended)


class Cut:
    """Text up to the first stop; what may begin one is held back until it is known."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.done = stops, "", False
        self.longest = max(map(len, stops), default=1)

    def push(self, text: str) -> str:
        """What of the answer is sure to be shown. The stop that ends first counts, however the
        answer is cut into pieces."""
        self.held += text
        found = [(at + len(s), at) for s in self.stops if (at := self.held.find(s)) >= 0]
        if found:
            self.done, at = True, min(found)[1]
            return self.held[:at]
        tails = range(min(len(self.held), self.longest - 1), 0, -1)
        keep = next((n for n in tails if any(s.startswith(self.held[-n:]) for s in self.stops)), 0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure

    def flush(self) -> str:
        return "" if self.done else self.held


class Worker(threading.Thread):
    """The engine's thread: its queue, and the sessions it keeps for media that come again."""

    def __init__(self, engine: Engine, store: Store, policy: Policy, reuse: str, queue: int,
                 cache: int):  # fmt: skip
        """`queue`: requests that may wait; `cache`: bytes that sessions may hold in between."""
        super().__init__(name="engine", daemon=True)
        self.engine, self.store, self.policy, self.reuse = engine, store, policy, reuse
        self.most, self.room = queue, cache
        self.queue, self.lock = deque[Job](), threading.Condition()
        self.job: Job | None = None
        self.draining = self.closed = False
        self.sessions: OrderedDict[Any, Session] = OrderedDict()  # the newest last
        engine.progress = self.progress

    # --- from the server's thread -------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self.queue and self.job is None

    def admit(self) -> None:
        """Raises Refusal (503) where one more request would not be taken."""
        if self.draining:
            raise Refusal(503, "this server is shutting down: ask another one")
        if len(self.queue) >= self.most:
            raise Refusal(
                503, f"{self.most} requests are waiting already: ask again later", None,
                "queue_full",
            )  # fmt: skip

    def submit(self, job: Job) -> None:
        with self.lock:
            self.admit()
            job.check()
            self.queue.append(job)
            self.lock.notify()

    def cancel(self, job: Job, why: Reason = GONE) -> None:
        """Ends a job: at once in the queue, else where the engine looks next."""
        with self.lock:
            job.ended = why
            if waited := job in self.queue:
                self.queue.remove(job)
        if waited:
            self.end(job, Refusal(*why))

    def drain(self, why: Reason | None = None) -> None:
        """Takes no more requests; with a reason ends those that are there, too."""
        self.draining = True
        if why is not None:
            with self.lock:
                jobs = [*self.queue, *([self.job] if self.job else [])]
            for job in jobs:
                self.cancel(job, why)

    def close(self, seconds: float) -> None:
        """Ends the thread, once it has no more to do, or after so long."""
        with self.lock:
            self.closed = True
            self.lock.notify()
        self.join(seconds)

    # --- the engine's thread ------------------------------------------------------------------

    def run(self) -> None:
        while True:
            with self.lock:
                self.job = None
                self.lock.wait_for(lambda: self.queue or self.closed)
                if not self.queue:
                    return
                job = self.job = self.queue.popleft()
            try:
                job.check()
                last: Event = self.answer(job)
            except BaseException as e:  # the thread goes on, whatever a method raises
                last = self.explain(e, job)
            self.end(job, last)
            self.trim()

    def end(self, job: Job, last: Event) -> None:
        self.store.release(job.media)
        job.emit(last)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], object]]:
        """Engine.progress: a job may end behind a layer, or behind some frames."""
        assert self.job is not None
        self.job.check()
        yield self.job.check

    def answer(self, job: Job) -> Done:
        """Emits the text of an answer. Raises what the engine raises, and Refusal."""
        ask, cut = job.ask, Cut(job.ask.stop)
        self.check_context(job)
        session = self.session(job)
        try:
            turn = session.turn(
                ask.messages, Sampling(ask.temperature, ask.top_p, ask.top_k, ask.seed)
            )
            pieces = cast(Generator[Piece], turn.pieces(ask.max_new_tokens, ignore_eos=False))
            with closing(pieces):
                for piece in pieces:
                    job.check()
                    if text := cut.push(piece.text):
                        job.emit(text)
                    if cut.done:
                        break
            if text := cut.flush():
                job.emit(text)
            reason = "stop" if cut.done else turn.result(0).finish_reason
            warnings = [*session.inputs.warnings, *turn.inputs[0].warnings]
            return done(reason, turn.result(0).stats, session.inputs.media, self.policy, warnings)
        finally:  # no answer depends on an earlier one, and a session let go is freed at once
            session.rewind()

    def check_context(self, job: Job) -> None:
        """Raises Refusal where the prompt and the answer may grow too long; reads no media."""
        ask, most = job.ask, self.store.limits.context
        images = sum(medium.kind == "image" for medium in job.media)
        placed = place_media(conversation(ask.messages, None), images, len(job.media) - images)
        runs = self.engine.chat.tokenize(placed, job.placed)
        visual = sum(part for one in job.placed for part in one if isinstance(part, int))
        prompt = visual + sum(len(run) for run in runs if isinstance(run, list))
        if prompt + ask.max_new_tokens > most:
            raise Refusal(
                400, f"the prompt has {prompt} tokens, the answer may have {ask.max_new_tokens}: "
                f"together at most {most} are allowed, ask for fewer frames, or for a smaller "
                "max_tokens", "messages", "context_length_exceeded",
            )  # fmt: skip

    def session(self, job: Job) -> Session:
        """The session of a job's media, as it was or new; of none one that keeps nothing."""
        ask = job.ask
        if not job.media:
            return self.engine.session(method=self.policy, reuse="none")
        frames = self.store.rate(ask)
        key = (*((m.kind, m.digest) for m in job.media), frames, ask.fps, ask.system)
        session = self.sessions.pop(key, None)
        if session is None:
            paths: dict[str, list[str | os.PathLike]] = {"image": [], "video": []}
            with ExitStack() as files:
                for medium in job.media:
                    path = files.enter_context(self.store.path(medium))
                    paths[medium.kind].append(path)
                    job.names[path] = medium.where
                session = self.engine.session(
                    paths["image"], paths["video"], frames, ask.fps, method=self.policy,
                    reuse=self.reuse,
                )  # fmt: skip
            names = dict.fromkeys(job.names, "the file")
            session.inputs.warnings = [plainly(w, names) for w in session.inputs.warnings]
        self.sessions[key] = session
        return session

    def trim(self) -> None:
        """Lets go of the sessions that were not asked for longest, until the others fit."""
        while sum(session.nbytes for session in self.sessions.values()) > self.room:
            self.sessions.popitem(last=False)

    def explain(self, e: BaseException, job: Job) -> Refusal:
        """What a client hears of a failure. What is not the client's own goes to stderr."""
        if isinstance(e, Refusal):
            return e.with_traceback(None)  # which holds the frames, and these what they made
        code, sentence = fault(e)
        sentence = plainly(sentence, job.names)
        if isinstance(e, MediaError):
            return Refusal(422, sentence)
        if isinstance(e, UsageError):
            return Refusal(400, sentence)
        self.sessions.clear()  # their memory, and what a broken step may have left in them
        say(f"error: {sentence}")
        if code == 3:
            return Refusal(503, sentence, None, "out_of_memory")
        if not isinstance(e, ZipvlError):
            traceback.print_exception(e)
        return Refusal(500, "the model failed on this request: the server's log says why")


def done(reason: str, stats: Stats, media: list[Media], policy: Policy,
         warnings: list[str]) -> Done:  # fmt: skip
    """The end of an answer, as its last chunk says it."""
    tokens = {f"{kind}_tokens": sum(m.tokens for m in media if m.kind == kind)
              for kind in ("image", "video")}  # fmt: skip
    usage = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused, **tokens},
    }
    zipvl = {
        "method": type(policy).__name__,
        "ratio": stats.ratio,
        "kv_bytes": stats.kv_bytes,
        "seconds": {name: round(value, 6) for name, value in stats.seconds.items()},
        "frames": stats.frames,
        "warnings": list(dict.fromkeys(warnings)),
    }
    return Done(reason, usage, zipvl)
