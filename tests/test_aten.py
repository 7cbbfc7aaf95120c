"""What the package relies on beyond what torch documents, each against a plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtdetr_act.kernels import aten

TYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("slopes", [(1.8, 0.9), (1.0, -0.3), (1e-3, 50.0)])
def test_two_slopes_in_one_pass(dtype: torch.dtype, slopes: tuple[float, float]) -> None:
    x, sign = torch.randn(2, 1000, dtype=dtype), torch.randn(2, 1000, dtype=dtype)
    sign[0, :4] = torch.tensor([0.0, -0.0, 1e9, -1e9])
    expected = torch.where(sign > 0, slopes[0] * x, slopes[1] * x)
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-14, "atol": 1e-25}
    torch.testing.assert_close(aten.scale_by_sign(x, sign, *slopes), expected, **tolerance)
    for out in (torch.empty_like(x), x.clone(), sign.clone()):
        given = [out if torch.equal(out, t) else t for t in (x, sign)]
        found = aten.scale_by_sign(*given, *slopes, out=out)
        assert found.data_ptr() == out.data_ptr()
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("dtype", TYPES)
def test_where_positive(dtype: torch.dtype) -> None:
    x, sign = torch.randn(1000, dtype=dtype), torch.randn(1000, dtype=dtype)
    sign[:3] = torch.tensor([0.0, float("nan"), float("inf")])
    expected = torch.where(sign > 0, x, 0)
    expected[1] = x[1]  # NaN is not at most the threshold
    out = torch.empty_like(x)
    assert aten.zero_unless_positive(x, sign, out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(aten.zero_unless_positive(x, sign, sign), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_gradient_of_the_sigmoid_and_softplus_over_their_input(dtype: torch.dtype) -> None:
    gate, grad = torch.rand(1000, dtype=dtype), torch.randn(1000, dtype=dtype)
    expected = grad * gate * (1 - gate)
    torch.testing.assert_close(aten.sigmoid_backward_(grad, gate), expected)
    x = torch.linspace(-30, 30, 1000, dtype=dtype)
    expected = torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
    assert aten.softplus_(x) is x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_per_channel(dtype: torch.dtype) -> None:
    grad, x = torch.randn(3, 5, 7, 9, dtype=dtype), torch.randn(3, 5, 7, 9, dtype=dtype)
    products, totals = aten.sum_per_channel(grad, x)
    torch.testing.assert_close(products, (grad * x).sum((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(totals, grad.sum((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_states_of_recording_are_seen() -> None:
    seen: list[tuple[bool, bool]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((aten.is_tracing(), aten.is_functorch_active()))
        return x * 2

    note(torch.ones(1))
    torch.jit.trace(note, torch.ones(1), check_trace=False)
    torch.func.vmap(note)(torch.ones(2))
    assert seen == [(False, False), (True, False), (False, True)]
