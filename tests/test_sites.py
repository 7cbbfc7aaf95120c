"""Sites: the counts measured in Ultralytics, what a module walk misses, channels and layouts against real shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from known import SITES, Twice
from torch import nn
from torch.nn import functional
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from rtdetr_act import find_sites, patch_model
from rtdetr_act.surgery.functional_calls import find_unreachable_calls
from rtdetr_act.surgery.modules import evaluation_mode
from rtdetr_act.surgery.sites import Site, observe_activations

torchvision = pytest.importorskip("torchvision")


def build(name: str) -> nn.Module:
    kind = RTDETRDetectionModel if name.startswith("rtdetr") else DetectionModel
    try:
        return kind(f"{name}.yaml", verbose=False)
    except FileNotFoundError:
        pytest.skip(f"this Ultralytics has no {name}")


@pytest.mark.integration
@pytest.mark.parametrize("name", SITES)
def test_counts(name: str) -> None:
    sites = find_sites(build(name))
    assert (sum(site.layout == "map" for site in sites), len(sites)) == SITES[name]
    assert len({site.name for site in sites}) == len(sites)
    assert all(site.channels for site in sites)
    assert {site.section for site in sites} == {"backbone", "neck", "head"}


@pytest.mark.integration
@pytest.mark.parametrize("name", ["rtdetr-l", "rtdetr-resnet50", "yolov10n", "yolov9t", "yolov6n", "yolo12n"])
def test_channels_and_layout_are_those_of_a_real_forward_pass(name: str) -> None:
    model = build(name)
    sites = [site for site in find_sites(model) if not site.hidden]
    shapes: dict[str, list[torch.Size]] = {site.name: [] for site in sites}

    def observe(site: Site) -> Callable[..., torch.Tensor]:
        return lambda module, x: shapes[site.name].append(x.shape) or module(x)

    with observe_activations(sites, observe), evaluation_mode(model), torch.no_grad():
        model(torch.zeros(1, 3, 160, 160))  # fewer positions than queries are an error in old releases
    called = [site for site in sites if shapes[site.name]]
    assert len(called) > 0.8 * len(sites)  # in evaluation, v10 leaves its one-to-many head out
    for site in called:
        for shape in shapes[site.name]:
            assert site.layout == ("map" if len(shape) == 4 else "tokens"), site.name
            assert site.channels == (shape[1] if len(shape) == 4 else shape[-1]), site.name


def test_sections_and_layers_follow_the_yaml() -> None:
    sites = {site.name: site for site in find_sites(build("rtdetr-l"))}
    assert (sites["model.0.stem1.act"].layer, sites["model.0.stem1.act"].section) == (0, "backbone")
    assert (sites["model.11.act"].section, sites["model.11.act"].current) == ("neck", "GELU")
    head = sites["model.28.dec_bbox_head.0.act"]
    assert (head.layer, head.section, head.layout, head.owner_class) == (28, "head", "tokens", "MLP")


def test_the_functional_relu_of_resnet_blocks_is_found() -> None:
    hidden = [site for site in find_sites(build("rtdetr-resnet50")) if site.hidden]
    assert len(hidden) == 16 and {site.owner_class for site in hidden} == {"ResNetBlock"}
    assert {site.channels for site in hidden} == {256, 512, 1024, 2048}


@pytest.mark.parametrize("name", ["yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls"])
def test_every_task_model(name: str) -> None:
    sites = find_sites(YOLO(f"{name}.yaml"))
    assert len(sites) > 30 and all(site.channels and site.layout == "map" for site in sites)


def test_gates_and_softmaxes_are_no_sites() -> None:
    from ultralytics.nn.modules import CBAM

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cbam = CBAM(8)
            self.softmax, self.hard = nn.Softmax(1), nn.Hardsigmoid()
            self.glu, self.attention = nn.GLU(1), nn.MultiheadAttention(8, 2)

    assert find_sites(Gated()) == []


def test_a_shared_module_is_one_site_per_owner() -> None:
    act = nn.SiLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 6, 1), act)
    assert [(site.name, site.channels) for site in find_sites(model)] == [("1", 4), ("3", 6)]


def test_one_module_called_at_two_widths_has_no_single_channel_count() -> None:
    (site,) = find_sites(Twice())
    assert (site.channels, site.widths) == (None, (4, 6))


def test_function_attributes_are_sites() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    sites = find_sites(model, example_input=torch.zeros(1, 5, 16))
    assert [site.current for site in sites] == ["F.relu", "F.relu"]
    assert {(site.channels, site.layout) for site in sites} == {(32, "tokens")}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "count", "layouts"),
    [
        ("resnet18", 17, {"map"}),
        ("resnet50", 49, {"map"}),
        ("mobilenet_v2", 35, {"map"}),
        ("densenet121", 121, {"map"}),
        ("vgg11", 10, {"map", "tokens"}),
        ("convnext_tiny", 18, {"tokens"}),
    ],
)
def test_torchvision(name: str, count: int, layouts: set[str]) -> None:
    model = getattr(torchvision.models, name)()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = find_sites(model)
    assert len(sites) == count and {site.layout for site in sites} == layouts
    assert all(site.channels for site in sites)
    assert model.training, "the probing pass leaves the mode as it was"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_example_input_of_a_model_that_takes_no_image() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.act = nn.Embedding(10, 6), nn.Bilinear(6, 6, 7), nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.inner(self.embed(x), self.embed(x)))

    assert find_sites(Text())[0].channels is None
    (site,) = find_sites(Text(), example_input=torch.zeros(2, 3, dtype=torch.long))
    assert (site.channels, site.layout) == (7, "tokens")


class Called(nn.Module):
    """A foreign block that calls activations where no module stands, one of them only for its effect in place."""

    LINE: ClassVar = inspect.currentframe().f_lineno + 8  # type: ignore[union-attr]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv(x))
        functional.silu(y, inplace=True)
        return y + x.relu()


def test_what_no_swap_reaches_is_reported() -> None:
    found = find_unreachable_calls(nn.Sequential(Called(), Called()))
    assert found == [f"silu in Called (test_sites.py:{Called.LINE}, 2 modules)"]
    report = patch_model(Called(), "arelu")
    assert len(report) == 2 and f"not reached: silu in Called (test_sites.py:{Called.LINE}, 1 module)" in str(report)
    assert (
        find_unreachable_calls(build("rtdetr-resnet50")) == []
        and find_unreachable_calls(torchvision.models.densenet121()) == []
    )
