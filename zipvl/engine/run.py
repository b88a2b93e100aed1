"""What the engine does: a loaded model prepares prompts, prefills them and decodes answers.

    prepare (media and text to token ids) -> encode (vision) -> prefill -> decode

Everything here is bookkeeping around three calls into the model: Family.encode, Decoder.prefill
and Decoder.decode. What a method keeps is decided by its policy inside the attention layer.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import DAMAGED, ModelError, UsageError, memory_errors
from ..model.batch import Batch, join, sent
from ..model.cache import Cache
from ..model.chat import Chat
from ..model.decoder import is_finite
from ..model.kernels import Attend
from ..model.vlm import VLM
from ..model.weights import Progress, silent
from ..policy import Notes, Policy
from .inputs import (
    ImageSource,
    Inputs,
    Message,
    Shown,
    VideoSource,
    as_list,
    build_inputs,
    conversation,
    place_media,
    read_clip,
    read_image,
    turned,
)
from .sampler import Sampling
from .stats import (
    Clock,
    Counted,
    LayerStats,
    Recorder,
    Stats,
    dense_work,
    layer_rows,
    peak_memory,
    restart_peak,
)

ROOM = 256  # places for new tokens in a cache: at first, and again whenever they are full
LOGIT_ROWS = 128  # rows of logits at a time
CHUNK = {"cuda": 8192, "cpu": 1024}  # rows of projections, MLP and norms at a time


@dataclass(frozen=True)
class Result:
    """An answer; the stop token is not in `tokens`."""

    text: str
    tokens: list[int]
    stats: Stats
    finish_reason: str  # stop | length


@dataclass(frozen=True)
class Piece:
    """One streamed token; `text` is empty while a character is still incomplete."""

    text: str
    token: int | None  # None for the last piece, which holds what text is left and the Result
    result: Result | None = None


class Step:
    """Decode steps over one batch's caches; engine/speed.py has one that a CUDA graph repeats."""

    def __init__(self, model: VLM, caches: Sequence[Cache], notes: list[Notes], policy: Policy,
                 attend: Attend):  # fmt: skip
        self.model, self.caches, self.notes = model, caches, notes
        self.policy, self.attend = policy, attend

    sheds = 1.0  # sequences that stopped leave the caches when no more than this share goes on

    @classmethod
    def repeats(cls, policy: Policy) -> bool:
        """Whether a method can be decoded this way."""
        return True

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """One more token per sequence, `ids` at `positions` [B] -> float32 logits [B, V]."""
        text, x = self.model.text, self.model.text.embed_tokens(ids)
        hidden = text.decode(x, positions, self.caches, self.policy, self.attend, self.notes)
        return self.model.logits(hidden)


Guided = Callable[[str, "Runtime", list[Inputs]], tuple["Runtime", list[Inputs]]]


