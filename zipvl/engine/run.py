"""One call of generate: prefill, then a token a step for every sequence until it stops."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from ..model.attention import Pack
from ..policy import Policy
from .inputs import Inputs
from .memory import memory_errors
from .sampler import Sampling
from .stats import Clock, LayerStats, Stats, layer_rows, peak_memory, restart_peak

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Result:
    """An answer; the stop token is not in `tokens`."""

    text: str
    tokens: list[int]
    stats: Stats
    finish_reason: str  # stop | length


class Run:
    """The state of one generation: lists with one entry a sequence. Sequences that stop leave."""

    def __init__(self, engine: "Engine", inputs: list[Inputs], policy: Policy, sampling: Sampling):
        self.engine, self.inputs, self.policy, self.sampling = engine, inputs, policy, sampling
        self.tokens: list[list[int]] = [[] for _ in inputs]
        self.reasons = ["length"] * len(inputs)
        self.seconds: dict[str, float] = {"video": sum(i.seconds for i in inputs)}
        self.layers: list[LayerStats] = []
        self.room = 0  # new tokens the caches have places for

    @torch.inference_mode()
    def steps(self, max_new_tokens: int, ignore_eos: bool) -> Iterator[list[tuple[int, int]]]:
        """Yields after each step the (sequence, token) pairs it made, stop tokens left out."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
        engine, model = self.engine, self.engine.model
        self.check_window(max_new_tokens)
        engine.step.check(self.policy)
        restart_peak(model.device)
        clock, self.room = Clock(model.device), max_new_tokens
        out = engine.prefill(self.inputs, self.policy, max_new_tokens, self.seconds)
        self.layers, caches = out.layers, out.caches
        logits = self.first_logits(out.hidden, out.pack)
        decode = engine.step(model, caches, self.policy, engine.attend)
        generators = [self.sampling.generator() for _ in self.inputs]
        stops = frozenset() if ignore_eos else engine.chat.stop_ids
        live = list(range(len(self.inputs)))
        for step in range(max_new_tokens):
            with clock("decode"):
                logits[:, engine.chat.vocab_size :] = -torch.inf  # rows of padding, not tokens
                new = [
                    self.sampling.choose(row, generators[b])
                    for b, row in zip(live, logits, strict=True)
                ]
            stay = [i for i, token in enumerate(new) if token not in stops]
            for b in set(live) - {live[i] for i in stay}:
                self.reasons[b] = "stop"
            new, kept = [new[i] for i in stay], [live[i] for i in stay]
            for b, token in zip(kept, new, strict=True):
                self.tokens[b].append(token)
            self.seconds["decode"] = clock.seconds["decode"]
            yield list(zip(kept, new, strict=True))
            if not kept or step + 1 == max_new_tokens:
                return
            advice = "ask for fewer --max-new-tokens, or use fewer --frames"
            with clock("decode"), memory_errors(model.device, "decoding", advice):
                if kept != live:
                    caches, live = [cache.drop(stay) for cache in caches], kept
                    decode = engine.step(model, caches, self.policy, engine.attend)
                ids = torch.tensor(new, device=model.device)
                at = [len(self.inputs[b]) + step for b in live]
                logits = decode(ids, torch.tensor(at, device=model.device))

    def check_window(self, max_new_tokens: int) -> None:
        """Answers, too, must stay inside a sliding window; the last token is never attended to."""
        window = self.engine.config.text.sliding_window
        longest = max(len(i) for i in self.inputs)
        if window and longest + max_new_tokens - 1 > window:
            raise UsageError(
                f"{longest} prompt tokens and {max_new_tokens} new ones do not fit this model's "
                f"attention window of {window}: ask for fewer --max-new-tokens"
            )

    def first_logits(self, hidden: Tensor, pack: Pack) -> Tensor:
        """Logits [B, V] of each prompt's last token, checked to be numbers."""
        ends = pack.spans.edges[1:].long() - 1
        lengths = torch.tensor([len(i) for i in self.inputs], device=ends.device)
        if not torch.equal(pack.positions[ends], lengths - 1):
            raise UsageError(
                "the method dropped the prompt's last token, which makes the first answer token"
            )
        logits = self.engine.model.logits(hidden[ends])
        if not torch.isfinite(logits).all():
            raise ModelError(
                "the model's first logits are NaN or infinite: with float16 use --dtype bfloat16 "
                "or float32; with those, the weights are damaged"
            )
        return logits

    def result(self, sequence: int) -> Result:
        """What sequence number `sequence` of the batch answered."""
        inputs, tokens, text = self.inputs[sequence], self.tokens[sequence], self.engine.config.text
        dtype = self.engine.model.dtype
        per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * dtype.itemsize
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
                layers=layer_rows(self.layers, sequence, len(inputs)),
                kv_bytes_dense=(len(inputs) + self.room) * per_token,
                peak_memory=peak_memory(self.engine.model.device),
                frames=[
                    {"index": i, "time": t}
                    for m in inputs.media if m.clip
                    for i, t in zip(m.clip.indices, m.clip.times, strict=True)
                ],
            ),
        )  # fmt: skip
