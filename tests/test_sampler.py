"""The sampler against its definition, spelled out in numpy: who may be drawn, and how often."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl import UsageError
from zipvl.engine.sampler import Sampling


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probability of every token, [V], by the words of the definition, one token after the other.

    Only for logits without ties. top_k: the k likeliest stay. top_p: of these, tokens enter from the
    likeliest down until their total mass reaches P; the one that reaches it is in.
    """
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = {i: np.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order}
    total = sum(weights.values())
    probs, mass = np.zeros(len(logits)), 0.0
    for i in order:
        if top_p < 1 and mass >= top_p:
            break
        probs[i] = weights[i] / total
        mass += probs[i]
    return probs / probs.sum()


def draws(sampling: Sampling, logits: np.ndarray, count: int) -> np.ndarray:
    """How often each of V tokens comes in `count` draws from one generator."""
    chance, x = sampling.generator(), torch.from_numpy(logits)
    return np.bincount([sampling.choose(x, chance) for _ in range(count)], minlength=len(logits))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (0.7, 5, 0.8), (1.0, 50, 0.999)],
)
def test_support_and_frequencies(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng().normal(size=9).astype(np.float32)
    wanted, count = allowed(logits, temperature, top_k, top_p), 3000
    seed = int(np.random.default_rng().integers(2**62))
    found = draws(Sampling(temperature, top_p, top_k, seed), logits, count)
    assert not found[wanted == 0].any(), "a token outside the support was drawn"
    spread = np.sqrt(count * wanted * (1 - wanted))
    assert (np.abs(found - count * wanted) <= 6 * spread + 1).all(), (found, count * wanted)


def chances(sampling: Sampling, logits: np.ndarray, patch: pytest.MonkeyPatch) -> np.ndarray:
    """The probability [V] each token is really drawn with, read where torch draws."""
    seen: list[torch.Tensor] = []

    def draw(probs: torch.Tensor, _count: int, generator: torch.Generator) -> torch.Tensor:
        seen.append(probs)
        return torch.tensor([0])

    with patch.context() as p:
        p.setattr(torch, "multinomial", draw)
        sampling.choose(torch.from_numpy(logits), sampling.generator())
    order = np.argsort(-logits, kind="stable")[: len(seen[0])]
    out = np.zeros(len(logits))
    out[order] = seen[0].numpy()
    return out / out.sum()


@pytest.mark.parametrize(
    ("mass", "inside"),
    [(1e-9, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 4)],
)
def test_top_p_takes_the_token_that_reaches_it(
    mass: float, inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares 0.5, 0.25, 0.13 and 0.12; a hair below a border stands for the border itself."""
    shares = np.array([0.13, 0.5, 0.12, 0.25])
    found = chances(Sampling(1.0, mass - 1e-6 * (mass in (0.5, 0.75))),
                    np.log(shares).astype(np.float32), monkeypatch)  # fmt: skip
    assert set(found.nonzero()[0]) == {1, 3, 0, 2} - set([2, 0, 3][: 4 - inside])
    assert np.allclose(found, np.where(found > 0, shares, 0) / shares[found > 0].sum())


def test_top_p_of_one_leaves_the_rarest_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """e^-30 is lost next to 1 in float32, and in a sum of float64s that already holds 1."""
    logits = np.array([0.0, -20.0, -30.0, -60.0], dtype=np.float32)
    assert (chances(Sampling(1.0), logits, monkeypatch) > 0).all()


@given(
    st.lists(st.integers(-600, 600), min_size=1, max_size=12, unique=True),
    st.floats(1e-300, 1e3),
    st.integers(0, 14),
    st.floats(1e-6, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_any_options_draw_as_defined(
    sixteenths: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.array(sixteenths, dtype=np.float32) / 16
    near = [allowed(logits, temperature, top_k, top_p * (1 + e)) for e in (-1e-9, 1e-9)]
    with pytest.MonkeyPatch.context() as patch:
        found = chances(Sampling(temperature, top_p, top_k), logits, patch)
    assert any(
        ((found > 0) == (wanted > 0)).all() and np.allclose(found, wanted) for wanted in near
    )


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_greedy_is_the_largest(values: list[float]) -> None:
    """Temperature 0 ignores the other options, and so does top_k 1 at any temperature."""
    x = torch.tensor(values)
    for options in (Sampling(), Sampling(0.0, 0.1, 2, 9), Sampling(3.0, top_k=1)):
        assert values[options.choose(x, options.generator())] == max(values)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 5e-324])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    x = torch.randn(50)
    x[40:] = -torch.inf  # what padding rows look like
    sampling = Sampling(temperature)
    assert sampling.choose(x, sampling.generator()) == int(x.argmax())


def test_huge_temperature_is_uniform_but_never_padding() -> None:
    x = np.array([5.0, -3.0, 0.0, -np.inf], dtype=np.float32)
    found = draws(Sampling(1e30, seed=1), x, 600)
    assert found[3] == 0
    assert (found[:3] > 140).all()


def test_seed_decides() -> None:
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    runs = [draws(Sampling(2.0, seed=s), x, 50).tolist() for s in (11, 11, 12)]
    assert runs[0] == runs[1] != runs[2]


def test_seed_is_an_order_of_tokens() -> None:
    """The exact tokens, not only their counts, and whatever torch's global generator has seen."""
    x = torch.linspace(0, 1, 64)
    made = []
    for noise in (0, 7):
        torch.rand(noise)
        sampling, chance = Sampling(1.5, seed=-4), Sampling(1.5, seed=-4).generator()
        made.append([sampling.choose(x, chance) for _ in range(20)])
    assert made[0] == made[1]


def test_logits_stay_as_they_are() -> None:
    x = torch.randn(30)
    before = x.clone()
    Sampling(0.8, 0.5, 4).choose(x, Sampling().generator())
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
    ],
)
def test_senseless_options(options: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Sampling(**options)


def test_extreme_seeds_work() -> None:
    for seed in (-(2**63), 2**63 - 1):
        assert isinstance(Sampling(1.0, seed=seed).generator(), torch.Generator)
