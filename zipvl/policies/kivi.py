"""KIVI (arXiv 2402.02750): all tokens at 2 (or 4) bits, keys per channel, values per token.

Prefill is dense, nothing is dropped and nothing is scored. Steps are shared by `group` consecutive
tokens of a key channel, and by `group` consecutive channels of a value. Keys wait in full precision
until `residual` of them are there and are then quantised together; the newest `residual` values
always are in full precision, so while decoding one value is quantised for each new one.
The authors advise 4 bits for models whose query heads share key/value heads.
Deviation: a group of equal numbers comes back as it was (their code divides by zero).
"""

from ..engine.storage import Storage, as_bits, kivi
from ..policy import Policy
from .selection import check


class KIVI(Policy):
    """2 bits, groups of 32, residual 128: the authors' main setting."""

    def __init__(self, kv_bits: int = 2, group: int = 32, residual: int = 128):
        check(group >= 1, f"group is {group}: give 1 or more")
        check(
            residual >= group and residual % group == 0,
            f"residual is {residual}: give a multiple of the group of {group}",
        )
        check(len(as_bits(kv_bits)) == 1, f"kv_bits is {kv_bits}: give one bit width, 2, 4 or 8")
        self.kv_bits, self.group, self.residual = kv_bits, group, residual

    @property
    def storage(self) -> Storage:
        return kivi(self.kv_bits, self.group, self.residual)
