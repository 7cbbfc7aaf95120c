"""torchvision blocks that call one ReLU several times, with different numbers of channels, or call `F.relu`.

A shared module allows neither an instance per site nor per-channel parameters: `Bottleneck.relu` is called with 64, 64
and 256 channels in one forward.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet, resnet
from torchvision.models.googlenet import BasicConv2d as _GoogLeNetConv
from torchvision.models.inception import BasicConv2d as _InceptionConv

from rtdetr_act.surgery.rewired.hidden_call import HiddenCall


def _call_after_norm(norm: str) -> HiddenCall:
    """Return the description of a call of `self.relu` on the output of the BatchNorm `norm`."""
    return HiddenCall(lambda self: self.relu, lambda self: getattr(self, norm).num_features)


class BasicBlock(resnet.BasicBlock):
    """Residual block of ResNet-18 and -34."""

    hidden_calls: ClassVar = {"act1": _call_after_norm("bn1"), "act2": _call_after_norm("bn2")}
    unused: ClassVar = ("relu",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C1, H, W) to (B, C2, H', W')."""
        skip = x if self.downsample is None else self.downsample(x)
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + skip)


class Bottleneck(resnet.Bottleneck):
    """Residual block of ResNet-50 and up, ResNeXt and Wide ResNet."""

    hidden_calls: ClassVar = {f"act{i}": _call_after_norm(f"bn{i}") for i in (1, 2, 3)}
    unused: ClassVar = ("relu",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C1, H, W) to (B, C2, H', W')."""
        skip = x if self.downsample is None else self.downsample(x)
        y = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.act3(self.bn3(self.conv3(y)) + skip)


class DenseNet(densenet.DenseNet):
    """DenseNet, which calls `F.relu` between its features and its pooling."""

    hidden_calls: ClassVar = {
        "act": HiddenCall(lambda _: nn.ReLU(inplace=True), lambda self: self.classifier.in_features)
    }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to (B, classes)."""
        y = F.adaptive_avg_pool2d(self.act(self.features(x)), (1, 1))
        return self.classifier(torch.flatten(y, 1))


class GoogLeNetConv(_GoogLeNetConv):
    """Convolution, BatchNorm and `F.relu` of GoogLeNet."""

    hidden_calls: ClassVar = {"act": HiddenCall(lambda _: nn.ReLU(inplace=True), lambda self: self.bn.num_features)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C1, H, W) to (B, C2, H', W')."""
        return self.act(self.bn(self.conv(x)))


class InceptionConv(_InceptionConv):
    """Convolution, BatchNorm and `F.relu` of Inception v3."""

    hidden_calls: ClassVar = GoogLeNetConv.hidden_calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C1, H, W) to (B, C2, H', W')."""
        return self.act(self.bn(self.conv(x)))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: BasicBlock,
    resnet.Bottleneck: Bottleneck,
    densenet.DenseNet: DenseNet,
    _GoogLeNetConv: GoogLeNetConv,
    _InceptionConv: InceptionConv,
}
