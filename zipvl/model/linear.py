"""Linear layers that read their weights at the memory's speed when there are few rows.

Decoding multiplies every weight by one row per sequence, so it is as fast as weights can be read.
PyTorch's F.linear on CPUs does not reach that speed for few rows; the same product written as
matrix-vector, or as W x^T, does (docs/results/: `bench.py linear`). Elsewhere this is nn.Linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 256  # rows up to which W x^T was faster


class Linear(nn.Linear):
    """nn.Linear, x [rows, in] -> [rows, out], with forms for few rows on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        few = x.ndim == 2 and len(x) <= FEW and x.device.type == "cpu"
        if not few or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        one = len(x) == 1
        out = torch.mv(self.weight, x[0])[None] if one else torch.mm(self.weight, x.T).T
        return out if self.bias is None else out + self.bias


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the memory of `gate` where no gradient will ask for it again."""
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)
