"""The forms of a linear layer against its definition in float64."""

import pytest
import torch

import zipvl.linear as forms
from zipvl.linear import BLOCK, FEW, WIDEN, Linear

ROWS = [0, 1, 2, WIDEN, 9, FEW, FEW + 1]


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_is_the_product(
    monkeypatch: pytest.MonkeyPatch, emulated: bool, dtype: torch.dtype, outputs: int, bias: bool
) -> None:
    monkeypatch.setattr(forms, "EMULATED", emulated)
    layer = Linear(40, outputs, bias=bias).to(dtype)
    for shape in [*((rows, 40) for rows in ROWS), (2, 3, 40), (40,)]:
        x = torch.randn(shape).to(dtype)
        turned = x.T.contiguous().T if x.ndim == 2 else x  # as another layer may have made it
        with torch.inference_mode():
            got = layer(x)
            assert torch.allclose(layer(turned).double(), got.double(), rtol=2e-2, atol=2e-2)
            want = x.double() @ layer.weight.double().T
            want = want + layer.bias.double() if bias else want
        assert got.shape == (*shape[:-1], outputs)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), want, rtol=2e-2, atol=2e-5 if dtype.itemsize == 4 else 2e-2
        )


def test_gradients_are_those_of_a_linear_layer() -> None:
    layer, x = Linear(8, 5), torch.randn(3, 8, requires_grad=True)
    layer(x).square().sum().backward()
    want = 2 * layer(x).detach() @ layer.weight.detach()
    torch.testing.assert_close(x.grad, want)


def test_widened_sums_are_not_rounded_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 ones and a small one: bfloat16 sums would stop at 256."""
    monkeypatch.setattr(forms, "EMULATED", True)
    layer = Linear(4096, 3, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    with torch.inference_mode():
        assert (layer(torch.ones(5, 4096, dtype=torch.bfloat16)) == 4096).all()
