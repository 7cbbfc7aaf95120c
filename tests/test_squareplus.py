"""Squareplus: its formula, and where it starts and ends."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE

from rtdetr_act import SpecError, create
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.testing import check_activation


@pytest.mark.integration
def test_squareplus_conforms() -> None:
    check_activation("squareplus", REFERENCE["squareplus"])


def test_b_is_a_constant_of_the_corner() -> None:
    assert not [*create("squareplus").parameters()]
    x = torch.tensor([0.0], dtype=torch.float64)
    for b in (4.0, 1.9):
        assert create("squareplus", b=b)(x).item() == pytest.approx(b**0.5 / 2, rel=1e-15)


def test_its_exported_form_does_not_overflow_in_float16() -> None:
    module = create("squareplus")
    form, x = get_entry("squareplus").exportable, torch.tensor([-6e4, -300.0, 300.0, 6e4], dtype=torch.float16)
    assert form is not None
    torch.testing.assert_close(form(module)(x), torch.relu(x))


@pytest.mark.parametrize("b", [0, -1.0, "4", float("nan")])
def test_a_wrong_b_is_named(b: object) -> None:
    with pytest.raises(SpecError, match="b is a positive number"):
        create("squareplus", b=b)
