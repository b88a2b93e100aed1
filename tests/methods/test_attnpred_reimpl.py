"""AttentionPredictor with its network: the network itself, its file, and what a step reads by it."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zipvl.errors import UsageError
from zipvl.policies import load_policy
from zipvl.policies.attnpred import AttnPredLast
from zipvl.policies.attnpred_cnn import AttnPredReimpl, load, predict
from zipvl.policy import Policy
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

from .foretold import NEEDS, WEIGHTS, Follows, random_network

FEW = {"budget": 48, "sinks": 16, "local": 16} | NEEDS["attnpred_reimpl"]
CASES = [
    ("attnpred_reimpl", FEW | {"dense": 0, "every": 2}, {"budget": 1000}),
    ("attnpred_reimpl", FEW | {"budget": 17, "sinks": 0, "local": 1, "every": 1}, {"dense": 3}),
    (f"attnpred_reimpl:weights={WEIGHTS}", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x [c, R, B], zeros around it -> [o, R, B]; negative numbers become 0."""
    _, R, B = x.shape
    around = np.zeros((len(x), R + 2, B + 2))
    around[:, 1:-1, 1:-1] = x
    out = np.empty((len(weight), R, B))
    for r in range(R):
        for b in range(B):
            out[:, r, b] = (weight * around[:, r : r + 3, b : b + 3]).sum((1, 2, 3)) + bias
    return np.maximum(out, 0)


def foretold(w: dict[str, torch.Tensor], history: np.ndarray) -> np.ndarray:
    """history [R, B] -> [B]"""
    w = {name: t.double().numpy() for name, t in w.items()}
    x = convolved(history[None], w["conv1.weight"], w["conv1.bias"])
    x = convolved(x, w["conv2.weight"], w["conv2.bias"]).mean(1)  # [32, B]
    return w["conv3.weight"][0, :, 0] @ x + w["conv3.bias"][0]


@pytest.mark.parametrize(("rows", "blocks"), [(64, 5), (64, 1), (64, 2), (1, 4), (3, 7)])
def test_the_network_is_three_convolutions(rows: int, blocks: int) -> None:
    for seed in range(2):
        w = random_network(seed)
        history = torch.rand(3, rows, blocks, generator=torch.Generator().manual_seed(seed))
        want = [foretold(w, one) for one in history.double().numpy()]
        np.testing.assert_allclose(predict(w, history), want, rtol=1e-4, atol=1e-4)


def test_it_has_as_many_parameters_as_the_published_one() -> None:
    network = load(str(WEIGHTS))
    assert sum(t.numel() for t in network.values()) == 4833
    assert network.keys() == random_network(0).keys()
    assert all(torch.equal(t, random_network(0)[name]) for name, t in network.items())


class Spy(Follows, AttnPredReimpl):
    def guess(self, history: np.ndarray) -> np.ndarray:
        return foretold(self.network, history)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("options", "length"),
    [((48, 16, 16, 1, 3), 110), ((40, 0, 20, 2, 1), 50), ((80, 32, 3, 2, 5), 150)],
)
def test_steps_read_what_the_network_foretells(options: tuple, length: int, groups: int) -> None:
    toy = Toy.build(4, groups, seed=length)
    spy = Spy(*options, weights=str(WEIGHTS))
    toy.run(spy, [toy.prompt(length)], steps=18)
    want = [(layer, n) for n in range(length + 1, length + 19) for layer in range(spy.dense, 3)]
    assert [(layer, n) for layer, n, _ in spy.read] == want
    last = toy.run(AttnPredLast(*options), [toy.prompt(length)], steps=18).seen.steps
    reads = [plan.attend.tolist() for plan in last if plan.attend is not None]
    assert reads != [read for *_, read in spy.read]  # the network has a say


def test_batches_and_full_budgets() -> None:
    toy = Toy.build(4, 2)
    prompts = [toy.prompt(90), toy.prompt(1), toy.prompt(2, "all"), toy.prompt(47, "none")]
    dense = toy.run(Policy(), prompts, 8)
    policy = load_policy("attnpred_reimpl", **FEW, dense=0, every=3)
    got = toy.run(policy, prompts, 8)
    assert got.tokens == [toy.run(policy, [p], 8).tokens[0] for p in prompts]
    assert got.bytes == dense.bytes
    assert not torch.allclose(got.hidden[8], dense.hidden[8], rtol=1e-2, atol=1e-2)
    for options in ({"budget": 98}, {"dense": 3}):
        assert (
            toy.run(load_policy("attnpred_reimpl", **FEW | options), prompts, 8).tokens
            == dense.tokens
        )


def test_it_shows_its_options_and_can_be_copied() -> None:
    policy = load_policy("attnpred_reimpl", **NEEDS["attnpred_reimpl"])
    sizes = "budget=1024, sinks=64, local=64, dense=2, every=5"
    assert repr(policy) == f"AttnPredReimpl({sizes}, weights={WEIGHTS})"
    assert copy.deepcopy(policy) == policy


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    half = {name: t.bfloat16() for name, t in random_network(1).items()}
    save_file(half, tmp_path / "half.safetensors")
    network = load(str(tmp_path / "half.safetensors"))
    assert all(torch.equal(t, half[name].float()) for name, t in network.items())
    assert {t.dtype for t in network.values()} == {torch.float32}


def wrong_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Name, and what is said of it."""
    right, cannot, other = random_network(2), "which cannot be read", "it holds other tensors"
    files = {
        "less": {name: t for name, t in right.items() if name != "conv3.bias"},
        "more": right | {"conv4.bias": torch.zeros(1)},
        "shape": right | {"conv1.weight": torch.zeros(16, 1, 3, 5)},
        "nan": right | {"conv2.bias": torch.full((32,), torch.nan)},
        "inf": right | {"conv3.bias": torch.tensor([torch.inf])},
    }
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "text").write_text("no tensors at all")
    (folder / "empty").touch()
    (folder / "cut").write_bytes(WEIGHTS.read_bytes()[:-8])
    return {"less": other, "more": other, "shape": other, "nan": "not finite", "inf": "not finite",
            "text": cannot, "empty": cannot, "cut": cannot, ".": cannot, "gone": cannot}  # fmt: skip


def test_a_wrong_file_is_one_sentence(tmp_path: Path) -> None:
    for name, says in wrong_files(tmp_path).items():
        path = str(tmp_path / name)
        with pytest.raises(UsageError) as e:
            load_policy("attnpred_reimpl", weights=path)
        assert str(e.value).startswith(f"method 'attnpred_reimpl': weights is {path!r}"), name
        assert says in str(e.value), name
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "weights is missing: train them, `python -m lab.attnpred`, and name the file"),
        ({"weights": 3}, "weights is 3: give a name"),
        ({"ema": 0.5}, "no option 'ema'"),
        ({"budget": 100}, "budget is 100: give 144 or more"),
    ],
)
def test_options(options: dict, says: str) -> None:
    with pytest.raises(UsageError) as e:
        load_policy("attnpred_reimpl", **options)
    assert says in str(e.value)
