"""Parameter groups of a patched model's optimizer beyond those of Ultralytics."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from rtdetr_act.activations.dynamic_conv import DynamicConv2d
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.parameters import NORMS, WEIGHT_LAYERS, find_scalar_and_channel_parameters


def separate_activation_parameters(optimizer: Optimizer, model: nn.Module, act_lr: float = 1.0) -> int:
    """Exclude scalar and per-channel activation parameters from weight decay and from Muon, in place.

    PReLU's documentation advises against weight decay, which pulls the slope to zero. With `act_lr=1` the parameters
    are moved to the existing group without decay, so that learning-rate schedulers see no new group. Otherwise they get
    a new group with the learning rate of that group times `act_lr`, which is safe because Ultralytics builds the
    scheduler after the optimizer.

    Args:
        optimizer: As returned by Ultralytics' `build_optimizer`, before its first step.
        model: The patched model that it was built for.
        act_lr: Factor on their learning rate. Default: 1.0.

    Returns:
        The number of parameter tensors that were moved.
    """
    chosen = {id(parameter) for parameter in find_scalar_and_channel_parameters(model)}
    moved = _remove_parameters(optimizer.param_groups, chosen)
    if not moved:
        return 0
    home = _find_group(optimizer.param_groups, _get_parameter_ids(model, "weight", NORMS), decays=False)
    if home is not None and act_lr == 1.0:
        home["params"].extend(moved)
    else:
        settings = _copy_settings(home or optimizer.param_groups[-1])
        optimizer.add_param_group({**settings, "params": moved, "lr": settings["lr"] * act_lr, "weight_decay": 0.0})
    return len(moved)


def find_decayed_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters to which a training applies weight decay.

    Ultralytics exempts biases, normalization layers and parameters named `logit_scale`; this package exempts those that
    `separate_activation_parameters` moves, in a model with a plan.

    Args:
        model: Task model.
    """
    exempt = {id(parameter) for parameter in find_scalar_and_channel_parameters(model)} if read_plan(model) else set()
    found = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if not ("bias" in full or "logit_scale" in full or isinstance(module, NORMS)):
                found.add(id(parameter))
    return found - exempt


def exclude_dynamic_kernels_from_muon(optimizer: Optimizer, model: nn.Module) -> int:
    """Exclude the kernels (K, Cout, …) and biases (K, Cout) of dynamic convolutions from Muon, in place.

    Muon is for matrices, and for convolution kernels flattened to matrices. It would make the K kernels of a layer
    orthogonal to each other, and Ultralytics' version before 8.4.130 does not accept five dimensions. The parameters
    are moved to the groups of weights and biases that do not use Muon.

    Args:
        optimizer: As returned by Ultralytics' `build_optimizer`, before its first step.
        model: The patched model that it was built for.

    Returns:
        The number of parameter tensors that were moved.
    """
    stacks = [module for module in model.modules() if isinstance(module, DynamicConv2d)]
    groups = optimizer.param_groups
    muon = [group for group in groups if group.get("use_muon")]
    count = 0
    for name, decays in (("weight", True), ("bias", False)):
        chosen = {id(p) for module in stacks if (p := getattr(module, name)) is not None}
        if not (moved := _remove_parameters(muon, chosen)):
            continue
        count += len(moved)
        if (home := _find_group(groups, _get_parameter_ids(model, name, WEIGHT_LAYERS), decays=decays)) is not None:
            home["params"].extend(moved)
        else:
            settings = _copy_settings(muon[-1])
            decay = settings["weight_decay"] if decays else 0.0
            optimizer.add_param_group({**settings, "params": moved, "weight_decay": decay})
    return count


def _remove_parameters(groups: list[dict], chosen: set[int]) -> list[nn.Parameter]:
    """Remove the parameters with the given ids from optimizer groups, and return them."""
    moved = [p for group in groups for p in group["params"] if id(p) in chosen]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    return moved


def _find_group(groups: list[dict], alike: set[int], *, decays: bool) -> dict | None:
    """Return the group for parameters of one kind, with or without weight decay and without Muon, or None.

    Groups cannot be identified by label or index: Ultralytics has no labels before 8.4.30, and another order in 8.4.0.
    Several groups may have the same settings, such as those of MuSGD, where the head has three times the learning rate;
    then the one with the lowest rate among those that contain parameters of the kind is chosen. A group without decay
    that contains other parameters is not suitable, since biases have a separate warm-up.

    Args:
        groups: The groups of the optimizer.
        alike: Ids of the model's parameters of this kind.
        decays: Whether the group must have weight decay.
    """
    right = [group for group in groups if bool(group["weight_decay"]) == decays and not group.get("use_muon")]
    holding = [group for group in right if any(id(p) in alike for p in group["params"])]
    others = [group for group in right if decays or not group["params"]]
    return min(holding or others, key=lambda group: group["lr"], default=None)


def _copy_settings(group: dict) -> dict[str, Any]:
    """Return the settings of a group for a new group without Muon."""
    settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return {**settings, "use_muon": False} if "use_muon" in settings else settings


def _get_parameter_ids(model: nn.Module, name: str, classes: tuple[type, ...]) -> set[int]:
    """Return the ids of the parameters with a name in modules of some classes."""
    found = (getattr(module, name, None) for module in model.modules() if isinstance(module, classes))
    return {id(parameter) for parameter in found if isinstance(parameter, nn.Parameter)}
