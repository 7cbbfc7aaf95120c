"""StarReLU: its formula, and where it starts and ends."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE

from rtdetr_act import create
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_star_relu_conforms() -> None:
    check_activation("star_relu", REFERENCE["star_relu"])


def test_it_starts_with_mean_0_and_variance_1() -> None:
    module = create("StarReLU")
    assert [(key, p.item()) for key, p in module.named_parameters()] == [
        ("scale", pytest.approx(0.8944)),
        ("bias", pytest.approx(-0.4472)),
    ]
    y = module(torch.special.ndtri(torch.linspace(0, 1, 200_001)[1:-1]))  # a standard normal input
    assert y.mean().item() == pytest.approx(0, abs=2e-3) and y.var().item() == pytest.approx(1, abs=2e-3)
