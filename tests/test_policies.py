"""Every method keeps the contract of policy.py, and the contract notices methods that do not."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import zipvl
from tests.methods.untrained import WEIGHTS
from zipvl import ModelError
from zipvl.policies import METHODS, load_policy
from zipvl.policies.fastv import FastV
from zipvl.policies.h2o import H2O
from zipvl.policies.snapkv import SnapKV
from zipvl.policies.streaming import StreamingLLM
from zipvl.policies.zipvl import ZipVL
from zipvl.policy import Notes, Plan, Policy, PromptView, StepView, View
from zipvl.testing import check_policy
from zipvl.testing.oracle import Oracle
from zipvl.testing.toy import Toy

ROOT = Path(__file__).parent.parent
CASES = [
    ("dense", {}, {}),
    ("zipvl", {"tau": 0.8, "recent": 8, "random": 8}, {"tau": 1.0}),
    ("zipvl", {"tau": 0.01, "recent": 1, "random": 0, "always": "none"}, None),  # keeps one token
    ("zipvl+", {"tau": 0.6, "always": "last"}, {"tau": 1.0}),
    ("zipvl-stream", {"tau": 0.8, "recent": 8, "random": 8}, {"tau": 1.0}),
    ("zipvl-stream", {"tau": 0.3, "floor": 0.2, "kv_bits": 4}, {"tau": 1.0, "kv_bits": 8}),
    ("zipvl-stream", {"tau": 0.3, "recent": 8, "random": 8, "summary": 5}, {"tau": 1.0}),
    ("snapkv", {"budget": 12, "window": 4, "summary": 7}, {"budget": 1000}),
    ("h2o", {"heavy": 5, "recent": 4, "summary": 3}, {"heavy": 1000}),
    ("fixed", {"ratio": 0.3, "always": "none"}, {"ratio": 1.0}),
    ("random", {"ratio": 0.3}, {"ratio": 1.0}),
    ("fastv", {"after": 1, "ratio": 0.3}, {"ratio": 1.0}),
    ("streaming", {"sinks": 2, "window": 9}, {"window": 1000}),
    ("streaming", {"sinks": 0, "window": 1}, None),  # keeps one token
    ("h2o", {"heavy": 5, "recent": 4}, {"heavy": 1000}),
    ("snapkv", {"budget": 12, "window": 4, "kernel": 3, "pool": "avg"}, {"budget": 1000}),
    ("snapkv", {"budget": 1, "window": 1}, None),
    ("zipvl", {"tau": 0.8, "kv_bits": 4, "interval": 3}, {"tau": 1.0, "kv_bits": 8}),
    ("zipvl-quant", {"tau": 0.8, "interval": 3}, {"tau": 1.0, "kv_bits": 8}),
    ("zipcache", {"interval": 2}, {"kv_bits": 8}),
    ("kivi", {"kv_bits": 4, "group": 2, "residual": 4}, {"kv_bits": 8}),
    ("kivi", {}, {"kv_bits": 8}),
    (f"{ROOT}/examples/keynorm.py:KeyNorm", {"ratio": 0.3}, {"ratio": 1.0}),
    (f"{ROOT}/examples/tova.py:TOVA", {"budget": 10}, {"budget": 1000}),
]


MORE = [  # of the same methods
    ("zipvl", {"tau": 0.5, "always": "last", "divisor": "all", "fill": "own"}, None),
    ("zipvl-stream", {"tau": 0.01, "always": "last", "first": 1}, {"floor": 1.0}),
    ("zipvl-stream", {"tau": 0.3, "kv_bits": "4/2", "interval": 2}, None),
    ("zipvl", {"tau": 0.3, "always": "last", "summary": 16}, {"tau": 1.0}),
    ("zipvl+", {"tau": 0.1, "always": "none", "summary": 1}, None),
    ("fastv", {"after": 2, "ratio": 0.0, "variant": "mask"}, {"ratio": 1.0}),
    ("h2o", {"heavy": 0, "recent": 1}, None),
    ("zipvl+", {"tau": 0.6, "kv_bits": 2, "interval": 1}, {"tau": 1.0, "kv_bits": 8}),
    ("fixed", {"ratio": 0.7, "kv_bits": "4/2", "interval": 2}, {"ratio": 1.0, "kv_bits": 8}),
    ("zipvl-quant", {"tau": 0.1, "always": "none", "kv_bits": "8/2", "interval": 1}, None),
    ("zipcache", {"ratio": 0.01, "probes": 0.5, "interval": 1}, {"ratio": 1.0, "kv_bits": 8}),
    ("kivi", {"group": 3, "residual": 3}, {"kv_bits": 8}),
]


@pytest.mark.parametrize(
    ("name", "options", "everything"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def test_every_method_is_in_the_contract_test() -> None:
    """Here, or in its own file among tests/methods."""
    files = [importlib.import_module(f"tests.methods.{path.stem}")
             for path in sorted((ROOT / "tests/methods").glob("test_*.py"))]  # fmt: skip
    cases = [*CASES, *(case for file in files for case in file.CASES)]
    assert {name for name, _, _ in cases} >= METHODS.keys()


class Selects(Policy):
    """Keeps the tokens of `index(T)`; the faults below are made of it."""

    def __init__(self, index: Callable[[int], Tensor], part: str = "attend"):
        self.index, self.part = index, part

    def plan(self, view: View) -> Plan:
        return replace(Plan(), **{self.part: self.index(view.length)})


class Remembers(Policy):
    def __init__(self) -> None:
        self.calls = 0

    def plan(self, view: View) -> Plan:
        self.calls += 1
        return Plan(attend=torch.arange(max(0, view.length - 3 * self.calls), view.length))


class Random(Policy):
    def plan(self, view: View) -> Plan:
        kept = torch.randperm(view.length)[: view.length // 2 + 1].sort().values
        return Plan(attend=kept, cache=kept)


class Overwrites(Policy):
    def plan(self, view: View) -> Plan:
        view.k.mul_(2)
        return Plan()


class Fixed100(Policy):
    def plan(self, view: View) -> Plan:
        return Plan(cache=view.k.norm(dim=-1).mean(0).topk(20).indices.sort().values)


class ByQueryHead(Policy):
    def plan(self, view: View) -> Plan:
        return Plan(cache=torch.arange(view.length).expand(2 * len(view.k), -1))


class EvictsBackwards(Policy):
    def step(self, view: StepView) -> Plan:
        return Plan(leave=torch.arange(2).flip(0))


class NamesWhatStays(Policy):
    def step(self, view: StepView) -> Plan:
        return Plan(cache=torch.arange(view.length))


class HidesWhatItAttends(Policy):
    def plan(self, view: View) -> Plan:
        return Plan(attend=view.every, mask=lambda rows: torch.ones(len(rows), view.length) > 0)


class HasNoRoom(Policy):
    def plan(self, view: View) -> Plan:
        return Plan(room=0)


class ReadsOneQueryHeadEach(Policy):
    def step(self, view: StepView) -> Plan:
        return Plan(attend=torch.arange(2).expand(len(view.q), -1))


class AsksForRowsBackwards(Policy):
    def plan(self, view: View) -> Plan:
        view.mass(torch.arange(view.length).flip(0))
        return Plan()


class LetsTheLastTokenWait(Policy):
    def start(self, view: PromptView) -> Plan:
        return Plan(stream=torch.arange(max(1, view.length - 1)))


class TrimsAhead(Policy):
    def trim(self, layer: int, notes: Notes) -> dict[int, Tensor]:
        return {layer + 1: torch.tensor([0])}


class CallsMoreThanAreDuePrecise(Policy):
    def step(self, view: StepView) -> Plan:
        return Plan(precise=torch.arange(view.due + 1))


FAULTS = [
    (lambda: Selects(lambda n: torch.arange(n).flip(0)), "not sorted"),
    (lambda: Selects(lambda n: torch.tensor([0, 0])), "not sorted or not unique"),
    (lambda: Selects(lambda n: torch.tensor([n])), "outside"),
    (lambda: Selects(lambda n: torch.ones(n + 1, dtype=torch.bool)), "is a mask of shape"),
    (lambda: Selects(lambda n: torch.zeros(n, dtype=torch.bool)), "an empty mask: keep at least"),
    (lambda: Selects(lambda n: torch.arange(0)), "at least one token"),
    (lambda: Selects(lambda n: torch.arange(n)[None]), "one index per token"),
    (lambda: Selects(lambda n: torch.arange(max(1, n - 1)), "stream"), "last token"),
    (Remembers, "view.notes"),
    (Random, "seed"),
    (Overwrites, "clone"),
    (Fixed100, "clamp"),
    (ByQueryHead, "not one row a query head"),
    (EvictsBackwards, "not sorted"),
    (NamesWhatStays, "name what is to `leave`"),
    (HidesWhatItAttends, "not both"),
    (HasNoRoom, "room is 0: give new tokens"),
    (ReadsOneQueryHeadEach, "not one row a query head"),
    (AsksForRowsBackwards, "the rows of view.mass"),
    (LetsTheLastTokenWait, "last token"),
    (TrimsAhead, "no cache yet"),
    (CallsMoreThanAreDuePrecise, "outside the 0 tokens there are"),
]


@pytest.mark.parametrize(("make", "hint"), FAULTS)
def test_contract_names_the_fault(make: Callable[[], Policy], hint: str) -> None:
    with pytest.raises((AssertionError, zipvl.UsageError), match=hint):
        check_policy(make)


def test_contract_notices_a_method_that_never_keeps_all() -> None:
    with pytest.raises(AssertionError, match="told to keep everything"):
        check_policy(ZipVL, tau=0.5, always="last", everything={"tau": 0.99})


PLANS = """
from zipvl.policies import load_policy
from zipvl.testing.toy import Toy
toy = Toy.build(4, 2)
runs = [toy.run(load_policy(m, recent=9, random=20), [toy.prompt(140)]) for m in ("zipvl", "fixed")]
found = [[plan.attend.tolist() for plan in run.seen.plans] + run.tokens for run in runs]
"""


def test_another_process_selects_the_same_and_check_policy_needs_no_pytest() -> None:
    code = PLANS + (
        "import json, sys, zipvl.testing\n"
        "zipvl.testing.check_policy(load_policy, method='snapkv', budget=9, window=2)\n"
        "assert not {'pytest', 'transformers', 'hypothesis'} & sys.modules.keys()\n"
        "print(json.dumps(found))"
    )
    torch.manual_seed(1)  # the world's random state is not to matter
    here: dict = {}
    exec(PLANS, here)
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout) == here["found"]
    assert all(1 < len(kept) < 140 for run in here["found"] for kept in run[:3])


# --- the verbs that no built-in method uses: the contract runs them against the oracle


class Enters(Policy):
    """start(): every other visual token enters."""

    def start(self, view: PromptView) -> Plan:
        assert view.x.shape == (view.length, 32)
        assert view.notes.prompt == view.length
        keep = ~view.is_visual | (torch.arange(view.length) % 2 > 0)
        keep[-1] = True
        return Plan(stream=keep)

    def plan(self, view: View) -> Plan:
        view.notes[view.layer] = view.positions
        return Plan()


class Trims(Policy):
    """trim(): behind the last layer the first layers keep their newest tokens, by head or not."""

    def plan(self, view: View) -> Plan:
        view.notes["G"] = len(view.k)
        return Plan(cache=torch.arange(0, view.length, 2)) if view.layer == 1 else Plan()

    def trim(self, layer: int, notes: Notes) -> dict[int, Tensor] | None:
        if layer < 2:
            return None
        slots = torch.arange(notes.prompt)[-5:]
        return {0: slots.expand(notes["G"], -1), 1: torch.tensor([0])}


class Fetches(Policy):
    """step(): each head reads the half of the slots that it likes best, and nothing leaves."""

    def step(self, view: StepView) -> Plan:
        best = view.by_group(view.mass()).topk(max(1, view.length // 2)).indices
        return Plan(attend=best.sort().values)


class Mixed(Policy):
    """step(): reads a few slots and lets some go by head, evicts in another layer, looks only."""

    def step(self, view: StepView) -> Plan:
        newest = torch.arange(view.length)[-3:]
        if view.layer == 0:
            least = view.by_group(view.mass()).topk(min(2, view.length - 1), largest=False).indices
            return Plan(attend=newest, leave=least.sort().values if view.length > 1 else None)
        if view.layer == 1:
            old = view.positions.sort(dim=1).indices[:, :-3].sort().values
            return Plan(leave=old if old.shape[1] else None)
        view.mass(newest)
        return Plan()


class Masked(Policy):
    """mask: each head sees itself, what is a multiple of 3 or 5 before it, and the first token."""

    def plan(self, view: View) -> Plan:
        steps = torch.tensor([3, 5, 3, 5])[:, None, None]

        def mask(rows: Tensor) -> Tensor:
            back = rows[:, None] - view.every
            return (back % steps == 0) | (view.every == 0)

        first = view.layer == 0
        return Plan(mask=mask) if not first else Plan(mask=lambda rows: mask(rows)[0])


class Merges(Policy):
    """merge: every third token stays, and takes in those behind it, by head or for all heads."""

    def plan(self, view: View) -> Plan:
        into = view.every // 3 * 3
        weight = 1 + view.every % 7
        if view.layer == 1:
            weight = weight.expand(len(view.k), -1)
            into = torch.stack([into, *[torch.where(into == 0, -1, into)] * (len(view.k) - 1)])
        return Plan(cache=view.every[::3], merge=(into, weight), room=2 if view.layer else None)

    def step(self, view: StepView) -> Plan:
        return Plan(leave=torch.tensor([0])) if view.layer and view.length > 1 else Plan()


class Looks(Policy):
    """logits(): keeps what the rows' largest logits name, and the blocks are the method's own."""

    def plan(self, view: View) -> Plan:
        rows = view.every[-3:]
        best = torch.full((view.length,), -torch.inf)
        for heads, some, logits in view.logits(rows):
            assert logits.shape == (heads.stop - heads.start, len(some), view.length)
            assert bool((logits.isneginf() == (view.every > some[:, None])).all())
            best = torch.maximum(best, logits.amax(dim=(0, 1)))
            logits.fill_(0)
        kept = best.topk(view.length // 2 + 1).indices.sort().values
        return Plan(cache=kept)


@pytest.mark.parametrize("make", [Enters, Trims, Fetches, Mixed, Masked, Merges, Looks])
def test_contract_of_the_other_verbs(make: Callable[[], Policy]) -> None:
    check_policy(make)


def test_trimmed_caches_give_their_memory_back() -> None:
    toy = Toy.build(4, 2)
    got = toy.run(Trims(), [toy.prompt(90), toy.prompt(41)])
    assert got.prefilled == [[5, 5], [1, 1], [90, 41]]
    assert got.bytes == [2 * (sum(n) + 2 * 4) * 2 * 8 * 4 for n in got.prefilled]


def test_what_does_not_enter_is_nowhere() -> None:
    toy, prompt = Toy.build(4, 2), Toy.build(4, 2).prompt(60)
    got = toy.run(Enters(), [prompt])
    entered = got.seen.started.stream
    assert int((~prompt[1]).sum()) < len(entered) < 50
    assert got.prefilled == [[len(entered)]] * 3
    assert all(torch.equal(got.notes[0][layer], entered) for layer in range(3))
    assert got.caches[0].view(0)[2][-4:, 0].tolist() == [60, 61, 62, 63]  # places of the prompt


class Scouted(Policy):
    """Keeps what its scout, H2O, scored highest in the same layer."""

    scout = H2O(heavy=3, recent=2)

    def plan(self, view: View) -> Plan:
        score = view.notes[view.layer].sum(0)  # of the slots the scout still held at its end
        best = score.topk(min(view.length, len(score)) // 2 + 1).indices.clamp(max=view.length - 1)
        return Plan(cache=best.unique())


def test_a_scout_leaves_its_notes(oracle: Callable) -> None:
    check_policy(Scouted)
    engine = zipvl.load(oracle("llava").folder, device="cpu", dtype="float32")
    inputs = engine.prepare("what is there to see")
    out = engine.generate(inputs, Scouted(), max_new_tokens=4, ignore_eos=True)
    assert out.stats.seconds["scout"] > 0
    assert {layer["cached"] for layer in out.stats.layers} == {3}
    plain = engine.generate(inputs, "dense", max_new_tokens=4, ignore_eos=True)
    assert "scout" not in plain.stats.seconds
    assert out.tokens[0] == plain.tokens[0]  # prefill was dense
    torch.testing.assert_close(engine.logits(inputs, Scouted()), engine.logits(inputs))


# --- what single methods promise beyond the contract


def test_fastv_mask_equals_drop_for_the_tokens_kept() -> None:
    toy, prompt = Toy.build(4, 2, seed=3, layers=5), Toy.build(4, 2).prompt(55)
    for after in (1, 2, 4):
        drop = toy.run(FastV(after, 0.4, "drop"), [prompt])
        mask = toy.run(FastV(after, 0.4, "mask"), [prompt])
        kept = drop.seen.plans[after - 1].stream
        assert kept is not None
        assert len(kept) == int((~prompt[1]).sum()) + round(0.4 * int(prompt[1].sum()))
        torch.testing.assert_close(mask.hidden[0][kept], drop.hidden[0], rtol=1e-4, atol=1e-4)
        assert mask.tokens == drop.tokens
        hidden = [Plan()] * after + [Plan(attend=kept, cache=kept, fill="own")] * (5 - after)
        x = toy.decoder.embed_tokens.weight[prompt[0]]  # the others still look at the kept ones
        want = Oracle(toy.decoder).prefill(x, hidden)
        torch.testing.assert_close(mask.hidden[0].double(), want, rtol=1e-3, atol=1e-3)
        assert drop.prefilled == mask.prefilled == [[55]] * after + [[len(kept)]] * (5 - after)


def test_fastv_ranks_by_the_last_tokens_row() -> None:
    toy, (ids, visual) = Toy.build(4, 2, seed=5), Toy.build(4, 2).prompt(55)
    rows = []

    class Spy(FastV):
        def plan(self, view: View) -> Plan:
            if view.layer == 1:
                full = (view.q @ view.k.repeat_interleave(2, 0).mT / 8**0.5)[:, -1]
                rows.append(full.double().softmax(-1).mean(0))
            return super().plan(view)

    got = toy.run(Spy(2, 0.25), [(ids, visual)]).seen.plans[1].stream
    best = sorted(visual.nonzero()[:, 0].tolist(), key=lambda j: -rows[0][j])
    want = set(best[: round(0.25 * int(visual.sum()))]) | set((~visual).nonzero()[:, 0].tolist())
    assert got.tolist() == sorted(want)


def test_streaming_holds_sinks_and_window_while_decoding() -> None:
    toy = Toy.build(4, 2)
    got = toy.run(StreamingLLM(2, 5), [toy.prompt(30), toy.prompt(6)])
    for cache in got.caches:
        assert sorted(cache.view(0)[2][:, 0].tolist()) == [0, 1, *range(29, 34)]
        assert sorted(cache.view(1)[2][:, 0].tolist()) == [0, 1, *range(5, 10)]


def full_attention(view: View) -> Tensor:
    """[G, T, T] float64 causal attention, mean over the query heads of a group."""
    G, T, D = view.k.shape
    k = view.k.double().repeat_interleave(len(view.q) // G, 0)
    scores = view.q.double() @ k.mT / D**0.5
    probs = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1)
    return probs.unflatten(0, (G, -1)).mean(1)


def test_h2o_prefill_is_exact_column_sums() -> None:
    toy = Toy.build(4, 2, seed=1)

    class Spy(H2O):
        def plan(self, view: View) -> Plan:
            plan = super().plan(view)
            sums = full_attention(view).sum(1)  # [G, T]
            torch.testing.assert_close(
                view.notes[view.layer].double(), sums.gather(1, plan.cache), rtol=1e-5, atol=1e-5
            )
            for row, kept in zip(sums, plan.cache, strict=True):
                best = row[:-3].topk(4).indices.tolist()
                assert kept.tolist() == [*sorted(best), 37, 38, 39]
            return plan

    assert len(toy.run(Spy(4, 3), [toy.prompt(40)]).seen.plans) == 3


def test_h2o_adds_each_decode_step_and_evicts_the_least() -> None:
    """By hand: two heads, four slots of budget; prefill scores count at the first step."""
    policy, notes = H2O(heavy=2, recent=2), Notes(4)
    notes[0] = torch.tensor([[5.0, 1, 4, 3], [1.0, 5, 4, 3]])

    class Step:  # two query heads, two key/value heads, five slots
        layer, length, by_group = 0, 5, staticmethod(lambda x: x)

        def __init__(self, probs: Tensor, positions: list):
            self.notes, self.mass, self.positions = notes, lambda: probs, torch.tensor(positions)

    probs = torch.tensor([[0.0, 0.2, 0.0, 0.3, 0.5], [0.0, 0.0, 0.0, 0.0, 1.0]])
    plan = policy.step(Step(probs, [[0, 1, 2, 3, 4]] * 2))
    assert plan.leave.tolist() == [[1], [0]]  # the newest takes its place
    torch.testing.assert_close(notes[0], torch.tensor([[5.0, 0.5, 4, 3.3], [1.0, 5, 4, 3]]))
    # what left is forgotten: a late favourite beats an early one; 4 and 5 are recent
    probs = torch.tensor([[0.0, 0, 0, 0.9, 0], [0.0, 0, 0, 9, 0]])
    plan = policy.step(Step(probs, [[0, 4, 2, 3, 5], [4, 1, 2, 3, 5]]))
    assert plan.leave.tolist() == [[2], [2]]
    torch.testing.assert_close(notes[0], torch.tensor([[5.0, 0.5, 0, 4.2], [1.0, 5, 0, 12]]))


def test_looking_at_a_step_changes_nothing() -> None:
    """[H, slots], one distribution for each query head, in every layer and step."""
    seen = []

    class Spy(Policy):
        def step(self, view: StepView) -> Plan:
            seen.append(view.length)
            mass = view.mass()
            assert mass.shape == (4, view.length)
            torch.testing.assert_close(mass.sum(1), torch.ones(4))
            assert view.by_group(mass).shape == (2, view.length)
            torch.testing.assert_close(view.by_group(mass)[1], mass[2:].mean(0))
            assert view.positions.shape == (2, view.length)
            assert (view.positions.diff(dim=1) > 0).all()
            return Plan()

    toy = Toy.build(4, 2)
    watched = toy.run(Spy(), [toy.prompt(30), toy.prompt(8)])
    assert seen == [n for step in range(1, 5) for _ in range(3) for n in (30 + step, 8 + step)]
    plain = toy.run(Policy(), [toy.prompt(30), toy.prompt(8)])  # watching changes nothing
    assert watched.tokens == plain.tokens
    for a, b in zip(watched.hidden, plain.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_snapkv_votes_pool_and_keep_the_window() -> None:
    toy = Toy.build(4, 2, seed=2)

    class Spy(SnapKV):
        def plan(self, view: View) -> Plan:
            plan, votes = super().plan(view), full_attention(view)[:, -4:, :-4].sum(1).numpy()
            for row, kept in zip(votes, plan.cache, strict=True):
                pooled = [row[max(0, j - 2) : j + 3].max() for j in range(len(row))]
                limit = sorted(pooled)[-6]
                old = kept[:-4].tolist()
                assert kept[-4:].tolist() == [36, 37, 38, 39]
                assert min(pooled[j] for j in old) >= limit - 1e-6
            return plan

    got = toy.run(Spy(budget=10, window=4, kernel=5), [toy.prompt(40)])
    assert got.prefilled == [[10]] * 3  # and grows by one a step after that
    assert [c.spans.lengths for c in got.caches] == [[14]] * 3


def test_fixed_keeps_its_ratio_and_random_the_same_count() -> None:
    toy = Toy.build(4, 2)
    prompt = toy.prompt(93)
    text = int((~prompt[1]).sum())
    for ratio in (0.05, 0.4, 0.77):
        counts = [
            toy.run(load_policy(m, ratio=ratio), [prompt], steps=1).prefilled
            for m in ("fixed", "random")
        ]
        want = max(round(ratio * 93), text)  # the prompt's text always stays
        assert counts == [[[want]] * 3] * 2


def test_random_layers_differ_and_seeds_differ() -> None:
    toy = Toy.build(4, 2)
    plans = [
        [
            p.attend.tolist()
            for p in toy.run(load_policy("random", seed=s), [toy.prompt(99)]).seen.plans
        ]
        for s in (0, 1)
    ]
    assert len({tuple(kept) for run in plans for kept in run}) == 6


# --- tau = 1 is dense, on every family


@pytest.mark.parametrize(
    "kind",
    ["llava", "llava_next_mistral", "llava_onevision", "original_16", "original_longva",
     *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
        "llava_next", "llava_next_video", "llava_onevision_tied", "original_15",
        "original_16_mistral", "original_onevision", "original_video"))],
)  # fmt: skip
def test_tau_one_is_dense_bit_for_bit(oracle: Callable, kind: str) -> None:
    from PIL import Image

    engine = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
    rng = np.random.default_rng(7)
    picture = Image.fromarray(rng.integers(0, 256, (70, 100, 3), dtype=np.uint8))
    inputs = engine.prepare("what is in the picture", images=[picture])
    torch.testing.assert_close(
        engine.logits(inputs, "zipvl:tau=1"), engine.logits(inputs, "dense"), rtol=0, atol=0
    )
    runs = [
        engine.generate(inputs, m, max_new_tokens=64, ignore_eos=True).tokens
        for m in ("dense", "zipvl:tau=1")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 64


# --- no method answers about nothing ------------------------------------------------------------


@pytest.fixture(scope="module")
def pictured(oracle: Callable) -> tuple:
    """A float32 engine, and one prompt with a picture."""
    from PIL import Image

    engine = zipvl.load(oracle("llava").folder, device="cpu", dtype="float32")
    pixels = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return engine, engine.prepare("what is there", images=[Image.fromarray(pixels)])


SMALL = {"streaming": ":sinks=1,window=9", "h2o": ":heavy=4,recent=4", "snapkv": ":budget=12,window=4",
         "zipvl": ":tau=0.5", "fixed": ":ratio=0.1", "random": ":ratio=0.1",
         "attnpred_reimpl": f":weights={WEIGHTS}"}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_feature_is_an_error_with_every_method(
    pictured: tuple, name: str, bad: float
) -> None:
    engine, inputs = pictured
    [medium] = inputs.media
    engine.encode(inputs)
    medium.features, healthy = medium.features.clone(), medium.features
    try:
        medium.features[len(healthy) // 2, 3] = bad
        for ask in (engine.generate, engine.logits):
            with pytest.raises(
                ModelError, match="vision features or embeddings are NaN or infinite"
            ):
                ask(inputs, name + SMALL.get(name, ""))
    finally:
        medium.features = healthy


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_number_that_overflows_in_a_layer_is_one_too(
    pictured: tuple, name: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One visual token's hidden state becomes infinite: no method may just leave it out."""
    engine, inputs = pictured
    block, row = engine.model.text.layers[layer], int(inputs.is_visual.nonzero()[4])
    plain = block.feed_forward

    def overflow(x: Tensor, h: Tensor) -> Tensor:
        x = plain(x, h)
        if len(x) > row:
            x[row] = torch.inf
        return x

    monkeypatch.setattr(block, "feed_forward", overflow)
    with pytest.raises(ModelError, match="are NaN or infinite: with float16 use"):
        engine.generate(inputs, name + SMALL.get(name, ""), max_new_tokens=2)


