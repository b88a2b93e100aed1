"""The model class that lmms-eval makes (its interface: lmms_eval/api/model.py, chat models)."""

import os
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..engine.inputs import Inputs, Media
from ..engine.load import load
from ..engine.run import FRAMES, Result
from ..engine.sampler import Sampling
from ..errors import UsageError
from ..policies import load_policy
from ..report import say
from .request import Ask, Medium, ended, read

METRICS = {  # of a Result, the mean over a run
    "kept": lambda r: r.stats.ratio,
    "prefill_work": lambda r: r.stats.prefill_work,
    "prefill_seconds": lambda r: r.stats.seconds["prefill"],
    "first_token_seconds": lambda r: r.stats.seconds["first_token"],
    "decode_tokens_per_second": lambda r: r.stats.decode_rate,
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
                 kernels: str = "auto", weights: str = "full", max_batch_size: Any = None,
                 **unknown: Any) -> None:  # fmt: skip
        """`pretrained`: folder or hub id, demo for the bundled model; `frames`, or max_frames_num
        as others call it: so many of each video, or at most so many at `fps`; `method` as for
        --method, in braces where it has commas. Raises UsageError, ModelError."""
        super().__init__()
        if unknown:
            known = (
                "pretrained, method, frames, fps, dtype, device, attn, template, kernels, weights"
            )
            raise UsageError(f"model_args: zipvl has no {min(unknown)!r}: it takes {known}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("zipvl runs in one process: start lmms-eval without accelerate launch")
        if frames and max_frames_num and frames != max_frames_num:
            raise UsageError(f"model_args: frames is {frames}, max_frames_num {max_frames_num}")
        self.policy = load_policy(str(method))
        self.frames, self.fps, self.batch_size = frames or max_frames_num, fps, int(batch_size)
        if self.frames is None and fps is None:
            self.frames = FRAMES
        self.engine = load(
            None if pretrained == "demo" else pretrained, device, dtype, attn, template, False,
            weights, kernels,
        )  # fmt: skip
        self.device = self.engine.model.device
        self.seen: dict[tuple[Any, ...], Media] = {}  # videos of the last batch, read and encoded
        most = f", at most {self.frames}" if self.frames else ""
        rule = f"{fps:g} frames a second{most}" if fps else f"{self.frames} frames, evenly spread"
        dtype = str(self.engine.model.dtype).removeprefix("torch.")
        say(f"zipvl: {self.policy}; of a video {rule}; {dtype} on {self.device}")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. What cannot be answered ends the run."""
        asks = [self.ask(request) for request in requests]
        results: list[Result] = []
        began = time.perf_counter()
        with tqdm(total=len(asks), desc="zipvl") as bar:
            for alike, some in groupby(asks, key=lambda a: (a.new_tokens, a.sampling)):
                together = list(some)
                for i in range(0, len(together), self.batch_size):
                    batch = together[i : i + self.batch_size]
                    results += self.answer(batch, *alike)
                    bar.update(len(batch))
        spent, made = time.perf_counter() - began, sum(len(r.tokens) for r in results)
        means = {
            name: sum(of(r) for r in results) / max(1, len(results)) for name, of in METRICS.items()
        }
        log_metrics(spent, made, made / max(spent, 1e-9), means | {"total_requests": len(results)})
        return [
            GenerationResult(
                ended(r.text, ask.until), TokenCounts(r.stats.prompt_tokens, len(r.tokens))
            )
            for ask, r in zip(asks, results, strict=True)
        ]

    def ask(self, request: Instance) -> Ask:
        """A request, whose arguments are six for a chat model (lmms_eval/api/task.py)."""
        _, to_messages, options, doc, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc])).messages
        told = [{"role": m.role, "content": [vars(part) for part in m.content]} for m in messages]
        return read(told, options)

    def answer(self, batch: Sequence[Ask], new_tokens: int, sampling: Sampling) -> list[Result]:
        """Answers to requests that agree in how to generate."""
        prompts = [self.prepare(ask) for ask in batch]
        wanted = {key(m) for ask in batch for m in ask.media if m.kind == "video"}
        self.seen = {name: media for name, media in self.seen.items() if name in wanted}
        found = self.engine.generate(
            prompts, self.policy, new_tokens, sampling.temperature, sampling.top_p,
            sampling.top_k, sampling.seed,
        )  # fmt: skip
        return found if isinstance(found, list) else [found]

    def prepare(self, ask: Ask) -> Inputs:
        pictures = [m.source for m in ask.media if m.kind == "image"]
        videos = [self.video(m) for m in ask.media if m.kind == "video"]
        return self.engine.prepare(ask.messages, pictures, videos)

    def video(self, m: Medium) -> Media:
        """Its frames, of which a question after the other finds the features made."""
        if key(m) not in self.seen:
            inputs = self.engine.prepare("", (), m.source, self.frames, self.fps, m.start, m.end)
            self.seen[key(m)] = inputs.media[0]
        return self.seen[key(m)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("zipvl answers tasks that generate text, not loglikelihood ones")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("zipvl answers one round a question: leave out multi-round tasks")
