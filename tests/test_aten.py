"""What the package relies on beyond what torch documents, each against a plain formula."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from op_checks import BATCH_NORM_IS_EXACT
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

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
    torch.testing.assert_close(aten.zero_unless_positive(x, sign.clone(), out), expected, rtol=0, atol=0)
    expected = torch.where(sign.nan_to_num(1) > -0.5, x, 0)
    torch.testing.assert_close(aten.zero_unless_above(x, sign, -0.5, sign), expected, rtol=0, atol=0)


def test_zero_outside_keeps_what_is_within_the_limit() -> None:
    x, position = torch.randn(64), 3 * torch.randn(64)
    expected = torch.where(position.abs() < 2, x, 0)
    for out in (torch.empty(64), torch.empty(64, dtype=torch.bfloat16)):
        assert aten.zero_outside(x, position, 2, out) is out
        torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0)
    torch.testing.assert_close(aten.zero_outside(x, position, 2, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_of_sigmoid_and_tanh_and_softplus_over_their_input(dtype: torch.dtype) -> None:
    gate, grad = torch.rand(1000, dtype=dtype), torch.randn(1000, dtype=dtype)
    torch.testing.assert_close(aten.tanh_backward_(grad.clone(), gate), grad * (1 - gate**2))
    expected = grad * gate * (1 - gate)
    torch.testing.assert_close(aten.sigmoid_backward_(grad, gate), expected)
    x = torch.linspace(-30, 30, 1000, dtype=dtype)
    expected = torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
    assert aten.softplus_(x) is x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", TYPES)
def test_hardswish_into_a_buffer_and_its_derivative(dtype: torch.dtype) -> None:
    x, grad, out = torch.linspace(-5, 5, 1000, dtype=dtype), torch.randn(1000, dtype=dtype), torch.empty(1000).to(dtype)
    assert aten.hardswish_into(x, out) is out
    torch.testing.assert_close(out, x * ((x + 3) / 6).clamp(0, 1))
    derivative = torch.where(x < -3, 0, torch.where(x > 3, 1, x / 3 + 0.5))
    torch.testing.assert_close(aten.hardswish_backward(grad, x), grad * derivative)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_normalise_batch_gives_what_batch_norm_gave(
    affine: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (3 * torch.randn(3, 17, 13, 5) + torch.randn(17, 1, 1)).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(17, dtype=wide), torch.randn(17, dtype=wide)) if affine else (None, None)
    result = F.batch_norm(x.requires_grad_(), None, None, weight, bias, True, 0.1, 1e-3)
    statistics = aten.get_batch_statistics(result)
    assert statistics is not None
    mean, deviation = statistics
    center, variance = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(mean.dtype, 1e-2)
    torch.testing.assert_close(mean.double(), center, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(deviation.double(), (variance + 1e-3).rsqrt(), rtol=tolerance, atol=tolerance)
    again = aten.normalise_batch(x.detach(), weight, bias, mean, deviation)
    assert again.stride() == result.stride() and again.dtype == result.dtype
    if BATCH_NORM_IS_EXACT and mean.dtype == torch.float32:
        assert torch.equal(again, result)
    else:
        torch.testing.assert_close(again, result, rtol=5 * tolerance, atol=5 * tolerance)


def test_only_a_batch_norm_in_training_has_statistics() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert aten.get_batch_statistics(x.exp()) is None
    assert aten.get_batch_statistics(x) is None


def test_hooks_of_others_are_seen() -> None:
    assert not aten.has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert aten.has_saved_tensor_hooks() or not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def test_the_address_of_a_storage() -> None:
    x = torch.zeros(4, 4)
    assert aten.get_storage_address(x) == aten.get_storage_address(x[1:].view(-1))
    assert aten.get_storage_address(x) != aten.get_storage_address(x.clone())
    assert aten.get_storage_address(torch.zeros(2, 2).to_sparse()) == 0


@pytest.mark.parametrize("mode", [FlopCounterMode(display=False), BaseTorchFunctionMode()])
def test_modes_are_seen(mode: AbstractContextManager[object]) -> None:
    assert not aten.has_modes()
    with mode:
        assert aten.has_modes()
    assert not aten.has_modes()
