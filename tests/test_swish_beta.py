"""Swish with a learned beta: its formula, per site and per channel, where it starts and what it is fitted to."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE
from torch import nn
from torch.nn import functional as F

from rtdetr_act import SpecError, create
from rtdetr_act.activations.swish_beta import SwishBeta
from rtdetr_act.surgery.match import match
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_swish_beta_conforms() -> None:
    check_activation("swish_beta", REFERENCE["swish_beta"])
    check_activation("swish_beta(per_channel=True)", REFERENCE["swish_beta"], dims=(1, 3))


@pytest.mark.parametrize(("per_channel", "shape"), [(False, (1,)), (True, (6,))])
def test_it_starts_as_silu(per_channel: bool, shape: tuple[int, ...]) -> None:
    module, x = create("swish_beta", 6, per_channel=per_channel), torch.randn(2, 6, 5, 4)
    assert [(key, tuple(p.shape)) for key, p in module.named_parameters()] == [("beta", shape)]
    assert (module.beta == 1).all()
    torch.testing.assert_close(module(x), F.silu(x))


def test_swish_is_still_silu() -> None:
    assert type(create("swish")) is nn.SiLU and type(create("SwishBeta")) is SwishBeta


def test_a_match_is_exact_where_it_can_be() -> None:
    module = create("swish_beta(beta=3.0, per_channel=True)", 4)
    assert match(module, nn.SiLU(), 4) == pytest.approx(0, abs=1e-6) and (module.beta == 1).all()
    assert match(module, nn.GELU(), 4) == pytest.approx(0.013, abs=0.003)
    assert module.beta[0].item() == pytest.approx(1.702, abs=0.1)  # as in the approximation of GELU by a sigmoid


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(SpecError, match="needs the number of channels"):
        create("swish_beta", per_channel=True)
    with pytest.raises(SpecError, match="beta is a finite number"):
        create("swish_beta(beta='x')")
    with pytest.raises(ValueError, match="layout is 'map' or 'tokens'"):
        SwishBeta(layout="nchw")  # type: ignore[arg-type]
