"""Packing and quantisers against slow numpy versions of the published formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zipvl.model.quant import (
    BITS,
    KEYS,
    VALUES,
    Packed,
    Scheme,
    channel_scale,
    pack,
    quantise,
    unpack,
)  # fmt: skip


def kivi_keys(group: int) -> Scheme:
    return Scheme(tokens=group, heads=1, channels=1)


def kivi_values(group: int) -> Scheme:
    return Scheme(tokens=1, heads=1, channels=group)


SCHEMES = {
    "keys": KEYS,
    "values": VALUES,
    "kivi keys": kivi_keys(32),
    "kivi values": kivi_values(32),
    "small groups": Scheme(3, 0, 5),
    "one for all": Scheme(0, 0, 0),
}


def plain(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((*packed.codes.shape[:2], packed.width), torch.nan, dtype=dtype)
    packed.into(out)
    return out


def draw(n: int, G: int, D: int, seed: int, dtype: torch.dtype = torch.float32,
         offset: float = 3) -> Tensor:  # fmt: skip
    """Channels of very different size and offset, as keys have them."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, G, D, generator=chance)
    x *= 10 ** torch.empty(G, D).uniform_(-2, 2, generator=chance)
    return (x + torch.randn(G, D, generator=chance) * offset).to(dtype)


def quantised(x: Tensor, bits: int, scheme: Scheme) -> Packed:
    return quantise(x, bits, scheme, channel_scale(x) if scheme.scaled else None)


# --- packing


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 5), st.integers(0, 67), st.integers(0, 2**32 - 1))
def test_packing_is_exact(bits: int, rows: int, n: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, n), generator=chance, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(n * bits / 8))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_uses_every_bit(bits: int) -> None:
    """All 2^bits codes at all places: different codes give different bytes."""
    per = 8 // bits
    every = torch.cartesian_prod(*[torch.arange(2**bits, dtype=torch.uint8)] * per)
    assert len(pack(every.view(-1, per), bits).unique()) == 256


# --- the published formulas, an element at a time


def oracle_group(x: np.ndarray, bits: int) -> np.ndarray:
    """Asymmetric minimum/maximum quantisation of one group, there and back, float64."""
    low, top = x.min(), 2**bits - 1
    step = (x.max() - low) / top
    if step == 0:
        return x.copy()
    return np.rint(np.clip((x - low) / step, 0, top)) * step + low


