"""Put the parameters of swapped activations into the optimizer of any training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import InputError, ModelError, quote
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.modules import unwrap_parallel
from rtdetr_act.surgery.parameters import Kind, Surroundings, Weight, list_scalar_and_channel_parameters, list_weights
from rtdetr_act.surgery.plan import check_act_lr
from rtdetr_act.surgery.schedulers import find_schedulers, let_group_follow

# Keys of a group that are learning rates: those of OneCycleLR and SWALR are among them.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# Where a parameter of a kind goes, by the kinds of the weights next to it, the best one first.
_ORDER: dict[Kind, tuple[Kind, ...]] = {
    "weight": ("weight", "norm", "bias"),
    "norm": ("norm", "weight", "bias"),
    "bias": ("bias", "norm", "weight"),
}


def add_to_optimizer(model: Any, optimizer: Optimizer, *, act_lr: float | None = None) -> int:
    """Put the parameters of swapped activations into an existing optimizer, without weight decay, in place.

    Some training loops collect `weight` and `bias` of every module, so that other parameters of activations never
    change; most apply weight decay to them, which pulls slopes to zero. Scalar and per-channel parameters get a group
    without weight decay, with the settings of the group of the normalization layers next to them, or of the other
    weights there. Those that a group without weight decay holds already stay there, unless `act_lr` asks for another
    learning rate. Weights of layers inside activations, and of dynamic convolutions, that no group holds join the group
    of the weights next to them. Activations among weights that the optimizer does not train are left out, and so are
    frozen parameters. The optimizer's state is kept, and torch's learning-rate schedulers learn of a new group.
    A second call changes nothing.

    Args:
        model: The patched model; it may be compiled or wrapped in DistributedDataParallel.
        optimizer: The optimizer that trains it.
        act_lr: Factor on the learning rate of scalar and per-channel parameters. Default: None, that of the model's
            plan, which is 1.0 unless `patch_model` got another.

    Returns:
        The number of parameter tensors that were added or moved.

    Raises:
        InputError: `optimizer` is not an optimizer of torch.
        ModelError: The optimizer holds no parameter of the model, or a scheduler cannot learn of a new group.
        SpecError: `act_lr` is not a positive number.

    >>> import torch
    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-4)
    >>> len(patch_model(net, "arelu")), add_to_optimizer(net, optimizer)
    (1, 2)
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(2, 0.0001), (2, 0.0)]
    """
    root = unwrap_parallel(model)
    check_optimizer(root, optimizer)
    factor = check_act_lr(_read_act_lr(root) if act_lr is None else act_lr)
    return _Editor(root, optimizer, factor, act_lr is not None or factor != 1.0).run()


def check_optimizer(root: nn.Module, optimizer: Optimizer, *, new_group: bool = False) -> None:
    """Check that an optimizer trains a model.

    Args:
        root: The model.
        optimizer: The optimizer.
        new_group: Whether to check, too, that the optimizer's schedulers can learn of a new group. Default: False.

    Raises:
        InputError: It is not an optimizer of torch.
        ModelError: It holds no parameter of the model, or a scheduler cannot learn of a new group.
    """
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer is a torch.optim.Optimizer, not {quote(optimizer)}")
    held = get_held_ids(optimizer)
    if not any(id(parameter) in held for parameter in root.parameters()):
        raise ModelError(
            "the optimizer holds no parameter of the model: give the one that was built from its parameters"
        )
    if new_group:
        find_schedulers(optimizer)


def get_held_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that the groups of an optimizer hold."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _read_act_lr(root: nn.Module) -> float:
    """Return the factor of the plan that a model, or the first patched part of it, carries; 1.0 without a plan."""
    return next((plan.act_lr for module in root.modules() if (plan := read_plan(module))), 1.0)


def remove_from_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Remove parameters from the groups and the state of an optimizer, in place; return how many it held."""
    gone = {id(parameter): parameter for parameter in parameters}
    count = 0
    for group in optimizer.param_groups:
        count += len(_take(group, set(gone)))
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
    return count


