"""SMU and SMU-1: their formulas, where they start, what they are fitted to and exported as."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import REFERENCE
from torch import nn
from torch.nn import functional as F

from rtdetr_act import SpecError, create
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.surgery.match import match
from rtdetr_act.testing import check_activation

NAMES = ("smu", "smu1")


@pytest.mark.integration
@pytest.mark.parametrize("spec", ["smu(mu=1.5)", "smu1(mu=0.5)"])
def test_smu_conforms(spec: str) -> None:
    check_activation(spec, REFERENCE[spec.partition("(")[0]])


@pytest.mark.parametrize("name", NAMES)
def test_alpha_is_the_slope_on_the_left(name: str) -> None:
    module, x = create(name, alpha=0.1, mu=0.7).double(), torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = REFERENCE[name](x.numpy(), {"mu": 0.7}, 0, alpha=0.1)
    torch.testing.assert_close(module(x), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)  # mu was in float32


@pytest.mark.parametrize(("name", "mu"), [("smu", 1_000_000.0), ("smu1", 4.352665993287951e-9)])
def test_they_start_as_leaky_relu(name: str, mu: float) -> None:
    module, x = create(name), torch.randn(2, 8, 50, 50)
    assert [(key, tuple(p.shape)) for key, p in module.named_parameters()] == [("mu", (1,))]
    assert module.mu.item() == pytest.approx(mu) and module.alpha == 0.25
    expected = F.leaky_relu(x, 0.25)
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=2e-7)
    halved = copy.deepcopy(module).half().float()  # as in a checkpoint; mu is infinite then, or 0
    assert halved.mu.item() in (float("inf"), 0)
    zeros = torch.cat([x.flatten(), torch.zeros(8)]).requires_grad_()
    y = halved(zeros)
    y.sum().backward()
    assert zeros.grad is not None and halved.mu.grad is not None
    assert bool(zeros.grad.isfinite().all()) and bool(halved.mu.grad.isfinite())
    torch.testing.assert_close(y[: x.numel()], expected.flatten(), rtol=1e-6, atol=2e-6)
    form = get_entry(name).exportable
    assert form is not None and str(form(module)) == str(form(halved)) == "LeakyReLU(negative_slope=0.25)"


@pytest.mark.parametrize("name", NAMES)
def test_mu_of_0_has_finite_gradients(name: str) -> None:
    module = create(name, mu=0.0)
    for copies in (1, 20_000):  # in torch's own operators, and in blocks
        x = torch.tensor([-1.0, 0.0, 1.0]).repeat(copies).requires_grad_()
        gradients = torch.autograd.grad(module(x).sum(), [x, module.mu])
        assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_a_match_is_exact_where_it_can_be(name: str) -> None:
    module = create(name)
    for slope, old in ((0.0, nn.ReLU()), (0.1, nn.LeakyReLU(0.1))):
        assert match(module, old, None) == pytest.approx(0, abs=1e-6)
        assert module.alpha == pytest.approx(slope, abs=1e-6)
    soft = create("smu(0.0, 0.5)") if name == "smu" else create("squareplus")
    assert match(module, nn.GELU() if name == "smu" else soft, None) == pytest.approx(0, abs=1e-6)
    assert module.alpha == pytest.approx(0, abs=1e-6)
    assert module.mu.item() == pytest.approx(0.5**0.5 if name == "smu" else 2, abs=1e-5)


@pytest.mark.parametrize("spec", ["smu(alpha='x')", "smu(mu=1e39)", "smu1(alpha=True)", "smu1(mu='x')"])
def test_wrong_arguments_are_named(spec: str) -> None:
    with pytest.raises(SpecError, match=r"(alpha|mu) is a finite number"):
        create(spec)
