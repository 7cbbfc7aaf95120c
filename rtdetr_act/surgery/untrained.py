"""Warn at the first optimizer step that leaves the parameters of swapped activations as they are, or decays them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import warn
from rtdetr_act.surgery.parameters import Surroundings, list_scalar_and_channel_parameters

_WRAPPERS = ("module", "_orig_mod")  # names in which DistributedDataParallel and torch.compile hold a model


@dataclass(frozen=True)
class _Neglected:
    """A parameter of an activation that stands among trained weights.

    Attributes:
        parameter: The parameter.
        activation: The activation.
        name: Qualified name of the activation.
        decayed: Whether an optimizer holds it, in a group with weight decay; False if none holds it.
    """

    parameter: nn.Parameter
    activation: nn.Module
    name: str
    decayed: bool


@dataclass
class _Watch:
    """What the hook has seen since the last swap.

    Attributes:
        handle: The handle of the hook, None before the first swap with parameters and once the hook is removed.
        active: Whether the hook has not finished yet.
        optimizers: The optimizers that were looked at.
        waiting: Neglected parameters that had no gradient yet.
    """

    handle: Any = None
    active: bool = False
    optimizers: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    waiting: tuple[weakref.ref[nn.Parameter], ...] = ()


_watch = _Watch()
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # activations that a warning has named


def watch_optimizers() -> None:
    """Look, at the next step of any optimizer in the process, for activations that are not trained as they should be.

    A hook on all optimizers of torch looks once at the modules and optimizers that exist, which takes 0.1 to 0.3 s, and
    is removed after that. A parameter counts if it has a gradient and the weights of the layers next to it are in an
    optimizer. Averaged copies, teachers, frozen networks and those that are not trained are thereby left out.
    """
    stop_watching()
    _watch.optimizers = weakref.WeakSet()
    _watch.waiting = ()
    _watch.handle, _watch.active = register_optimizer_step_pre_hook(_check_step), True


def stop_watching() -> None:
    """Remove the hook, outside of a step."""
    if _watch.handle is not None:
        _watch.handle.remove()
    _watch.handle, _watch.active = None, False


def _check_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, if there is reason to, before the step of an optimizer."""
    if torch.compiler.is_compiling() or not _watch.active:
        return
    if optimizer in _watch.optimizers and not any(
        (parameter := each()) is not None and parameter.grad is not None for each in _watch.waiting
    ):
        return
    _watch.optimizers.add(optimizer)
    neglected, settled = _find_neglected()
    if found := [each for each in neglected if each.parameter.grad is not None]:
        _finish()
        _warn(found)
        return
    _watch.waiting = tuple(weakref.ref(each.parameter) for each in neglected)
    if not neglected and settled:
        _finish()


def _finish() -> None:
    """Remove the hook, or leave it without effect where another hook has been registered after it.

    torch goes through a dictionary of hooks at this moment, from which only the last one can be removed.
    """
    hooks = _watch.handle.hooks_dict_ref()
    _watch.active = False
    if hooks and next(reversed(hooks)) == _watch.handle.id:
        stop_watching()


def _find_neglected() -> tuple[list[_Neglected], bool]:
    """Return the parameters of activations that are not trained as they should be.

    Returns:
        The parameters, with or without gradients; and whether that is all there is to say: there are activations among
        trained weights, or none whose network may be trained later. A network that stays in training mode and is never
        trained, such as the one from which Ultralytics builds the one that it trains, does not keep the hook.
    """
    modules, optimizers = _find_modules_and_optimizers()
    decays: dict[int, bool] = {}  # whether all groups that hold a parameter decay it
    for optimizer in optimizers:
        for group in vars(optimizer).get("param_groups", ()):
            for parameter in group["params"]:
                decays[id(parameter)] = decays.get(id(parameter), True) and bool(group.get("weight_decay", 0))
    surroundings = Surroundings(modules)
    found: list[_Neglected] = []
    trained = trainable = False
    for activation in surroundings.placed:
        placed = get_placement(activation)
        parameters = [parameter for parameter in activation.parameters() if parameter.requires_grad]
        if not parameters or not placed or placed.replaces != "activation" or activation in _told:
            continue
        nearest = [each.parameter for each in surroundings.find_nearest_weights(activation)]
        if not any(parameter.requires_grad and id(parameter) in decays for parameter in nearest):
            trainable |= activation.training
            continue
        trained = True
        slopes = {id(parameter) for parameter in list_scalar_and_channel_parameters(activation)}
        name = surroundings.name(activation)
        for parameter in parameters:
            decayed = decays.get(id(parameter))
            if decayed is None or (decayed and id(parameter) in slopes):
                found.append(_Neglected(parameter, activation, name, bool(decayed)))
    return found, trained or not trainable


def _find_modules_and_optimizers() -> tuple[list[nn.Module], list[Optimizer]]:
    """Return all modules and optimizers of the process, without running code of theirs."""
    modules: list[nn.Module] = []
    optimizers: list[Optimizer] = []
    lists: dict[type, list | None] = {}
    for each in gc.get_objects():
        cls = type(each)
        if cls not in lists:
            lists[cls] = modules if issubclass(cls, nn.Module) else optimizers if issubclass(cls, Optimizer) else None
        if (found := lists[cls]) is not None and (found is optimizers or "_modules" in vars(each)):
            found.append(each)
    return modules, optimizers


def _warn(found: list[_Neglected]) -> None:
    """Warn of parameters that are not trained as they should be."""
    _told.update(each.activation for each in found)
    absent = [each for each in found if not each.decayed]
    decayed = [each for each in found if each.decayed]
    parts = []
    if absent:
        verbs = ("is", "stays as it is") if len(absent) == 1 else ("are", "stay as they are")
        parts.append(f"{_describe(absent)} {verbs[0]} in no optimizer and {verbs[1]}")
    if decayed:
        verb, them = ("is", "it") if len(decayed) == 1 else ("are", "them")
        parts.append(f"{_describe(decayed)} {verb} under weight decay, which pulls {them} to 0")
    message = f"{', and '.join(parts)}: call rtdetr_act.add_to_optimizer(model, optimizer) before training"
    warn(message)


def _describe(found: list[_Neglected]) -> str:
    """Return e.g. "110 parameters of activations (arelu at model.0.act first)"."""
    first = min(found, key=lambda each: _natural_order(each.name))
    placed = get_placement(first.activation)
    assert placed is not None
    parts = first.name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    count = f"{len(found)} parameter{'s' if len(found) > 1 else ''} of activations"
    return f"{count} ({placed.spec} at {'.'.join(parts)} first)"


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts qualified names with the numbers in them as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
