"""Which tokens ZipVL keeps, against the paper's equations written out slowly in numpy."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.untrained import NEEDS
from zipvl import Plan, Policy, UsageError, View, load_policy
from zipvl.model.attention import logit_blocks, probe_mass
from zipvl.policies import METHODS
from zipvl.policies.zipvl import ZipVL, covering
from zipvl.policy import Notes, ask

FAST = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = ("random", "peaked", "one-hot", "uniform", "tied")


def heads(
    T: int, kind: str, seed: int, H: int = 4, G: int = 2, D: int = 8
) -> tuple[Tensor, Tensor]:
    """q [T, H, D], k [T, G, D] whose attention is of some kind."""
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(T, H, D, generator=rng), torch.randn(T, G, D, generator=rng)
    if kind == "peaked":
        k *= torch.rand(T, 1, 1, generator=rng) ** 3 * 9
    if kind == "one-hot":  # all rows from some token on see that token alone
        q, k = torch.ones_like(q), torch.zeros_like(k)
        k[int(torch.randint(T, (1,), generator=rng))] = 100.0
    if kind == "uniform":
        k = torch.zeros_like(k)
    if kind == "tied":  # a few different keys, each many times
        k = k[torch.randint(min(T, 4), (T,), generator=rng)]
    return q, k


def build_view(q: Tensor, k: Tensor, is_visual: Tensor, layer: int = 0) -> View:
    """The View as the attention layer builds it."""
    return View(
        layer, 4, k.transpose(0, 1), torch.arange(len(q)), is_visual, Notes(len(q)),
        lambda: q.transpose(0, 1), lambda: k.transpose(0, 1),
        lambda rows: probe_mass(q[rows], k, rows), lambda rows: logit_blocks(q[rows], k, rows),
    )  # fmt: skip


def unasked(rows: Tensor) -> Tensor:
    raise AssertionError("nobody needs scores here")


def equations(q: np.ndarray, k: np.ndarray, rows: list[int], tau: float, divisor: str) -> tuple:
    """Eq. 5 to 8 on probe rows, a loop each: column sums a, count p, normalised scores a~."""
    T, H, D = q.shape
    group = H // k.shape[1]
    a, seen = np.zeros(T), np.zeros(T)
    for i in rows:  # A' = softmax(Q' K^T / sqrt d), row i sees columns 0..i
        for h in range(H):
            logits = [float(q[i, h] @ k[j, h // group]) / math.sqrt(D) for j in range(i + 1)]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            a[: i + 1] += np.array(weights) / sum(weights) / H  # Eq. 5, mean over heads
        seen[: i + 1] += 1
    p, total = 0, 0.0
    for mass in sorted(a, reverse=True):  # Eq. 6: the smallest p that reaches tau x the total
        p, total = p + 1, total + mass
        if total >= tau * a.sum():
            break
    count = {"probes": np.maximum(seen, 1), "all": np.arange(T, 0, -1), "none": np.ones(T)}
    return a, p, a / count[divisor]  # Eq. 7


def borders_on(kept: set[int], score: np.ndarray, p: int, forced: set[int]) -> bool:
    """Eq. 8 up to ties: `kept` is `forced` and p tokens that no left-out token beats."""
    slack = 1e-5 * score.max()
    order = np.sort(score)[::-1]
    floor = order[p - 1]  # the p-th best
    above = set(np.flatnonzero(score > floor + slack).tolist())
    below = set(np.flatnonzero(score < floor - slack).tolist())
    return above <= kept and not (kept & below) - forced and forced <= kept


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    T = draw(st.one_of(st.integers(1, 12), st.integers(13, 60)))
    return (
        T, draw(st.sampled_from(KINDS)), draw(st.integers(0, 10**6)),
        draw(st.sampled_from([0.3, 0.8, 0.96, 0.975, 0.999])),
        draw(st.integers(0, 80)), draw(st.integers(1, 80)),
        draw(st.sampled_from(["text", "last", "none"])),
        draw(st.sampled_from(["probes", "all", "none"])),
    )  # fmt: skip


@FAST
@given(cases())
@example((400, "peaked", 3, 0.975, 20, 20, "last", "probes"))
@example((399, "tied", 4, 0.9, 3, 9, "text", "all"))
@example((1, "random", 0, 0.975, 64, 64, "none", "probes"))
def test_selection_equals_the_equations(case: tuple) -> None:
    T, kind, seed, tau, recent, random, always, divisor = case
    q, k = heads(T, kind, seed)
    visual = torch.rand(T, generator=torch.Generator().manual_seed(seed + 1)) < 0.8
    policy = ZipVL(tau, recent=recent, random=random, always=always, divisor=divisor)
    view = build_view(q, k, visual)
    probes = policy.probe(view)
    rows, mass = probes.tolist(), view.mass(probes).mean(0)
    a, p, score = equations(q.double().numpy(), k.double().numpy(), rows, tau, divisor)
    np.testing.assert_allclose(mass.numpy(), a, atol=1e-5 * len(rows))

    forced = {"text": set((~visual).nonzero()[:, 0].tolist()), "last": set(), "none": set()}[always]
    forced |= {T - 1} if always != "none" else set()
    got_p = covering(mass, tau)
    largest = np.sort(a)[::-1].cumsum()
    slack = 1e-5 * a.sum()  # the scores are float32: on a tie either side of the limit is right
    assert largest[got_p - 1] >= tau * a.sum() - slack
    assert got_p == 1 or largest[got_p - 2] < tau * a.sum() + slack
    if kind == "random":
        assert abs(got_p - p) <= 1
    plan = ask(policy.plan, view)
    kept = plan.attend.tolist()
    assert kept == sorted(set(kept))
    assert plan.cache is plan.attend
    assert got_p <= len(kept) <= got_p + len(forced)
    assert borders_on(set(kept), score, got_p, forced)


@FAST
@given(st.integers(1, 400), st.integers(0, 10**6), st.integers(0, 90), st.integers(0, 90))
def test_probe_rows(T: int, seed: int, recent: int, random: int) -> None:
    if recent + random == 0:
        return
    q, k = heads(T, "uniform", 0)
    policy = ZipVL(0.9, recent=recent, random=random, seed=seed)
    rows = [policy.probe(build_view(q, k, torch.ones(T) > 0, layer)) for layer in (0, 1)]
    for r in rows:
        assert (r.diff() > 0).all()
        assert len(r) == min(T, recent) + min(max(0, T - recent), random)
        assert set(range(max(0, T - recent), T)) <= set(r.tolist())
    if 5 <= random <= (T - recent) // 2:
        assert rows[0].tolist() != rows[1].tolist()  # fresh in each layer
        other = ZipVL(0.9, recent=recent, random=random, seed=seed + 1)
        again = other.probe(build_view(q, k, torch.ones(T) > 0))
        assert again.tolist() != rows[0].tolist()


@FAST
@given(st.integers(1, 300), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_p_never_decreases_with_tau(T: int, kind: str, seed: int) -> None:
    q, k = heads(T, kind, seed)
    view = build_view(q, k, torch.ones(T) > 0)
    mass = view.mass(ZipVL().probe(view)).mean(0)
    counts = [covering(mass, tau) for tau in (1e-6, 0.2, 0.5, 0.9, 0.96, 0.975, 0.99, 0.9999)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] <= T
    assert ZipVL(1.0).plan(view).attend is None  # exactly dense
    assert ZipVL(1.0).plan(replace(view, score=unasked)) == Plan()


def test_the_threshold_is_reached_not_passed() -> None:
    """Sums that are exact in binary: reaching tau x the total is enough."""
    assert covering(torch.ones(4), 0.5) == 2
    assert covering(torch.tensor([1.0, 4.0, 1.0, 2.0]), 0.75) == 2
    assert covering(torch.tensor([1.0, 4.0, 1.0, 2.0]), 0.7500001) == 3


def test_one_hot_attention_needs_one_token() -> None:
    q, k = torch.ones(50, 4, 8), torch.zeros(50, 2, 8)
    k[0] = 100.0
    policy = ZipVL(0.975, always="none")
    plan = ask(policy.plan, build_view(q, k, torch.ones(50) > 0))
    assert plan.attend.tolist() == [0]


def test_uniform_attention_favours_no_place() -> None:
    """With all rows probed Eq. 7 divides the sum of a column by the rows that see it: what is left
    is the mean of 1 / (row + 1), so late tokens must not win by being seen seldom, nor early ones
    by being seen often."""
    q, k = heads(64, "uniform", 0)
    view = build_view(q, k, torch.ones(64) > 0)
    rows = ZipVL().probe(view)
    mass = view.mass(rows).mean(0).double().numpy()
    want = [sum(1 / (i + 1) for i in range(j, 64)) for j in range(64)]
    np.testing.assert_allclose(mass, want, rtol=1e-5)
    score = ZipVL().score(view, view.mass(rows).mean(0), rows).double().numpy()
    np.testing.assert_allclose(score, np.array(want) / np.arange(64, 0, -1), rtol=1e-5)


def test_always_keeps_what_it_names() -> None:
    q, k = torch.ones(40, 4, 8), torch.zeros(40, 2, 8)
    k[20] = 100.0  # the rows from 20 on want this token; the rest of the mass lies on rows 0..19
    visual = torch.arange(40) % 4 > 0
    kept = {}
    for always in ("text", "last", "none"):
        policy = ZipVL(0.4, recent=19, random=1, always=always)
        kept[always] = ask(policy.plan, build_view(q, k, visual)).attend.tolist()
    assert kept["none"] == [20]
    assert kept["last"] == [20, 39]
    assert kept["text"] == sorted({*range(0, 40, 4), 39})


# --- options and files


def test_every_method_loads_with_its_defaults_and_says_its_options() -> None:
    for name in METHODS:
        policy = load_policy(name, **NEEDS.get(name, {}))
        assert isinstance(policy, Policy)
        assert repr(policy).startswith(type(policy).__name__)
        with pytest.raises(UsageError, match="it takes "):
            load_policy(f"{name}:bogus=1")
    assert load_policy(policy) is policy


def test_options_from_string_and_arguments() -> None:
    policy = load_policy("zipvl:tau=0.96,recent=32,random=96,always=last", tau=0.5, seed=None)
    assert (policy.tau, policy.recent, policy.random) == (0.5, 32, 96)
    assert (policy.always, policy.seed) == ("last", 0)
    assert load_policy("zipvl:tau=1").tau == 1.0
    assert load_policy("zipvl").fill == "zero"
    assert load_policy("zipvl+").fill == "previous"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("zipvll", "unknown method 'zipvll': use one of dense, zipvl, zipvl-stream, zipvl+"),
        ("", "unknown method"),
        ("zipvl:tua=0.9", "no option 'tua': it takes tau=0.975"),
        ("zipvl:tau", "option=value"),
        ("zipvl:kv_bits=4,2", "'2' is not of the form option=value; write two bit widths as 4/2"),
        ("zipvl:tau=high", "tau is 'high': give a number, such as 0.975"),
        ("zipvl:recent=1.5", "recent is 1.5: give a whole number"),
        ("zipvl:tau=0", "above 0"),
        ("zipvl:tau=nan", "above 0"),
        ("zipvl:recent=0,random=0", "1 probe or more"),
        ("zipvl:recent=-1", "1 probe or more"),
        (f"zipvl:seed={2**53}", "seed is 9007199254740992: give a number below 2^53"),
        (f"zipvl:tau=-{2**53}", "give a number below 2^53"),
        ("zipvl:always=maybe", "text, last, none"),
        ("zipvl:always=1", "give a name"),
        ("zipvl:divisor=x", "probes, all, none"),
        ("zipvl:fill=x", "zero, previous, own"),
        ("zipvl+:fill=zero", "no option 'fill'"),
        ("dense:tau=0.9", "it takes none"),
        ("fixed:ratio=0", "above 0"),
        ("random:ratio=1.1", "up to 1"),
        ("fastv:after=0", "1 or more"),
        ("fastv:ratio=-1", "from 0 to 1"),
        ("fastv:variant=shrink", "drop, mask"),
        ("streaming:window=0", "1 or more"),
        ("streaming:sinks=-1", "0 or more"),
        ("h2o:recent=0", "1 or more"),
        ("h2o:heavy=-2", "0 or more"),
        ("snapkv:budget=8", "hold the window of 32"),
        ("snapkv:kernel=4", "odd"),
        ("snapkv:pool=sum", "max, avg"),
        ("snapkv:window=0", "1 or more"),
        ("nowhere.py:Mine", "does not exist"),
    ],
)
def test_a_wrong_method_is_one_clear_sentence(method: str, words: str) -> None:
    with pytest.raises(UsageError) as e:
        load_policy(method)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


GOOD = """
    from __future__ import annotations
    from dataclasses import dataclass
    from zipvl import Plan, Policy
    @dataclass(repr=False)
    class Mine(Policy):
        ratio: float = 0.5
    class Other(Policy):
        def __init__(self, ratio):
            self.ratio = ratio
    class Switched(Policy):
        def __init__(self, shift=False, flip: bool = None):
            self.shift, self.flip = shift, flip
    class Fails(Policy):
        def __init__(self, size=1):
            self.size = {}[size]
    class NotAPolicy: ...
    made = Mine()
    def function(): ...
