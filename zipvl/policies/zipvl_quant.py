"""ZipVL's first version (arXiv 2410.08584 v1, October 2024): nothing leaves the cache.

Prefill attention is that of `zipvl`, among the tokens T that cover `tau` of a layer's attention
mass. The cache holds T at 4 bits and all others at 2, in ZipCache's form (engine/quant.py), and
decoding attends over everything. After every `interval` new tokens the newest query sorts these the
same way (Algorithm 1); until then they wait in full precision.
Where the paper is silent:
  threshold  among new tokens tau x their own mass, not tau x 100
  steps      the paper's text on its quantiser is not public; the authors' earlier ZipCache, which
             its table names, is taken; each set of tokens has its own steps
"""

from ..engine.storage import KVBits
from .selection import check
from .zipvl import ZipVL


class ZipVLQuant(ZipVL):
    """4 and 2 bits, 100 new tokens at a time, as published; one width is for all tokens."""

    def __init__(self, tau: float = 0.975, recent: int = 64, random: int = 64, always: str = "text",
                 divisor: str = "probes", fill: str = "zero", seed: int = 0,
                 kv_bits: KVBits = (4, 2), interval: int = 100):  # fmt: skip
        super().__init__(tau, recent, random, always, divisor, fill, seed, kv_bits, interval)
        check(len(self.kv_bits) > 0, "kv_bits is missing: give one or two bit widths, such as 4/2")
        self.kv_bits = (self.kv_bits * 2)[:2]