class Returns(Policy):
    def __init__(self, what: object = 3, verb: str = "plan"):
        self.what = what
        setattr(self, verb, self.answer)

    def answer(self, view: object) -> object:
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


def plan_of(index: object) -> Plan:
    """All parts are `index`: each verb looks at those that it answers with."""
    return Plan(attend=index, cache=index, stream=index, precise=index)


NONSENSE = [  # what a verb answers with, and what its error says
    (3, "gives 3: return a Plan"),
    (None, "gives None: return a Plan"),
    ([0, 1], r"gives \[0, 1\]: return a Plan"),
    (torch.eye(3), r"gives tensor\(\[\[1., 0., 0.\], \[0., 1., 0.\],"),  # in one line
    (KeyError("x"), "fails with KeyError"),
    (RuntimeError("shapes"), "fails with RuntimeError"),
    (plan_of([0, 1]), r"gives a Plan.* whose \w+ is \[0, 1\]: give a tensor"),
    (plan_of(torch.ones(2)), "has dtype torch.float32: give int64"),
    (plan_of(torch.ones(2) > 0), r"is a mask of shape \[2\]: the tokens need"),
    (plan_of(torch.tensor(0)), r"has shape \[\]: one index per token"),
    (plan_of(torch.arange(0)), "is empty"),
    (plan_of(torch.tensor([0, 10**6])), r"reaches outside the \d+ tokens there are"),
    (plan_of(torch.tensor([-1, 0])), r"reaches outside the \d+ tokens there are"),
    (plan_of(torch.tensor([1, 0])), "is not sorted"),
]


