"""What makes things faster behind the readable path, each tested equal to it.

--weights   packed products    weights in the order in which a CPU's products read them
                               a copy of each weight in 8 or 4 bits, for decoding on a CPU
--kernels   fused kernels      on CUDA: norm, rotation, gate and probe scores in Triton
            a CUDA graph       a decode step that is the same at every step, recorded and replayed
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..linear import GatedMLP, Linear, RMSNorm
from ..model.attention import Attention
from ..model.batch import Batch, Spans, ahead, moved, rope_table
from ..model.cache import Cache
from ..model.decoder import Decoder
from ..model.kernels import Attend, attend_sdpa, sdpa
from ..model.vlm import VLM
from ..policy import Notes, Policy
from .run import Step

# --- weights in the order of products -------------------------------------------------------------
#
# A product of few rows loses most of its time on a weight that lies row by row. oneDNN lays it out
# in blocks, once, the same numbers in the same bytes: 1 to 16 rows are two to four times faster and
# many rows no slower. Blocks replace the weight; only an embedding that is the head stays, too.

FEW_ROWS = 8  # the layout is made for so many; it is the same one for 2 to 2,048


class BlockedLinear(Linear):
    """The layer `full` with its weight in blocks, for any number of rows; without gradients."""

    def __init__(self, full: Linear):
        super().__init__(full.in_features, full.out_features, bias=False, device="meta")
        blocks = torch.ops.mkldnn._reorder_linear_weight(full.weight.detach(), FEW_ROWS)
        self.weight, self.bias = nn.Parameter(blocks, requires_grad=False), full.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


# --- weights in 8 or 4 bits -----------------------------------------------------------------------
#
# Decoding reads every weight once a step, so fewer bytes are fewer milliseconds. Many rows are
# another matter: unpacking then costs more than it saves, and a prefill would be many times slower.
# So each layer keeps its weight in full for prefill and gains a packed copy for up to PACKED_ROWS
# rows: memory grows, by 1 byte (int8) or 0.56 bytes (int4) a weight. Both products take bfloat16
# rows (their float32 forms are slow), whatever the model's dtype.
#
#     int8    w = q s, one scale s an output row, symmetric
#     int4    w = (q - 8) s + z, scale and middle for each GROUP inputs of an output row
#
# A batch of more sequences than that decodes with full weights, so its answers may differ from
# those given one by one.

PACKED_ROWS = 4  # rows up to which the packed products were faster
GROUP = 64  # inputs that share a scale at 4 bits
KINDS = ("full", "packed", "int8", "int4")


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


Packing = Callable[[Tensor], tuple[Tensor, Tensor]]
Times = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Packing, Times]] = {
    "int8": (pack_int8, times_int8),
    "int4": (pack_int4, times_int4),
}


class PackedLinear(Linear):
    """The layer `full` with its own weight and bias, and a packed copy for few rows."""

    def __init__(self, full: Linear, kind: str):
        super().__init__(full.in_features, full.out_features, bias=False, device="meta")
        self.weight, self.bias = full.weight, full.bias
        pack, self.times = FORMS[kind]
        self.codes, self.scales = pack(full.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or len(x) > PACKED_ROWS or torch.is_grad_enabled():
            return super().forward(x)
        out = self.times(x.bfloat16(), self.codes, self.scales).to(x.dtype)
        return out if self.bias is None else out + self.bias

    @property
    def packed_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def check_kind(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError for an unknown kind, and for one that cannot be used here in `dtype`."""
    if kind not in KINDS:
        raise UsageError(f"unknown weights {kind!r}: use {', '.join(KINDS)}")
    if kind != "full" and device.type != "cpu":
        raise UsageError(
            f"weights {kind!r} are for decoding on a CPU and the device is {device}: leave out "
            "--weights, or use --device cpu"
        )
    if kind == "packed":
        try:
            BlockedLinear(Linear(16, 16, dtype=dtype))
        except (RuntimeError, AttributeError):  # no such products; PyTorch without oneDNN
            raise UsageError(
                f"this CPU cannot use packed weights in {str(dtype).removeprefix('torch.')}: leave "
                "out --weights, or use --dtype float32"
            ) from None


