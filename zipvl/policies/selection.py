"""What methods that rank tokens by probe rows share: probes, the always-kept set, how to store.

recent, random  probe rows: the most recent ones, and others drawn afresh in every layer, without
                replacement, by `seed`
always          text keeps the prompt's text tokens in every layer (a token left out attends to
                nothing there, and the question must); last keeps the last token; none neither
divisor         what a token's mass is divided by: the probe rows that see it (`probes`), all rows
                that see it (`all`, n - j, as the authors' ZipCache code does), or 1 (`none`)
fill            what left-out tokens receive (policy.py, Plan)
kv_bits         4: what is kept is stored at 4 bits; 4/2: nothing is dropped, kept tokens are
                stored at 4 bits, others at 2; `interval` new tokens are quantised at a time
"""

import torch
from torch import Tensor

from ..engine.storage import FULL, KVBits, Storage, as_bits, zipcache
from ..policy import FILLS, Policy, View

ALWAYS = ("text", "last", "none")
DIVISORS = ("probes", "all", "none")


class Selection(Policy):
    """Options and helpers; a subclass says how many tokens and which."""

    kv_bits: tuple[int, ...] = ()  # full precision
    interval = 100

    def __init__(self, recent: int, random: int, always: str, divisor: str, fill: str, seed: int,
                 kv_bits: KVBits, interval: int):  # fmt: skip
        check(min(recent, random) >= 0 < recent + random, "recent + random must be 1 probe or more")
        check(always in ALWAYS, f"always is {always!r}: use one of {', '.join(ALWAYS)}")
        check(divisor in DIVISORS, f"divisor is {divisor!r}: use one of {', '.join(DIVISORS)}")
        check(fill in FILLS, f"fill is {fill!r}: use one of {', '.join(FILLS)}")
        self.recent, self.random, self.seed = recent, random, seed
        self.always, self.divisor, self.fill = always, divisor, fill
        if kv_bits is not None:
            self.kv_bits, self.interval = as_bits(kv_bits), interval
            check(interval >= 1, f"interval is {interval}: give 1 new token or more")

    @property
    def storage(self) -> Storage:
        return zipcache(self.kv_bits, self.interval) if self.kv_bits else FULL

    def probe(self, view: View) -> Tensor | None:
        """Rows [P], sorted; all rows if T is no more than recent + random."""
        old = max(0, view.length - self.recent)
        chance = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
        some = torch.randperm(old, generator=chance)[: self.random].sort().values
        return torch.cat((some, torch.arange(old, view.length)))

    def columns(self, view: View) -> Tensor:
        """[T]: how many rows could look at each token."""
        if self.divisor == "all":
            return torch.arange(view.length, 0, -1, device=view.k.device)
        if self.divisor == "none" or view.seen is None:
            return torch.ones_like(view.positions)
        return view.seen.clamp(min=1)

    def forced(self, view: View) -> Tensor:
        """[T] bool: tokens that stay whatever their score."""
        keep = torch.zeros_like(view.is_visual)
        if self.always == "text":
            keep = ~view.is_visual
        if self.always != "none":
            keep[-1] = True
        return keep


def check(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)
