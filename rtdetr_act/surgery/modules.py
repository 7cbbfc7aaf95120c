"""Modules of a network: reach the root, set a child, evaluate, and leave everything as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.errors import ModelError


def unwrap(model: Any) -> nn.Module:
    """Return the module whose sites a model has: the task model of an RTDETR or YOLO object, else the model itself.

    Raises:
        ModelError: The model is exported, wrapped, compiled or no module at all.
    """
    root = model.model if hasattr(model, "overrides") and hasattr(model, "task") else model
    if isinstance(root, str) and root is not model:
        raise ModelError(f"'{root}' is an exported model without modules to swap: give the .pt or .yaml it came from")
    if not isinstance(root, nn.Module):
        raise ModelError(
            f"a {type(root).__name__} is no torch.nn.Module: give a model object, such as RTDETR('x.yaml')"
        )
    if isinstance(root, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be changed any more: patch the model it came from")
    if isinstance(root, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ModelError(f"the model is wrapped in {type(root).__name__}: patch model.module, before wrapping it")
    if type(root).__name__ == "OptimizedModule":
        raise ModelError("the model is compiled: patch it before torch.compile (or patch model._orig_mod)")
    return root


def example_inputs(root: nn.Module, example_input: Any) -> tuple[Any, ...] | None:
    """Return what to call a model with: the arguments given, else zeros (1, C, 224, 224), None if it takes none."""
    if example_input is not None:
        return example_input if isinstance(example_input, tuple) else (example_input,)
    parameter = next((p for p in root.parameters() if p.is_floating_point()), None)
    conv = next((m for m in root.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))), None)
    if parameter is None or conv is None:
        return None
    return (torch.zeros(1, conv.in_channels, 224, 224, device=parameter.device, dtype=parameter.dtype),)


def frozen_among(parameters: Iterable[torch.Tensor]) -> set[int]:
    """Return the ids of parameters that a training leaves alone.

    Those are none where all of them are frozen, since a checkpoint's network comes so. Parameters of activations placed
    since then are not, and should not be among the given ones.
    """
    found = list(parameters)
    frozen = {id(parameter) for parameter in found if not parameter.requires_grad}
    return frozen if len(frozen) < len({id(parameter) for parameter in found}) else set()


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in root.modules()]
    root.train(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back every module's attributes: its mode, and what a forward pass caches, such as a decoder's anchors."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


_LAYER_NOTES = ("i", "f", "type", "np")  # index, inputs, class and size, as `parse_model` writes them


def put(owner: nn.Module, attribute: str, activation: Any) -> None:
    """Set an activation, a module or a plain function, as the attribute of its owner.

    Where a row of a model YAML is nothing but that activation, it stays the layer that it was: Ultralytics goes through
    the layers by what it noted on them.
    """
    if isinstance(activation, nn.Module):
        current = owner._modules.get(attribute)
        if current is not None:
            vars(activation).update({key: vars(current)[key] for key in _LAYER_NOTES if key in vars(current)})
        if attribute in owner._modules:
            owner._modules[attribute] = activation  # keeps its place among the children
        else:
            vars(owner).pop(attribute, None)
            owner.add_module(attribute, activation)
    else:
        owner._modules.pop(attribute, None)
        vars(owner)[attribute] = activation


def tensors_of(root: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict([*root.named_parameters(), *root.named_buffers()])