def oracle_zipcache(k: np.ndarray, v: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys per channel; values over c_i = sqrt(max |x_i|), per token over all channels."""
    deq_k, deq_v = np.empty_like(k), np.empty_like(v)
    for g in range(k.shape[1]):
        for d in range(k.shape[2]):
            deq_k[:, g, d] = oracle_group(k[:, g, d], bits)
    c = np.sqrt(np.abs(v).max(0))
    c[c == 0] = 1
    for t in range(len(v)):
        deq_v[t] = oracle_group(v[t] / c, bits) * c
    return deq_k, deq_v


def oracle_kivi(k: np.ndarray, v: np.ndarray, bits: int, group: int) -> tuple:
    """Keys: groups of tokens of one channel; values: groups of channels of one token and head."""
    deq_k, deq_v = np.empty_like(k), np.empty_like(v)
    n, G, D = k.shape
    for g in range(G):
        for a in range(0, n, group):
            for d in range(D):
                deq_k[a : a + group, g, d] = oracle_group(k[a : a + group, g, d], bits)
        for t in range(n):
            for a in range(0, D, group):
                deq_v[t, g, a : a + group] = oracle_group(v[t, g, a : a + group], bits)
    return deq_k, deq_v


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 3), st.integers(1, 37),
    st.integers(1, 40), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_quantisers_are_the_published_ones(
    bits: int, n: int, G: int, D: int, group: int, seed: int
) -> None:
    k, v = draw(n, G, D, seed).double(), draw(n, G, D, seed + 1).double()
    wants = {
        (KEYS, VALUES): oracle_zipcache(k.numpy(), v.numpy(), bits),
        (kivi_keys(group), kivi_values(group)): oracle_kivi(k.numpy(), v.numpy(), bits, group),
    }
    for schemes, want in wants.items():
        for x, scheme, deq in zip((k, v), schemes, want, strict=True):
            got = plain(quantised(x.float(), bits, scheme)).double()
            # an element on the edge of two codes may fall to either: half a step from it, both
            same = torch.isclose(got, torch.from_numpy(deq), rtol=1e-4, atol=1e-5 * x.abs().max())
            halves = (got - x).abs(), (torch.from_numpy(deq) - x).abs()
            tie = torch.isclose(*halves, rtol=1e-3, atol=1e-5 * float(x.abs().max()))
            assert (same | tie).all()
            assert same.double().mean() > 0.98


# --- half a step, per element


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS), st.sampled_from(sorted(SCHEMES)), st.integers(1, 60),
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0, 3, 300]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_element_is_within_half_a_step(
    bits: int, name: str, n: int, G: int, D: int, dtype: torch.dtype, offset: float, seed: int
) -> None:
    x, scheme = draw(n, G, D, seed, dtype, offset), SCHEMES[name]
    packed = quantised(x, bits, scheme)
    half = packed.spread(packed.step, slice(0, n)).expand(n, G, D).double() / 2
    if packed.scale is not None:
        half = half * packed.scale.double()
    error = (plain(packed).double() - x.double()).abs()
    slop = 1e-5 * x.double().abs().amax() if scheme.heads == 0 else 1e-5 * x.double().abs().amax(0)
    assert (error <= half * (1 + 1e-5) + slop).all()
    assert packed.step.dtype == packed.low.dtype == dtype
    assert packed.step.numel() + packed.low.numel() == scheme.parameters(n, G, D)
    assert packed.codes.nbytes == n * G * math.ceil(D * bits / 8)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_nothing_is_clipped_where_bfloat16_is_coarse(name: str, sign: int) -> None:
    """Far from zero a minimum between two bfloat16 numbers must go down, or the least are cut."""
    x = (sign * (50 + torch.randn(30, 2, 40))).bfloat16()
    packed = quantised(x, 8, SCHEMES[name])
    scale = torch.ones(2, 40) if packed.scale is None else packed.scale.float()
    half = packed.spread(packed.step, slice(0, 30)) * scale / 2
    assert ((plain(packed) - x.float()).abs() <= half * 1.001 + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_come_back(bits: int, name: str, dtype: torch.dtype) -> None:
    for value in (0.0, 1.0, -3.140625, 1e-30):
        x = torch.full((9, 2, 7), value, dtype=dtype)
        got = plain(quantised(x, bits, SCHEMES[name]), dtype)
        torch.testing.assert_close(got, x, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_dead_channel_is_no_division_by_zero() -> None:
    x = draw(20, 2, 8, 3)
    x[:, 1, 4] = 0
    got = plain(quantised(x, 4, VALUES))
    assert torch.isfinite(got).all()
    assert (got[:, 1, 4].abs() <= x.abs().max() / 8).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_no_tokens(bits: int, name: str) -> None:
    packed = quantise(torch.empty(0, 2, 7), bits, SCHEMES[name])
    assert sum(t.nbytes for t in packed.tensors()) == 0
    assert plain(packed).shape == (0, 2, 7)


def test_rows_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(150, 2, 12, 5)
    for scheme in SCHEMES.values():
        whole = quantised(x, 4, scheme)
        with monkeypatch.context() as m:
            m.setattr("zipvl.model.quant.CHUNK", 240)  # ten rows at a time
            pieces = quantised(x, 4, scheme)
            assert torch.equal(pieces.codes, whole.codes)
            assert torch.equal(pieces.step, whole.step)
            torch.testing.assert_close(plain(pieces), plain(whole), rtol=0, atol=0)


def test_joined_blocks_are_the_blocks() -> None:
    a, b = draw(64, 2, 40, 1), draw(32, 2, 40, 2)
    for scheme in (kivi_keys(32), kivi_values(32)):
        one, two = quantised(a, 2, scheme), quantised(b, 2, scheme)
        torch.testing.assert_close(
            plain(one.join(two)), torch.cat((plain(one), plain(two))), rtol=0, atol=0
        )


def test_outlier_channels_are_what_the_schemes_are_for() -> None:
    """Relative squared error at 2 bits with three loud channels: per channel beats per token for
    keys, and dividing by the channels' scale recovers most of what grouping gives for values."""
    chance = torch.Generator().manual_seed(0)
    k, v = (torch.randn(512, 4, 64, generator=chance) for _ in range(2))
    k[:, 0, :3] *= 30
    v[:, 1, 5] *= 30

    def error(x: Tensor, scheme: Scheme) -> float:
        deq = plain(quantised(x, 2, scheme))
        return float(((deq - x) / x.std(0)).square().mean())

    tokenwise = Scheme(1, 0, 0)
    assert error(k, KEYS) < error(k, tokenwise) / 5
    assert error(v, VALUES) < error(v, tokenwise) / 5
    assert error(v, VALUES) < 2.5 * error(v, kivi_values(32))
