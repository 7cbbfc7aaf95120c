"""Squared ReLU: its formula, and where it starts and ends."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE

from rtdetr_act import create
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_squared_relu_conforms() -> None:
    check_activation("squared_relu", REFERENCE["squared_relu"])


def test_float16_overflows_as_the_formula_does() -> None:
    x = torch.tensor([255.0, 256.0, -256.0], dtype=torch.float16)
    assert create("relu2")(x).tolist() == [65_024, float("inf"), 0]
