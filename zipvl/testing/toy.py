"""A tiny random decoder in memory, and a policy that watches another one at work on it."""

from dataclasses import dataclass, replace
from functools import partial, update_wrapper

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TextConfig
from ..model.batch import Batch
from ..model.cache import Cache
from ..model.decoder import Decoder
from ..model.kernels import attend_sdpa
from ..policy import Mask, Notes, Plan, Policy, PromptView, StepView, Trim, View, ask, fault, sound

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
    notes: list[Notes]


class Stretches:
    """Where visual tokens could come from (policy.Origin): one medium, each stretch of them a crop,
    and attention at random."""

    def __init__(self, visual: Tensor):
        self.tiles = [(0, 0)] * int(visual.any())
        begins = visual & ~F.pad(visual, (1, 0))[:-1]
        self.crop = torch.where(visual, begins.cumsum(0) - 1, -1)
        self.medium = visual.long() - 1
        chance = torch.Generator().manual_seed(len(visual))
        received = torch.rand(len(visual), 2, generator=chance)
        self.received = received.masked_fill(~visual[:, None], -torch.inf)


@dataclass(frozen=True)
class Toy:
    """A tiny Qwen2 or Qwen3 decoder with random weights and a vocabulary of 61."""

    decoder: Decoder
    head: Tensor  # [V, C]

    @classmethod
    def build(cls, heads: int, groups: int, seed: int = 0, layers: int = 3, normed: bool = False,
              rows: bool = False) -> "Toy":  # fmt: skip
        """`normed`: Qwen3, whose heads are; `rows`: visual tokens are turned by row and column."""
        config = TextConfig(
            "qwen3" if normed else "qwen2", 61, 32, 64, layers, heads, groups, 8, 1e-6, 1e4,
            rope_sections=(2, 1, 1) if rows else (), qkv_bias=not normed, qk_norm=normed,
        )  # fmt: skip
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

    def turns(self, visual: Tensor) -> Tensor | None:
        """Rotary ids [3, T] as Qwen2-VL gives them, each stretch of `visual` tokens a picture of
        three columns; None: a token's place is its only one."""
        if not self.decoder.config.rope_sections:
            return None
        out: list[tuple[int, ...]] = []
        at, before = 0, 0  # `before`: tokens of this stretch
        for seen in visual.tolist():
            if not seen and before:
                at, before = max(max(turn) for turn in out) + 1, 0
            out.append((at, at + before // 3, at + before % 3) if seen else (at,) * 3)
            at, before = (at, before + 1) if seen else (at + 1, 0)
        return torch.tensor(out).T

    @torch.inference_mode()
    def run(self, policy: Policy, prompts: list[Prompt], steps: int = ROOM) -> Trace:
        """Greedy decoding of a packed batch."""
        model, watch = self.decoder, Watch(policy)
        lengths = [len(ids) for ids, _ in prompts]
        x = model.embed_tokens(torch.cat([ids for ids, _ in prompts]))
        at = torch.cat([torch.arange(n) for n in lengths])
        visual = torch.cat([v for _, v in prompts])
        notes = self.scout(policy, prompts, steps)
        turns = [t for _, some in prompts if (t := self.turns(some)) is not None]
        for i, (mine, (_, some)) in enumerate(zip(notes, prompts, strict=True)):
            mine.origin, mine.entered = Stretches(some), None
            mine.ahead = int(turns[i].max()) + 1 - lengths[i] if turns else 0
        ids = torch.cat(turns, dim=1) if turns else None
        batch = Batch.build(lengths, at, visual, model.config, x.dtype, notes, ids)
        out = model.prefill(x, batch, watch, attend_sdpa, room=steps)
        counts = [list(c.spans.lengths) for c in out.caches]
        storage = [c.nbytes for c in out.caches]
        hidden, tokens = [out.hidden], torch.empty(len(prompts), 0, dtype=torch.long)
        last, held = out.hidden[out.batch.spans.edges[1:].long() - 1], []
        for step in range(steps):
            new = (last @ self.head.T).argmax(-1)  # [B]
            tokens = torch.cat((tokens, new[:, None]), dim=1)
            positions = torch.tensor([mine.at(mine.prompt) for mine in notes]) + step
            k_v_at = [[t.clone() for t in c.view(0)] for c in out.caches]
            held.append([(k, v, at) for k, v, at in k_v_at])
            full = [i for i, cache in enumerate(out.caches) if not cache.spans.free()]
            expect(
                not full,
                f"the cache of layer {min(full, default=0)} has no place for new token {step + 1}: "
                "let one `leave` in step() for each new one, or ask for more `room` in plan()",
            )
            x = model.embed_tokens(new)
            last = model.decode(x, positions, out.caches, watch, attend_sdpa, notes)
            hidden.append(last)
        return Trace(tokens.tolist(), hidden, out.caches, counts, storage, held, watch, notes)

    def scout(self, policy: Policy, prompts: list[Prompt], steps: int) -> list[Notes]:
        """Fresh notes, or those that the policy's scout leaves."""
        if policy.scout is None:
            return [Notes(len(ids), steps) for ids, _ in prompts]
        return self.run(policy.scout, prompts, steps).notes


class Watch(Policy):
    """Does what another policy does, looks at its answers, and keeps them."""

    def __init__(self, policy: Policy):
        self.policy, self.storage = sound(policy), policy.storage
        self.plans: list[Plan] = []
        self.trims: list[dict[int, Tensor]] = []
        self.steps: list[Plan] = []
        self.started: Plan | None = None
        if policy.trim is not None:  # under the method's own name, which errors are to say
            self.trim = update_wrapper(partial(self.note_trim, policy.trim), policy.trim)

    def start(self, view: PromptView) -> Plan:
        plan = ask(self.policy.start, view) if self.policy.start else Plan()
        check_stream("start(): plan.stream", plan.stream, view.length)
        self.started = plan
        return plan

    def plan(self, view: View) -> Plan:
        where, before = f"layer {view.layer}", [t.clone() for t in (view.k, view.is_visual)]

        def score(rows: Tensor) -> Tensor:
            wrong = fault(rows, view.length, 1, 0)
            expect(not wrong, f"{where}: the rows of view.mass() {wrong}")
            return view.score(rows)

        plan = ask(self.policy.plan, replace(view, score=score))
        expect(
            torch.equal(view.k, before[0]) and torch.equal(view.is_visual, before[1]),
            f"{where}: plan() changed a tensor of the view: work on a .clone()",
        )
        check_stream(f"{where}: plan.stream", plan.stream, view.length)
        if plan.mask is not None:
            check_mask(f"{where}: plan.mask", plan.mask, view)
        if plan.merge is not None:
            check_merge(f"{where}: plan.merge", plan, view)
        self.plans.append(plan)
        return plan

    def note_trim(self, trim: Trim, layer: int, notes: Notes) -> dict[int, Tensor] | None:
        slots = trim(layer, notes)
        self.trims.append({} if slots is None else slots)
        return slots

    def step(self, view: StepView) -> Plan:
        plan = ask(self.policy.step, view) if self.policy.step else Plan()
        gone = 0 if plan.leave is None else plan.leave.shape[-1]
        expect(gone < view.length, f"layer {view.layer}: step() lets all {gone} slots leave")
        self.steps.append(plan)
        return plan


def check_stream(name: str, index: Tensor | None, count: int) -> None:
    expect(
        index is None or int(index[-1]) == count - 1,
        f"{name} drops the prompt's last token, from which the answer starts",
    )


def check_mask(name: str, mask: Mask, view: View) -> None:
    """It is asked for some rows at a time, and says of each the same as of them all."""
    H, T = len(view.q), view.length
    expect(callable(mask), f"{name} is no function: give one of rows [b]")
    parts = []
    for rows in view.every.split(T // 2 + 1):
        parts.append(seen := mask(rows))
        shape, right = list(seen.shape), ([len(rows), T], [H, len(rows), T])
        expect(
            shape in right and seen.dtype == torch.bool,
            f"{name} of {len(rows)} rows is {seen.dtype} {shape}: give bool {right[0]}, {right[1]}",
        )
    whole = torch.cat(parts, dim=-2)
    expect(torch.equal(whole, mask(view.every)), f"{name} says other things of rows asked together")
    expect(
        bool(whole.diagonal(dim1=-2, dim2=-1).all()),
        f"{name} hides a row from itself: the first one then sees nothing",
    )


def check_merge(name: str, plan: Plan, view: View) -> None:
    """Tokens join tokens that are cached, or none."""
    G, T = len(view.k), view.length
    assert plan.merge is not None
    into, weight = plan.merge
    for what, x in (("into", into), ("weight", weight)):
        right = list(x.shape) in ([T], [G, T])
        expect(right, f"{name}: `{what}` is {list(x.shape)}: give {[T]} or {[G, T]}")
    expect(into.dtype == torch.int64, f"{name}: `into` is {into.dtype}: give int64 tokens")
    held = torch.zeros(G, T + 1, dtype=torch.bool)  # the last place is -1's
    held[:, T] = True
    held.scatter_(1, (view.every if plan.cache is None else plan.cache).expand(G, -1), True)
    inside = bool(((into >= -1) & (into < T)).all())
    expect(
        inside and bool(held.gather(1, into.expand(G, T) % (T + 1)).all()),
        f"{name}: a token joins one that is not in plan.cache: give one that is, or -1 for none",
    )


def expect(true: bool, sentence: str) -> None:
    if not true:
        raise AssertionError(sentence)
