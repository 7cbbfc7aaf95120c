"""Blocks whose forward calls an activation that no module walk can see, given a module for each call.

Swapping such an activation means changing the block's class to a subclass here, whose forward calls `self.act…`
instead. The class stays importable, so a patched block pickles, deep-copies, traces and compiles like any other;
`torch.fx` or a patched `forward` would lose one of these.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

from torch import nn

# (module, class) of a block -> (module here, class there). Strings, so that nothing is imported before it is needed.
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
    """Return the class here that a block has, or would get: None for a block without hidden activations.

    Its `hidden_calls` map attributes to calls; the children named in `unused` are what those calls stand for.
    """
    cls = type(owner)
    if hasattr(cls, "hidden_calls"):
        return cls
    room = _REWIRED.get((cls.__module__, cls.__qualname__))
    return None if room is None else import_module(f"rtdetr_act.surgery.rewired.{room}").CLASSES[cls]


def rewire(owner: nn.Module) -> None:
    """Change the class of `owner` so that each hidden activation becomes a module of its own, equal to the original."""
    cls: Any = rewired_class(owner)
    for attribute, call in cls.hidden_calls.items():
        owner.add_module(attribute, copy.deepcopy(call.original(owner)).train(owner.training))
    owner.__class__ = cls


def unwire(owner: nn.Module) -> None:
    """Undo `rewire`."""
    cls = type(owner)
    for attribute in cls.hidden_calls:  # type: ignore[attr-defined]
        delattr(owner, attribute)
    owner.__class__ = cls.__bases__[0]