"""


@pytest.fixture
def method_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "random.py"  # named like a module of the standard library
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_a_method_from_a_file(method_file: Callable[[str], Path]) -> None:
    import random

    path = method_file(GOOD)
    assert load_policy(f"{path}:Mine").ratio == 0.5
    assert load_policy(f"{path}:Mine:ratio=0.25").ratio == 0.25
    assert load_policy(f"{path}:Other:ratio=2").ratio == 2
    assert load_policy(f"{path}:Mine", ratio=0.1).ratio == 0.1
    assert hasattr(random, "randint")  # the real module is untouched


@pytest.mark.parametrize("option", ["shift", "flip"])  # by its default, by its annotation
@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("no", False), ("0", False), ("True", True), ("yes", True), ("1", True)],
)
def test_a_switch_arrives_as_a_switch(
    method_file: Callable[[str], Path], option: str, text: str, value: bool
) -> None:
    switched = f"{method_file(GOOD)}:Switched"
    for policy in (
        load_policy(f"{switched}:{option}={text}"), load_policy(switched, **{option: value})
    ):  # fmt: skip
        assert getattr(policy, option) is value


def test_a_class_is_a_method_and_a_policy_is_made() -> None:
    assert load_policy(ZipVL, tau=0.5) == ZipVL(tau=0.5)
    policy = ZipVL()
    assert load_policy(policy, tau=None) is policy  # an option that is None is none
    with pytest.raises(UsageError, match=r"is made: give it tau, seed where you make it"):
        load_policy(policy, tau=0.5, seed=1)
    with pytest.raises(UsageError, match="method 'ZipVL' has no option 'ratio'"):
        load_policy(ZipVL, ratio=0.5)
    for wrong in (3, None, Path, [ZipVL]):
        with pytest.raises(UsageError, match="give a name, a Policy or a class of one"):
            load_policy(wrong)


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (GOOD, "", "no method '': it has Mine, Other, Switched, Fails"),
        (GOOD, "Mine2", "no method 'Mine2': it has Mine, Other, Switched, Fails"),
        (GOOD, "NotAPolicy", "it has Mine, Other, Switched, Fails"),
        (GOOD, "Policy", "it has Mine, Other, Switched, Fails"),
        (GOOD, "made", "its made is Mine(ratio=0.5), no class made from zipvl.Policy"),
        (GOOD, "function", "its function is <function function at "),
        (GOOD, "Other", "missing"),
        (GOOD, "Fails", "fails when it is made (KeyError: 1)"),
        (GOOD, "Switched:shift=maybe", "shift is 'maybe': give true or false"),
        (GOOD, "Switched:flip=2", "flip is 2: give true or false"),
        (GOOD, "Mine:ratio=1,size=2", "no option 'size': it takes ratio=0.5"),
        ("x = 1", "Mine", "it has no Policy class"),
        ("x = (", "Mine", "cannot be imported (SyntaxError"),
        ("import sys; sys.exit(3)", "Mine", "cannot be imported (SystemExit: 3)"),
        ("import nothing_like_it", "Mine", "cannot be imported (ModuleNotFoundError"),
    ],
)
def test_a_wrong_method_file(
    method_file: Callable[[str], Path], text: str, name: str, words: str
) -> None:
    path = method_file(text)
    with pytest.raises(UsageError) as e:
        load_policy(f"{path}:{name}")
    assert words in str(e.value)
    assert str(path.name) in str(e.value)


def test_a_misspelled_fill_in_a_plan() -> None:
    from zipvl import Plan

    with pytest.raises(UsageError, match="zero, previous, own"):
        Plan(fill="prev")
