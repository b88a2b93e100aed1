"""The engine: a loaded model that prepares prompts, prefills them and decodes answers.

    load -> prepare (media and text to token ids) -> encode (vision) -> prefill -> decode

Everything here is bookkeeping around three calls into the model: VLM.encode, Decoder.prefill and
Decoder.decode. What a method keeps is decided by its policy inside the attention layer.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..model import kernels
from ..model.attention import Pack
from ..model.chat import Chat
from ..model.decoder import Prefilled
from ..model.tokens import join
from ..model.vlm import VLM
from ..policy import Policy, load_policy
from .graph import Step
from .inputs import (
    ImageSource,
    Inputs,
    Message,
    VideoSource,
    as_list,
    build_inputs,
    conversation,
    read_image,
)
from .memory import memory_errors
from .progress import Progress
from .run import Result, Run
from .sampler import Sampling
from .stats import Clock
from .watch import read_clip

CHUNK = {"cuda": 8192, "cpu": 1024}  # rows of projections, MLP and norms at a time


@dataclass(frozen=True)
class Piece:
    """One streamed token; `text` is empty while a character is still incomplete."""

    text: str
    token: int | None  # None for the last piece, which holds what text is left and the Result
    result: Result | None = None


class Engine:
    """A model, its tokenizer and an attention backend. One request or batch at a time."""

    def __init__(
        self, model: VLM, chat: Chat, backend: str, attend: kernels.Attend, progress: Progress,
        step: type[Step] = Step,
    ):  # fmt: skip
        self.model, self.chat, self.config = model, chat, model.config
        self.backend, self.attend, self.progress = backend, attend, progress
        self.step, self.chunk = step, CHUNK.get(model.device.type)

    def prepare(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        video: VideoSource | Sequence[VideoSource] | None = None,
        frames: int | None = 32,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        system: str | None = None,
    ) -> Inputs:
        """Token ids of `prompt` with its media.

        `prompt` is the user's text or a list of {"role", "content"} messages; `<image>` and
        `<video>` in it place the media, else they come first. `video` is a path, uint8
        [F, H, W, 3], or a list of these.
        Media of an earlier Inputs are taken as they are, features included.
        `frames` uniformly spread, or at most so many at `fps`; between seconds `start` and `end`.
        Raises MediaError, UsageError, ModelError.
        """
        began, messages = time.perf_counter(), conversation(prompt, system)
        with memory_errors(self.model.device, "reading media", "use fewer --frames"):
            images = as_list(images)
            pictures = [read_image(i, self.config, alone=len(images) == 1) for i in images]
            clips = [
                read_clip(v, self.model, self.progress, frames, fps, start, end)
                for v in as_list(video)
            ]
        read, encode = time.perf_counter() - began, sum(seconds for _, seconds in clips)
        inputs = build_inputs(self.chat, self.config, messages, pictures, [m for m, _ in clips])
        inputs.seconds, inputs.vision_seconds = read - encode, encode
        return inputs

    @torch.inference_mode()
    def logits(self, inputs: Inputs | str, method: str | Policy = "dense",
               images: Sequence[ImageSource] = (),
               video: VideoSource | None = None) -> Tensor:  # fmt: skip
        """float32 [T, V] at every position; NaN where the token left the stream (FastV)."""
        inputs = self.prepared(inputs, images, video)
        out = self.prefill([inputs], load_policy(method), None, {})
        logits = self.model.logits(out.hidden)
        full = logits.new_full((len(inputs), logits.shape[1]), torch.nan)
        return full.index_copy(0, out.pack.positions, logits)

    def generate(self, inputs: Inputs | str | Sequence[Inputs | str],
                 method: str | Policy = "zipvl", max_new_tokens: int = 256,
                 temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
                 ignore_eos: bool = False, images: Sequence[ImageSource] = (),
                 video: VideoSource | None = None,
                 ) -> Result | list[Result]:  # fmt: skip
        """The answer to one prompt, or the list of answers to a batch, each as if asked alone."""
        alone = isinstance(inputs, Inputs | str)
        asked = [inputs] if isinstance(inputs, Inputs | str) else inputs
        batch = [self.prepared(i, images, video) for i in asked]
        run = Run(self, batch, load_policy(method), Sampling(temperature, top_p, top_k, seed))
        for _ in run.steps(max_new_tokens, ignore_eos) if batch else ():
            pass
        results = [run.result(b) for b in range(len(batch))]
        return results[0] if alone else results

    def stream(self, inputs: Inputs | str, method: str | Policy = "zipvl",
               max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
               top_k: int = 0, seed: int = 0, ignore_eos: bool = False,
               images: Sequence[ImageSource] = (),
               video: VideoSource | None = None) -> Iterator[Piece]:  # fmt: skip
        """Pieces of the answer as they are made; the last carries the Result."""
        inputs = self.prepared(inputs, images, video)
        run = Run(self, [inputs], load_policy(method), Sampling(temperature, top_p, top_k, seed))
        text = self.chat.detokenizer()
        for made in run.steps(max_new_tokens, ignore_eos):
            yield from (Piece(text.push(token), token) for _, token in made)
        yield Piece(text.flush(), None, run.result(0))

    def prepared(self, inputs: Inputs | str, images: Sequence[ImageSource],
                 video: VideoSource | None) -> Inputs:  # fmt: skip
        """`inputs`, or a prompt and its media prepared. Raises UsageError for anything else."""
        if isinstance(inputs, str):
            return self.prepare(inputs, images, video)
        if not isinstance(inputs, Inputs):
            raise UsageError(f"inputs is a {type(inputs).__name__}: give text or prepared inputs")
        if as_list(images) or video is not None:
            raise UsageError("these inputs are prepared: give pictures and videos to prepare()")
        return inputs

    def encode(self, inputs: Inputs) -> list[Tensor]:
        """Features [tokens, C] of each medium, computed once and kept with the inputs."""
        waiting = [m for m in inputs.media if m.features is None]
        with self.progress("encode frames", sum(len(m.crops) for m in waiting)) as step:
            for m in waiting:
                m.features = self.model.encode(m.crops, m.geometry, progress=step)
        return [m.features for m in inputs.media if m.features is not None]

    def prefill(self, batch: list[Inputs], policy: Policy, room: int | None,
                seconds: dict[str, float]) -> Prefilled:  # fmt: skip
        """Encodes media and runs all layers over the packed prompts; adds stage seconds."""
        model, device, clock = self.model, self.model.device, Clock(self.model.device)
        lengths = [len(i) for i in batch]
        advice = "use fewer --frames, a smaller --tau or --keep-ratio, or --dtype bfloat16"
        with memory_errors(device, f"prefilling {sum(lengths)} tokens", advice):
            with clock("vision"):
                features = [self.encode(i) for i in batch]
            with (
                clock("prefill"),
                self.progress("prefill layers", self.config.text.num_layers) as step,
            ):
                ids = [(i.input_ids.to(device), i.is_visual.to(device)) for i in batch]
                x = join([model.embed(*i, f) for i, f in zip(ids, features, strict=True)])
                positions = join([torch.arange(n, device=device) for n in lengths])
                visual = join([v for _, v in ids])
                pack = Pack.build(lengths, positions, visual, self.config.text, model.dtype)
                out = model.text.prefill(
                    x, pack, policy, self.attend, room, self.chunk, lambda _: step(1)
                )
        seconds |= clock.pop()
        seconds["vision"] += sum(i.vision_seconds for i in batch)
        return out
