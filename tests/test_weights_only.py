"""Packed copies of weights: what they stand for, when they are used, what they cost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zipvl
from zipvl.engine.speed import (
    FORMS,
    GROUP,
    KINDS,
    PACKED_ROWS,
    PackedLinear,
    check_kind,
    pack_weights,
)
from zipvl.errors import UsageError
from zipvl.linear import Linear

ROUNDING = 2.0**-8  # of one bfloat16 number


def layer(rows: int, width: int, kind: str, dtype: torch.dtype, bias: bool = False) -> PackedLinear:
    full = Linear(width, rows, bias=bias).to(dtype).requires_grad_(False)
    return PackedLinear(full, kind)


def weight_of(packed: PackedLinear) -> Tensor:
    """float64 [out, in] that the packed copy stands for, read out with rows of the identity."""
    eye = torch.eye(packed.in_features, dtype=torch.bfloat16)
    return packed.times(eye, packed.codes, packed.scales).T.double()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "width"), [(16, 64), (48, 192), (320, 128)])
def test_half_a_step(kind: str, rows: int, width: int) -> None:
    packed = layer(rows, width, kind, torch.float32)
    packed.weight.data[:, 0] *= 5  # an outlier in one group must not cost the others
    packed.codes, packed.scales = FORMS[kind][0](packed.weight)
    w = packed.weight.double()
    if kind == "int8":
        step = w.abs().amax(1, keepdim=True) / 127
    else:
        low, high = w.unflatten(1, (-1, GROUP)).aminmax(dim=2)
        step = ((high - low) / 15).repeat_interleave(GROUP, 1)
    slack = 2 * ROUNDING * w.abs().amax(1, keepdim=True)
    assert ((weight_of(packed) - w).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", range(1, PACKED_ROWS + 1))
def test_product_of_what_is_packed(kind: str, dtype: torch.dtype, count: int) -> None:
    """Against float64 on the dequantised weight; bias in the model's own dtype."""
    packed = layer(96, 256, kind, dtype, bias=True)
    x = torch.randn(count, 256, dtype=dtype)
    with torch.inference_mode():
        y = packed(x)
    exact = x.bfloat16().double() @ weight_of(packed).T + packed.bias.double()
    assert y.dtype == dtype
    assert y.shape == (count, 96)
    assert (y - exact).abs().max() <= 4 * ROUNDING * exact.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_rows_and_training_use_the_full_weight(kind: str) -> None:
    packed = layer(32, 64, kind, torch.float32)
    full = Linear(64, 32, bias=False)
    full.weight = packed.weight
    many, few = torch.randn(PACKED_ROWS + 1, 64), torch.randn(1, 64)
    with torch.inference_mode():
        assert torch.equal(packed(many), full(many))
        assert not torch.equal(packed(few), full(few))
    assert torch.equal(packed(few), full(few))  # gradients are on
    assert packed.weight is full.weight


def test_zero_rows_stay_zero() -> None:
    for kind in ("int8", "int4"):
        full = Linear(64, 16, bias=False).requires_grad_(False)
        full.weight.zero_()
        with torch.inference_mode():
            assert (PackedLinear(full, kind)(torch.randn(2, 64)) == 0).all()


@pytest.mark.parametrize(("kind", "bytes_a_weight"), [("int8", 1.0), ("int4", 0.5 + 4 / GROUP)])
def test_memory_is_what_the_file_says(kind: str, bytes_a_weight: float) -> None:
    packed = layer(512, 1024, kind, torch.bfloat16)
    scales = 2 * 512 if kind == "int8" else 0
    assert packed.packed_bytes == 512 * 1024 * bytes_a_weight + scales


@pytest.mark.parametrize(("kind", "error", "same"), [("int8", 0.07, 0.8), ("int4", 0.7, 0.3)])
@pytest.mark.parametrize("family", ["llava_onevision_tied", "llava"])
@torch.inference_mode()
def test_a_tiny_model_stays_close(
    oracle: Callable, family: str, kind: str, error: float, same: float
) -> None:
    """Contexts so short that every layer computes packed: logits, and how often the likeliest
    token is the same one. A prefill is the same bit by bit."""
    folder: Path = oracle(family).folder
    exact, packed = zipvl.load(folder), zipvl.load(folder, weights=kind)
    hits = []
    for ids in torch.randint(3, 60, (32, PACKED_ROWS)):
        a, b = (
            e.model.logits(e.model.text(e.model.text.embed_tokens(ids), [PACKED_ROWS]))
            for e in (exact, packed)
        )
        assert 0 < (a - b).norm() / a.norm() < error
        hits += (a.argmax(1) == b.argmax(1)).tolist()
    assert sum(hits) >= same * len(hits)
    prompt = "What happens in this long question?"
    assert torch.equal(exact.logits(prompt), packed.logits(prompt))
    assert len(packed.generate(prompt, max_new_tokens=4, ignore_eos=True).tokens) == 4


def test_what_does_not_fit_stays_full(oracle: Callable) -> None:
    """4 bits need widths of whole groups and 16 outputs; a layer without these is left alone."""
    model = zipvl.load(oracle("llava").folder).model
    odd = Linear(GROUP + 2, 32, bias=False)
    model.text.layers[0].mlp.up_proj = odd
    linears = [m for m in [*model.text.modules(), model.lm_head] if isinstance(m, Linear)]
    taken = pack_weights(model, "int4")
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert model.text.layers[0].mlp.up_proj is odd
    assert len(packed) == len(linears) - 1  # and nothing of the tower, which never decodes
    assert taken == sum(m.packed_bytes for m in packed)
    assert pack_weights(model, "full") == 0


def test_refusals(oracle: Callable) -> None:
    with pytest.raises(UsageError, match="unknown weights 'int2': use full, int8, int4"):
        zipvl.load(oracle("llava").folder, weights="int2")
    for kind in KINDS[1:]:
        with pytest.raises(UsageError, match="for decoding on a CPU and the device is cuda"):
            check_kind(kind, torch.device("cuda"))
    check_kind("full", torch.device("cuda"))
