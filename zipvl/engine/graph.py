"""Decode steps, and one that is the same at every step, so that a CUDA graph can replay it.

    ids, positions [B]  ->  embedding, layers, head  ->  logits float32 [B, V]

The ordinary step launches its hundreds of small kernels anew for each token, which at small batches
takes a GPU longer than running them. A static step keeps everything in place: ids and positions in
buffers, lengths in tensors, caches at the capacity they have from the start, no number read back.
It is recorded once and replayed from then on, and again when a sequence leaves the batch.

No GPU was at hand: the static step is tested on a CPU, also through a recorder that stands in for
the graph (tests/test_compile.py); the capture itself has not run on a GPU yet.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UsageError
from ..model.kernels import Attend, attend_masked, attend_sdpa
from ..model.pack import Pack
from ..model.rope import rope_table
from ..model.vlm import VLM
from ..policy import Policy
from .cache import Cache
from .storage import FULL


class Step:
    """The ordinary step, for any method and cache."""

    def __init__(self, model: VLM, caches: Sequence[Cache], policy: Policy, attend: Attend):
        self.model, self.caches, self.policy, self.attend = model, caches, policy, attend

    @classmethod
    def check(cls, policy: Policy) -> None:
        """Raises UsageError, before the prefill, for a method that cannot be decoded this way."""

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.model.text.embed_tokens(ids)
        hidden = self.model.text.decode(x, positions, self.caches, self.policy, self.attend)
        return self.model.logits(hidden)


class StaticStep(Step):
    """The same operations on the same memory at every step."""

    def __init__(self, model: VLM, caches: Sequence[Cache], policy: Policy, attend: Attend):
        super().__init__(model, caches, policy, attend_masked if attend is attend_sdpa else attend)
        B, device, config = len(caches[0].spans), model.device, model.text.config
        self.ids = torch.zeros(B, dtype=torch.long, device=device)
        at, text = torch.zeros_like(self.ids), torch.zeros_like(self.ids, dtype=torch.bool)
        self.pack = Pack.build([1] * B, at, text, config, model.dtype)

    @classmethod
    def check(cls, policy: Policy) -> None:
        evicts = policy.watch_decode or type(policy).evict is not Policy.evict
        if evicts or policy.storage != FULL:
            what = "drops cached tokens" if evicts else "quantises its cache"
            raise UsageError(
                f"the method {type(policy).__name__} {what} while decoding, which a CUDA graph "
                "cannot repeat: leave out --compile"
            )

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.pack.positions.copy_(positions)
        return self.run()

    def run(self) -> Tensor:
        text = self.model.text
        cos, sin = rope_table(self.pack.positions, text.config, self.model.dtype)
        pack, x = replace(self.pack, cos=cos, sin=sin), text.embed_tokens(self.ids)
        return self.model.logits(text.step(x, pack, self.caches, self.policy, self.attend))


class GraphStep(StaticStep):
    """The static step, run once, then recorded, then replayed."""

    warm = False
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
