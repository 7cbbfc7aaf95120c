"""A swap that starts from what the network knows, and temperatures that fall in the course of a training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
import torch
import torchvision
from conftest import Data, Run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner
from ultralytics import RTDETR, YOLO
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from rtdetr_act import calibrate, create, find_sites, names, patch_model, refit, set_epoch
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.dyrelu import DyReLUC
from rtdetr_act.activations.prelu import PReLU
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, ModelError, SpecError
from rtdetr_act.integrations.ultralytics.models import save_checkpoint
from rtdetr_act.surgery.least_squares import NormalEquations, collect_inputs, collect_outputs
from rtdetr_act.surgery.match import match
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.rescale import find_gain, rescale
from rtdetr_act.surgery.site_samples import sample_sites
from rtdetr_act.workflows.train import train_variants


def task_model() -> nn.Module:
    """Return the tiny RT-DETR with its own statistics in every BatchNorm."""
    torch.manual_seed(0)
    model = RTDETRDetectionModel(copy.deepcopy(tiny.RTDETR), verbose=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
    return model.eval()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found[0] if isinstance(found, (tuple, list)) else found


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# --- where it starts --------------------------------------------------------------------------------------------------


def test_second_swap_starts_from_the_first_one() -> None:
    model = task_model()
    patch_model(model, "mish")
    patch_model(model, "prelu@backbone", init="match")
    assert read_plan(model).to_yaml() == {
        "rules": [{"activation": "prelu", "sections": ["backbone"], "init": "match"}],
        "base": {"rules": [{"activation": "mish"}]},
    }
    for kind in (PReLU, nn.Hardswish):
        rebuilt = RTDETRDetectionModel(copy.deepcopy(model.yaml), verbose=False).eval()
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(output(rebuilt, IMAGES), output(model, IMAGES))
        found = {site.section: type(site.module) for site in find_sites(rebuilt) if site.layout == "map"}
        assert (found["backbone"], found["neck"]) == (kind, nn.Mish)
        patch_model(model, "hardswish@backbone")


def test_command_line_starts_from_a_patched_checkpoint(mish_run: Any, data: Data, tmp_path: Path) -> None:
    pairs = [f"{key}={value}" for key, value in tiny.train_args(data.detect, tmp_path).items() if key != "data"]
    words = ["train", "--act", "prelu init=match", "--model", "yolo11n.yaml", "--data", str(data.detect), *pairs]
    result = CliRunner().invoke(app, [*words, "--pretrained", str(mish_run.pt)])
    assert result.exit_code == 0, result.output
    trained = tiny.load(tmp_path / "run" / "weights" / "last.pt")
    assert read_plan(trained).base == Plan.parse("mish")
    assert tiny.count(trained, PReLU) == 77 and tiny.count(trained, nn.Mish) == 0
    before = tiny.load(mish_run.pt).state_dict()["model.0.conv.weight"]
    assert torch.allclose(trained.state_dict()["model.0.conv.weight"], before, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--act", "arelu", "--init", "mach"], "did you mean 'match'"),
        (["--act", "stock", "--init", "match"], "name one with act="),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code != 0
    assert message in f"{result.output} {result.exception}"


@pytest.mark.parametrize(
    ("act", "options", "told"),
    [
        ("relu", {}, True),
        ("relu init=match", {}, False),
        ("relu", {"init": "match"}, False),
        ("stock", {}, False),
        ("mish", {}, False),  # as it is
    ],
)
def test_a_plain_swap_of_a_trained_model_is_told(mish_run: Run, act: str, options: Any, told: bool) -> None:
    sentences: list[str] = []
    with pytest.raises(InputError, match="no data set"):  # which is looked for after the warnings
        next(iter(train_variants(mish_run.pt, act, "nowhere.yaml", warn=sentences.append, **options)))
    assert [("init=match starts from that" in sentence) for sentence in sentences] == [True] * told


# --- fitting --------------------------------------------------------------------------------------------------------

X = torch.linspace(-5, 5, 2001, dtype=torch.float64)
WEIGHTS = torch.exp(-(X**2) / 2)
OLD = {"relu": nn.ReLU(), "silu": nn.SiLU(), "mish": nn.Mish(), "hardswish": nn.Hardswish(), "gelu": nn.GELU()}


def squared_error(activation: nn.Module, old: nn.Module) -> float:
    """Return the error under a normal input, of a module that sees each value alone, at full positive attention."""
    inputs = X.view(-1, 1, 1, 1).expand(-1, 4, 1, 1)
    with torch.no_grad():
        found = activation.double()(inputs)[:, 0, 0, 0]
    return float((WEIGHTS * (found - old(X)) ** 2).sum() / (WEIGHTS * old(X) ** 2).sum())


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize(
    "name", "arelu prelu aconc aglu apa dyrelu_a dyrelu_b repact smu smu1 star_relu swish_beta".split()
)
def test_no_other_parameters_are_closer(name: str, old: str) -> None:
    activation = create(name, channels=4)
    misfit = match(activation, OLD[old], 4)
    start = squared_error(activation, OLD[old])
    assert misfit is not None and misfit == pytest.approx(start**0.5, abs=2e-3)
    assert start <= squared_error(create(name, channels=4), OLD[old]) + 1e-9
    for index, parameter in enumerate(activation.parameters()):
        if not parameter.any() and parameter.ndim > 1:
            continue  # a generator's weights, at zero so that the coefficients are constant
        for step in (0.03, -0.03):
            other = copy.deepcopy(activation)
            moved = list(other.parameters())[index]
            with torch.no_grad():
                moved.add_(step)
            error = squared_error(other, OLD[old])
            # At the end of what a parameter may be, one direction is better and not allowed.
            assert error >= start - 1e-7 or at_the_end(name, activation), (index, step, error, start)


def at_the_end(name: str, activation: nn.Module) -> bool:
    """Say whether a fit stopped at a bound: AReLU's slopes and clamp, a steep ACON, a squashed coefficient, a gate."""
    if name == "arelu":
        return activation.alpha.item() <= 0.0101 or activation.beta.item() < -2.9
    if name == "aconc":
        return activation.beta.max().item() > 9.9
    if name == "swish_beta":
        return activation.beta.item() > 9.99
    if name == "smu1":  # at 0, on either side of which it is the same
        return activation.mu.item() < 1e-6
    if name in ("aglu", "apa"):
        return activation.lambd.item() < 0.0011 or activation.kappa.item() > 9.99
    return False


