"""How weights start and how they move: Muon for the matrices, AdamW for the rest.

Muon (Keller Jordan, 2024) makes a matrix's momentum orthogonal. torch.optim.Muon works in bf16,
which most CPUs only emulate.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

RATE = 2e-3


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
    """Matrices of one shape are made orthogonal together; steps are as long as AdamW's."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

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
            assert p.grad is not None  # step() left the others out
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            moving.append(p.grad.lerp(momentum, 0.95))
        for p, update in zip(params, orthogonal(torch.stack(moving)), strict=True):
            p.mul_(1 - lr * decay).add_(update, alpha=-lr * size)


def initialise(model: nn.Module, depth: int) -> None:
    """Matrices scaled by their fan-in, those that end a residual branch by the depth as well."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            table = ("embedding.weight" in name and "patch" not in name) or "lm_head" in name
            nn.init.normal_(p, std=0.02 if table else p[0].numel() ** -0.5)
        if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
            p.data *= (2 * depth) ** -0.5


def optimisers(*modules: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for tables, heads, norms and biases."""
    named = [(n, p) for m in modules for n, p in m.named_parameters()]
    tables = ("embed", "lm_head", "kind", "colour", "covered")
    inner = [p for n, p in named if p.dim() == 2 and not any(t in n for t in tables)]
    known = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in known]
    return [
        Muon(inner, RATE),
        torch.optim.AdamW(rest, RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def update(opts: list[torch.optim.Optimizer], loss: Tensor, step: int, steps: int) -> None:
    """One step: warm-up over 50 steps, constant, linearly down to 2 % in the last 40 %."""
    rate = RATE * min(1.0, (step + 1) / 50, (1 - step / steps) / 0.4 + 0.02)
    loss.backward()
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
