"""A tiny random decoder in memory, and a policy that watches another one at work on it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TextConfig
from ..engine.cache import Cache
from ..engine.storage import Storage
from ..model.decoder import Decoder
from ..model.kernels import attend_sdpa
from ..model.pack import Pack
from ..policy import Plan, Policy, View

Prompt = tuple[Tensor, Tensor]  # input ids [T], is_visual [T]
ROOM = 4  # tokens generated in a run


@dataclass(frozen=True)
class Trace:
    """What a run of the toy decoder left behind; one entry a sequence, or a step, or a layer."""

    tokens: list[list[int]]
    hidden: list[Tensor]  # [sum T', C] of the prefill, then [B, C] of each decode step
    caches: list[Cache]
    prefilled: list[list[int]]  # tokens cached in each layer and sequence before decoding
    bytes: list[int]  # of each layer's cache
    held: list[list[tuple[Tensor, Tensor, Tensor]]]  # before each step, of each layer: what the
    #   cache says of the first sequence, k and v [n, G, D] and positions [n, G]
    seen: "Watch"


@dataclass(frozen=True)
class Toy:
    """A tiny Qwen2 decoder with random weights and a vocabulary of 61."""

    decoder: Decoder
    head: Tensor  # [V, C]

    @classmethod
    def build(cls, heads: int, groups: int, seed: int = 0, layers: int = 3) -> "Toy":
        config = TextConfig("qwen2", 61, 32, 64, layers, heads, groups, 8, 1e-6, 1e4, qkv_bias=True)
        chance = torch.Generator().manual_seed(seed)
        decoder = Decoder(config)
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                noise = torch.randn(p.shape, generator=chance)
                p.copy_(1 + 0.1 * noise if "norm" in name else 0.25 * noise)
            decoder.embed_tokens.weight.mul_(4)
        return cls(decoder, torch.randn(61, 32, generator=chance))

    def prompt(self, length: int, visual: str = "some") -> Prompt:
        """Random ids; `visual` says which tokens are: none, all, or some stretches of them."""
        ids = torch.randint(61, (length,), generator=torch.Generator().manual_seed(length))
        place = torch.arange(length)
        some = {"none": place < 0, "all": place >= 0, "some": (place > 3) & (place % 19 < 14)}
        return ids, some[visual]

    @torch.inference_mode()
    def run(self, policy: Policy, prompts: list[Prompt], steps: int = ROOM) -> Trace:
        """Greedy decoding of a packed batch."""
        model, watch = self.decoder, Watch(policy)
        lengths = [len(ids) for ids, _ in prompts]
        x = model.embed_tokens(torch.cat([ids for ids, _ in prompts]))
        at = torch.cat([torch.arange(n) for n in lengths])
        visual = torch.cat([v for _, v in prompts])
        pack = Pack.build(lengths, at, visual, model.config, x.dtype)
        out = model.prefill(x, pack, watch, attend_sdpa, room=steps)
        counts = [list(c.spans.lengths) for c in out.caches]
        storage = [c.nbytes for c in out.caches]
        hidden, tokens = [out.hidden], torch.empty(len(prompts), 0, dtype=torch.long)
        last, held = out.hidden[out.pack.spans.edges[1:].long() - 1], []
        for step in range(steps):
            new = (last @ self.head.T).argmax(-1)  # [B]
            tokens = torch.cat((tokens, new[:, None]), dim=1)
            positions = torch.tensor(lengths) + step
            k_v_at = [[t.clone() for t in c.view(0)] for c in out.caches]
            held.append([(k, v, at) for k, v, at in k_v_at])
            last = model.decode(model.embed_tokens(new), positions, out.caches, watch, attend_sdpa)
            hidden.append(last)
        return Trace(tokens.tolist(), hidden, out.caches, counts, storage, held, watch)


class Watch(Policy):
    """Does what another policy does, looks at its answers, and keeps them."""

    def __init__(self, policy: Policy):
        self.policy, self.watch_decode = policy, policy.watch_decode
        self.plans: list[Plan] = []
        self.evictions: list[Tensor | None] = []

    @property
    def storage(self) -> Storage:
        return self.policy.storage

    def probe(self, view: View) -> Tensor | None:
        rows = self.policy.probe(view)
        check_index(f"layer {view.layer}: the rows of probe()", rows, view.length, ndims=(1,))
        return rows

    def plan(self, view: View) -> Plan:
        where, before = f"layer {view.layer}", [t.clone() for t in (view.k, view.is_visual)]
        plan = self.policy.plan(view)
        expect(
            torch.equal(view.k, before[0]) and torch.equal(view.is_visual, before[1]),
            f"{where}: plan() changed a tensor of the view: work on a .clone()",
        )
        check_index(f"{where}: plan.attend", plan.attend, view.length, ndims=(1,))
        check_index(f"{where}: plan.cache", plan.cache, view.length, heads=len(view.k))
        check_index(f"{where}: plan.stream", plan.stream, view.length, ndims=(1,))
        check_index(f"{where}: plan.precise", plan.precise, view.length, ndims=(1,))
        expect(
            plan.stream is None or int(plan.stream[-1]) == view.length - 1,
            f"{where}: plan.stream drops the prompt's last token, from which the answer starts",
        )
        self.plans.append(plan)
        return plan

    def precise(self, layer: int, mass: Tensor, state: dict) -> Tensor | None:
        index = self.policy.precise(layer, mass, state)
        check_index(f"layer {layer}: what precise() returns", index, mass.shape[1], ndims=(1,))
        return index

    def evict(self, layer: int, slots: int, state: dict, probs: Tensor | None) -> Tensor | None:
        keep = self.policy.evict(layer, slots, state, probs)
        heads = 0 if probs is None else len(probs)  # unknown to a method that does not watch
        check_index(f"layer {layer}: what evict() returns", keep, slots, heads=heads)
        self.evictions.append(keep)
        return keep


def expect(true: bool, sentence: str) -> None:
    if not true:
        raise AssertionError(sentence)


def check_index(name: str, index: Tensor | None, count: int, ndims: tuple[int, ...] = (1, 2),
                heads: int = 0) -> None:  # fmt: skip
    """`index` is None, or int64, of one or (per head) two dimensions, sorted, unique, in range."""
    if index is None:
        return
    expect(isinstance(index, Tensor), f"{name}: give a tensor of indices, not {type(index)}")
    expect(index.dtype == torch.int64, f"{name}: dtype {index.dtype}; a bool mask needs .nonzero()")
    expect(index.ndim in ndims, f"{name}: shape {list(index.shape)}; one index per token is needed")
    expect(
        index.ndim == 1 or len(index) == heads or not heads,
        f"{name}: {len(index)} rows; key/value heads need {heads}, not one row a query head",
    )
    expect(index.shape[-1] > 0, f"{name}: empty; keep at least one token")
    inside = int(index.min()) >= 0 and int(index.max()) < count
    expect(
        inside, f"{name}: reaches outside 0..{count - 1}; positions are not indices into the view"
    )
    rising = bool((index.diff(dim=-1) > 0).all())
    expect(rising, f"{name}: not sorted or not unique; causality needs order: .sort().values")
