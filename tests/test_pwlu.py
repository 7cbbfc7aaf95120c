"""PWLU: its start, its fit, what realigns it, and what that survives."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data
from reference import REFERENCE
from torch import nn
from ultralytics import YOLO
from ultralytics.utils.torch_utils import ModelEMA

from rtdetr_act import create, patch_model, set_epoch
from rtdetr_act.activations.pwlu import PWLU, _list_segments, _sum_by_one_hot, _sum_by_segment
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.surgery.match import match
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.sites import find_sites
from rtdetr_act.testing import check_activation

X = torch.linspace(-8, 8, 4001)


def feed(module: nn.Module, shift: float = 1.0, scale: float = 0.5, steps: int = 100) -> None:
    """Run a module in training on normal inputs of a mean and a standard deviation."""
    generator = torch.Generator().manual_seed(0)
    module.train()
    with torch.no_grad():
        for _ in range(steps):
            module(shift + scale * torch.randn(4, 3, 16, 16, generator=generator))


def pwlus(model: nn.Module) -> list[PWLU]:
    return [module for module in model.modules() if isinstance(module, PWLU)]


# ---------------------------------------------------------------- the function


@pytest.mark.integration
def test_pwlu_conforms() -> None:
    check_activation("pwlu", REFERENCE["pwlu"])


def test_pwlu_starts_as_relu() -> None:
    assert torch.equal(PWLU()(X), X.relu())
    assert type(create("piecewise_linear_unit")) is PWLU


@pytest.mark.parametrize(
    ("old", "most"), [(nn.ReLU(), 1e-12), (nn.SiLU(), 4e-3), (nn.GELU(), 5e-3), (nn.LeakyReLU(0.1), 1e-7)]
)
def test_pwlu_is_fitted_by_its_values_and_slopes(old: nn.Module, most: float) -> None:
    module = create("pwlu")
    found = match(module, old, None)
    assert found is not None and found < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 10_000])  # few elements take torch's operators
def test_pwlu_takes_any_input(dtype: torch.dtype, count: int) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, 0.1, 1e4, largest], dtype=torch.float64).to(dtype).repeat(count).requires_grad_()
    module = PWLU()
    y = module(x)
    y.float().sum().backward()
    torch.testing.assert_close(y, x.relu())
    assert x.grad is not None and torch.equal(x.grad, (x > 0).to(dtype))


@pytest.mark.parametrize("count", [1, 10_000])
def test_pwlu_passes_nan_on(count: int) -> None:  # a training that diverges ends with its own message
    x = torch.tensor([1.0, math.nan, math.inf, -1.0]).repeat(count).requires_grad_()
    y = PWLU()(x)
    y.nansum().backward()
    assert torch.equal(y.isnan(), x.isnan())


def test_pwlu_regions_may_collapse() -> None:
    module = PWLU()
    with torch.no_grad():
        module.bounds.copy_(torch.tensor([1.0, 1.0]))
    y = module(X)
    y.sum().backward()
    assert all(bool(each.isfinite().all()) for each in (y, *(parameter.grad for parameter in module.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pwlu_sums_alike_on_every_device(dtype: torch.dtype) -> None:
    segments = torch.randint(0, 32, (50_000,), dtype=torch.int32)
    values = torch.randn(50_000, dtype=dtype)
    exact = torch.zeros(32, dtype=torch.float64).index_add_(0, segments.long(), values.double())
    for found in (_sum_by_segment(segments, values, 32), _sum_by_one_hot(segments, values, 32)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


def test_pwlu_exports_only_the_segments_that_differ() -> None:
    entry = get_entry("pwlu")
    assert entry.exportable is not None
    module = PWLU()
    assert _list_segments(module.values, module.slopes, module.bounds) == [(1.0, 0.0, None)]
    with torch.no_grad():
        module.values.copy_(torch.randn(17, generator=torch.Generator().manual_seed(0)))
    state = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
    expected = torch.from_numpy(REFERENCE["pwlu"](X.double().numpy(), state, 0))
    torch.testing.assert_close(entry.exportable(module)(X).double(), expected, rtol=0, atol=2e-5)
    with torch.no_grad():
        module.values.fill_(2.0)
        module.slopes.zero_()
    assert torch.equal(entry.exportable(module)(X), torch.full_like(X, 2.0))


def test_pwlu_of_a_network_can_be_replaced() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), PWLU())
    assert [site.name for site in find_sites(net)] == ["1"]


# ---------------------------------------------------------------- realignment


def test_realignment_takes_the_region_of_the_inputs_once() -> None:
    module = PWLU(realign_epoch=2)
    feed(module)
    module.set_epoch(1.9)
    assert module.bounds.tolist() == [-3, 3]
    module.set_epoch(2)
    torch.testing.assert_close(module.bounds.detach(), torch.tensor([-0.5, 2.5]), atol=0.05, rtol=0)
    torch.testing.assert_close(module(X), X.relu(), atol=0.05, rtol=0)  # 0 is between two knots
    before = copy.deepcopy(module.state_dict())
    feed(module, shift=9.0)
    module.set_epoch(3)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_realignment_keeps_what_was_learned() -> None:
    module = PWLU()
    match(module, nn.SiLU(), None)
    feed(module, shift=0.0, scale=0.7)
    before = module(X)
    module.set_epoch(5)
    assert module.bounds.abs().max() < 2.2
    inside = X.abs() < 2
    torch.testing.assert_close(module(X)[inside], before[inside], atol=0.02, rtol=0)


def test_statistics_leave_out_steps_that_overflow() -> None:
    module = PWLU()
    feed(module)
    before = module.statistics.clone()
    for value in (math.nan, math.inf):
        module(torch.full((4, 4), value))
    module(torch.empty(0, 4))
    assert torch.equal(module.statistics[0], before[0])


def test_processes_realign_alike() -> None:
    # DistributedDataParallel copies the buffers of the first process to all before each step, which then differ.
    first = PWLU()
    feed(first)
    second = copy.deepcopy(first)
    feed(first, shift=2.0, steps=1)
    feed(second, shift=-2.0, steps=1)
    assert not torch.equal(first.statistics[0], second.statistics[0])
    first.set_epoch(5)
    second.set_epoch(5)
    assert torch.equal(first.bounds, second.bounds) and torch.equal(first.values, second.values)


def test_an_average_of_weights_is_realigned_with_the_model() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), PWLU(realign_epoch=1))
    nn.init.dirac_(net[0].weight)
    ema = ModelEMA(net, decay=0.9, tau=1.0)
    for step in range(60):
        feed(net, steps=1)
        for network in (net, ema.ema):
            network[1].set_epoch(step / 30)
        ema.update(net)
        error = (ema.ema[1](X) - X.relu()).abs().max()
        assert error < 0.1, (step, error)
    torch.testing.assert_close(ema.ema[1].bounds, net[1].bounds, atol=0.05, rtol=0)


@pytest.mark.parametrize("spec", ["pwlu", "pwlu(realign_epoch=None)"])
def test_a_realigned_state_dict_is_not_realigned_again(spec: str) -> None:
    trained = PWLU()
    feed(trained)
    trained.set_epoch(5)
    loaded = create(spec)
    loaded.load_state_dict(trained.state_dict())
    feed(loaded, shift=5.0)
    loaded.set_epoch(5)
    torch.testing.assert_close(loaded(X), trained(X), rtol=0, atol=0)


def test_the_plan_forgets_a_realignment_that_is_over() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    patch_model(net, "pwlu(intervals=8)")
    assert read_plan(net).schedule_ends() == (5,)
    set_epoch(net, 5)
    assert str(read_plan(net)) == "pwlu(intervals=8, realign_epoch=None)"
    assert read_plan(net).schedule_ends() == ()


@pytest.mark.integration
def test_training_realigns_the_network_and_its_average(data: Data, tmp_path: Path) -> None:
    model = YOLO(str(tiny.write_yaml(tmp_path / "yolo.yaml", tiny.yolo())))
    patch_model(model, "pwlu(realign_epoch=1)@backbone")
    seen: list[list[bool]] = []

    def note(trainer: Any) -> None:
        networks = (trainer.model, trainer.ema.ema)
        seen.append([bool(module.realigned) for network in networks for module in pwlus(network)])
        for one, other in zip(*map(pwlus, networks), strict=True):
            assert torch.allclose(one.bounds, other.bounds, atol=0.6), (one.bounds, other.bounds)

    model.add_callback("on_train_batch_end", note)
    last = tiny.train(model, data.detect, tmp_path, epochs=2)
    assert not any(seen[0]) and all(seen[-1]) and len(seen[0]) == len(seen[-1]) > 2
    saved = tiny.load(last)
    assert "pwlu(realign_epoch=None)@backbone" in str(saved.yaml["activation"])
    trained = pwlus(saved.float())
    assert all(module.realigned and module.bounds.tolist() != [-3, 3] for module in trained)
    # Resuming builds the network from this plan and loads this state.
    rebuilt = type(saved)(saved.yaml, ch=3, verbose=False)
    rebuilt.load(saved)
    set_epoch(rebuilt, 2)
    for one, other in zip(pwlus(rebuilt), trained, strict=True):
        torch.testing.assert_close(one(X), other(X), rtol=0, atol=0)
