"""Subclasses of blocks with hidden activations, which call a module for each of them instead.

A hidden activation is a functional call, or one of several calls of a shared module. To swap it, the class of the block
is changed to the subclass here, whose forward calls `self.act…`. Since the class is importable, a patched block can be
pickled, deep-copied, traced and compiled; with `torch.fx` or a patched `forward` one of these would fail.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

from torch import nn

# (module, class) of a block -> submodule here with its subclass. As strings, since libraries are imported on demand.
_REWIRED = {
    ("ultralytics.nn.modules.block", "ResNetBlock"): "ultralytics",
    ("ultralytics.nn.modules.block", "SwiGLUFFN"): "ultralytics",
    ("torchvision.models.resnet", "BasicBlock"): "torchvision",
    ("torchvision.models.resnet", "Bottleneck"): "torchvision",
    ("torchvision.models.densenet", "DenseNet"): "torchvision",
    ("torchvision.models.googlenet", "BasicConv2d"): "torchvision",
    ("torchvision.models.inception", "BasicConv2d"): "torchvision",
}


def rewired_class(owner: nn.Module) -> Any | None:
    """Return the subclass for a block, which it may already have, or None for a block without hidden activations.

    Its `hidden_calls` map attributes to the calls; its `unused`, if any, names the children that they replace.
    """
    cls = type(owner)
    if hasattr(cls, "hidden_calls"):
        return cls
    submodule = _REWIRED.get((cls.__module__, cls.__qualname__))
    return None if submodule is None else import_module(f"rtdetr_act.surgery.rewired.{submodule}").CLASSES[cls]


def rewire(owner: nn.Module) -> None:
    """Change the class of a block to its subclass here, and add a module for each hidden activation, in place."""
    cls: Any = rewired_class(owner)
    for attribute, call in cls.hidden_calls.items():
        owner.add_module(attribute, copy.deepcopy(call.original(owner)).train(owner.training))
    owner.__class__ = cls


def unwire(owner: nn.Module) -> None:
    """Undo `rewire`: restore the class of a block, and delete the modules of its hidden activations."""
    cls = type(owner)
    for attribute in cls.hidden_calls:  # type: ignore[attr-defined]
        delattr(owner, attribute)
    owner.__class__ = cls.__bases__[0]
