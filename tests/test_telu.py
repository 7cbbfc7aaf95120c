"""TeLU: its formula, and where it starts and ends."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE

from rtdetr_act import create
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_telu_conforms() -> None:
    check_activation("telu", REFERENCE["telu"])


def test_its_gate_ends_at_0_and_1() -> None:
    x = torch.tensor([-100.0, 9.0, 100.0], requires_grad=True)
    y = create("telu")(x)
    assert y[0].abs() < 1e-40 and y[1:].tolist() == [9, 100]
    assert torch.autograd.grad(y.sum(), x)[0][1:].tolist() == [1, 1]
