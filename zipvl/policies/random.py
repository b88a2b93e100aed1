"""Random tokens at a fixed ratio: what any method that looks at attention has to beat.

`fixed` with noise in place of the attention mass, so the count and the `always` set are the same.
Fresh noise in every layer; the same seed and prompt length give the same tokens. No probes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..policy import Plan, View
from .fixed import Fixed


class Random(Fixed):
    """ratio 0.4, as `fixed`."""

    def __init__(self, ratio: float = 0.4, always: str = "text", fill: str = "zero", seed: int = 0):
        super().__init__(ratio, always=always, divisor="none", fill=fill, seed=seed)
        del self.recent, self.random  # no probes here

    def probe(self, view: View) -> Tensor | None:
        return None

    def plan(self, view: View) -> Plan:
        chance = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
        noise = torch.rand(1, view.length, generator=chance).to(view.k.device)
        return super().plan(replace(view, mass=noise))
