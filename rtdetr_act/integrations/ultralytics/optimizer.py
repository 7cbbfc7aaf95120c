"""What the optimizer of a patched model needs beyond Ultralytics' own groups."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from rtdetr_act.activations.dynamic_conv import DynamicConv2d
from rtdetr_act.surgery.parameters import WEIGHT_LAYERS, find_scalar_and_channel_parameters

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def separate_activation_parameters(optimizer: Optimizer, model: nn.Module, act_lr: float = 1.0) -> int:
    """Take scalar and per-channel activation parameters out of weight decay (and out of Muon), in place.

    PReLU's documentation warns against decaying its slope: decay pulls it to zero whatever the loss says. With
    `act_lr=1` they join the group without decay that is there, so no group appears behind the back of a learning-rate
    scheduler; else they get one group with the learning rate of that group times `act_lr`, which is safe while no
    scheduler exists yet (Ultralytics builds it after the optimizer).

    Args:
        optimizer: As Ultralytics' `build_optimizer` returns it, before its first step.
        model: The patched model it was built for.
        act_lr: Factor on their learning rate.

    Returns:
        How many parameter tensors were moved.
    """
    chosen = {id(parameter) for parameter in find_scalar_and_channel_parameters(model)}
    moved = _remove_parameters(optimizer.param_groups, chosen)
    if not moved:
        return 0
    home = _find_group(optimizer.param_groups, _get_parameter_ids(model, "weight", _NORMS), decays=False)
    if home is not None and act_lr == 1.0:
        home["params"].extend(moved)
    else:
        settings = _copy_settings(home or optimizer.param_groups[-1])
        optimizer.add_param_group({**settings, "params": moved, "lr": settings["lr"] * act_lr, "weight_decay": 0.0})
    return len(moved)


def exclude_dynamic_kernels_from_muon(optimizer: Optimizer, model: nn.Module) -> int:
    """Take kernels and biases of dynamic convolutions, (K, Cout, …) and (K, Cout), out of Muon, in place.

    Muon is for matrices and the kernels of convolutions, which it flattens to matrices. Here it would make the K
    kernels of a layer orthogonal to one another, where it takes five axes at all: Ultralytics' did not before 8.4.130.
    They go where the weights and biases go that Muon does not take.

    Returns:
        How many parameter tensors were moved.
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
    """Remove the parameters of these ids from optimizer groups, and return them."""
    moved = [p for group in groups for p in group["params"] if id(p) in chosen]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    return moved


def _find_group(groups: list[dict], alike: set[int], *, decays: bool) -> dict | None:
    """Return the group whose parameters are treated as some should be: with or without decay, never by Muon.

    Neither labels nor places tell: Ultralytics has no labels before 8.4.30, and the order of 8.4.0 is another. Of
    several groups that do the same, as those of MuSGD whose first has the head's threefold rate, the one is meant that
    holds parameters of the kind, with the lowest rate. Biases have a warm-up of their own, so that a group without
    decay that holds others will not do.

    Args:
        groups: Of the optimizer.
        alike: Ids of the model's parameters of the kind.
        decays: Whether the group has weight decay.
    """
    right = [group for group in groups if bool(group["weight_decay"]) == decays and not group.get("use_muon")]
    holding = [group for group in right if any(id(p) in alike for p in group["params"])]
    others = [group for group in right if decays or not group["params"]]
    return min(holding or others, key=lambda group: group["lr"], default=None)


def _copy_settings(group: dict) -> dict[str, Any]:
    """Return the settings of a group for another one beside it, which Muon leaves alone."""
    settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return {**settings, "use_muon": False} if "use_muon" in settings else settings


def _get_parameter_ids(model: nn.Module, name: str, classes: tuple[type, ...]) -> set[int]:
    """Return the ids of the parameters of that name in modules of these classes."""
    found = (getattr(module, name, None) for module in model.modules() if isinstance(module, classes))
    return {id(parameter) for parameter in found if isinstance(parameter, nn.Parameter)}
