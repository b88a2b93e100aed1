"""From logits to the next token: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: give a share above 0 and up to 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}: give 0 (off) or more")
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}: give a whole number of at most 63 bits")

    def generator(self) -> torch.Generator:
        """One a sequence, on the CPU: the same seed draws the same tokens on every device."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from float32 logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, order = logits.cpu().sort(descending=True)
        if self.top_k:
            values = values[: self.top_k]
        # float64 and the largest logit first at 0, so that no temperature is too small
        probs = ((values.double() - values[0]) / self.temperature).softmax(0)
        if self.top_p < 1:
            before = probs.cumsum(0) - probs  # mass of the likelier tokens; the first is always in
            probs = probs.masked_fill(before >= self.top_p, 0)
        return int(order[torch.multinomial(probs, 1, generator=generator)])