@pytest.mark.parametrize("verb", ["plan", "step", "start"])
@pytest.mark.parametrize(("what", "says"), NONSENSE)
def test_a_broken_method_is_named(pictured: tuple, verb: str, what: object, says: str) -> None:
    engine, inputs = pictured
    for run in (
        lambda: engine.generate(inputs, Returns(what, verb), max_new_tokens=3),
        lambda: check_policy(Returns, what=what, verb=verb),
    ):
        with pytest.raises(
            zipvl.UsageError, match=r"^Returns.answer\(\) of the method .*" + says
        ) as e:
            run()
        assert "\n" not in str(e.value)


class BadTrim(Policy):
    def __init__(self, what: object = 3):
        self.what = what

    def trim(self, layer: int, notes: Notes) -> object:
        return self.what


@pytest.mark.parametrize(
    ("what", "says"),
    [(3, "gives 3: return a dict of slots, or None"),
     (torch.arange(2), "gives tensor"),
     ({1: torch.arange(1)}, "names layer 1, which has no cache yet"),
     ({"0": torch.arange(1)}, "names layer '0', which has no cache yet"),
     ({0: [0]}, r"gives slots of layer 0 whose index is \[0\]"),
     ({0: torch.tensor([10**6])}, "gives slots of layer 0 whose index reaches outside"),
     ({0: torch.zeros(9, 1).long()}, "gives slots of layer 0 whose index has 9 rows")],
)  # fmt: skip
def test_a_broken_trim_is_named(pictured: tuple, what: object, says: str) -> None:
    engine, inputs = pictured
    for run in (
        lambda: engine.generate(inputs, BadTrim(what), max_new_tokens=3),
        lambda: check_policy(BadTrim, what=what),
    ):
        with pytest.raises(zipvl.UsageError, match=r"^BadTrim.trim\(\) of the method " + says):
            run()


