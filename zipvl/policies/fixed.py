"""Fixed ratio: ZipVL without its idea, the baseline of the paper's own ablation (arXiv 2410.08584).

Every layer keeps the same share of the prompt; probes, scores and what happens to left-out tokens
are those of `zipvl`. Where the paper is silent:
  count   `ratio` is the share kept in all, the `always` set included, so that a ratio measured with
          `zipvl` can be given here; where that set alone is larger, it is what is kept
`ratio=0.7,kv_bits=4/2` is the paper's ablation of its cache, ZipCache with a hand-set ratio.
"""

from torch import Tensor, inf

from ..engine.storage import KVBits
from ..policy import View
from .selection import Selection, check
from .zipvl import ZipVL


class Fixed(ZipVL):
    """ratio 0.4, near the 42.1 % of the paper's ablation on Video-MME."""

    def __init__(self, ratio: float = 0.4, recent: int = 64, random: int = 64, always: str = "text",
                 divisor: str = "probes", fill: str = "zero", seed: int = 0,
                 kv_bits: KVBits = None, interval: int = 100):  # fmt: skip
        check(0 < ratio <= 1, f"ratio is {ratio}: give the share to keep, above 0 and up to 1")
        self.ratio = ratio  # in place of tau
        Selection.__init__(self, recent, random, always, divisor, fill, seed, kv_bits, interval)

    def keeps_all(self) -> bool:
        return self.ratio >= 1

    def budget(self, mass: Tensor) -> int:
        return max(1, round(self.ratio * len(mass)))

    def score(self, view: View, mass: Tensor) -> Tensor:
        return super().score(view, mass).masked_fill(self.forced(view), inf)