class Runtime:
    """A model, its tokenizer and an attention backend. One request or batch at a time.

    `with progress("encode frames", 64) as step: step(16)` shows how far it is.
    """

    def __init__(self, model: VLM, chat: Chat, backend: str, attend: Attend,
                 progress: Progress = silent, step: type[Step] = Step,
                 guided: Guided | None = None, source: Path | None = None):  # fmt: skip
        """`source`: the checkpoint's folder, for those who have to know it again."""
        self.model, self.chat, self.config = model, chat, model.config
        self.source = source
        self.backend, self.attend = backend, attend
        self.progress, self.step, self.guided = progress, step, guided
        self.chunk = CHUNK.get(model.device.type)

    def prepare(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        video: VideoSource | Sequence[VideoSource] | None = None,
        frames: int | Literal["auto"] | None = "auto",
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        system: str | None = None,
        reader: str = "pyav",
    ) -> Inputs:
        """Token ids of `prompt` with its media.

        `prompt` is the user's text or a list of {"role", "content"} messages; `<image>` and
        `<video>` in it place the media, else they come first. `video` is a path, uint8
        [F, H, W, 3], or a list of these.
        Media of an earlier Inputs are taken as they are, features included.
        `frames` uniformly spread, or at most so many at `fps`; None: all, "auto": what the family
        takes, and all at `fps`; between seconds `start` and `end`; by the `reader` pyav, or by
        decord, which is for plain MP4 and Matroska files only.
        Raises MediaError, UsageError, ModelError.
        """
        images, videos = as_list(images), as_list(video)
        messages = place_media(conversation(prompt, system), len(images), len(videos))
        runs = self.chat.tokenize(messages)  # what is wrong with the words is told at once
        if frames == "auto":
            frames = self.model.vision.frames if fps is None else None
        began = time.perf_counter()
        with memory_errors(self.model.device, "reading media", "use fewer --frames"):
            pictures = [read_image(i, self.model.vision, alone=len(images) == 1) for i in images]
            clips = [
                read_clip(v, self.model, self.progress, frames, fps, start, end, reader)
                for v in videos
            ]
        read, encode = time.perf_counter() - began, sum(seconds for _, seconds in clips)
        left = {"image": iter(pictures), "video": iter([m for m, _ in clips])}
        media = [next(left[run]) for run in runs if isinstance(run, str)]
        placed = [self.model.vision.place(m) for m in media]
        if any(len(one) > 1 for one in placed):  # text stands between, or beside
            runs = self.chat.tokenize(messages, placed)
        inputs = build_inputs(self.config, self.model.vision, runs, media, placed)
        inputs.seconds, inputs.vision_seconds = read - encode, encode
        return inputs

    def encode(self, inputs: Inputs) -> list[Tensor]:
        """Features [tokens, C] of each medium, computed once and kept with the inputs."""
        waiting = [m for m in inputs.media if m.features is None]
        with self.progress("encode frames", sum(len(m.crops) for m in waiting)) as step:
            for m in waiting:
                m.features = self.model.vision.encode(m.crops, m.geometry, progress=step)
        return [m.features for m in inputs.media if m.features is not None]

    def prefill(
        self,
        inputs: list[Inputs],
        policy: Policy,
        room: int | None,
        seconds: dict[str, float],
        notes: list[Notes] | None = None,
        ends: bool = False,
    ) -> Counted:
        """Encodes media and runs all layers over the packed prompts; adds stage seconds.

        `room`: new tokens that the caches must hold, None for no caches. `notes`: one a prompt,
        None for fresh ones. `ends`: the last layer computes each prompt's last token alone.
        """
        model, device, clock = self.model, self.model.device, Clock(self.model.device)
        lengths = [len(i) for i in inputs]
        advice = "use fewer --frames, a smaller --tau or --keep-ratio, or --dtype bfloat16"
        item, text = model.dtype.itemsize, self.config.text
        need = 3 * sum(lengths) * text.hidden_size * item  # hidden states alone
        if room is not None and type(policy).plan is Policy.plan and policy.storage is None:
            need += (sum(lengths) + room * len(lengths)) * text.kv_width * item  # everything stays
        with memory_errors(device, f"prefilling {sum(lengths)} tokens", advice, need):
            features = [self.encode(i) for i in inputs]
            clock.lap("vision")
            with self.progress("prefill layers", self.config.text.num_layers) as step:
                places = join([torch.arange(n, device=device) for n in lengths])
                visual = join([i.is_visual.to(device) for i in inputs])
                notes = notes or [Notes(n, room or 0) for n in lengths]
                for mine, asked in zip(notes, inputs, strict=True):
                    mine.origin, mine.entered, mine.ahead = Shown(asked, model), None, asked.ahead
                turns = turned(inputs, device)
                batch = Batch.build(lengths, places, visual, text, model.dtype, notes, turns)
                recorder = Recorder(device, text, step)
                out = model.text.prefill(  # the embeddings are its own, to be let go in layer 0
                    self.embed(inputs, features), batch, policy, self.attend, room, self.chunk,
                    recorder, ends,
                )  # fmt: skip
            clock.lap("prefill")
        seconds |= clock.pop()
        return recorder.counted(out)

    def embed(self, inputs: list[Inputs], features: list[list[Tensor]]) -> Tensor:
        """Embeddings [sum T, C] of packed prompts. Raises ModelError where they are no numbers."""
        device, both = self.model.device, zip(inputs, features, strict=True)
        x = join(
            [self.model.embed(i.input_ids.to(device), i.is_visual.to(device), f) for i, f in both]
        )
        if not is_finite(x):
            raise ModelError(f"the vision features or embeddings {DAMAGED}")
        return x

    def take_notes(self, inputs: list[Inputs], policy: Policy, new: int) -> list[Notes]:
        """Notes for each prompt: fresh ones, or what the method's scout wrote while it answered, in
        this model or in the method's guide."""
        if policy.scout is None:
            return [Notes(len(i), new) for i in inputs]
        engine = self
        if policy.guide:
            if self.guided is None:
                raise UsageError(f"{policy} needs a guide beside an engine that load() made")
            engine, inputs = self.guided(policy.guide, self, inputs)
        run = Run(engine, inputs, policy.scout, Sampling())
        for _ in run.steps(new, ignore_eos=False):
            pass
        return run.notes


