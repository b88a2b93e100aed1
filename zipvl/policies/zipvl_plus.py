"""`zipvl+`, our variant: a token left out of a layer's attention receives the output of the nearest
earlier kept token instead of nothing (Plan.fill previous). Same tokens, same attention work."""

from ..engine.storage import KVBits
from .zipvl import ZipVL


class ZipVLPlus(ZipVL):
    """The defaults of `zipvl`."""

    def __init__(self, tau: float = 0.975, recent: int = 64, random: int = 64, always: str = "text",
                 divisor: str = "probes", seed: int = 0, kv_bits: KVBits = None,
                 interval: int = 100):  # fmt: skip
        super().__init__(tau, recent, random, always, divisor, "previous", seed, kv_bits, interval)
