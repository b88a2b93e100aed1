"""From logits to the next tokens: greedy, temperature, top-k, top-p, for a batch where it lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from ..errors import UsageError

NUCLEUS = 1024  # tokens that top_p looks at first: nearly always enough, and no sort of them all
COLDEST = 1e-30  # a smaller temperature is the same as this in float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in.
    `seed` is one for all sequences of a batch, each as if it were alone, or one for each."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed]
        for name, value, kind in (
            ("temperature", self.temperature, Real), ("top_p", self.top_p, Real),
            ("top_k", self.top_k, Integral), *(("seed", seed, Integral) for seed in seeds),
        ):  # fmt: skip
            if not isinstance(value, kind):
                whole = "whole " if kind is Integral else ""
                raise UsageError(f"{name} is {value!r}: give a {whole}number")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: give a share above 0 and up to 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}: give 0 (off) or more")
        for seed in seeds:
            if not -(2**63) <= seed < 2**63:
                raise UsageError(f"seed is {seed}: give a whole number of at most 63 bits")

    def generators(self, count: int) -> list[torch.Generator]:
        """One a sequence, on the CPU: the same seed draws the same tokens on every device."""
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed] * count
        if len(seeds) != count:
            raise UsageError(f"{len(seeds)} seeds for {count} prompts: give one, or one for each")
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """The next token of each sequence from float32 logits [B, V]; one draw a generator."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        drawn = [torch.rand(1, dtype=torch.float64, generator=g) for g in generators]
        tokens, weights = self.support(logits.cpu() if logits.device.type == "mps" else logits)
        reach = weights.cumsum(-1, dtype=torch.float64)  # [B, n]
        share = torch.stack(drawn).to(reach.device) * reach[:, -1:]
        place = torch.searchsorted(reach, share, right=True).clamp(max=reach.shape[1] - 1)
        return (place if tokens is None else tokens.gather(-1, place))[:, 0].tolist()

    def support(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Tokens [B, n] that may be drawn, None: all in order, and their weights [B, n]: float64
        and the likeliest first, where top_k or top_p left some out; 0 where it may not be drawn."""
        heat, V = max(self.temperature, COLDEST), logits.shape[-1]
        best = logits.amax(-1, keepdim=True)
        if not self.top_k and self.top_p == 1:
            return None, logits.sub(best).div_(heat).exp_()
        n, few = min(self.top_k or NUCLEUS, V), bool(self.top_k) or V <= NUCLEUS
        while True:
            values, tokens = logits.topk(n)
            weights = values.double().sub_(best).div_(heat).exp_()
            if self.top_p == 1:
                return tokens, weights
            total = weights.sum(-1, keepdim=True)
            if not few:
                total = logits.sub(best).div_(heat).exp_().sum(-1, keepdim=True).double()
            before = (weights.cumsum(-1) - weights) / total  # of the likelier ones; the first is in
            if few or n == V or bool((before[:, -1] >= self.top_p).all()):
                return tokens, weights.masked_fill_(before >= self.top_p, 0)
            n = min(4 * n, V)
