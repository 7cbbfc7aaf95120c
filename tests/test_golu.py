"""GoLU: its formula, and where it starts and ends."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE

from rtdetr_act import create
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_golu_conforms() -> None:
    check_activation("golu", REFERENCE["golu"])


def test_its_gate_ends_at_0_and_1() -> None:
    x = torch.tensor([-100.0, -5.0, 20.0, 100.0], requires_grad=True)
    y = create("golu")(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 20.0, 100.0]), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=1e-6, atol=1e-30
    )