def test_exact_starts_are_exact() -> None:
    acon, dynamic = create("aconc", channels=4), create("dyrelu_b", channels=4)
    x = torch.randn(3, 4, 6, 6)
    assert match(acon, nn.SiLU(), 4) == pytest.approx(0, abs=1e-6)
    assert torch.allclose(acon(x), F.silu(x), atol=1e-6)
    gated = create("aglu(lambd=0.3)")
    assert match(gated, nn.SiLU(), 4) == pytest.approx(0, abs=1e-6)
    assert (gated.lambd.item(), gated.kappa.item()) == (1, 1)
    assert match(dynamic, nn.ReLU(), 4) == 0
    assert torch.equal(dynamic(x), torch.relu(x))
    leaky = nn.LeakyReLU()
    assert match(leaky, nn.LeakyReLU(0.2), None) == pytest.approx(0, abs=1e-6)
    assert leaky.negative_slope == pytest.approx(0.2, abs=1e-6)
    assert match(nn.Hardswish(), nn.SiLU(), 4) is None


def on_tokens(name: str) -> str:
    return {"threshold": "threshold(0.1, 0.2)", "prelu": "prelu(per_channel=True)"}.get(name, name)


class Offset(nn.Module):
    """A stranger's activation with a number for each channel, which is not a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.offset)


@pytest.mark.parametrize("inputs", [(4, 3), (2, 5, 3)], ids=["(B, C)", "(B, N, C)"])
@pytest.mark.parametrize("name", [name for name in names() if get_entry(name).tokens])
def test_every_activation_behind_a_linear_is_fitted_and_fitted_to(name: str, inputs: tuple[int, ...]) -> None:
    x, spec = torch.randn(inputs), on_tokens(name)
    stock = [nn.ReLU(), nn.GELU(), Offset(), *([nn.PReLU(8)] if x.ndim == 2 else [])]
    for old in [*stock, create(spec, 8, "tokens")]:
        activation = create(spec, 8, "tokens")
        misfit = match(activation, old, 8, "tokens")
        assert misfit is None or 0 <= misfit < 2
        assert activation(x.new_zeros(*inputs[:-1], 8)).shape == (*inputs[:-1], 8)
    fitted = create("aconc", 8, "tokens")
    assert match(fitted, create(spec, 8, "tokens"), 8, "tokens") is not None
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    patch_model(net, spec, init="match", scope="all")
    patch_model(net, "aconc", init="match", scope="all")
    assert net(x).shape == (*inputs[:-1], 8)


@pytest.mark.parametrize("example", [None, torch.randn(4, 3)], ids=["unknown channels", "known channels"])
def test_torchs_prelu_of_many_slopes_behind_a_linear_is_fitted_to(example: torch.Tensor | None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Linear(3, 8), nn.PReLU(8, init=0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.first(x))

    net = Net()
    report = patch_model(net, "prelu", init="match", scope="all", example_input=example)
    assert report.swaps[0].misfit == pytest.approx(0, abs=1e-6) and net.act.weight.item() == pytest.approx(0.5)


def test_what_has_no_curve_is_named() -> None:
    with pytest.raises(ModelError, match=r"the PReLU here takes neither \(B, C\) nor \(B, N, C\) inputs with C = 8"):
        match(create("arelu"), nn.PReLU(17), 8, "tokens")
    with pytest.raises(ModelError, match=r"the PReLU here takes neither \(B, C, H, W\) nor"):
        match(create("arelu"), nn.PReLU(17), 8)


def test_matched_generator_learns_to_depart() -> None:
    torch.manual_seed(0)
    activation = create("dyrelu_b", channels=16, reduction=2)
    match(activation, nn.SiLU(), 16)
    x = torch.randn(4, 16, 5, 5) + torch.arange(4).view(4, 1, 1, 1)
    optimizer = torch.optim.SGD(activation.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        activation(x).square().mean().backward()
        optimizer.step()
    slopes, _ = activation.coefficients(x)
    assert slopes[0].std(0).min() > 1e-4  # different for each image


def test_report_tells_how_well_it_fits() -> None:
    report = patch_model(task_model(), "dyrelu_b", init="match")
    assert {round(swap.misfit, 3) for swap in report.swaps} == {0.0, 0.098}  # at a ReLU, at a SiLU
    assert f"{tiny.CONV_SITES} fitted to what they replace, 9.8% off at most" in str(report)
    assert "fitted" not in str(patch_model(task_model(), "mish", init="match"))


def test_matched_network_is_nearer_to_the_stock_one() -> None:
    expected = output(model := task_model(), IMAGES)
    distances = {}
    for init in ("paper", "match"):
        patched = copy.deepcopy(model)
        patch_model(patched, "prelu", init=init)
        distances[init] = float((output(patched, IMAGES) - expected).norm())
    assert distances["match"] < distances["paper"]


# --- calibrating ----------------------------------------------------------------------------------------------------


def test_calibrated_statistics_are_those_of_the_images() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    net.requires_grad_(True).train()
    images = torch.randn(24, 3, 9, 9)
    weights = {name: value.clone() for name, value in net.state_dict().items() if "running" not in name}
    assert calibrate(net, images) == 2
    first = net[0](images)
    assert torch.allclose(net[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)
    normal = (first - first.mean((0, 2, 3), keepdim=True)) / (
        first.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    second = net[3](torch.relu(normal))
    assert torch.allclose(net[4].running_var, second.var((0, 2, 3)), rtol=1e-3)
    assert net.training and net[1].momentum == 0.1
    assert all(torch.equal(value, net.state_dict()[n]) for n, value in weights.items() if "num_batches" not in n)
    half = [images[:12], images[12:]]
    calibrate(net, iter(half))
    assert torch.allclose(net[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)


def test_calibrating_a_detector_brings_its_maps_back() -> None:
    model = task_model()
    calibrate(model, IMAGES.repeat(4, 1, 1, 1))
    expected = output(model, IMAGES)
    patch_model(model, "leaky_relu(0.5)")
    swapped = output(model, IMAGES)
    calibrate(model, IMAGES.repeat(4, 1, 1, 1))
    assert (output(model, IMAGES) - expected).norm() < (swapped - expected).norm()


STILL = {"mosaic": 0, "translate": 0, "scale": 0, "fliplr": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "erasing": 0}


def train_images(trainer: Any) -> torch.Tensor:
    """Return all that a trainer with `STILL` trains on."""
    dataset = trainer.train_loader.dataset
    return torch.stack([dataset[index]["img"] for index in range(len(dataset))]).float() / 255


def test_nothing_to_calibrate_is_said() -> None:
    with pytest.raises(InputError, match="no BatchNorm"):
        calibrate(nn.Conv2d(3, 3, 1), IMAGES)
    with pytest.raises(InputError, match="no images"):
        calibrate(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), [])


# --- rescaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old"),
    [(nn.Hardswish(), nn.ReLU()), (nn.Hardswish(), nn.SiLU()), (nn.GELU(), nn.SiLU()), (nn.Tanh(), F.relu)],
)
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-1, 2), (3, 5)])
def test_gain_is_the_best_of_a_fine_search(new: nn.Module, old: Any, mean: float, std: float) -> None:
    x = mean + std * torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = old(x)

    def error(c: float, a: float) -> float:
        return float(((a * new(c * x) - y) ** 2).sum())

    def best_factor(c: float) -> float:
        return float((new(c * x) * y).sum() / (new(c * x) ** 2).sum())

    found = min(error(c, best_factor(c)) for c in torch.linspace(1 / 32, 2, 301).tolist())
    c, a = find_gain(new, x, y)
    assert (c, a) == (1, 1) or (1 / 32 <= c <= 2 and error(c, a) <= max(1.01 * found, 1e-9))
    assert ((c, a) == (1, 1)) == (found > 0.99**2 * error(1, best_factor(1)))


@given(st.floats(0.1, 2), st.floats(0.3, 3))
def test_gain_finds_a_scaled_function(c: float, a: float) -> None:
    x = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    found = find_gain(nn.Tanh(), x, a * torch.tanh(c * x))
    near = abs(c - 1) < 0.05  # where it is not worth it
    assert (near and found == (1, 1)) or found == pytest.approx((c, a), rel=0.02)


def test_relu6_is_scaled_to_inputs_without_normalisation() -> None:
    x = 40 * torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, a = find_gain(nn.ReLU6(), x, F.relu(x))
    assert c * x.max() < 9 and a * c == pytest.approx(1, rel=0.05)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["rtdetr", "yolo11n.yaml", "rtdetr-resnet50.yaml", "mobilenet"])
def test_rescaled_network_is_the_one_with_scaled_activations(name: str) -> None:
    torch.manual_seed(0)
    if name == "mobilenet":
        model: Any = torchvision.models.mobilenet_v2().eval()
    elif name == "rtdetr":
        model = task_model()
    else:
        model = (DetectionModel if "yolo" in name else RTDETRDetectionModel)(name, verbose=False).eval()
    model, images = model.double(), torch.rand(2, 3, 128, 128).double()
    calibrate(model, images)  # else little is left of an image behind many layers
    original = copy.deepcopy(model)
    patch_model(model, "hardswish", example_input=images)
    expected, before = copy.deepcopy(model), output(model, images)
    samples = sample_sites(original, [site.name for site in find_sites(original)], images)
    done = rescale(model, samples, images)
    names = done.sites
    maps = [site for site in find_sites(model, images) if site.layout == "map" and not site.hidden]
    # YOLO11's attention, and with it what is added to it, keeps its scale; others would gain too little.
    assert len(maps) / 3 < len(names) <= len(maps)
    assert done.outputs is not None and any(factor != 1 for factor in done.outputs.values())
    for site in names:
        x, y = (value.flatten() for value in (samples[site].inputs, samples[site].outputs))
        step = len(x) // 4096 | 1
        c, a = find_gain(nn.Hardswish(), x[::step], y[::step])
        module = expected.get_submodule(site)
        module.forward = lambda x, c=c, a=a: a * F.hardswish(c * x)  # type: ignore[method-assign]
    found, wanted = (output(net, images) for net in (model, expected))
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-4)


def test_rescaling_leaves_frozen_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3).requires_grad_(False))
    original, images = copy.deepcopy(net), torch.rand(2, 3, 16, 16)
    patch_model(net, "hardswish")
    samples = sample_sites(original, ["1"], images)
    assert rescale(net, samples, images).sites == () and torch.equal(net[0].weight, original[0].weight)
    net.requires_grad_(False)
    assert rescale(net, samples, images).sites == ("1",) and not torch.equal(net[0].weight, original[0].weight)


# --- refitting ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions of every kind, some of which a fit must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8, padding_mode="reflect")
        self.act2 = nn.SiLU()
        self.grouped = nn.Conv2d(8, 12, (1, 3), stride=(1, 2), groups=2, bias=False)
        self.twice = nn.Conv2d(12, 12, 1)
        self.frozen = nn.Conv2d(12, 5, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act2(self.depthwise(self.act(self.norm(self.first(x)))))
        return self.frozen(self.twice(self.twice(self.grouped(x))))


@pytest.mark.parametrize("name", ["first", "depthwise", "grouped", "dense"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_fitted_layer_is_the_least_squares_of_numpy(name: str, chunks: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 7) if name == "dense" else Net().get_submodule(name)
    x = torch.randn(20, 9, 5) + 2 if name == "dense" else torch.randn(20, layer.in_channels, 11, 11)
    y = torch.randn(20, *layer(x).shape[1:]) + 1
    positions = torch.arange(9 if name == "dense" else y[0, 0].numel())
    equations = NormalEquations(layer, centred=layer.bias is not None)
    for some_x, some_y in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        equations.add(collect_inputs(layer, some_x, positions), collect_outputs(layer, some_y, positions))
    solution = equations.solve(ridge=0.0)
    assert solution is not None
    weight, constant = solution
    if isinstance(layer, nn.Conv2d):
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode="reflect" if name == "depthwise" else "constant")
        patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # B, C * kernel, L
        groups, outputs = layer.groups, y.flatten(2)
    else:
        patches, groups, outputs = x.mT, 1, y.mT
    per_group = len(layer.weight) // groups
    for group, rows in enumerate(patches.chunk(groups, 1)):
        a = rows.mT.flatten(0, 1).double().numpy()
        if layer.bias is not None:
            a = np.concatenate([a, np.ones((len(a), 1))], 1)
        own = slice(group * per_group, (group + 1) * per_group)
        expected = np.linalg.lstsq(a, outputs[:, own].mT.flatten(0, 1).double().numpy(), rcond=None)[0]
        found = weight[own].flatten(1).T.numpy()
        assert np.allclose(found, expected[: len(found)], atol=1e-5)
        assert np.allclose(constant[own].numpy(), expected[-1] if layer.bias is not None else 0, atol=1e-5)


def test_refitting_leaves_what_must_stay() -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.rand(32, 3, 24, 24)
    calibrate(net, images)
    before = copy.deepcopy(net)
    patch_model(net, "relu")
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    swapped = copy.deepcopy(net)
    assert refit(net, images) == 2
    now = net.state_dict()
    assert all(torch.equal(now[name], weights[name]) for name in weights if name.split(".")[0] in ("twice", "frozen"))
    assert not any(torch.equal(now[f"{name}.weight"], weights[f"{name}.weight"]) for name in ("depthwise", "grouped"))
    # The first sees what it saw.
    assert torch.equal(now["first.weight"], weights["first.weight"])
    assert torch.equal(net.norm.running_mean, before.norm.running_mean)
    test = torch.rand(32, 3, 24, 24)
    expected, missed = (output(model.eval(), test) for model in (before, swapped))
    assert (output(net.eval(), test) - expected).norm() < 0.6 * (missed - expected).norm()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("plan", ["hardswish", "hardswish@0-1, arelu@2-9", "hardswish@0-1, frelu@2-9"])
def test_a_checkpoint_whose_weights_are_all_frozen_is_refitted(plan: str) -> None:
    original, found = task_model(), []
    for trains in (True, False):
        model = copy.deepcopy(original).requires_grad_(trains)
        torch.manual_seed(0)
        patch_model(model, plan)  # what is learnable in it trains
        found.append((refit(model, IMAGES), model.state_dict()))
    (count, expected), (again, state) = found
    assert count == again > 0
    # Attention without gradients rounds otherwise.
    assert all(torch.allclose(state[name], value, atol=1e-3) for name, value in expected.items())


def test_refitting_undoes_what_linear_layers_can_undo() -> None:
    """AReLU without a negative side is a scaled ReLU: the next convolution takes up the scale."""
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.rand(64, 3, 16, 16)
    expected = output(net, images)
    original = copy.deepcopy(net)
    patch_model(net, "leaky_relu(negative_slope=0.0)")
    with torch.no_grad():
        net[0].weight *= 3
        net[0].bias *= 3
    assert refit(net, images, original) == 1
    assert torch.allclose(output(net, images), expected, atol=1e-3)


@pytest.mark.integration
@pytest.mark.parametrize("activation", ["silu", "relu", "hardswish", "arelu"])
def test_refitting_a_detector_brings_its_maps_back(activation: str) -> None:
    torch.manual_seed(0)
    model = DetectionModel("yolo11n.yaml", verbose=False)
    images = F.interpolate(torch.rand(32, 3, 16, 16), size=64, mode="bilinear")
    calibrate(model, images)
    expected = maps(model, images)
    patch_model(model, activation, init="match")
    swapped = copy.deepcopy(model)
    calibrate(swapped, images)
    # Of 88 the last, of the DFL, has no weights to learn, and the first ones of the network and of each
    # attention see what they saw.
    assert refit(model, images) == (0 if activation == "silu" else 84)
    error, before = ((maps(net, images) - expected).norm() / expected.norm() for net in (model, swapped))
    assert error < (1e-3 if activation == "silu" else 0.6 * before)


def maps(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what a neck of YOLO11 gives first."""
    found: list[torch.Tensor] = []
    with model.model[16].register_forward_hook(lambda _, __, output: found.append(output)):
        output(model.eval(), images)
    return found[0]


