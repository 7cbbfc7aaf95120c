"""The conformance suite passes what is right, and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import REFERENCE
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Folded
from rtdetr_act.activations.registry import register
from rtdetr_act.spec import ActSpec
from rtdetr_act.testing import check_activation

OURS = "aconc aglu apa arelu dyrelu_a dyrelu_b dyrelu_c frelu glu meta_aconc prelu".split()


@pytest.mark.integration
@pytest.mark.parametrize("name", OURS)
def test_our_own_conform(name: str) -> None:
    check_activation(name, REFERENCE[name], dims=(1, 2, 3))


@pytest.mark.integration
def test_a_slope_per_channel_conforms() -> None:
    check_activation("prelu(per_channel=True)", REFERENCE["prelu"], dims=(1, 2, 3))


def test_softmax_over_the_channels_conforms() -> None:
    check_activation("softmax2d", REFERENCE["softmax2d"], dims=(1, 2, 3))


class Gain(nn.Module):
    """`gain * x` for positive x, which each of the following gets wrong in one way."""

    def __init__(self, gain: float = 1.5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([gain]))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(x) * self.gain).to(x.dtype)


def formula(x: np.ndarray, state: Any, axis: int) -> np.ndarray:
    return np.maximum(x, 0) * state["gain"]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        return torch.relu(x) * gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum().view(1)


class WrongFormula(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01


class WrongGradient(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return _WrongGradient.apply(x, self.gain)


class Widens(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).float() * self.gain if x.dtype in (torch.float16, torch.bfloat16) else super().forward(x)


class Contiguous(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


class NeedsTwoImages(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * x.std(0, correction=len(x) - 1 if len(x) > 1 else 1)


class BreaksTheGraph(Gain):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class SharesItsParameter(Gain):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        other = type(self)()
        other.gain = self.gain
        return other


class HasAMatrix(Gain):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1, 1), 1.5))


WRONG: list[tuple[type[Gain], str]] = [
    (WrongFormula, "its formula"),
    (WrongGradient, "finite differences"),
    (Widens, "half types"),
    (Contiguous, "channels_last"),
    (NeedsTwoImages, "one image of one pixel"),
    (BreaksTheGraph, "graph break"),
    (SharesItsParameter, "share no parameters"),
    (HasAMatrix, "one dimension"),
]


@pytest.mark.integration
@pytest.mark.usefixtures("own_zoo")
@pytest.mark.parametrize(("cls", "check"), WRONG)
def test_what_is_wrong_is_named(cls: type[Gain], check: str) -> None:
    register("wrong_gain", cls)
    with pytest.raises(AssertionError, match=rf"^wrong_gain \((map|tokens)\): .*{check}"):
        check_activation("wrong_gain", formula)


def _fit_nothing(module: Gain, target: Tensor) -> Tensor:
    return target


ANSWERS: list[tuple[dict[str, Callable[..., Any]], str]] = [
    ({"fold": lambda module: Folded(ActSpec("relu"), 2.0)}, "folded form is equivalent"),
    ({"exportable": lambda module: nn.ReLU()}, "exportable form"),
    ({"fit": _fit_nothing}, "returns the curve of the fitted module"),
    ({"learned": lambda module: {"both": torch.zeros(2)}}, "recorded numbers are scalars"),
    ({"coefficients": lambda module, x: {"all": torch.zeros(1)}}, "recorded numbers are scalars"),
    ({"held_at": lambda module, x: torch.relu}, "recorded numbers are scalars"),
]


@pytest.mark.integration
@pytest.mark.usefixtures("own_zoo")
@pytest.mark.parametrize(("answers", "check"), ANSWERS)
def test_wrong_answers_are_named(answers: dict[str, Any], check: str) -> None:
    register("wrong_gain", Gain, **answers)
    with pytest.raises(AssertionError, match=f"wrong_gain .*{check}"):
        check_activation(Gain, formula)


@pytest.mark.integration
@pytest.mark.usefixtures("own_zoo")
def test_a_plain_module_conforms_at_once() -> None:
    register("gain", Gain, homogeneous=True, fold=lambda module: Folded(ActSpec("relu"), module.gain.item()))
    check_activation(Gain, formula)


def test_a_class_that_is_not_registered_is_named() -> None:
    with pytest.raises(AssertionError, match="Gain is not registered"):
        check_activation(Gain)
