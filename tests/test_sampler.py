"""The sampler against its definition, spelled out in numpy: who may be drawn, and how often."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
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
    chance, x = sampling.generators(1), torch.from_numpy(logits)[None]
    return np.bincount([sampling.choose(x, chance)[0] for _ in range(count)], minlength=len(logits))


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


def chances(sampling: Sampling, logits: np.ndarray) -> np.ndarray:
    """The probability [V] that each token is drawn with."""
    tokens, weights = sampling.support(torch.from_numpy(logits)[None])
    out = np.zeros(len(logits))
    out[slice(None) if tokens is None else tokens[0].numpy()] = weights[0].numpy()
    return out / out.sum()


@pytest.mark.parametrize(
    ("mass", "inside"),
    [(1e-9, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 4)],
)
def test_top_p_takes_the_token_that_reaches_it(mass: float, inside: int) -> None:
    """Shares 0.5, 0.25, 0.13 and 0.12; a hair below a border stands for the border itself."""
    shares = np.array([0.13, 0.5, 0.12, 0.25])
    border = mass - 1e-6 * (mass in (0.5, 0.75))
    found = chances(Sampling(1.0, border), np.log(shares).astype(np.float32))
    assert set(found.nonzero()[0]) == {1, 3, 0, 2} - set([2, 0, 3][: 4 - inside])
    assert np.allclose(found, np.where(found > 0, shares, 0) / shares[found > 0].sum())


def test_top_p_of_one_leaves_the_rarest_in() -> None:
    """e^-30 is lost next to 1 in float32, and in a sum of float64s that already holds 1."""
    logits = np.array([0.0, -20.0, -30.0, -60.0], dtype=np.float32)
    assert (chances(Sampling(1.0), logits) > 0).all()


@given(
    st.lists(st.integers(-600, 600), min_size=1, max_size=12, unique=True),
    st.floats(1e-300, 1e3),
    st.integers(0, 14),
    st.floats(1e-6, 1.0),
)
@example([0, 1, 147], 0.25, 0, 0.9999999999999999)
@settings(max_examples=150, deadline=None)
def test_any_options_draw_as_defined(
    sixteenths: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.array(sixteenths, dtype=np.float32) / 16
    few, many = (allowed(logits, temperature, top_k, top_p * (1 + e)) for e in (-1e-9, 1e-9))
    found = chances(Sampling(temperature, top_p, top_k), logits)
    if not top_k and top_p == 1:  # all tokens, in float32: the rarest weigh nothing
        few, many, found = (np.where(x < 1e-44, 0, x) for x in (few, many, found))
    assert ((few > 0) <= (found > 0)).all()  # a border nearer than a hair may fall on either side
    assert ((found > 0) <= (many > 0)).all()
    wanted = np.where(found > 0, many, 0)
    assert np.allclose(found, wanted / wanted.sum(), rtol=1e-5)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_greedy_is_the_largest(values: list[float]) -> None:
    """Temperature 0 ignores the other options, and so does top_k 1 at any temperature."""
    x = torch.tensor(values)
    for options in (Sampling(), Sampling(0.0, 0.1, 2, 9), Sampling(3.0, top_k=1)):
        assert values[options.choose(x[None], options.generators(1))[0]] == max(values)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 5e-324])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    x = torch.randn(50)
    x[40:] = -torch.inf  # what padding rows look like
    sampling = Sampling(temperature)
    assert sampling.choose(x[None], sampling.generators(1)) == [int(x.argmax())]


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
        sampling, chance = Sampling(1.5, seed=-4), Sampling(1.5, seed=-4).generators(1)
        made.append([sampling.choose(x[None], chance) for _ in range(20)])
    assert made[0] == made[1]


def test_logits_stay_as_they_are() -> None:
    x = torch.randn(30)
    before = x.clone()
    Sampling(0.8, 0.5, 4).choose(x[None], Sampling().generators(1))
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
        ({"top_k": 1.5}, "top_k is 1.5: give a whole number"),
        ({"top_p": None}, "top_p is None: give a number"),
        ({"temperature": "1"}, "temperature is '1': give a number"),
        ({"seed": "a"}, "seed is 'a': give a whole number"),
        ({"seed": [1, 2.5]}, "seed is 2.5: give a whole number"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
    ],
)
def test_senseless_options(options: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Sampling(**options)


def test_extreme_seeds_work() -> None:
    for seed in (-(2**63), 2**63 - 1):
        assert len(Sampling(1.0, seed=seed).generators(3)) == 3


# --- batches and vocabularies of real size ------------------------------------------------------


OPTIONS = [
    (0.0, 1.0, 0),
    (0.8, 1.0, 0),
    (1.3, 0.9, 0),
    (1.0, 0.99999, 0),
    (0.7, 1.0, 50),
    (1, 0.5, 9),
]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), OPTIONS)
def test_a_batch_draws_as_its_rows_alone(temperature: float, top_p: float, top_k: int) -> None:
    """With one seed for all, and with one each; also where the nucleus is larger than NUCLEUS."""
    x = torch.randn(5, 20_000, generator=torch.Generator().manual_seed(3)) * 0.5
    for seeds in (7, [4, 9, 4, 2, 11]):
        sampling = Sampling(temperature, top_p, top_k, seeds)
        together, many = [], sampling.generators(5)
        for _ in range(6):
            together.append(sampling.choose(x, many))
        for b, row in enumerate(x):
            seed = seeds if isinstance(seeds, int) else seeds[b]
            alone = Sampling(temperature, top_p, top_k, seed)
            chance = alone.generators(1)
            assert [alone.choose(row[None], chance)[0] for _ in range(6)] == [
                t[b] for t in together
            ]


def test_a_large_nucleus_is_the_whole_of_it() -> None:
    """Flat logits: 90 % of the mass are 18,000 tokens, far more than are looked at first."""
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1)) * 0.1
    tokens, weights = Sampling(1.0, 0.9).support(x)
    probs, order = x[0].double().softmax(0).sort(descending=True)
    inside = int((probs.cumsum(0) - probs < 0.9).sum())
    assert int((weights > 0).sum()) == pytest.approx(inside, abs=1)
    assert set(tokens[0, : inside - 1].tolist()) == set(order[: inside - 1].tolist())


def test_seeds_are_one_or_one_for_each() -> None:
    with pytest.raises(UsageError, match="2 seeds for 3 prompts"):
        Sampling(1.0, seed=[1, 2]).generators(3)
    with pytest.raises(UsageError, match="seed is 9223372036854775808"):
        Sampling(seed=[1, 2**63])


def test_frequencies_over_a_large_vocabulary() -> None:
    """Two tokens hold most of the mass, thousands the rest: shares within six sigma."""
    x = torch.full((1, 30_000), -9.0)
    x[0, 17], x[0, 29_999] = 1.0, 0.0
    want = x[0].double().softmax(0)
    sampling, count = Sampling(1.0), 4000
    chance = sampling.generators(1)
    drawn = torch.tensor([sampling.choose(x, chance)[0] for _ in range(count)])
    for token in (17, 29_999):
        p = float(want[token])
        assert abs(int((drawn == token).sum()) - count * p) < 6 * (count * p * (1 - p)) ** 0.5
    rest = drawn[(drawn != 17) & (drawn != 29_999)]
    assert len(rest.unique()) > 0.9 * len(rest) > 0  # spread over all the others
