"""Rational: its start, its fit, its numbers, and inputs of any magnitude."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE
from torch import nn

from rtdetr_act import create
from rtdetr_act.activations.rational import Rational
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.surgery.match import match
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_rational_conforms() -> None:
    check_activation("rational", REFERENCE["rational"])


def test_rational_starts_close_to_leaky_relu() -> None:
    x = torch.linspace(-3, 3, 601)
    error = (Rational()(x) - nn.functional.leaky_relu(x)).abs()
    assert error.max() < 0.034
    assert error.square().mean().sqrt() < 0.006


def test_rational_is_what_users_call_pau() -> None:
    assert type(create("PAU")) is type(create("pade")) is Rational


@pytest.mark.parametrize(
    ("old", "most"), [(nn.SiLU(), 1e-5), (nn.ReLU(), 0.011), (nn.GELU(), 1e-3), (nn.Mish(), 1e-3), (nn.Tanh(), 1e-4)]
)
def test_rational_is_fitted_to_smooth_functions(old: nn.Module, most: float) -> None:
    module = create("rational")
    found = match(module, old, None)
    assert found is not None and found < most
    x = torch.linspace(-2.5, 2.5, 501)
    torch.testing.assert_close(module(x), old(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 10_000])  # few elements take torch's operators
def test_rational_and_its_gradient_are_finite_for_any_input(dtype: torch.dtype, count: int) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, 0.0, 13.5, 1e4, largest], dtype=torch.float64).to(dtype).repeat(count)
    x.requires_grad_()
    module = Rational()
    y = module(x)
    y.float().sum().backward()
    gradients = (x.grad, module.numerator.grad, module.denominator.grad)
    assert y.isfinite().all() and all(each is not None and each.isfinite().all() for each in gradients)
    state = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
    expected = torch.from_numpy(REFERENCE["rational"](x.detach().double().clamp(-1e6, 1e6).numpy(), state, 0))
    torch.testing.assert_close(y.detach().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    assert x.grad is not None and bool((x.grad[x.abs() > 1e6] == 0).all())


def test_rational_exports_a_form_that_half_types_can_compute() -> None:
    entry, module = get_entry("rational"), Rational()
    assert entry.exportable is not None
    written = entry.exportable(module)
    x = torch.linspace(-60_000, 60_000, 4001).half()
    found, exact = written(x), module.double()(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=5e-3)
