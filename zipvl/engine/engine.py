"""The engine as its users see it: load() makes one, and it answers questions about media.

    load -> prepare (media and text to token ids) -> encode (vision) -> prefill -> decode

What these steps do is in run.py.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..errors import UsageError
from ..policies import load_policy
from ..policy import Policy
from .inputs import ImageSource, Inputs, VideoSource, as_list
from .run import Piece, Result, Run, Runtime
from .sampler import Sampling
from .session import Session

LOGIT_ROWS = 128  # rows of logits at a time


class Engine(Runtime):
    @torch.inference_mode()
    def logits(self, inputs: Inputs | str, method: str | Policy = "dense",
               images: Sequence[ImageSource] = (),
               video: VideoSource | Sequence[VideoSource] | None = None,
               last: int | None = None) -> Tensor:  # fmt: skip
        """float32 [T, V] at every position, or at the `last` ones only; NaN where the token left
        the stream (FastV). Takes little more memory than its answer."""
        inputs = self.prepared(inputs, images, video)
        policy = load_policy(method)
        notes = self.take_notes([inputs], policy, 1)
        out = self.prefill([inputs], policy, None, {}, notes)
        first = max(0, len(inputs) - (len(inputs) if last is None else last))
        places = notes[0].original(out.batch.positions)
        rows = (places >= first).nonzero()[:, 0]
        shape, device = (len(inputs) - first, self.config.text.vocab_size), rows.device
        logits = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        for some in rows.split(LOGIT_ROWS):
            logits[places[some] - first] = self.model.logits(out.hidden[some])
        return logits

    def generate(self, inputs: Inputs | str | Sequence[Inputs | str],
                 method: str | Policy = "zipvl", max_new_tokens: int = 256,
                 temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
                 seed: int | Sequence[int] = 0, ignore_eos: bool = False,
                 images: Sequence[ImageSource] = (),
                 video: VideoSource | Sequence[VideoSource] | None = None,
                 ) -> Result | list[Result]:  # fmt: skip
        """The answer to one prompt, or the list of answers to a batch, each as if asked alone.

        `images` and `video` belong to every prompt that is text, and are read once. `seed`: one, or
        one for each prompt. Raises MediaError, UsageError, ModelError, OutOfMemory.
        """
        many = isinstance(inputs, Sequence) and not isinstance(inputs, str)
        batch: list[Inputs] = []
        for asked in cast(Sequence[Inputs | str], inputs if many else [inputs]):
            batch.append(self.prepared(asked, images, video))
            if isinstance(asked, str):
                images = [m for m in batch[-1].media if m.kind == "image"]
                video = [m for m in batch[-1].media if m.kind == "video"]
        run = Run(self, batch, load_policy(method), Sampling(temperature, top_p, top_k, seed))
        for _ in run.steps(max_new_tokens, ignore_eos) if batch else ():
            pass
        results = [run.result(b) for b in range(len(batch))]
        return results if many else results[0]

    def stream(self, inputs: Inputs | str, method: str | Policy = "zipvl",
               max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
               top_k: int = 0, seed: int = 0, ignore_eos: bool = False,
               images: Sequence[ImageSource] = (),
               video: VideoSource | Sequence[VideoSource] | None = None,
               ) -> Iterator[Piece]:  # fmt: skip
        """Pieces of the answer as they are made; the last carries the Result."""
        inputs = self.prepared(inputs, images, video)
        run = Run(self, [inputs], load_policy(method), Sampling(temperature, top_p, top_k, seed))
        return run.pieces(max_new_tokens, ignore_eos)

    def session(self, images: Sequence[ImageSource] = (),
                video: VideoSource | Sequence[VideoSource] | None = None,
                frames: int | Literal["auto"] | None = "auto", fps: float | None = None,
                start: float | None = None, end: float | None = None, system: str | None = None,
                method: str | Policy = "zipvl", reuse: str = "first",
                reader: str = "pyav") -> Session:  # fmt: skip
        """Many questions about media that are read and prefilled once (session.py); the first one
        waits for the prefill. Media, frames and reader as in prepare()."""
        policy = load_policy(method)
        if not as_list(images) and not as_list(video):
            none = torch.empty(0, dtype=torch.long)
            return Session(self, Inputs(none, none.bool(), []), policy, reuse, system)
        inputs = self.prepare("", images, video, frames, fps, start, end, system, reader)
        if any(m.sha256 for m in inputs.media):
            raise UsageError("media of a session's file have no pixels: give the files themselves")
        return Session(self, inputs, policy, reuse, system)

    def open_session(self, path: str | os.PathLike,
                     method: str | Policy | None = None) -> Session:  # fmt: skip
        """The session that Session.save wrote, ready for questions; `method` need be named where
        it is not a built-in one. Raises UsageError, ModelError."""
        return Session.opened(self, path, method)

    def prepared(self, inputs: Inputs | str, images: Sequence[ImageSource],
                 video: VideoSource | Sequence[VideoSource] | None) -> Inputs:  # fmt: skip
        """`inputs`, or a prompt and its media prepared. Raises UsageError for anything else."""
        if isinstance(inputs, str):
            return self.prepare(inputs, images, video)
        if not isinstance(inputs, Inputs):
            raise UsageError(f"inputs is a {type(inputs).__name__}: give text or prepared inputs")
        if as_list(images) or as_list(video):
            raise UsageError("these inputs are prepared: give pictures and videos to prepare()")
        return inputs
