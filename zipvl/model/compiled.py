"""`--compile`: what a prefill does row by row, each as one kernel made by torch.compile.

PyTorch runs norm, rotation and gate as several kernels that each read and write all rows. Compiled
from the very same functions they pass over memory once. Few rows, as in decoding, and training go
the plain way, so no code is made for every batch size and none of it enters a CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UsageError
from .decoder import Decoder, RMSNorm, rms_norm
from .linear import FEW, gated
from .rope import rotate


def compiled(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`plain` for any number of rows of its first argument; made at the first call."""
    fused = torch.compile(plain, dynamic=True)

    def choose(x: Tensor, *others: Tensor | float) -> Tensor:
        few = len(x) <= FEW or torch.is_grad_enabled()
        return (plain if few else fused)(x, *others)

    return choose


@torch.inference_mode()
def compile_rows(text: Decoder) -> None:
    """Gives a decoder the compiled forms, made now. Raises UsageError where that is impossible."""
    config, weight, rows = text.config, text.norm.weight, FEW + 1
    D, make = config.head_dim, weight.new_zeros
    x, cos, wide = make(2 * rows, len(weight)), make(2 * rows, 1, D // 2), make(rows, len(weight))
    sin = cos.clone()  # two arguments that are one would be taken for always one
    try:
        norm, turn, gate = compiled(rms_norm), compiled(rotate), compiled(gated)
        for part in (slice(rows), slice(rows, None)):  # a chunk at the start of its tensor and not
            norm(x[part], weight, config.rms_norm_eps)
            for heads in (config.num_heads, config.num_kv_heads):
                turn(make(rows, heads, D), cos[part], sin[part])
        if weight.device.type == "cpu":
            gate = gated  # in place it is faster than what the compiler makes of it
        gate(wide, wide.clone())
    except Exception as e:  # whatever the compiler's many layers raise
        why = (str(root(e)).strip() or type(e).__name__).splitlines()[0]
        raise UsageError(
            f"--compile cannot be used here ({why}): install the compiler that torch.compile "
            "needs (g++, clang or cl for a CPU, Triton for CUDA), or leave out --compile"
        ) from None
    for norms in (m for m in text.modules() if isinstance(m, RMSNorm)):
        norms.compute = norm
    for block in text.blocks():
        block.self_attn.rotate, block.mlp.gated = turn, gate


def root(e: BaseException) -> BaseException:
    return root(e.__cause__) if e.__cause__ else e
