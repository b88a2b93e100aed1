"""KIVI (arXiv 2402.02750): all tokens at 2 (or 4) bits, keys per channel, values per token.

Prefill is dense, nothing is dropped and nothing is scored. Steps are shared by `group` consecutive
tokens of a key channel, and by `group` consecutive channels of a value. Keys wait in full precision
until `residual` of them are there and are then quantised together; the newest `residual` values
always are in full precision, so while decoding one value is quantised for each new one.
The authors advise 4 bits for models whose query heads share key/value heads.
Phase: the cache, behind a dense prefill and while decoding. What leaves: bits, no token.
Source: paper and code. Deviation: a group of equal numbers comes back as it was (their code divides
by zero).
"""

from dataclasses import dataclass

from ..model.cache_quant import as_bits, kivi
from ..policy import Policy, check


@dataclass(repr=False)
class KIVI(Policy):
    """All tokens stored at 2 bits, groups of 32, residual 128: the authors' main setting."""

    kv_bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check(self.group >= 1, f"group is {self.group}: give 1 or more")
        check(
            self.residual >= self.group and self.residual % self.group == 0,
            f"residual is {self.residual}: give a multiple of the group of {self.group}",
        )
        one = len(as_bits(self.kv_bits)) == 1
        check(one, f"kv_bits is {self.kv_bits}: give one bit width, 2, 4 or 8")
        self.storage = kivi(self.kv_bits, self.group, self.residual)