def fits(layer: Linear, kind: str) -> bool:
    """Whether the packed product takes this shape; other layers stay as they are."""
    return kind != "int4" or (layer.out_features % 16 == 0 and layer.in_features % GROUP == 0)


def pack_weights(model: nn.Module, kind: str) -> int:
    """Packs the decoder's linear layers and the head; returns by how many bytes that grew them."""
    if kind == "full":
        return 0
    before = held(model)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]
    names = [n for n, m in layers if fits(m, kind) and not n.startswith("vision.")]
    for name in names:  # one at a time: a weight that is replaced makes room for the next
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        full = getattr(owner, leaf)
        setattr(owner, leaf, BlockedLinear(full) if kind == "packed" else PackedLinear(full, kind))
    return held(model) - before


def held(model: nn.Module) -> int:
    """Bytes of parameters, shared ones once, and of packed copies."""
    packs = sum(m.packed_bytes for m in model.modules() if isinstance(m, PackedLinear))
    return packs + sum(p.nbytes for p in model.parameters())


# --- fused kernels --------------------------------------------------------------------------------
#
# PyTorch runs norm, rotation and gate as several kernels that each read and write all rows, and the
# probe rows' scores as [heads, rows, tokens] in float32. On CUDA model/fused.py does each in one or
# two passes over memory. It is written in Triton, which comes with PyTorch for CUDA.


