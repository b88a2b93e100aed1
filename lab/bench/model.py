"""A decoder of a real model's shape with random weights: its speed is real, its answers are not."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from zipvl.config import TextConfig
from zipvl.engine.run import CHUNK, Step
from zipvl.engine.speed import (
    PACKED_ROWS,
    PackedLinear,
    check_kind,
    fuse,
    held,
    pack_weights,
)
from zipvl.engine.stats import Counted, Recorder
from zipvl.linear import Linear
from zipvl.model.backends import pick
from zipvl.model.batch import Batch
from zipvl.model.cache import Kept, LayerCache
from zipvl.model.decoder import Decoder
from zipvl.model.vlm import VLM
from zipvl.policies import load_policy
from zipvl.policy import Notes, Policy

SHAPES = {  # layers, width, heads, kv heads, head size, FFN, vocabulary
    "qwen2-0.5b": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936),
    "longva-7b": ("qwen2", 28, 3584, 28, 4, 128, 18944, 152064),
    "llava-1.5-7b": ("llama", 32, 4096, 32, 32, 128, 11008, 32064),
    "llava-next-13b": ("llama", 40, 5120, 40, 40, 128, 13824, 32064),
    "tiny": ("qwen2", 2, 64, 4, 2, 16, 128, 512),
    "tiny-384": ("qwen2", 2, 64, 4, 2, 16, 128, 512),  # behind frames of a real tower's size
}
TIED = ("qwen2-0.5b", "tiny", "tiny-384")  # whose head is the embedding
QUESTION = 64  # text tokens at the end of a benchmark prompt; the others count as visual
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def text_config(shape: str, layers: int | None = None) -> TextConfig:
    kind, depth, width, heads, kv_heads, head_dim, ffn, vocab = SHAPES[shape]
    return TextConfig(
        kind, vocab, width, ffn, layers or depth, heads, kv_heads, head_dim, 1e-6, 1e6,
        qkv_bias=kind == "qwen2", tied=shape in TIED,
    )  # fmt: skip


def fill(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Random weights for a module on the meta device, never a second copy of them."""
    torch.manual_seed(0)
    module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for p in module.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)


class Model:
    """A random decoder with its head, tied to the embedding."""

    def __init__(self, shape: str, device: str, dtype: torch.dtype, attn: str, layers: int | None,
                 kernels: str = "auto"):  # fmt: skip
        self.config = text_config(shape, layers)
        self.device, self.dtype = torch.device(device), dtype
        self.backend, self.attend = pick(attn, self.device, dtype, self.config.head_dim)
        with torch.device("meta"):
            self.decoder = Decoder(self.config)
            self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        fill(self.decoder, device, dtype)
        self.lm_head.weight = self.decoder.embed_tokens.weight
        if self.device.type == "cuda" and kernels == "auto":
            fuse(self.decoder)

    def twin(self, change: Callable[[nn.ModuleDict], object]) -> "Model":
        """New modules around the same tensors, `text` and `head`, after a change."""
        twin, memo = copy.copy(self), {id(p): p for p in self.decoder.parameters()}
        both = copy.deepcopy(nn.ModuleDict({"text": self.decoder, "head": self.lm_head}), memo)
        change(both)
        twin.decoder = cast(Decoder, both["text"])
        twin.lm_head = cast(Linear, both["head"])
        return twin

    def packed(self, kind: str) -> "Model":
        """The same tensors, and those of the linear layers in `kind`."""
        check_kind(kind, self.device, self.dtype)
        return self.twin(lambda both: pack_weights(both, kind))

    def attending(self, attn: str) -> "Model":
        """The same tensors behind another attention backend."""
        twin, c = copy.copy(self), self.config
        twin.backend, twin.attend = pick(attn, self.device, self.dtype, c.head_dim)
        return twin

    def stepper(self, kind: type[Step], caches: list[LayerCache]) -> Step:
        """Decode steps of one `kind` over `caches`; a Step needs no more of a VLM than this has."""
        notes = [Notes(0) for _ in caches[0].spans.lengths]
        return kind(cast(VLM, self), caches, notes, load_policy("dense"), self.attend)

    @property
    def text(self) -> Decoder:
        return self.decoder

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.decoder.parameters())

    @property
    def packs(self) -> list[PackedLinear]:
        modules = (*self.decoder.modules(), self.lm_head)
        return [m for m in modules if isinstance(m, PackedLinear)]

    @property
    def held_bytes(self) -> int:
        """Of weights and packed copies, each once."""
        return held(nn.ModuleDict({"text": self.decoder, "head": self.lm_head}))

    def step_bytes(self, batch: int) -> int:
        """Bytes of weights that a decode step of `batch` sequences reads."""
        packs = self.packs if batch <= PACKED_ROWS else []
        return self.weight_bytes + sum(m.packed_bytes - m.weight.nbytes for m in packs)

    def batch(self, tokens: int) -> Batch:
        """One sequence of `tokens`, all visual but the question at the end."""
        positions = torch.arange(tokens, device=self.device)
        visual = positions < tokens - QUESTION
        return Batch.build([tokens], positions, visual, self.config, self.dtype)

    def prefill(
        self, ids: Tensor, method: str | Policy, room: int | None
    ) -> tuple[Tensor, Counted]:
        """Logits of the last token, and what the prefill left."""
        batch, recorder = self.batch(len(ids)), Recorder(self.device, self.config)
        x = self.decoder.embed_tokens(ids)
        out = self.decoder.prefill(
            x, batch, load_policy(method), self.attend, room, CHUNK.get(self.device.type), recorder,
            ends=True,
        )  # fmt: skip
        return self.logits(out.hidden), recorder.counted(out)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()

    def caches(self, lengths: list[int], room: int) -> list[LayerCache]:
        """Random caches, `lengths` slots by sequence, to time decoding without a prefill."""
        c, device = self.config, self.device
        at = [torch.arange(n, dtype=torch.int32, device=device) for n in lengths]

        def some() -> list[Tensor]:
            shapes = [(n, c.num_kv_heads, c.head_dim) for n in lengths]
            return [torch.randn(s, dtype=self.dtype, device=self.device) for s in shapes]

        def one() -> LayerCache:
            return LayerCache([Kept(*kept) for kept in zip(some(), some(), at, strict=True)], room)

        return [one() for _ in range(c.num_layers)]