class Brings(Policy):
    def __init__(self, name: str = "scout", what: object = 3):
        setattr(self, name, what)


@pytest.mark.parametrize(
    ("name", "what", "says"),
    [("scout", H2O, "Brings.scout is <class 'zipvl.policies.h2o.H2O'>: give a Policy that is made"),
     ("scout", "h2o", "Brings.scout is 'h2o': give a Policy"),
     ("storage", 4, "Brings.storage is 4: give a KVFormat"),
     ("plan", 3, r"3\(\) of the method fails with TypeError"),
     ("step", partial(int, "x"), r"functools.partial\(.*\(\) of the method fails with TypeError")],
)  # fmt: skip
def test_what_a_method_brings_must_be_of_use(
    pictured: tuple, name: str, what: object, says: str
) -> None:
    engine, inputs = pictured
    with pytest.raises(zipvl.UsageError, match=says):
        engine.generate(inputs, Brings(name, what), max_new_tokens=3)
    with pytest.raises(zipvl.UsageError, match=says):
        check_policy(Brings, name=name, what=what)


def test_check_policy_wants_a_policy() -> None:
    with pytest.raises(zipvl.UsageError, match="3 is no method"):
        check_policy(lambda: 3)


def test_what_is_no_methods_fault_passes(pictured: tuple) -> None:
    engine, inputs = pictured
    with pytest.raises(zipvl.OutOfMemory):
        engine.generate(inputs, Returns(RuntimeError("DefaultCPUAllocator: not enough memory")))
    with pytest.raises(zipvl.UsageError, match="my own words"):
        engine.generate(inputs, Returns(zipvl.UsageError("my own words")))
