"""Weights in 8 or 4 bits for decoding on a CPU, through PyTorch's own packed products.

Decoding reads every weight once a step, so fewer bytes are fewer milliseconds. Many rows are
another matter: unpacking then costs more than it saves, and a prefill would be many times slower.
So each layer keeps its weight in full for prefill and gains a packed copy for up to FEW rows:
memory grows, by 1 byte (int8) or 0.56 bytes (int4) a weight. Both products take bfloat16 rows
(their float32 forms are slow), whatever the model's dtype.

    int8    w = q s, one scale s an output row, symmetric
    int4    w = (q - 8) s + z, scale and middle for each GROUP inputs of an output row

A batch of more than FEW sequences decodes with full weights, so its answers may differ from those
given one by one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .linear import Linear

FEW = 4  # rows up to which the packed products were faster
GROUP = 64  # inputs that share a scale at 4 bits
KINDS = ("full", "int8", "int4")


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> codes int8 [out, in], scales bfloat16 [out]."""
    w = weight.float()
    scales = (w.abs().amax(1) / 127).clamp_min(1e-20).bfloat16()
    codes = (w / scales.float()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> codes in the order of this machine's kernel, and scale and middle
    bfloat16 [in / GROUP, out, 2]."""
    w = weight.float().unflatten(1, (-1, GROUP))  # [out, in / GROUP, GROUP]
    low, high = w.aminmax(dim=2)
    scales = ((high - low) / 15).clamp_min(1e-20).bfloat16()
    middles = (low + 8 * scales.float()).bfloat16()
    codes = ((w - middles.float()[..., None]) / scales.float()[..., None]).round() + 8
    codes = codes.clamp(0, 15).to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.stack((scales, middles), dim=-1).transpose(0, 1).contiguous()


def times_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, codes, scales)


def times_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scales)


Pack = Callable[[Tensor], tuple[Tensor, Tensor]]
Times = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Pack, Times]] = {
    "int8": (pack_int8, times_int8),
    "int4": (pack_int4, times_int4),
}


class PackedLinear(Linear):
    """The layer `full` with its own weight and bias, and a packed copy for up to FEW rows."""

    def __init__(self, full: Linear, kind: str):
        super().__init__(full.in_features, full.out_features, bias=False, device="meta")
        self.weight, self.bias = full.weight, full.bias
        pack, self.times = FORMS[kind]
        self.codes, self.scales = pack(full.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or len(x) > FEW or torch.is_grad_enabled():
            return super().forward(x)
        out = self.times(x.bfloat16(), self.codes, self.scales).to(x.dtype)
        return out if self.bias is None else out + self.bias

    @property
    def packed_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def check_kind(kind: str, device: torch.device) -> None:
    """Raises UsageError for an unknown kind, and for packed weights where no CPU computes."""
    if kind not in KINDS:
        raise UsageError(f"unknown weights {kind!r}: use {', '.join(KINDS)}")
    if kind != "full" and device.type != "cpu":
        raise UsageError(
            f"weights {kind!r} are for decoding on a CPU and the device is {device}: leave out "
            "--weights, or use --device cpu"
        )


def fits(layer: Linear, kind: str) -> bool:
    """Whether the packed product takes this shape; other layers stay as they are."""
    return kind == "int8" or (layer.out_features % 16 == 0 and layer.in_features % GROUP == 0)


def pack_weights(model: nn.Module, kind: str) -> int:
    """Gives the decoder's linear layers and the head packed copies; returns their bytes."""
    if kind == "full":
        return 0
    decoder = [
        (n, m) for n, m in model.named_modules() if not n.startswith(("vision", "projector"))
    ]
    layers = {name: m for name, m in decoder if isinstance(m, Linear) and fits(m, kind)}
    packed = {name: PackedLinear(m, kind) for name, m in layers.items()}
    for name, layer in packed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return sum(layer.packed_bytes for layer in packed.values())
