"""The model class that lmms-eval makes (its interface: lmms_eval/api/model.py, chat models)."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..engine.inputs import Inputs, Media
from ..engine.load import load
from ..engine.run import Result
from ..errors import UsageError
from ..policies import load_policy
from ..report import say
from .request import Ask, Medium, ended, frame_count, frame_rule, method_text, read

OPTIONS = "pretrained, method, frames, fps, dtype, device, attn, template, kernels, weights"
METRICS = {  # of a Result, the mean over a run; seconds are those of the batch it was in
    "kept": lambda r: r.stats.ratio,
    "prefill_work": lambda r: r.stats.prefill_work,
    "video_seconds": lambda r: r.stats.seconds["video"],
    "vision_seconds": lambda r: r.stats.seconds["vision"],
    "prefill_seconds": lambda r: r.stats.seconds["prefill"],
    "first_token_seconds": lambda r: r.stats.seconds["first_token"],
    "decode_seconds": lambda r: r.stats.seconds["decode"],
    "kv_bytes": lambda r: r.stats.kv_bytes,
    "prompt_tokens": lambda r: r.stats.prompt_tokens,
}


def key(m: Medium) -> tuple[Any, ...]:
    """What says that a video is the same one."""
    source = m.source if isinstance(m.source, str) else id(m.source)
    return source, m.start, m.end


class ZipvlModel(lmms):
    """`--model zipvl --model_args pretrained=...,method=...,frames=...`"""

    is_simple = False

    def __init__(self, pretrained: str = "demo", method: str = "zipvl",
                 frames: int | None = None, max_frames_num: int | None = None,
                 fps: float | None = None, dtype: str = "auto", device: str = "auto",
                 batch_size: int | str = 1, attn: str = "auto", template: str | None = None,
                 kernels: str = "auto", weights: str = "full", **unknown: Any) -> None:  # fmt: skip
        """`pretrained`: folder or hub id, demo for the bundled model; `frames`, or max_frames_num
        as others call it: so many of each video, or at most so many at `fps`; `method` as for
        --method, in quotes where it has commas. Raises UsageError, ModelError."""
        super().__init__()
        if unknown:
            raise UsageError(
                f"model_args: zipvl has no {min(unknown)!r}: it takes {OPTIONS}; options of a "
                "method belong to its name, method='zipvl:tau=0.9,recent=32'"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("zipvl runs in one process: start lmms-eval without accelerate launch")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"--batch_size is {batch_size!r}: give a whole number above 0")
        count = frame_count(frames, max_frames_num, fps)
        self.fps, self.batch_size = fps, int(batch_size)
        self.policy = load_policy(method_text(str(method)))
        self.engine = load(
            None if pretrained == "demo" else pretrained, device, dtype, attn, template, False,
            weights, kernels,
        )  # fmt: skip
        self.frames, rule = frame_rule(count, fps, self.engine.model.vision.frames)
        self.device = self.engine.model.device
        self.seen: dict[tuple[Any, ...], Media] = {}  # videos of the last batch, read and encoded
        self.warned: set[str] = set()
        dtype = str(self.engine.model.dtype).removeprefix("torch.")
        say(f"zipvl: {pretrained}, {self.policy}; of a video {rule}; {dtype} on {self.device}")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. What cannot be answered ends the run."""
        answers: list[GenerationResult] = []
        sums, made, steps, began = Counter[str](), 0, 0, time.perf_counter()
        with tqdm(total=len(requests), desc="zipvl") as bar:
            for ask, r in self.answered(requests):
                counts = TokenCounts(r.stats.prompt_tokens, len(r.tokens))
                answers.append(GenerationResult(ended(r.text, ask.until), counts))
                sums.update({name: of(r) for name, of in METRICS.items()})
                made += len(r.tokens)
                steps += len(r.tokens) - (r.finish_reason == "length")  # a stop token takes one
                bar.update()
        spent, count = time.perf_counter() - began, len(answers)
        means = {name: sums[name] / max(1, count) for name in METRICS}
        means["decode_tokens_per_second"] = steps / max(sums["decode_seconds"], 1e-9)
        log_metrics(spent, made, made / max(spent, 1e-9), means | {"total_requests": count})
        return answers

    def answered(self, requests: list[Instance]) -> Iterator[tuple[Ask, Result]]:
        """Requests, read when their turn comes as they hold pictures, and their answers. Those that
        stand together and agree in how to generate make a batch."""
        asks = self.asks(requests)
        for (most, sampling), alike in groupby(asks, key=lambda a: (a.new_tokens, a.sampling)):
            while batch := list(islice(alike, self.batch_size)):
                prompts = [self.prepare(ask) for ask in batch]
                wanted = {key(m) for ask in batch for m in ask.media if m.kind == "video"}
                self.seen = {name: m for name, m in self.seen.items() if name in wanted}
                found = self.engine.generate(
                    prompts, self.policy, most, sampling.temperature, sampling.top_p,
                    sampling.top_k, [ask.seed for ask in batch],
                )  # fmt: skip
                assert isinstance(found, list)
                yield from zip(batch, found, strict=True)

    def asks(self, requests: Sequence[Instance]) -> Iterator[Ask]:
        """Requests, whose arguments are six for a chat model (lmms_eval/api/task.py). A task that
        wants several answers to a question repeats the request."""
        times = Counter[int]()
        for request in requests:
            _, to_messages, options, doc, task, split = request.args
            said = ChatMessages(messages=to_messages(self.task_dict[task][split][doc])).messages
            told = [{"role": m.role, "content": [vars(part) for part in m.content]} for m in said]
            yield read(told, options, times[id(request)])
            times[id(request)] += 1

    def prepare(self, ask: Ask) -> Inputs:
        """The prompt. A video that the batch before, or this one, has is not read again."""
        pictures = [m.source for m in ask.media if m.kind == "image"]
        videos = [m for m in ask.media if m.kind == "video"]
        fresh: list[Inputs] = []
        for m in videos:
            if key(m) not in self.seen:
                span = (self.frames, self.fps, m.start, m.end)
                fresh.append(self.engine.prepare("", (), m.source, *span))
                self.seen[key(m)] = fresh[-1].media[0]
        inputs = self.engine.prepare(ask.messages, pictures, [self.seen[key(m)] for m in videos])
        inputs.seconds += sum(i.seconds for i in fresh)
        inputs.vision_seconds += sum(i.vision_seconds for i in fresh)
        for warning in {*inputs.warnings} - self.warned:
            say(f"warning: {warning}")
            self.warned.add(warning)
        return inputs

    def clean(self) -> None:
        """Lets go of the model: what scores the answers may need the memory."""
        self.seen.clear()
        del self.engine
        super().clean()

    # Abstract in lmms-eval's class, for tasks of other kinds.

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("zipvl answers tasks that generate text, not loglikelihood ones")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("zipvl answers one round a question: leave out multi-round tasks")
