"""Floating-point operations: by hand, against Ultralytics, on fake tensors and on real ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rtdetr_act import patch_convs, patch_model
from rtdetr_act.analysis.flops import count_activation_flops, count_gflops
from rtdetr_act.integrations.ultralytics.models import load_model


class OnValues(nn.Module):
    """A model whose code asks for the value of a tensor, which a fake one does not have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the model for an image of zeros, and other images as they are."""
        return self.model(x) if x.abs().sum() == 0 else x


def test_operations_count_the_activations() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.SiLU(), nn.Conv2d(8, 4, 1, bias=False))
    per_image = 100 * (2 * 27 * 8 + 2 * 8 + 2 * 8 * 4)
    assert count_gflops(net, 10) == count_gflops(OnValues(net), 10) == pytest.approx(per_image / 1e9)
    patch_model(net, "dyrelu_b")
    layers = 2 * (8 * 1 + 1 * 32)  # of 8, 1 and 32 channels
    each = 1 + 4 + 2  # the mean, two products and two sums, a comparison and a choice
    assert count_activation_flops(net[1], (1, 8, 10, 10)) == pytest.approx(each * 800 + layers, rel=0.03)
    assert count_activation_flops(nn.ReLU(), (2, 3, 4, 5)) == 120


@pytest.mark.parametrize("source", ["yolo11n.yaml", "rtdetr-n.yaml"])
def test_operations_agree_with_ultralytics_on_a_stock_model(source: str) -> None:
    from ultralytics.utils.torch_utils import get_flops

    model = load_model(source).model
    assert count_gflops(model) == count_gflops(model, 640) == pytest.approx(get_flops(model, 640), rel=0.03)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = load_model("rtdetr-n.yaml").model.eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)[0]
        count_gflops(model, 64)  # at the size whose anchors the decoder keeps
        assert model(image)[0].equal(before)


@pytest.mark.integration
@pytest.mark.parametrize("source", ["rtdetr-resnet50.yaml", "yolo11n-seg.yaml", "yolo11n-pose.yaml", "yolov10n.yaml"])
def test_fake_tensors_give_the_count_of_a_real_pass(source: str) -> None:
    model = load_model(source)
    patch_model(model, "dyrelu_b@backbone, arelu@neck")
    patch_convs(model, layers="0-3")
    assert count_gflops(model.model, 128) == count_gflops(OnValues(model.model), 128) > 0