@pytest.mark.integration
def test_training_refits_after_a_swap(stock_run: Run, data: Data, tmp_path: Path) -> None:
    trained = stock_run.pt
    found: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def note(trainer: Any) -> None:
        expected = RTDETR(str(trained)).model.float().train()
        for parameter in expected.parameters():
            parameter.requires_grad_(True)
        patch_model(expected, "arelu", init="match")
        refit(expected, train_images(trainer))
        for network in (trainer.model, trainer.ema.ema):
            found.append((copy.deepcopy(network.state_dict()), expected.state_dict()))

    model = RTDETR(str(trained))
    patch_model(model, "arelu", init="match")
    model.add_callback("on_train_start", note)
    tiny.train(model, data.detect, tmp_path / "swapped", **STILL)
    assert len(found) == 2
    for state, expected in found:
        assert all(torch.allclose(state[name], value, atol=1e-4) for name, value in expected.items()), [
            name for name, value in expected.items() if not torch.allclose(state[name], value, atol=1e-4)
        ]


@pytest.mark.integration
@pytest.mark.parametrize("way", ["trained", "trained, into a new model", "refitted", "calibrated"])
def test_training_gives_a_swap_its_start_once(
    way: str, stock_yaml: Path, stock_run: Run, data: Data, tmp_path: Path
) -> None:
    model = RTDETR(str(stock_run.pt))
    report = patch_model(model, "relu", init="match")
    if way == "refitted":
        refit(model, IMAGES)
    elif way == "calibrated":
        calibrate(model, IMAGES)
    else:
        tiny.train(model, data.detect, tmp_path / "first")
        trained = str(tmp_path / "first" / "run" / "weights" / "last.pt")
        model = RTDETR(trained if way == "trained" else str(stock_yaml))
    if way == "trained, into a new model":
        patch_model(model, "relu", init="match")
        model.load(trained)
    assert read_plan(model.model) == replace(report.plan, fitted=True)
    weights, found = copy.deepcopy(model.model.state_dict()), dict[str, torch.Tensor]()
    model.add_callback("on_train_start", lambda trainer: found.update(copy.deepcopy(trainer.model.state_dict())))
    tiny.train(model, data.detect, tmp_path / "second")
    assert all(torch.allclose(found[name].float(), value.float()) for name, value in weights.items())
    assert read_plan(tiny.load(tmp_path / "second" / "run" / "weights" / "last.pt")).fitted


