"""AttentionPredictor: its history, what it foretells, and what a step then reads."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import zipvl
from zipvl.policies import load_policy
from zipvl.policies.attnpred import AttnPredLast
from zipvl.policies.attnpred_cnn import AttnPredReimpl, load, predict
from zipvl.policy import Plan, Policy, StepView, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .looking import attention, step_row
from .untrained import NEEDS, WEIGHTS, network

SMALL = {"budget": 64, "sinks": 16, "local": 16, "dense": 1, "every": 2}
CASES = [
    ("attnpred_last", SMALL, {"budget": 1000}),
    ("attnpred_last", {}, {}),  # prompts shorter than its budget
    ("attnpred_last", {"budget": 33, "sinks": 0, "local": 17, "dense": 0, "ema": 0.3}, None),
    ("attnpred_last", {"budget": 17, "sinks": 0, "local": 1, "dense": 0, "every": 1}, None),
    ("attnpred_reimpl", SMALL | NEEDS["attnpred_reimpl"], {"budget": 1000}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


# --- the rule as published, in numpy


def pool(row: np.ndarray) -> list[float]:
    """The largest of every 16 numbers."""
    return [float(row[i : i + 16].max()) for i in range(0, len(row), 16)]


def grouped(rows: list[list[float]], G: int) -> list[np.ndarray]:
    """One row a query head -> their means, one a key/value head."""
    return [np.mean(mine, axis=0) for mine in np.split(np.array(rows), G)]


def convolved(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x [in, rows, blocks] -> [out, rows, blocks], 3 x 3, zeros around, ReLU."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(w), *x.shape[1:]))
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
            out += np.einsum("oi,irb->orb", w[:, :, i, j], part)
    return np.maximum(out + b[:, None, None], 0)


def by_network(w: dict[str, Tensor], history: np.ndarray) -> np.ndarray:
    n = {name: t.double().numpy() for name, t in w.items()}
    x = convolved(history[None], n["conv1.weight"], n["conv1.bias"])
    x = convolved(x, n["conv2.weight"], n["conv2.bias"]).mean(1)  # [32, blocks]
    return n["conv3.weight"][0, :, 0] @ x + n["conv3.bias"][0]


def by_ema(ema: float, history: np.ndarray) -> np.ndarray:
    weight = [(1 - ema) ** age for age in range(len(history))][::-1]
    return np.average(history, axis=0, weights=weight)


class Follows(Policy):
    """Does what another one does, and holds each of its steps against the rule."""

    def __init__(self, policy: AttnPredLast, w: dict[str, Tensor] | None = None):
        self.policy, self.steps, self.fetched, self.w = policy, 0, 0, w
        self.history: dict[int, list[list[np.ndarray]]] = {}  # of a layer, by head: rows

    def plan(self, view: View) -> Plan:
        assert self.policy.plan(view) == Plan()
        if view.layer >= self.policy.dense:
            whole, G = attention(view)[:, -64:], len(view.k)
            rows = [grouped([pool(head[i]) for head in whole], G) for i in range(whole.shape[1])]
            self.history[view.layer] = [[row[g] for row in rows] for g in range(G)]
        return Plan()

    def wanted(self, layer: int, n: int) -> list[list[int]] | None:
        p = self.policy
        if n <= p.budget:
            return None
        last = (n - p.local) // 16  # whole blocks only: from its start on all are read
        ends = [*range(p.sinks), *range(last * 16, n)]
        count, found = (p.budget - len(ends)) // 16, []
        for rows in self.history[layer]:
            middle = np.array([row[p.sinks // 16 : last] for row in rows])
            next_row = by_network(self.w, middle) if self.w else by_ema(p.ema, middle)
            blocks = np.argsort(-next_row)[:count] + p.sinks // 16
            found.append(sorted([*ends, *(16 * b + i for b in blocks for i in range(16))]))
        return found

    def step(self, view: StepView) -> Plan:
        plan, p, n = self.policy.step(view), self.policy, view.length
        if view.layer < p.dense:
            assert plan == Plan()
            return plan
        self.steps += 1
        want, row = self.wanted(view.layer, n), step_row(view)
        if want is None:
            assert plan == Plan()
        else:
            assert plan.attend is not None
            assert plan.attend.tolist() == want
            assert len(want[0]) <= p.budget
            assert n - 1 in want[0]
            self.fetched += 1
            if (n - view.notes.prompt) % p.every:  # what was not read counts as nothing
                share = len(row) // len(want)
                for h, head in enumerate(row):
                    head[[i for i in range(n) if i not in want[h // share]]] = 0
                row /= row.sum(1, keepdims=True)
        for rows, new in zip(
            self.history[view.layer],
            grouped([pool(r) for r in row], len(view.k)),
            strict=True,
        ):
            rows[:] = [np.pad(old, (0, len(new) - len(old))) for old in rows[-63:]]
            rows.append(new)
        mine = view.notes[view.layer]
        np.testing.assert_allclose(mine, np.array(self.history[view.layer]), rtol=2e-4, atol=1e-6)
        return plan


OPTIONS = [
    {"budget": 64, "sinks": 16, "local": 16, "dense": 1, "every": 3},
    {"budget": 75, "sinks": 32, "local": 10, "dense": 0, "every": 1, "ema": 0.2},
    {"budget": 49, "sinks": 0, "local": 33, "dense": 0, "every": 5, "ema": 0.7},  # no block or one
]
SHAPES_OF_HEADS = [(4, 1, 0), (4, 2, 1), (4, 4, 2)]


@pytest.mark.parametrize(("H", "G", "seed"), SHAPES_OF_HEADS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [59, pytest.param(139, marks=pytest.mark.slow), 200])
def test_steps_read_what_the_rule_says(H: int, G: int, seed: int, options: dict, length: int) -> None:  # fmt: skip
    toy, policy = Toy.build(H, G, seed), AttnPredLast(**options)
    follows, plain = Follows(policy), toy.run(Policy(), [toy.prompt(length)], steps=10)
    got = toy.run(follows, [toy.prompt(length)], steps=10)
    layers = 3 - policy.dense
    assert follows.steps == 10 * layers
    assert follows.fetched == layers * sum(length + i > policy.budget for i in range(1, 11))
    assert got.prefilled == [[length]] * 3  # nothing leaves
    assert [c.spans.lengths for c in got.caches] == [[length + 10]] * 3
    assert got.bytes == plain.bytes


@pytest.mark.parametrize(("H", "G", "seed"), SHAPES_OF_HEADS)
def test_steps_read_what_the_network_says(H: int, G: int, seed: int) -> None:
    toy = Toy.build(H, G, seed)
    policy = AttnPredReimpl(budget=64, sinks=16, local=16, dense=1, every=3, weights=str(WEIGHTS))
    follows = Follows(policy, network(5))
    toy.run(follows, [toy.prompt(180)], steps=8)
    assert follows.fetched == 16


@pytest.mark.parametrize(("rows", "blocks"), [(64, 40), (64, 1), (5, 2), (1, 3)])
def test_the_network_is_the_published_one(rows: int, blocks: int) -> None:
    w = network(rows + blocks)
    assert sum(t.numel() for t in w.values()) == 4833
    history = torch.rand(3, rows, blocks, generator=torch.Generator().manual_seed(1))
    got = predict(w, history)
    want = [by_network(w, one.double().numpy()) for one in history]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-4, atol=1e-4)


def test_a_late_favourite_is_found_when_all_are_read() -> None:
    """What no step reads stays unseen until a row is that of all slots."""
    policy, notes = AttnPredLast(32, 0, 1, dense=0, every=3), zipvl.policy.Notes(64)
    history = torch.full((1, 64, 4), 0.1)
    history[:, :, 1] = 0.5
    notes[0] = history
    k = torch.zeros(1, 70, 2)
    k[0, 40] = 9.0  # block 2
    read = []
    for n in range(65, 71):
        view = StepView(
            layer=0, num_layers=1, q=torch.ones(1, 2), k=k[:, :n], v=k[:, :n],
            positions=torch.arange(n)[None], due=0, notes=notes,
        )  # fmt: skip
        plan = policy.step(view)
        assert plan.attend is not None
        read.append(sorted({i // 16 for i in plan.attend[0].tolist()}))
    assert read == [[1, 4]] * 3 + [[2, 4]] * 3  # the third step sees it, the fourth reads it


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 90])
def test_the_history_begins_with_the_end_of_the_prompt(length: int) -> None:
    """Before any step: its last 64 rows, or as many as there are."""
    kept: list[int] = []

    class Spy(AttnPredLast):
        def plan(self, view: View) -> Plan:
            plan = super().plan(view)
            if view.layer < self.dense:
                assert not view.notes
                return plan
            whole, G = attention(view)[:, -64:], len(view.k)
            want = [grouped([pool(head[i]) for head in whole], G) for i in range(whole.shape[1])]
            mine = view.notes[view.layer].transpose(0, 1)
            np.testing.assert_allclose(mine, np.array(want), rtol=2e-4, atol=1e-6)
            kept.append(len(mine))
            return plan

    Toy.build(4, 2, seed=length).run(Spy(dense=1), [Toy.build(4, 2).prompt(length)], steps=1)
    assert kept == [min(64, length)] * 2


@pytest.mark.parametrize(
    ("every", "whole"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (5, [5]), (8, [])]
)
def test_a_row_of_all_joins_the_history_every_so_many_steps(every: int, whole: list[int]) -> None:
    """Else its numbers are 0 where nothing was read."""
    toy = Toy.build(4, 2)
    got = toy.run(AttnPredLast(48, 16, 16, 0, every), [toy.prompt(100)], steps=7)
    for layer in range(3):
        rows = got.notes[0][layer][:, -7:, :6]  # blocks that were there before
        full = (rows > 0).all(2).all(0)
        assert [i + 1 for i in range(7) if full[i]] == whole


def test_published_sizes() -> None:
    """1024 slots of a longer cache, 64 the first and 64 the newest; layers 0 and 1 read all."""
    toy = Toy.build(4, 2)
    got = toy.run(AttnPredLast(), [toy.prompt(1100)], steps=1)
    reads = [plan.attend for plan in got.seen.steps]
    assert reads[0] is None
    assert reads[1] is None
    assert 1008 < reads[2].shape[1] <= 1024
    for slots in reads[2].tolist():
        assert slots[:64] == list(range(64))
        assert slots[-64:] == list(range(1101 - 64, 1101))


@pytest.mark.parametrize("name", ["attnpred_last", "attnpred_reimpl"])
def test_long_answers_in_batches(name: str) -> None:
    """Of unequal prompts, each as alone; with budgets or layers for all, as dense."""
    toy = Toy.build(4, 1)
    make = partial(load_policy, name, **NEEDS.get(name, {}), sinks=16, local=16)
    prompts = [toy.prompt(90), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(47, "none")]
    dense, policy = toy.run(Policy(), prompts, 12), make(budget=48, dense=0, every=3)
    got = toy.run(policy, prompts, 12)
    assert got.tokens == [toy.run(policy, [p], 12).tokens[0] for p in prompts]
    assert got.bytes == dense.bytes
    far = [(a - b).abs().max() for a, b in zip(got.hidden[1:], dense.hidden[1:], strict=True)]
    assert max(far) > 0.05
    for options in ({"budget": 102, "dense": 0}, {"budget": 48, "dense": 3}):
        assert toy.run(make(**options), prompts, 12).tokens == dense.tokens


def test_a_network_is_no_option_and_is_float32(tmp_path: Path) -> None:
    policy = load_policy("attnpred_reimpl", **NEEDS["attnpred_reimpl"])
    sizes = "budget=1024, sinks=64, local=64, dense=2, every=5"
    assert repr(policy) == f"AttnPredReimpl({sizes}, weights={WEIGHTS})"
    half = {name: t.bfloat16() for name, t in network(1).items()}
    save_file(half, tmp_path / "half")
    read = load(str(tmp_path / "half"))
    assert {t.dtype for t in read.values()} == {torch.float32}
    assert all(torch.equal(t, half[name].float()) for name, t in read.items())


# --- what is said of what is wrong


@pytest.mark.parametrize(
    ("options", "says"),
    [({"sinks": 10}, "sinks is 10: give a multiple of 16"), ({"sinks": -16}, "sinks is -16"),
     ({"local": 0}, "local is 0: give 1 or more"),
     ({"budget": 143}, "budget is 143: give 144 or more"), ({"dense": -1}, "dense is -1: give 0"),
     ({"every": 0}, "every is 0: give 1"), ({"ema": 0.0}, "ema is 0.0"), ({"ema": 1.5}, "ema is 1.5")],
)  # fmt: skip
def test_options(options: dict, says: str) -> None:
    with pytest.raises(zipvl.UsageError, match=says):
        load_policy("attnpred_last", **options)


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    def refused(path: str, says: str) -> None:
        with pytest.raises(zipvl.UsageError, match="weights is " + says) as e:
            load_policy("attnpred_reimpl", weights=path)
        assert "\n" not in str(e.value)

    refused("", "missing: train them, `python -m lab.attnpred`")
    refused(str(tmp_path / "none.safetensors"), ".*which cannot be read.*name a file")
    refused(str(tmp_path), ".*which cannot be read")
    for name, data in (("empty", b""), ("text", b"no network at all, " * 9)):
        (tmp_path / name).write_bytes(data)
        refused(str(tmp_path / name), ".*which cannot be read")
    others = {
        "more": network(0) | {"conv4.bias": torch.zeros(1)},
        "less": {"conv1.bias": torch.zeros(16)},
        "shape": network(0) | {"conv3.bias": torch.zeros(2)},
    }
    for name, found in others.items():
        save_file(found, tmp_path / name)
        refused(str(tmp_path / name), ".*holds other tensors than lab.attnpred writes")
    for bad in (torch.nan, torch.inf):
        save_file(network(0) | {"conv3.bias": torch.tensor([bad])}, tmp_path / "bad")
        refused(str(tmp_path / "bad"), ".*not finite")
    (tmp_path / "cut").write_bytes(WEIGHTS.read_bytes()[:-8])
    refused(str(tmp_path / "cut"), ".*which cannot be read")
    with pytest.raises(zipvl.UsageError, match="has no option 'ema'"):
        load_policy("attnpred_reimpl", ema=0.5)
