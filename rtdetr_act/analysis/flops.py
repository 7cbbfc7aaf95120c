"""Floating-point operations of a network, those of its activations included.

Ultralytics counts with `thop`, which assigns operations by the class of a layer and counts none for activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from rtdetr_act.activations.dynamic_conv import DynamicConv2d
from rtdetr_act.surgery.modules import evaluation_mode, get_example_inputs, preserve_attributes
from rtdetr_act.surgery.sites import Site, find_sites, observe_activations

DEFAULT_IMGSZ = 640  # at which Ultralytics counts, whatever the size of the training

# Operations per element of torch's operators. An elementary function such as exp, tanh or erf counts as one operation,
# as do a product, a sum and a comparison.
_PER_ELEMENT = {
    "relu": 1, "leaky_relu": 2, "prelu": 2, "_prelu_kernel": 2, "rrelu_with_noise": 2, "threshold": 1, "hardtanh": 2,
    "sigmoid": 1, "tanh": 1, "hardsigmoid": 4, "silu": 2, "hardswish": 5, "mish": 4, "gelu": 4, "elu": 4, "celu": 4,
    "softplus": 3, "log_sigmoid_forward": 3, "hardshrink": 2, "softshrink": 3, "glu": 2, "clamp": 2,
    "_softmax": 5, "_log_softmax": 5, "native_batch_norm": 2, "_native_batch_norm_legit_no_training": 2,
}  # fmt: skip
_REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min", "logsumexp")
# Operators that only move or create tensors.
_FREE = (
    "view _unsafe_view reshape expand unsqueeze squeeze permute transpose t split chunk unbind select slice clone "
    "copy_ _to_copy cat stack detach alias empty empty_like zeros_like ones_like full_like new_empty new_zeros"
).split()


def count_gflops(model: nn.Module, imgsz: int = DEFAULT_IMGSZ) -> float:
    """Return the floating-point operations of one forward pass in evaluation mode, in units of 1e9.

    Convolutions and matrix products, attention included, are counted by torch's `FlopCounterMode`: two operations per
    multiply-add. All operations of the activations are added, and for a dynamic convolution the pooling, the layers of
    its attention, the mixing of its kernels and the convolution with the result. BatchNorm is not counted, since it
    folds into the convolutions.

    The forward pass runs on fake tensors, which have shapes but no values, so that it computes nothing and takes no
    memory: 0.6 s for rtdetr-x at 640 pixels on one CPU core, where a real one takes 2.2 s. A model that cannot run on
    them, since its code depends on values, runs on an image of zeros. The model is left unchanged.

    Ultralytics' `model.info()` counts layers by their class, at 640 pixels too: 110.2 for rtdetr-l, which has 109.6
    here, and 6.67 for yolo11n, which has 6.57 here (Ultralytics 8.4.190).

    Args:
        model: Ultralytics task model, or any model that takes images.
        imgsz: Height and width of the image in pixels. Default: 640, as in Ultralytics.

    Returns:
        GFLOPs of a batch of one image; NaN if the inputs of the model are unknown.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU())
    >>> round(count_gflops(net, 10) * 1e9)  # 100 positions: 2 * 3 * 8 for the convolution, 8 for ReLU
    5600
    """
    inputs = get_example_inputs(model, None)
    if inputs is None or inputs[0].ndim != 4:  # a signal or a clip, of which imgsz is not the size
        return math.nan
    sites = [site for site in find_sites(model) if isinstance(site.module, nn.Module)]
    size = (1, inputs[0].shape[1], imgsz, imgsz)
    try:
        return _count_operations(model, sites, inputs[0], size, FakeTensorMode(allow_non_fake_inputs=True)) / 1e9
    except Exception:  # of many classes: code of any model may ask for the value of a tensor
        return _count_operations(model, sites, inputs[0], size, nullcontext()) / 1e9


def _count_operations(
    model: nn.Module, sites: Sequence[Site], like: Tensor, size: tuple[int, ...], mode: AbstractContextManager[Any]
) -> int:
    """Return the floating-point operations of a model on an image of zeros.

    Args:
        model: The model.
        sites: Its activation sites with modules.
        like: Tensor whose dtype and device the image has.
        size: Shape of the image.
        mode: Context manager in which the model runs.
    """
    shapes: list[tuple[nn.Module, torch.Size]] = []

    def observe(site: Site) -> Callable[[nn.Module, Tensor], Tensor]:
        def skip(module: nn.Module, x: Tensor) -> Tensor:
            shapes.append((module, x.shape))
            return x

        return skip

    counter = FlopCounterMode(display=False)
    pooled: list[int] = []  # elements that dynamic convolutions average
    hooks = [
        module.register_forward_pre_hook(lambda _, given: pooled.append(given[0].numel()))
        for module in model.modules()
        if isinstance(module, DynamicConv2d)
    ]
    try:
        with (
            preserve_attributes(model),  # heads keep their anchors, which would be fake or of another size
            observe_activations(sites, observe),
            evaluation_mode(model),
            torch.no_grad(),
            mode,
            counter,
        ):
            model(like.new_zeros(size))
    finally:
        for hook in hooks:
            hook.remove()
    known: dict[tuple[int, torch.Size], int] = {}
    total = int(counter.get_total_flops()) + sum(pooled)
    for activation, shape in shapes:
        total += known.setdefault((id(activation), shape), count_activation_flops(activation, shape))
    return total


def count_activation_flops(activation: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of an activation in evaluation mode.

    Args:
        activation: The module, which is copied to the meta device.
        shape: Shape of its input.

    >>> count_activation_flops(nn.SiLU(), (1, 8, 10, 10))  # a sigmoid and a product each
    1600
    """
    counter = _OperationCounter()
    with torch.no_grad(), counter:
        deepcopy(activation).to("meta").eval()(torch.empty(shape, device="meta"))
    return counter.total


class _OperationCounter(TorchDispatchMode):
    """Sums the floating-point operations of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        elif name.rstrip("_") not in _FREE and name not in _FREE:
            counted = args[0] if name in _REDUCTIONS else out[0] if isinstance(out, (tuple, list)) else out
            if isinstance(counted, Tensor):
                self.total += counted.numel() * _PER_ELEMENT.get(name.rstrip("_"), _PER_ELEMENT.get(name, 1))
        return out