@pytest.mark.integration
def test_a_second_swap_gets_a_start_of_its_own(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "relu", init="match")
    refit(model, IMAGES)
    patch_model(model, "hardswish@neck", init="match")
    plan = read_plan(model.model)
    assert plan.needs_fit and plan.base is not None and plan.base.fitted
    with tiny.logged() as lines:
        tiny.train(model, data.detect, tmp_path)
    assert any("layers fitted to what they gave before the swap" in line for line in lines)


@pytest.mark.integration
def test_a_fit_that_is_due_is_made_under_another_swap(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "relu@neck init=match")
    patch_model(model, "mish from=relu", exclude="model.10.*")
    plan = read_plan(model.model)
    assert len(plan.stages) == 2 and plan.needs_fit and not plan.reference
    with tiny.logged() as lines:
        tiny.train(model, data.detect, tmp_path)
    assert any("layers fitted to what they gave before the swap" in line for line in lines)
    trained = tiny.load(tmp_path / "run" / "weights" / "last.pt")
    assert read_plan(trained) == replace(plan, fitted=True)
    assert tiny.count(trained, nn.Mish) == tiny.CONV_SITES - 1


@pytest.mark.parametrize("text", ["mish", "mish; then arelu@2-3 from=mish"])
def test_weights_of_the_network_before_the_swap_are_still_fitted(text: str) -> None:
    source, model, other = task_model(), task_model(), task_model()
    for network in (source, model):
        for plan in text.split("; then "):
            patch_model(network, plan)
    for network, activation in ((model, "hardswish"), (other, "relu")):
        patch_model(network, activation, init="match")
        network.load(source, verbose=False)
    assert read_plan(model).needs_fit, "the weights are those that it was to be fitted to"
    assert not read_plan(other).needs_fit, "they are from another network"


