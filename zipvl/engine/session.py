"""Media read once and asked often: caches that outlive an answer.

    prompt    | system prompt, media | question | answer | question | ...
    caches    | what was read        | the talk so far               |

A new prompt shares its beginning with what the caches hold: that part is not computed again, the
rest goes through Decoder.extend. What differs from there on is cut off the caches first. Caches
that cannot be cut, of methods that move or pack slots while they decode, start again from a copy of
what was read.

What a method kept of the media it chose at some time, and later questions have no say in it:

    reuse="first"     for the first question; what its prompt made it keep stays
    reuse="general"   for a general question, which is then cut off: no question changes another
    reuse="media"     for the media alone
    reuse="none"      for every question anew: nothing is reused but the features of the media

What each costs in right answers is measured in docs/sessions.md: "first" least, "media" most.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..errors import DAMAGED, ModelError, UsageError, memory_errors
from ..model.cache import Cache
from ..model.decoder import is_finite
from ..policy import Policy
from .film import Film, Held, load, save
from .inputs import Inputs, Message
from .run import ROOM, Piece, Result, Run, Runtime, keep
from .sampler import Sampling
from .stats import Clock

REUSE = ("first", "general", "media", "none")
GENERAL = {True: "Describe the video.", False: "Describe the picture."}  # whether there is a video


class Session:
    """A conversation about media that are read once."""

    def __init__(self, engine: Runtime, inputs: Inputs, policy: Policy, reuse: str,
                 system: str | None = None):  # fmt: skip
        """`inputs`: a prompt with the media. Raises UsageError."""
        if reuse not in REUSE:
            raise UsageError(f"unknown reuse {reuse!r}: use one of {', '.join(REUSE)}")
        self.fixed = policy.step is not None or policy.storage is not None
        if reuse == "media" and policy.scout is not None:
            raise UsageError(
                f"{policy} answers the question first to choose tokens: use reuse first or none"
            )
        if reuse == "general" and self.fixed:
            raise UsageError(
                f"no question can be cut off what {policy} holds: use reuse media, first or none"
            )
        self.engine, self.policy, self.reuse, self.system = engine, policy, reuse, system
        self.inputs, self.talk = inputs, list[Message]()
        self.held: Held | None = None  # what the caches hold now,
        self.base: Held | None = None  # and when they were new, where they cannot be cut
        self.last: Turn | None = None  # the turn that writes into the caches

    def ask(self, question: str, max_new_tokens: int = 256, temperature: float = 0.0,
            top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> Result:  # fmt: skip
        """The answer to the talk's next question. Raises UsageError, ModelError, OutOfMemory."""
        *_, last = self.stream(question, max_new_tokens, temperature, top_p, top_k, seed)
        return cast(Result, last.result)

    def stream(self, question: str, max_new_tokens: int = 256, temperature: float = 0.0,
               top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> Iterator[Piece]:  # fmt: skip
        """ask() in pieces; the last carries the Result. An answer that is not taken to its end is
        no part of the talk."""
        asked = [*self.talk, {"role": "user", "content": question}]
        for piece in self.reply(asked, max_new_tokens, temperature, top_p, top_k, seed):
            if piece.result is not None:
                self.talk = [*asked, {"role": "assistant", "content": piece.result.text}]
            yield piece

    def reply(self, messages: Sequence[Message], max_new_tokens: int = 256,
              temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
              seed: int = 0) -> Iterator[Piece]:  # fmt: skip
        """The answer to a whole conversation about the session's media, in pieces; `talk` has no
        part in it. Messages are those of Engine.prepare."""
        turn = self.turn(messages, Sampling(temperature, top_p, top_k, seed))
        return turn.pieces(max_new_tokens, ignore_eos=False)

    def turn(self, messages: Sequence[Message], sampling: Sampling | None = None) -> "Turn":
        """The run that will answer a conversation: its prompt is made, and nothing is computed."""
        media, read = self.inputs.media, self.inputs
        pictures, videos = ([m for m in media if m.kind == kind] for kind in ("image", "video"))
        inputs = self.engine.prepare(messages, pictures, videos, system=self.system)
        if not read.reported:  # reading is part of the first turn
            inputs.seconds += read.seconds
            inputs.vision_seconds += read.vision_seconds
            inputs.warnings, read.reported = read.warnings, True
        return Turn(self, inputs, sampling or Sampling())

    def rewind(self) -> None:
        """Forgets the talk; what was read of the media stays."""
        self.talk = []
        self.settle()
        if self.held and (self.fixed or not self.held.cut(self.held.read)):
            self.held = None

    def fork(self) -> "Session":
        """A session that goes on from here on its own; its caches are copies."""
        self.settle()
        twin = copy.copy(self)
        twin.talk, twin.held = list(self.talk), self.held and self.held.copy()
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of its caches, and of pixels and features of the media."""
        caches = [c for held in (self.held, self.base) if held for c in held.caches]
        media = [t for m in self.inputs.media for t in (m.crops, m.features) if t is not None]
        return sum(c.nbytes for c in caches) + sum(t.nbytes for t in media)

    def save(self, path: str | os.PathLike) -> None:
        """Writes what was read to FILE.zipvl, without the talk (film.py); reads it first where
        nothing was asked yet. Raises UsageError, ModelError, OutOfMemory."""
        self.settle()
        held = self.base or self.held
        if held is None:
            if self.reuse in ("first", "none") or not self.inputs.media:
                raise UsageError(
                    "nothing is held that could be saved: give the session media, and reuse "
                    f"general or media instead of {self.reuse}, or ask a question first"
                )
            turn = self.turn([{"role": "user", "content": "?"}])
            with torch.inference_mode():
                held = self.hold(turn.read(read_length(turn.inputs[0])))
        if self.fixed and held.read < len(held.ids):
            raise UsageError(
                f"what {self.policy} holds cannot be parted from the first question: make the "
                "session with reuse media to save it"
            )
        if not torch.equal(self.inputs.input_ids[: held.read], held.ids[: held.read]):
            raise UsageError("the first question has media amid its words: put them first to save")
        save(self.engine, Film(self.inputs, self.policy, self.reuse, self.system, held), path)

    @classmethod
    def opened(cls, engine: Runtime, path: str | os.PathLike,
               method: str | Policy | None = None) -> "Session":  # fmt: skip
        """The session that was saved to a file. Raises UsageError, ModelError."""
        film = load(engine, path, method)
        session = cls(engine, film.inputs, film.policy, film.reuse, film.system)
        held = session.hold(film.held)
        first = session.turn([{"role": "user", "content": "?"}]).inputs[0].input_ids
        if held.common(first) < len(held.ids):
            raise ModelError(f"{path} was saved with another prompt template or tokenizer")
        return session

    def hold(self, held: Held) -> Held:
        """Caches that were made just now."""
        self.held, self.base = held, held.copy() if self.fixed else None
        return held

    def settle(self) -> None:
        """What the last turn put into the caches is theirs from now on."""
        turn, self.last = self.last, None
        if turn and self.held:
            if self.fixed and not turn.whole:
                self.held = None
            elif turn.opened:
                said = torch.tensor(turn.tokens[0][: turn.fed], dtype=torch.long)
                self.held.ids = torch.cat((turn.inputs[0].input_ids, said))

    def shared(self, inputs: Inputs) -> Held | None:
        """What caches hold of a prompt, at least its media, and nothing else; None: too little."""
        self.settle()
        ids, held, base = inputs.input_ids, self.held, self.base
        n = held.common(ids) if held else 0
        whole = held is not None and n == len(held.ids)
        if held and n >= read_length(inputs) and (whole or not self.fixed) and held.cut(n):
            return held
        return base.copy() if base and base.common(ids) == len(base.ids) else None


def read_length(inputs: Inputs) -> int:
    """How many tokens system prompt and media are; 0 without media."""
    visual = inputs.is_visual.nonzero()
    return int(visual[-1]) + 1 if len(visual) else 0


class Turn(Run):
    """The run of one answer, over what its session holds."""

    def __init__(self, session: Session, inputs: Inputs, sampling: Sampling):
        super().__init__(session.engine, [inputs], session.policy, sampling)
        self.session = session
        self.opened = False  # whether the caches hold the whole prompt,
        self.whole = True  # and all of them the same tokens

    def steps(self, max_new_tokens: int, ignore_eos: bool) -> Iterator[list[tuple[int, int]]]:
        """As Run.steps. Raises UsageError where another question came between."""
        try:
            for made in super().steps(max_new_tokens, ignore_eos):
                yield made
                if self.session.last is not self:
                    raise UsageError("another question was asked before this answer ended")
        except GeneratorExit:  # between two steps
            raise
        except BaseException:
            self.whole = False
            raise

    def open(self, new: int) -> tuple[list[Cache], Tensor]:
        """Prefills, or extends, what the session holds of the prompt."""
        session, [inputs] = self.session, self.inputs
        held, media = session.shared(inputs), read_length(inputs)
        if held is None and any(m.sha256 for m in inputs.media):
            raise UsageError(
                "this session's file holds no pixels to read again: leave the media first, and the "
                "talk as it was"
            )
        session.last, session.held = self, held
        if held is not None:
            self.reused = len(held.ids)
            self.seconds |= {"vision": 0.0, "prefill": 0.0}
            return held.caches, self.extend(held, new)
        session.base = None  # freed before another is made
        if session.reuse in ("media", "general") and media:
            held = session.hold(self.read(media))
            return held.caches, self.extend(held, new)
        caches, logits = super().open(new)
        if session.reuse != "none":
            session.hold(Held(inputs.input_ids, media, caches, self.notes[0], self.layers))
            self.opened = True
        return caches, logits

    def read(self, n: int) -> Held:
        """Prefills the first n tokens of the prompt; for a general question behind them, if such
        are the session's."""
        engine, [inputs] = self.engine, self.inputs
        ids, visual = inputs.input_ids[:n], inputs.is_visual[:n]
        turns = None if inputs.turns is None else inputs.turns[:, :n]
        if self.session.reuse == "general":
            question = GENERAL[any(m.kind == "video" for m in inputs.media)]
            asked = self.session.turn([{"role": "user", "content": question}]).inputs[0]
            rest = slice(read_length(asked), None)
            ids = torch.cat((ids, asked.input_ids[rest]))
            visual = torch.cat((visual, asked.is_visual[rest]))
            if turns is not None:  # what is behind the media is text
                behind = torch.arange(n, len(ids)) + inputs.ahead
                turns = torch.cat((turns, behind.expand(3, -1)), dim=1)
        start = Inputs(ids, visual, inputs.media, turns, inputs.ahead)
        notes = engine.take_notes([start], self.policy, ROOM)
        out = engine.prefill([start], self.policy, ROOM, self.seconds, notes, ends=True)
        held = Held(ids, n, out.caches, notes[0], out.layers)
        if not held.cut(n):
            raise UsageError(f"no question is cut off what {self.policy} holds: use reuse media")
        return held

    def extend(self, held: Held, new: int) -> Tensor:
        """Logits [1, V] of the first new token, once the caches hold the rest of the prompt."""
        engine, model, rest = self.engine, self.engine.model, self.inputs[0].input_ids
        rest, clock = rest[len(held.ids) :].to(model.device), Clock(model.device)
        n, self.notes, self.room = len(rest), [held.notes], min(new, ROOM)
        with memory_errors(model.device, f"prefilling {n} tokens", "ask less, or rewind the talk"):
            if min(cache.spans.free() for cache in held.caches) < n:
                keep(held.caches, [0], n + self.room)
            places = held.notes.at(len(held.ids)) + torch.arange(n, device=model.device)
            hidden = model.text.extend(
                model.text.embed_tokens(rest), [n], places, held.caches, self.policy,
                engine.attend, self.notes, engine.chunk,
            )  # fmt: skip
            logits = model.logits(hidden[-1:])
        if not is_finite(logits):
            raise ModelError(f"the model's first logits {DAMAGED}")
        clock.lap("prefill")
        self.seconds["prefill"] += clock.pop()["prefill"]
        self.layers = [
            replace(layer, cached=list(cache.spans.lengths), kv_bytes=cache.sequence_bytes())
            for layer, cache in zip(held.layers, held.caches, strict=True)
        ]
        self.opened = True
        return logits