class _Editor:
    """Change the groups of an optimizer for a model.

    Args:
        root: The model.
        optimizer: The optimizer.
        factor: Factor on the learning rate of scalar and per-channel parameters.
        explicit: Whether parameters that are without weight decay already must get that learning rate too.
    """

    def __init__(self, root: nn.Module, optimizer: Optimizer, factor: float, explicit: bool) -> None:
        self.optimizer, self.factor, self.explicit = optimizer, factor, explicit
        self.surroundings = Surroundings(root.modules())
        self.names = {id(parameter): name for name, parameter in root.named_parameters()}
        self.slopes = {id(p) for module in self.surroundings.placed for p in _list_slopes(module)}
        self.held = {id(each): index for index, group in enumerate(self.groups) for each in group["params"]}
        self._schedulers: list[LRScheduler] | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer."""
        return self.optimizer.param_groups

    @property
    def schedulers(self) -> list[LRScheduler]:
        """The schedulers of the optimizer, looked for once."""
        if self._schedulers is None:
            self._schedulers = find_schedulers(self.optimizer)
        return self._schedulers

    def run(self) -> int:
        """Add and move the parameters; return how many."""
        moves: dict[int, list[nn.Parameter]] = {}  # by the index of the reference group
        joins: dict[int, list[nn.Parameter]] = {}  # by the index of the group
        rates: dict[int, int] = {}  # reference group by group whose learning rate is another one
        for module in self.surroundings.placed:
            nearest = self._find_trained(self.surroundings.find_nearest_weights(module))
            if not nearest:
                continue
            reference = self._choose("norm", nearest)
            for weight in list_weights(module):
                parameter = weight.parameter
                if not parameter.requires_grad:
                    continue
                index = self.held.get(id(parameter))
                if id(parameter) not in self.slopes:
                    if index is None:
                        alike = self._find_trained(self.surroundings.find_nearest_weights(module, weight.kind))
                        joins.setdefault(self._choose(weight.kind, alike or nearest), []).append(parameter)
                elif index is None or _decays(self.groups[index]):
                    moves.setdefault(reference, []).append(parameter)
                elif self.explicit and not self._has_rate(index, reference):
                    if self._is_dedicated(index):
                        rates[index] = reference
                    else:
                        moves.setdefault(reference, []).append(parameter)
        moves, joins = _drop_repeated(moves), _drop_repeated(joins)
        if any(self._find_home(reference) is None for reference in moves) or rates:
            self.schedulers  # noqa: B018, which raises before anything is changed
        for index, reference in rates.items():
            self._set_rates(index, reference)
        for reference, parameters in moves.items():
            self._move(parameters, reference)
        for index, parameters in joins.items():
            self._put(index, parameters)
        return sum(map(len, [*moves.values(), *joins.values()]))

    def _find_trained(self, weights: list[Weight]) -> list[tuple[Kind, int]]:
        """Return the kinds and the groups of those weights that the optimizer holds."""
        pairs = ((weight.kind, self.held.get(id(weight.parameter))) for weight in weights)
        return [(kind, index) for kind, index in pairs if index is not None]

    def _choose(self, kind: Kind, nearest: list[tuple[Kind, int]]) -> int:
        """Return the group for a parameter of a kind, the one with the lowest learning rate where there are several."""
        for other in _ORDER[kind]:
            if found := [index for each, index in nearest if each == other]:
                return min(found, key=lambda index: (_get_rate(self.groups[index]), index))
        raise AssertionError("every weight has a kind")

    def _is_dedicated(self, index: int) -> bool:
        """Return whether a group holds scalar and per-channel parameters of activations only, without decay."""
        group = self.groups[index]
        params = group["params"]
        return bool(params) and not _decays(group) and all(id(parameter) in self.slopes for parameter in params)

    def _has_rate(self, index: int, reference: int) -> bool:
        """Return whether a group has the learning rate of a reference group times the factor."""
        target = _get_rate(self.groups[reference]) * self.factor
        return math.isclose(_get_rate(self.groups[index]), target, rel_tol=1e-6)

    def _find_home(self, reference: int) -> int | None:
        """Return the group that exists for parameters with a reference group, None if there is none yet."""
        if "weight_decay" not in self.groups[reference] and self.factor == 1.0:
            return reference  # such as LBFGS, which has one group only
        found = (i for i in range(len(self.groups)) if self._is_dedicated(i) and self._has_rate(i, reference))
        return next(found, None)

    def _move(self, parameters: list[nn.Parameter], reference: int) -> None:
        """Move parameters to the group for this reference group, which is made where there is none."""
        chosen = {id(parameter) for parameter in parameters}
        home = self._find_home(reference)
        for group in self.groups:
            _take(group, chosen)
        if home is not None:
            self._put(home, parameters)
            return
        settings = {k: v for k, v in self.groups[reference].items() if k not in ("params", "param_names")}
        settings.update({key: settings[key] * self.factor for key in _RATES if key in settings})
        if "use_muon" in settings:  # MuSGD of Ultralytics: Muon is for matrices
            settings["use_muon"] = False
        named = "param_names" in self.groups[reference]
        params: list[Any] = [(self.names[id(each)], each) for each in parameters] if named else parameters
        schedulers = self.schedulers
        self.optimizer.add_param_group({**settings, "params": params, "weight_decay": 0.0})
        for scheduler in schedulers:
            let_group_follow(scheduler, len(self.groups) - 1, reference, self.factor)

    def _put(self, index: int, parameters: list[nn.Parameter]) -> None:
        """Append parameters to a group."""
        group = self.groups[index]
        group["params"].extend(parameters)
        if "param_names" in group:  # of an optimizer that was built from named parameters, since torch 2.6
            group["param_names"].extend(self.names[id(parameter)] for parameter in parameters)

    def _set_rates(self, index: int, reference: int) -> None:
        """Give a group the learning rates of a reference group times the factor."""
        for key in _RATES:
            if key in self.groups[index] and key in self.groups[reference]:
                self.groups[index][key] = self.groups[reference][key] * self.factor
        for scheduler in self.schedulers:
            let_group_follow(scheduler, index, reference, self.factor)


def _list_slopes(module: nn.Module) -> list[nn.Parameter]:
    """Return the scalar and per-channel parameters of an inserted module, none for a convolution."""
    placed = get_placement(module)
    return list_scalar_and_channel_parameters(module) if placed and placed.replaces == "activation" else []


def _decays(group: dict[str, Any]) -> bool:
    return bool(group.get("weight_decay", 0))


def _get_rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a group before its scheduler changed it."""
    return float(group.get("initial_lr", group["lr"]))


def _drop_repeated(found: dict[int, list[nn.Parameter]]) -> dict[int, list[nn.Parameter]]:
    """Return lists of parameters without those that stand in them, or in an earlier one, already."""
    seen: set[int] = set()
    return {
        index: [each for each in parameters if id(each) not in seen and not seen.add(id(each))]  # type: ignore[func-returns-value]
        for index, parameters in found.items()
    }


def _take(group: dict[str, Any], chosen: set[int]) -> list[nn.Parameter]:
    """Remove the parameters with the given ids from a group, and their names; return them."""
    taken = [parameter for parameter in group["params"] if id(parameter) in chosen]
    if taken:
        if "param_names" in group:
            pairs = zip(group["param_names"], group["params"], strict=True)
            group["param_names"] = [name for name, parameter in pairs if id(parameter) not in chosen]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    return taken