class FusedNorm(RMSNorm):
    """In the place of the norm `plain`, with its weight."""

    def __init__(self, plain: RMSNorm, fused: ModuleType):
        super().__init__(0, plain.eps)
        self.weight, self.fused = plain.weight, fused

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.rms_norm(x, self.weight, self.eps)

    def chunked(self, x: Tensor, rows: int | None) -> Tensor:
        return self(x)  # which needs no memory but for what it returns

    def add(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.fused.add_rms_norm(x, h, self.weight, self.eps)


class Fused(nn.Module):
    """In the place of a module without weights."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class FusedMLP(GatedMLP):
    """In the place of the MLP `plain`: gate and up in one product."""

    def __init__(self, plain: GatedMLP, fused: ModuleType):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = (
            plain.gate_proj, plain.up_proj, plain.down_proj,
        )  # fmt: skip
        self.both, self.fused = joined([plain.gate_proj, plain.up_proj])[0], fused

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.both).chunk(2, dim=-1)
        return self.down_proj(self.fused.swiglu(gate, up))


class FusedProjections:
    """In the place of Attention.newest: one product and one rotation."""

    def __init__(self, layer: Attention, fused: ModuleType):
        self.weight, self.bias = joined([layer.q_proj, layer.k_proj, layer.v_proj])
        self.heads, self.H, self.rotate = layer.heads, layer.config.num_heads, fused.rotate
        self.norms = (layer.q_norm, layer.k_norm) if layer.config.qk_norm else None
        self.turned = self.H + layer.config.num_kv_heads

    def __call__(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.heads(F.linear(x, self.weight, self.bias))  # [B, H + 2 G, D]
        qk = qkv[:, : self.turned]
        if self.norms is not None:
            both = zip(self.norms, (qk[:, : self.H], qk[:, self.H :]), strict=True)
            qk = torch.cat([norm(x) for norm, x in both], dim=1)
        qk = self.rotate(qk, batch.cos, batch.sin)
        return qk[:, : self.H], qk[:, self.H :], qkv[:, self.turned :]


def joined(layers: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers one below the other; theirs become views of it, so nothing is
    held twice."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, part in zip(layers, weight.split(sizes), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return weight, torch.cat(biases) if biases else None


def fuse(text: Decoder) -> None:
    """Gives a decoder the fused kernels. Raises ImportError where there is no Triton."""
    fused = import_module("zipvl.model.fused")
    text.norm = FusedNorm(text.norm, fused)
    for block in text.blocks():
        attention = block.self_attn
        block.input_layernorm = FusedNorm(block.input_layernorm, fused)
        block.post_attention_layernorm = FusedNorm(block.post_attention_layernorm, fused)
        block.mlp = FusedMLP(block.mlp, fused)
        attention.rotate, attention.probe_mass = Fused(fused.rotate), fused.probe_mass
        attention.newest = FusedProjections(attention, fused)  # type: ignore[method-assign]


# --- a decode step as a CUDA graph ----------------------------------------------------------------
#
#     ids, positions [B]  ->  embedding, layers, head  ->  logits float32 [B, V]
#
# The ordinary step launches its hundreds of small kernels anew for each token, which takes a GPU
# longer than running them. A static step keeps everything in place: ids and positions in buffers,
# lengths in tensors, caches at the capacity they have from the start, no number read back. It is
# recorded once and replayed from then on. A method that does something at each step, evicting or
# quantising, cannot be repeated and decodes step by step.


def attend_masked(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
    """One row a sequence over all its places, the unused masked on the device: the same shapes
    and addresses at every step, as a CUDA graph needs them. Unused places must hold numbers."""
    out = []
    for b, (start, places) in enumerate(zip(k_spans.starts, k_spans.capacity, strict=True)):
        at, seen = slice(start, start + places), torch.arange(places, device=q.device)
        mask, bias = (seen < k_spans.used[b])[None], k_spans.bias(b, places, q.dtype)
        mask = mask if bias is None else torch.where(mask, bias, -torch.inf)
        out.append(sdpa(q[None, b : b + 1], k[None, at], v[None, at], mask)[0])
    return torch.cat(out)


class StaticStep(Step):
    """The same operations on the same memory at every step."""

    def __init__(self, model: VLM, caches: Sequence[Cache], notes: list[Notes], policy: Policy,
                 attend: Attend):  # fmt: skip
        attend = attend_masked if attend is attend_sdpa else attend
        super().__init__(model, caches, notes, policy, attend)
        B, device, config = len(caches[0].spans), model.device, model.text.config
        self.ids = torch.zeros(B, dtype=torch.long, device=device)
        at, text = torch.zeros_like(self.ids), torch.zeros_like(self.ids, dtype=torch.bool)
        self.batch = Batch.build([1] * B, at, text, config, model.dtype, notes)
        self.ahead = ahead(notes, [1] * B, device)

    @classmethod
    def repeats(cls, policy: Policy) -> bool:
        return policy.storage is None and policy.step is None

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.batch.positions.copy_(positions)
        return self.run()

    def run(self) -> Tensor:
        text = self.model.text
        turns = moved(self.batch.positions, self.ahead)
        cos, sin = rope_table(turns, text.config, self.model.dtype)
        batch, x = replace(self.batch, cos=cos, sin=sin), text.embed_tokens(self.ids)
        return self.model.logits(text.step(x, batch, self.caches, self.policy, self.attend))


class GraphStep(StaticStep):
    """The static step, run once, then recorded, then replayed. Recording takes as long as some
    steps, so sequences that stop stay and are ignored until half have."""

    sheds = 0.5
    warm = False

    def __init__(self, model: VLM, caches: Sequence[Cache], notes: list[Notes], policy: Policy,
                 attend: Attend):  # fmt: skip
        if isinstance(model.text.norm, FusedNorm):
            attend = import_module("zipvl.model.fused_decode").attend_one
        super().__init__(model, caches, notes, policy, attend)

    graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> Tensor:
        if not self.warm:  # kernels and workspaces are loaded, which must not happen in a capture
            self.warm = True
            return super().run()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records without running
                self.logits = super().run()
        else:
            for cache in self.caches:
                cache.spans.count()
        self.graph.replay()
        return self.logits