def learn(model: nn.Module) -> None:
    """Let each AReLU have learned something else."""
    with torch.no_grad():
        for module in (each for each in model.modules() if isinstance(each, AReLU)):
            module.alpha.uniform_(0.1, 0.5)
            module.beta.uniform_(-1, 1)


@pytest.mark.integration
@pytest.mark.parametrize("known", [True, False])
def test_training_fits_to_what_activations_had_learned(
    known: bool, stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "arelu")
    torch.manual_seed(0)
    learn(model.model)
    save_checkpoint(model, tmp_path / "arelu.pt")
    original = copy.deepcopy(model.model)
    model = RTDETR(tmp_path / "arelu.pt")
    patch_model(model, "relu", init="match")
    save_checkpoint(model, tmp_path / "swapped.pt")  # which a training may start from, too
    model = RTDETR(tmp_path / "swapped.pt")
    if not known:  # as in a file of before
        for module in model.model.modules():
            vars(module).get("_rtdetr_act", {}).pop("replaced", None)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(trainer: Any) -> None:
        images = train_images(trainer)
        with torch.no_grad():
            for network in (trainer.model, trainer.ema.ema):
                seen.append((first_map(network, images), first_map(original.to(images.device), images)))

    model.add_callback("on_train_start", note)
    with tiny.logged() as lines:
        tiny.train(model, data.detect, tmp_path, **STILL)
    assert any("layers fitted to what they gave" in line for line in lines) == known
    assert any("not known what the activations before the swap had learned" in line for line in lines) != known
    assert len(seen) == 2
    for found, expected in seen:
        assert ((found - expected).norm() < 0.5 * expected.norm()) == known
    trained = tiny.load(tmp_path / "run" / "weights" / "last.pt")
    assert not any(isinstance(each, AReLU) for each in trained.modules())
    assert "AReLU" not in str([vars(module).get("_rtdetr_act") for module in trained.modules()])


