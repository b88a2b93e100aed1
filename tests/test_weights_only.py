"""Packed weights and copies: what they stand for, when they are used, what they cost."""

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
    BlockedLinear,
    PackedLinear,
    check_kind,
    held,
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
    chance = torch.Generator().manual_seed(0)
    for ids in torch.randint(3, 60, (32, PACKED_ROWS), generator=chance):
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
    with pytest.raises(UsageError, match="unknown weights 'int2': use full, packed, int8, int4"):
        zipvl.load(oracle("llava").folder, weights="int2")
    for kind in KINDS[1:]:
        with pytest.raises(UsageError, match="for decoding on a CPU and the device is cuda"):
            check_kind(kind, torch.device("cuda"), torch.float32)
    check_kind("full", torch.device("cuda"), torch.float16)


# --- weights in the order of products -------------------------------------------------------------


def usable(dtype: torch.dtype) -> bool:
    try:
        check_kind("packed", torch.device("cpu"), dtype)
    except UsageError:
        return False
    return True


needs_blocks = pytest.mark.skipif(not usable(torch.float32), reason="PyTorch without oneDNN")


@needs_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 40), (130, 40), (128, 70), (896, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_are_the_same_weight(
    dtype: torch.dtype, outputs: int, inputs: int, bias: bool
) -> None:
    """For any number and layout of rows: against float64, no worse than one rounding."""
    if not usable(dtype):
        pytest.skip("no products of this type here")
    full = Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    blocked = BlockedLinear(full)
    assert (blocked.weight.dtype, blocked.weight.nbytes) == (dtype, full.weight.nbytes)
    for shape in [
        *((rows, inputs) for rows in (0, 1, 2, 3, 8, 16, 300)),
        (2, 3, inputs),
        (inputs,),
    ]:
        x = torch.randn(shape).to(dtype)
        turned = x.T.contiguous().T if x.ndim == 2 else x
        with torch.inference_mode():
            want = x.double() @ full.weight.double().T + (full.bias.double() if bias else 0)
            for y in (blocked(x), blocked(turned)):
                assert (y.shape, y.dtype) == (want.shape, dtype)
                close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {
                    "rtol": 2 * ROUNDING, "atol": 2 * ROUNDING}  # fmt: skip
                torch.testing.assert_close(y.double(), want, **close)


@needs_blocks
@pytest.mark.parametrize("family", ["llava_onevision_tied", "llava"])
def test_a_model_in_blocks_gives_the_same_tokens(oracle: Callable, family: str) -> None:
    """Alone and in batches, dense and sparse; logits within rounding."""
    folder: Path = oracle(family).folder
    full, packed = zipvl.load(folder), zipvl.load(folder, weights="packed")
    prompts = ["What happens?", "Which long question is the first of all of these?", "a b c d e"]
    for prompt in prompts:
        torch.testing.assert_close(full.logits(prompt), packed.logits(prompt), rtol=1e-4, atol=1e-4)
    for method in ("dense", "zipvl:tau=0.9", "fixed:ratio=0.5"):
        for asked in (prompts[:1], prompts, prompts * 3):
            a, b = (e.generate([e.prepare(p) for p in asked], method, max_new_tokens=6,
                               ignore_eos=True) for e in (full, packed))  # fmt: skip
            assert [x.tokens for x in a] == [x.tokens for x in b]


@needs_blocks
def test_the_demo_model_in_blocks_answers_the_same() -> None:
    full, packed = (
        zipvl.load(device="cpu", dtype="float32", weights=w) for w in ("full", "packed")
    )
    clip, asked = str(zipvl.demo_clip()), ("List all objects in order.", "What comes first?")
    batches = [[e.prepare(p, video=clip, frames=n) for p in asked for n in (4, 8)]
               for e in (full, packed)]  # fmt: skip
    for method in ("dense", "zipvl"):
        a, b = (e.generate(batch, method, max_new_tokens=24)
                for e, batch in zip((full, packed), batches, strict=True))  # fmt: skip
        assert [x.text for x in a] == [x.text for x in b]


@needs_blocks
@pytest.mark.parametrize(("family", "tied"), [("llava_onevision_tied", True), ("llava", False)])
def test_blocks_replace_the_weight(oracle: Callable, family: str, tied: bool) -> None:
    """Only an embedding that is the head stays beside them; the tower is left alone."""
    model = zipvl.load(oracle(family).folder).model
    before, head = held(model), model.lm_head.weight.nbytes
    grown = pack_weights(model, "packed")
    assert grown == held(model) - before == (head if tied else 0)
    left = [n for n, m in model.named_modules() if type(m) is Linear]
    assert all(n.startswith(("vision", "projector")) for n in left)
    assert isinstance(model.lm_head, BlockedLinear)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_blocks_are_refused_where_no_product_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "cannot use packed weights in float64: leave out --weights, or use --dtype float32"
    with pytest.raises(UsageError, match=said):
        check_kind("packed", torch.device("cpu"), torch.float64)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # as PyTorch without oneDNN
    with pytest.raises(UsageError, match="cannot use packed weights in float32"):
        check_kind("packed", torch.device("cpu"), torch.float32)
