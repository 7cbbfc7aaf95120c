"""Hard Mish: its formula, and where it starts and ends."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE

from rtdetr_act import create
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_hard_mish_conforms() -> None:
    check_activation("hard_mish", REFERENCE["hard_mish"])


@pytest.mark.parametrize("copies", [1, 20_000])  # in torch's own operators, and in blocks
def test_its_derivative_where_pieces_meet(copies: int) -> None:
    x = torch.tensor([-2.0, -1.9999, 0.0, 0.0001]).repeat(copies).requires_grad_()
    create("hard_mish")(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[-4:], torch.tensor([0.0, -0.9999, 1.0, 1.0]))
