"""RepAct: the sum of four activations that is one function, and what that function equals and becomes."""

from __future__ import annotations

import pytest
import torch
from reference import REFERENCE
from torch import nn
from torch.nn import functional as F

from rtdetr_act import create, fold_activations
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.activations.repact import RepAct
from rtdetr_act.surgery.match import match
from rtdetr_act.testing import check_activation


def build(weights: list[float], slope: float = 0.25) -> RepAct:
    module = RepAct()
    with torch.no_grad():
        module.weights.copy_(torch.tensor(weights))
        module.slope.fill_(slope)
    return module


@pytest.mark.parametrize("softmax", [False, True])
def test_repact_conforms(softmax: bool) -> None:
    check_activation(
        f"repact(softmax={softmax})", lambda x, state, axis: REFERENCE["repact"](x, state, axis, softmax=softmax)
    )


def test_it_starts_as_the_mean_of_its_branches() -> None:
    x = 4 * torch.randn(2, 8, 10, 10)
    mean = (x + F.relu(x) + F.prelu(x, torch.tensor([0.25])) + F.hardswish(x)) / 4
    for softmax in (False, True):
        torch.testing.assert_close(RepAct(softmax)(x), mean)


@pytest.mark.parametrize(
    ("weights", "branch"),
    [
        ([1.0, 0.0, 0.0, 0.0], nn.Identity()),
        ([0.0, 1.0, 0.0, 0.0], nn.ReLU()),
        ([0.0, 0.0, 1.0, 0.0], nn.PReLU()),
        ([0.0, 0.0, 0.0, 1.0], nn.Hardswish()),
    ],
)
def test_each_branch_alone_is_its_activation(weights: list[float], branch: nn.Module) -> None:
    module, x = build(weights), 3 * torch.randn(4, 32, 40, 40)  # in blocks
    with torch.no_grad():
        torch.testing.assert_close(module(x), branch(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(get_entry("repact").exportable(module)(x), branch(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [[0.1, 0.5, -0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.5, 0.0, 0.3, 0.7]])
@pytest.mark.parametrize("slope", [0.25, 1.0, -3.0])
def test_all_that_it_may_learn_is_exported(weights: list[float], slope: float) -> None:
    module, x = build(weights, slope), 3 * torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(get_entry("repact").exportable(module)(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "slope", "folded"),
    [
        ([0.5, 0.5, 0.25, 0.0], 0.5, nn.LeakyReLU(0.5)),  # 1.25 times that
        ([0.0, 0.75, 0.0, 0.0], 0.5, nn.ReLU()),
        ([0.0, 0.5, -0.5, 1.0], 0.0, nn.Hardswish()),
    ],
)
def test_it_folds_where_torch_has_it(weights: list[float], slope: float, folded: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), build(weights, slope), nn.Conv2d(4, 2, 1)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = net(x)
    report = fold_activations(net, x)
    assert len(report) == 1 and not report.needs and repr(net[1]) == repr(folded)
    torch.testing.assert_close(net(x), expected)


def test_it_does_not_fold_with_a_share_of_hardswish_or_a_negative_factor() -> None:
    for weights in ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.5], [-1.0, 0.0, 0.0, 0.0]):
        assert get_entry("repact").fold(build(weights)) is None


def test_a_fit_is_exact_where_a_branch_is_and_keeps_shares_within_bounds() -> None:
    x = torch.randn(2, 4, 6, 6)
    for old in (nn.ReLU(), nn.Hardswish(), nn.LeakyReLU(0.1)):
        module = create("repact", 4)
        assert match(module, old, 4) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(module(x), old(x), rtol=1e-5, atol=1e-5)
    assert match(create("repact"), nn.SiLU(), 4) < 0.04
    for old, bound in ((nn.ReLU(), 0.01), (nn.Hardswish(), 0.01), (nn.SiLU(), 0.04)):
        module = create("repact(softmax=True)")
        assert match(module, old, 4) < bound
        assert bool((module.branch_weights() > 0.003).all())


def test_its_branches_are_recorded() -> None:
    found = get_entry("repact").learned(RepAct(softmax=True))
    assert {name: value.item() for name, value in found.items()} == {
        **dict.fromkeys(("identity", "relu", "prelu", "hardswish"), 0.25),
        "slope": 0.25,
    }
