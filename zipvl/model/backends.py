"""Which attention kernel a machine uses: FlashAttention-2 as PyTorch carries it, cuDNN's on Hopper,
or a FlashAttention package. Each is an Attend (kernels.py) and equals attend_sdpa.
"""

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UsageError
from .batch import Spans
from .kernels import Attend, attend_sdpa, has_flash, heads


def attend_torch_flash(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """FlashAttention-2 as every CUDA build of PyTorch carries it: one varlen call for the batch.
    Slots are bounded by the capacity, which unlike lengths is the same at every step (a graph).
    The kernel adds nothing to scores, so summaries are a call of their own."""
    rows, slots = len(q), k_spans.lengths[0]
    if len(k_spans) == 1 and 1 < rows < slots and k_spans.merged is None:
        # Of packed sequences a kernel does not cut the slots into parts; this form does, which for
        # a question over a long cache is 8 times as fast.
        alone = (q[None], k[None, :slots], v[None, :slots], None, None, rows, slots)
        return torch.ops.aten._flash_attention_forward(*alone, 0.0, True, False)[0][0]
    longest = max(q_spans.lengths), max(k_spans.capacity)
    flash = partial(torch.ops.aten._flash_attention_forward, q, k, v, q_spans.edges)
    if k_spans.merged is None:
        used = k_spans.used if k_spans.room else None
        return flash(k_spans.edges, *longest, 0.0, True, False, seqused_k=used)[0]
    merged, behind = k_spans.far, k_spans.edges + F.pad(k_spans.far, (0, 1))
    far, far_mass = flash(k_spans.edges, *longest, 0.0, False, False, seqused_k=merged)[:2]
    own, own_mass = flash(behind, *longest, 0.0, True, False, seqused_k=k_spans.used - merged)[:2]
    stand = k_spans.stand.masked_fill(merged == 0, -torch.inf)  # what is not there has no mass
    stand = stand.repeat_interleave(q_spans.used, output_size=len(q))  # [rows]
    far_mass = torch.where(stand == -torch.inf, stand, far_mass + stand)  # the kernel's is +inf
    return joined(own, own_mass, far, far_mass)


def joined(a: Tensor, a_mass: Tensor, b: Tensor, b_mass: Tensor) -> Tensor:
    """Attention over two sets of slots from that over each, [rows, H, D], and from the logarithms
    of their softmax's denominators [H, rows]."""
    share = torch.sigmoid(b_mass - a_mass).T[..., None]  # of b
    return torch.lerp(a.float(), b.float(), share).to(a.dtype)


def attend_package(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans,
                   package: str) -> Tensor:  # fmt: skip
    """A FlashAttention package. A cache with room or with summaries goes to PyTorch's kernel."""
    if k_spans.room or k_spans.merged:
        return attend_torch_flash(q, k, v, q_spans, k_spans)
    function = import_module(package).flash_attn_varlen_func
    longest = max(q_spans.lengths), max(k_spans.lengths)
    out = function(q, k, v, q_spans.edges, k_spans.edges, *longest, causal=True)
    return out[0] if isinstance(out, tuple) else out


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """cuDNN's kernel for one long prompt, which on Hopper is 1.8 times as fast as FlashAttention-2;
    anything else goes to that. cuDNN plans 50 ms for each new length, so lengths are rounded up, to
    one of eight between powers of two: causal rows do not see what is behind them."""
    n = len(q)
    if len(q_spans) > 1 or len(k) != n or n < LONG:
        return attend_torch_flash(q, k, v, q_spans, k_spans)
    pad = -n % (1 << n.bit_length() - 4)
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)).transpose(0, 1)[None] for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return heads(q, k, v, None, causal=True)[0].transpose(0, 1)[:n]


LONG = 16384  # tokens from which planning costs cuDNN less than it saves in 28 layers
PACKAGES = {"flash-attn-3": "flash_attn_interface", "flash-attn": "flash_attn"}
BACKENDS: dict[str, Attend] = {  # the fastest first
    "flash-attn-3": partial(attend_package, package=PACKAGES["flash-attn-3"]),
    "cudnn": attend_cudnn,
    "flash-attn": partial(attend_package, package=PACKAGES["flash-attn"]),
    "torch-flash": attend_torch_flash,
    "sdpa": attend_sdpa,
}


def usable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a backend can run for these tensors on this machine."""
    if name == "sdpa":
        return True
    if not has_flash(device, dtype, head_dim):
        return False
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if name == "cudnn":
        return hopper and head_dim <= 128 and torch.backends.cuda.cudnn_sdp_enabled()
    return name == "torch-flash" or ((hopper or name == "flash-attn") and installed(PACKAGES[name]))


def installed(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def pick(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend]:
    """The backend called `name`, or for "auto" the fastest one that is usable."""
    if name == "auto":
        name = next(n for n in BACKENDS if usable(n, device, dtype, head_dim))
    if name not in BACKENDS:
        raise UsageError(f"unknown attention backend {name!r}: use auto, {', '.join(BACKENDS)}")
    if not usable(name, device, dtype, head_dim):
        raise UsageError(
            f"attention backend {name!r} cannot run here (device {device}, dtype {dtype}, head "
            f"size {head_dim}): use --attn auto"
        )
    return name, BACKENDS[name]
