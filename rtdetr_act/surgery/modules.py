"""Helpers for the modules of a network: unwrap, set a child, run in evaluation mode, restore attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.errors import ModelError


def unwrap(model: Any) -> nn.Module:
    """Return the task model of an RTDETR or YOLO object, or the model itself.

    Raises:
        ModelError: The model is exported, wrapped or compiled, or is not a module.
    """
    root = model.model if hasattr(model, "overrides") and hasattr(model, "task") else model
    if isinstance(root, str) and root is not model:
        raise ModelError(f"'{root}' is an exported model without modules to swap: give the .pt or .yaml it came from")
    if not isinstance(root, nn.Module):
        raise ModelError(
            f"a {type(root).__name__} is not a torch.nn.Module: give a model object, such as RTDETR('x.yaml')"
        )
    if isinstance(root, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be changed: patch the model it was exported from")
    if isinstance(root, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ModelError(f"the model is wrapped in {type(root).__name__}: patch model.module, before wrapping it")
    if type(root).__name__ == "OptimizedModule":
        raise ModelError("the model is compiled: patch it before torch.compile (or patch model._orig_mod)")
    return root


def unwrap_parallel(model: Any) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel or torch.compile, else what `unwrap` returns.

    Raises:
        ModelError: The model is exported, or is not a module.
    """
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or (
        type(model).__name__ == "OptimizedModule"
    ):
        model = model._orig_mod if type(model).__name__ == "OptimizedModule" else model.module
    return unwrap(model)


def get_example_inputs(root: nn.Module, example_input: Any, side: int = 224) -> tuple[Any, ...] | None:
    """Return the positional arguments of a test call of a model.

    Args:
        root: The model.
        example_input: A tensor or a tuple of arguments, None for zeros of the shape that the first convolution takes:
            (1, C, 4096), (1, C, 224, 224) or (1, C, 16, 64, 64).
        side: Height and width of the image. Default: 224.

    Returns:
        The arguments; None if none are given and the model has no convolution.
    """
    if example_input is not None:
        return example_input if isinstance(example_input, tuple) else (example_input,)
    parameter = next((p for p in root.parameters() if p.is_floating_point()), None)
    convs = (m for m in root.modules() if isinstance(m, nn.modules.conv._ConvNd))
    conv = next(convs, None)
    if parameter is None or conv is None:
        return None
    size = _EXAMPLE_SIZES.get(len(conv.kernel_size), (side, side))
    return (torch.zeros(1, conv.in_channels, *size, device=parameter.device, dtype=parameter.dtype),)


# Spatial sizes of an example input by their number: a signal that survives a stride of a thousand, and a clip.
_EXAMPLE_SIZES = {1: (4096,), 3: (16, 64, 64)}


def find_frozen(parameters: Iterable[torch.Tensor]) -> set[int]:
    """Return the ids of the parameters that the user has frozen.

    If all parameters are frozen, none counts: checkpoints store networks that way. Do not pass the parameters of
    activations inserted since loading, which are not frozen.
    """
    given = list(parameters)
    frozen = {id(parameter) for parameter in given if not parameter.requires_grad}
    return frozen if len(frozen) < len({id(parameter) for parameter in given}) else set()


@contextmanager
def evaluation_mode(root: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in root.modules()]
    root.train(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of every module after the block, such as its mode and the cached anchors of a decoder."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


_LAYER_ATTRIBUTES = ("i", "f", "type", "np")  # index, inputs, class and size, as `parse_model` writes them


def set_child(owner: nn.Module, attribute: str, activation: Any) -> None:
    """Set an attribute of a module to an activation, a module or a plain function.

    If the replaced child is a layer of an Ultralytics model, the new one gets its index, inputs, class name and size,
    which Ultralytics stores on layers.
    """
    if isinstance(activation, nn.Module):
        current = owner._modules.get(attribute)
        if current is not None:
            vars(activation).update({key: vars(current)[key] for key in _LAYER_ATTRIBUTES if key in vars(current)})
        if attribute in owner._modules:
            owner._modules[attribute] = activation  # keeps the order of the children
        else:
            vars(owner).pop(attribute, None)
            owner.add_module(attribute, activation)
    else:
        owner._modules.pop(attribute, None)
        vars(owner)[attribute] = activation


def get_named_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by qualified name."""
    return dict([*root.named_parameters(), *root.named_buffers()])
