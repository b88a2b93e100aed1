"""Muon (Keller Jordan, 2024): momentum made orthogonal, for weight matrices; small models learn in
about half the steps of AdamW. torch.optim.Muon works in bf16, which most CPUs only emulate.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [n, a, b] by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = g.shape[1] > g.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are orthogonalised together. Step sizes match AdamW's at the same lr."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, decay: float = 0.01) -> None:
        super().__init__(params, dict(lr=lr, decay=decay))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                self._step(params, group["lr"], group["decay"], 0.2 * max(shape) ** 0.5)

    def _step(self, params: list[nn.Parameter], lr: float, decay: float, size: float) -> None:
        moving = []
        for p in params:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            moving.append(p.grad.lerp(momentum, 0.95))
        for p, update in zip(params, orthogonal(torch.stack(moving)), strict=True):
            p.mul_(1 - lr * decay).add_(update, alpha=-lr * size)