class Run:
    """One call of generate: prefill, then a token a step for every sequence until it stops. Lists
    have one entry a sequence."""

    def __init__(self, engine: Runtime, inputs: list[Inputs], policy: Policy, sampling: Sampling):
        self.engine, self.inputs, self.policy, self.sampling = engine, inputs, policy, sampling
        self.tokens: list[list[int]] = [[] for _ in inputs]
        self.reasons = ["length"] * len(inputs)
        self.seconds: dict[str, float] = {"video": 0.0}
        self.layers: list[LayerStats] = []
        self.notes: list[Notes] = []
        self.room = 0  # new tokens the caches have places for
        self.reused = 0  # tokens of the prompt that were in the caches before
        self.fed = 0  # tokens of the answers that the caches hold

    @torch.inference_mode()
    def steps(self, max_new_tokens: int, ignore_eos: bool) -> Iterator[list[tuple[int, int]]]:
        """Yields after each step the (sequence, token) pairs it made, stop tokens left out."""
        # 1 what would fail later is told before the work
        if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}: give a whole number from 1 on")
        engine, model = self.engine, self.engine.model
        self.check_window(max_new_tokens)
        # 2 prefill: all prompts at once
        restart_peak(model.device)
        generators = self.sampling.generators(len(self.inputs))
        began = time.perf_counter()
        fresh = [i for i in self.inputs if not i.reported]  # preparing is part of the first run
        self.seconds["video"] = sum(i.seconds for i in fresh)
        caches, logits = self.open(max_new_tokens)
        self.seconds["vision"] += sum(i.vision_seconds for i in fresh)
        for inputs in fresh:
            inputs.reported = True
        # 3 decode: choose a token each, let those that stop leave, run the others one step on.
        # `rows` are the sequences that are in the caches, `live` those of them that go on
        kind = engine.step if engine.step.repeats(self.policy) else Step
        decode = kind(model, caches, self.notes, self.policy, engine.attend)
        stops = frozenset() if ignore_eos else engine.chat.stop_ids
        first = [n.at(len(i)) for n, i in zip(self.notes, self.inputs, strict=True)]
        rows = live = list(range(len(self.inputs)))
        grown = ROOM * engine.config.text.kv_width * model.dtype.itemsize
        self.seconds["decode"], since = 0.0, time.perf_counter()
        for step in range(max_new_tokens):
            logits[:, engine.chat.vocab_size :] = -torch.inf  # rows of padding, not tokens
            new = self.sampling.choose(logits, [generators[b] for b in rows])
            now = time.perf_counter()  # tokens were read back, so the device is done, too
            self.seconds.setdefault("first_token", now - began)
            self.seconds["decode"] += now - since
            made = self.take([(b, t) for b, t in zip(rows, new, strict=True) if b in live], stops)
            live = [b for b, _ in made]
            yield made
            since = time.perf_counter()
            if not live or step + 1 == max_new_tokens:
                return
            advice = "ask for fewer --max-new-tokens, or use fewer --frames"
            full = min(cache.spans.free() for cache in caches) == 0
            need = max(cache.nbytes for cache in caches) + len(live) * grown if full else 0
            with memory_errors(model.device, "decoding", advice, need):
                if full or (len(live) < len(rows) and len(live) <= kind.sheds * len(rows)):
                    stay = [i for i, b in enumerate(rows) if b in live]
                    keep(caches, stay, min(ROOM, max_new_tokens - step) if full else None)
                    rows, new = live, [new[i] for i in stay]
                    notes = [self.notes[b] for b in rows]
                    decode = kind(model, caches, notes, self.policy, engine.attend)
                at = [first[b] + step for b in rows]
                ids, places = sent(torch.tensor([new, at]), model.device)
                logits = decode(ids, places)
                self.fed = step + 1

    def open(self, new: int) -> tuple[list[Cache], Tensor]:
        """Caches that hold the prompts and have places for `new` tokens, at first; logits [B, V] of
        the first ones."""
        engine, began = self.engine, time.perf_counter()
        self.room = min(new, ROOM)
        self.notes = engine.take_notes(self.inputs, self.policy, new)
        if self.policy.scout is not None:
            self.seconds["scout"] = time.perf_counter() - began
        out = engine.prefill(self.inputs, self.policy, self.room, self.seconds, self.notes, True)
        self.layers = out.layers
        return out.caches, self.first_logits(out.hidden, out.batch)

    def take(self, made: list[tuple[int, int]], stops: frozenset[int]) -> list[tuple[int, int]]:
        """Adds tokens to the answers of their sequences; returns those that are no stop tokens."""
        for b, token in made:
            if token in stops:
                self.reasons[b] = "stop"
            else:
                self.tokens[b].append(token)
        return [(b, token) for b, token in made if token not in stops]

    def pieces(self, max_new_tokens: int, ignore_eos: bool) -> Iterator[Piece]:
        """The answer to a lone prompt while it is made."""
        text = self.engine.chat.detokenizer()
        for made in self.steps(max_new_tokens, ignore_eos):
            yield from (Piece(text.push(token), token) for _, token in made)
        yield Piece(text.flush(), None, self.result(0))

    def check_window(self, max_new_tokens: int) -> None:
        """Answers, too, must stay inside a sliding window; the last token is never attended to."""
        window = self.engine.config.text.sliding_window
        longest = max(len(i) for i in self.inputs)
        if window and longest + max_new_tokens - 1 > window:
            raise UsageError(
                f"{longest} prompt tokens and {max_new_tokens} new ones do not fit this model's "
                f"attention window of {window}: ask for fewer --max-new-tokens"
            )

    def first_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Logits [B, V] of each prompt's last token, `hidden` [B, C], checked to be numbers."""
        lengths = torch.tensor([len(i) for i in self.inputs], device=hidden.device)
        ends = zip(self.notes, batch.positions.split(1), strict=True)
        if not torch.equal(join([notes.original(at) for notes, at in ends]), lengths - 1):
            raise UsageError(
                "the method dropped the prompt's last token, which makes the first answer token"
            )
        logits = self.engine.model.logits(hidden)
        if not is_finite(logits):
            raise ModelError(f"the model's first logits {DAMAGED}")
        return logits

    def result(self, sequence: int) -> Result:
        """What sequence number `sequence` of the batch answered."""
        inputs, tokens, text = self.inputs[sequence], self.tokens[sequence], self.engine.config.text
        prefilled = self.notes[sequence].prompt if self.notes else len(inputs)
        dtype = self.engine.model.dtype
        stages: dict[str, float] = {}
        for layer in self.layers:
            for name, value in layer.seconds.items():
                stages[f"prefill_{name}"] = stages.get(f"prefill_{name}", 0.0) + value
        return Result(
            text=self.engine.chat.decode(tokens),
            tokens=tokens,
            finish_reason=self.reasons[sequence],
            stats=Stats(
                method=repr(self.policy),
                prompt_tokens=len(inputs),
                visual_tokens=int(inputs.is_visual.sum()),
                new_tokens=len(tokens),
                batch=len(self.inputs),
                seconds=self.seconds | stages,
                layers=layer_rows(self.layers, sequence, prefilled),
                work=sum(s.work[sequence] for s in self.layers),
                work_dense=dense_work(text, prefilled, ends=True),
                kv_bytes_dense=(len(inputs) + self.room) * text.kv_width * dtype.itemsize,
                peak_memory=peak_memory(self.engine.model.device),
                frames=[
                    {"index": i, "time": t}
                    for m in inputs.media if m.clip
                    for i, t in zip(m.clip.indices, m.clip.times, strict=True)
                ],
                reused=self.reused,
            ),
        )  # fmt: skip


def keep(caches: list[Cache], stay: list[int], room: int | None) -> None:
    """Leaves in `caches` the sequences `stay`, with places for `room` more tokens if it is given:
    one layer at a time, so that little is held twice."""
    for i in range(len(caches)):
        caches[i] = caches[i].drop(stay, room)