def first_map(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what the first convolution of the second layer of a network gives in evaluation."""
    found: list[torch.Tensor] = []
    training = network.training
    with network.model[1].m[0].conv.register_forward_hook(lambda _, __, y: found.append(y)):
        network.eval()(images)
    network.train(training)
    return found[0]


@pytest.mark.integration
def test_training_makes_mosaics_after_refitting(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "relu", init="match")
    # Ultralytics makes them of images that it has loaded, and fails where it does not know of any.
    tiny.train(model, data.detect, tmp_path, mosaic=1.0, close_mosaic=0)


@pytest.mark.integration
def test_training_refits_on_images_of_several_shapes(tmp_path: Path) -> None:
    tiny.draw_images(tmp_path, {"detect": ["{cls} {x} {y} 0.375 0.375"]})
    for number in range(3):
        path = str(tmp_path / "detect" / "images" / f"{number}.png")
        cv2.imwrite(path, cv2.imread(path)[:32])
    names = {"train": "images", "val": "images", "names": ["a", "b"]}
    data = tiny.write_yaml(tmp_path / "wide.yaml", {"path": str(tmp_path / "detect"), **names})
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    patch_model(model, "relu", init="match")
    with tiny.logged() as lines:
        tiny.train(model, data, tmp_path, rect=True, batch=1)
    assert any("on 8 training images" in line for line in lines)


def test_nothing_to_refit_is_said() -> None:
    with pytest.raises(InputError, match="nothing is swapped"):
        refit(Net(), IMAGES)
    with pytest.raises(InputError, match="no images"):
        refit(Net(), IMAGES[:0])


# --- temperatures ---------------------------------------------------------------------------------------------------


def test_temperature_falls_and_is_forgotten() -> None:
    activation = create("dyrelu_c(tau=1.0, tau_start=30.0, tau_epochs=4)", channels=8)
    x = torch.randn(2, 8, 4, 4)
    assert isinstance(activation, DyReLUC) and "temperature.now" not in activation.state_dict()
    found = {}
    for epoch in (0, 2, 4, 9):
        activation.temperature.set_epoch(epoch)
        found[epoch] = float(activation.temperature())
        z = F.conv2d(x, activation.spatial.weight, activation.spatial.bias).flatten(1)
        expected = (torch.softmax(z / found[epoch], 1) * 16 / 3).clamp(max=1).view(2, 1, 4, 4)
        assert torch.allclose(activation.attention(x), expected, atol=1e-6)
    assert found == {0: 30.0, 2: 15.5, 4: 1.0, 9: 1.0}
    assert [*activation.buffers()] == []


def test_temperature_leaves_the_plan_with_its_last_epoch() -> None:
    model = DetectionModel(copy.deepcopy(tiny.yolo()), verbose=False)
    patch_model(model, "dyrelu_c(tau=1.0, tau_start=30.0, tau_epochs=4)@backbone, arelu@neck+head")
    set_epoch(model, 3)
    assert "tau_start" in str(model.yaml["activation"])
    set_epoch(model, 4)
    assert model.yaml["activation"] == "rtdetr_act.Plan('dyrelu_c(tau=1.0)@backbone, arelu@neck+head')"
    assert read_plan(model).schedule_ends() == ()


COOLING = "dyrelu_c(tau=1.0, tau_start=31.0, tau_epochs=2)@backbone"


def temperatures(model: nn.Module) -> set[float]:
    return {float(module.temperature()) for module in model.modules() if isinstance(module, DyReLUC)}


@pytest.mark.integration
def test_training_lowers_temperatures(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, COOLING)
    seen: list[tuple[int, set[float], set[float]]] = []
    saved: list[set[float]] = []

    def note(trainer: Any) -> None:
        seen.append((trainer.epoch, temperatures(trainer.model), temperatures(trainer.ema.ema)))

    model.add_callback("on_train_batch_end", note)
    model.add_callback("on_model_save", lambda trainer: saved.append(temperatures(tiny.load(trainer.last))))
    last = tiny.train(model, data.detect, tmp_path, epochs=3)
    assert seen == [
        (0, {31.0}, {31.0}),
        (0, {23.5}, {23.5}),
        (1, {16.0}, {16.0}),
        (1, {8.5}, {8.5}),
        *[(2, {1.0}, {1.0})] * 2,
    ]
    assert saved == [{16.0}, {1.0}, {1.0}]
    assert tiny.load(last).yaml["activation"] == "rtdetr_act.Plan('dyrelu_c(tau=1.0)@backbone')"


_KILLED = """
import json, sys, time
from pathlib import Path
from ultralytics import RTDETR
from rtdetr_act import patch_model

model = RTDETR(sys.argv[2])
patch_model(model, sys.argv[4])

def wait_for_the_kill(trainer):
    Path(sys.argv[3]).write_text("saved")
    time.sleep(600)

model.add_callback("on_model_save", wait_for_the_kill)
model.train(**json.loads(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.kill
def test_temperatures_go_on_after_a_kill(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    arguments = tiny.train_args(data.detect, tmp_path, epochs=3)
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    (tmp_path / "script.py").write_text(_KILLED)
    note = tmp_path / "note"
    words = [sys.executable, "script.py", "args.json", str(stock_yaml), str(note), COOLING]
    process = subprocess.Popen(words, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not note.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -9
    last = tmp_path / "run" / "weights" / "last.pt"
    # Half of the way is over with the first of three epochs; so it was validated, and so it is in the checkpoint.
    assert temperatures(tiny.load(last)) == {16.0}

    seen: list[tuple[int, set[float]]] = []
    model = RTDETR(str(last))
    model.add_callback("on_train_batch_end", lambda trainer: seen.append((trainer.epoch, temperatures(trainer.model))))
    model.train(resume=True)
    assert seen == [(1, {16.0}), (1, {8.5}), (2, {1.0}), (2, {1.0})]


def test_wrong_temperatures_are_refused() -> None:
    with pytest.raises(SpecError, match="tau_start is a positive number"):
        create("dyrelu_c(tau_start=0)", channels=8)
