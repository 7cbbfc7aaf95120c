"""The count of what runs, against a count of operators that shares no code with it."""

from __future__ import annotations

import pathlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics import RTDETR, YOLO
from ultralytics.utils import ROOT

from rtdetr_act import ModelError, find_sites, patch_model, unpatch_model
from rtdetr_act.surgery.coverage import measure_coverage

torchvision = pytest.importorskip("torchvision")

OPERATORS = ("relu", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "mish", "elu", "tanh", "softplus")


class Tally(TorchDispatchMode):
    """Counts operators by name, those in place too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::").rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def tally(model: nn.Module, x: Tensor) -> int:
    """Return the number of activation operators in a forward pass, gates of sigmoids left out."""
    modes = [(module, module.training) for module in model.modules()]
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), Tally() as found:
            model.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for module, mode in modes:
            module.training = mode
    return sum(found.counts[name] for name in OPERATORS)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "googlenet", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1",
        "shufflenet_v2_x0_5", "regnet_y_400mf", "swin_t",
    ],
)  # fmt: skip
def test_every_activation_of_torchvision_models_is_swapped(name: str) -> None:
    model = getattr(torchvision.models, name)(**({"init_weights": False} if name == "googlenet" else {}))
    expected = tally(model, torch.zeros(1, 3, 224, 224))
    report = patch_model(model, "mish", scope="all")
    found = report.coverage
    assert (found.running, found.swapped, found.left, found.unreached) == (expected, expected, {}, ())
    assert found.differences == 0
    unpatch_model(model)
    assert measure_coverage(model).swapped == 0 and measure_coverage(model).running == expected


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["rtdetr-n.yaml", "rtdetr-resnet50.yaml", "yolo11n.yaml", "yolov10n.yaml", "yolo12n.yaml"]
)
def test_every_activation_of_ultralytics_models_is_swapped_or_left(name: str) -> None:
    if name == "yolo12n.yaml" and not any((ROOT / "cfg" / "models").rglob("yolo12.yaml")):
        pytest.skip("this Ultralytics has no YOLO12")
    model = (RTDETR if name.startswith("rtdetr") else YOLO)(name)
    expected = tally(model.model, torch.zeros(1, 3, 224, 224))
    stock = {key: id(module) for key, module in model.model.named_modules()}
    report = patch_model(model, "arelu")
    patched = {key: id(module) for key, module in model.model.named_modules()}
    found = report.coverage
    assert found.running == expected == found.swapped + sum(found.left.values())
    assert found.unreached == () and found.differences == 0
    assert {key: id(module) for key, module in model.model.named_modules()} == patched, "counting changes no module"
    unpatch_model(model)
    assert {key: id(module) for key, module in model.model.named_modules()} == stock


def helper(x: Tensor) -> Tensor:
    return F.relu(x)


class Scattered(nn.Module):
    """Activations in every place that no swap reaches, and one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.functions = [F.silu, F.gelu]
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = helper(self.conv(x))
        for function in self.functions:
            x = function(self.conv(x))
        x = torch.clamp(self.conv(x), min=0)
        x = self.conv(x)
        x = x * self.sigmoid(x)
        y = self.conv(x)
        y = y * torch.tanh(F.softplus(y))
        gate = torch.sigmoid(self.conv(y))
        return (y * gate).softmax(1)


def test_what_no_swap_reaches_is_counted_with_file_and_line() -> None:
    model = Scattered()
    report = patch_model(model, "arelu", scope="all")
    found = report.coverage
    assert (found.running, found.swapped) == (7, 1)
    operators = Counter({each.operator: each.count for each in found.unreached})
    assert operators == {"relu": 1, "silu": 1, "gelu": 1, "clamp": 1, "x*sigmoid(x)": 1, "x*tanh*softplus(x)": 1}
    assert {each.file for each in found.unreached} == {__file__}
    lines = pathlib.Path(__file__).read_text(encoding="utf-8").splitlines()
    assert all("return F.relu(x)" in lines[each.line - 1] for each in found.unreached if each.operator == "relu")
    assert all("torch.clamp" in lines[each.line - 1] for each in found.unreached if each.operator == "clamp")
    assert "not reached: relu (test_coverage.py:" in str(found)
    assert found.to_dict()["unreached"][0]["line"] > 0 and len(found.to_csv().splitlines()) == 7


def test_sites_that_do_not_run_are_named() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.other = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(x))
            return self.other(x) if self.training else x

    report = patch_model(Auxiliary(), "arelu")
    assert report.coverage.idle == ("other",) and "1 site did not run (other first)" in str(report.coverage)


def test_the_fused_path_of_transformer_layers_is_counted() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    report = patch_model(model, "mish", scope="all", example_input=torch.zeros(1, 5, 16))
    assert (report.coverage.running, report.coverage.swapped) == (2, 2)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_cannot_be_called_says_so() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.act = nn.Embedding(10, 6), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.embed(x))

    with pytest.raises(ModelError, match="give example_input="):
        _ = patch_model(Text(), "mish", scope="all").coverage
    found = patch_model(Text(), "mish", scope="all", example_input=torch.zeros(1, 3, dtype=torch.long)).coverage
    assert (found.running, found.swapped) == (1, 1)


def test_the_mode_the_weights_and_the_random_state_are_left_alone() -> None:
    model = torchvision.models.resnet18()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert measure_coverage(model).running == 17
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(find_sites(model)) == 17


class Factors(nn.Module):
    """Features that are multiplied with something, and stay features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.other, self.act, self.kind = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        if self.kind == "mask":
            return y * (x.sum(1, keepdim=True) >= 0).float()
        if self.kind == "modulation":
            return y * self.other(x.mean((2, 3), keepdim=True))
        if self.kind == "square":
            return y * y
        return y * torch.sigmoid(y)


@pytest.mark.parametrize(("kind", "running"), [("mask", 1), ("modulation", 1), ("square", 1), ("swish", 2)])
def test_features_that_are_masked_modulated_or_squared_are_no_gates(kind: str, running: int) -> None:
    model = Factors(kind)
    assert [site.name for site in find_sites(model)] == ["act"]
    found = measure_coverage(model)
    assert (found.running, found.left) == (running, {"map": 1})
