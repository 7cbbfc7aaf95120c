"""Blocks of torchvision in earlier checkpoints."""

from __future__ import annotations

from torchvision.models import densenet, resnet
from torchvision.models.googlenet import BasicConv2d as _GoogLeNetConv
from torchvision.models.inception import BasicConv2d as _InceptionConv

from rtdetr_act.surgery.rewired import make_alias

BasicBlock = make_alias(__name__, "BasicBlock", resnet.BasicBlock, ("relu",))
Bottleneck = make_alias(__name__, "Bottleneck", resnet.Bottleneck, ("relu",))
DenseNet = make_alias(__name__, "DenseNet", densenet.DenseNet)
GoogLeNetConv = make_alias(__name__, "GoogLeNetConv", _GoogLeNetConv)
InceptionConv = make_alias(__name__, "InceptionConv", _InceptionConv)
