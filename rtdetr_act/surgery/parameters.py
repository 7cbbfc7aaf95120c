"""Parameters of the activations in a patched model, and the weights of the layers around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.surgery.sites import iterate_placed_activations

# Layers inside activations whose weights and biases are treated as those of any other layer.
WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)

Kind = Literal["weight", "norm", "bias"]


@dataclass(frozen=True)
class Weight:
    """A parameter and its kind: the weight of a normalization layer ("norm"), a bias, or any other weight."""

    parameter: nn.Parameter
    kind: Kind


def find_scalar_and_channel_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the scalar and per-channel parameters of all activations that a swap inserted into a model."""
    for _, activation in iterate_placed_activations(model):
        yield from list_scalar_and_channel_parameters(activation)


def list_scalar_and_channel_parameters(activation: nn.Module) -> list[nn.Parameter]:
    """Return the scalar and per-channel parameters of an activation, without those of the layers inside it."""
    return [
        parameter
        for module in activation.modules()
        if not isinstance(module, WEIGHT_LAYERS)
        for parameter in module.parameters(recurse=False)
        if parameter.numel() == max(parameter.shape, default=1)  # such as (), (C,) and (1, C, 1, 1)
    ]


def list_weights(module: nn.Module) -> list[Weight]:
    """Return the parameters of a module and of all modules inside it, with their kinds."""
    return [
        Weight(parameter, _get_kind(each, name))
        for each in module.modules()
        for name, parameter in each.named_parameters(recurse=False)
    ]


def _get_kind(module: nn.Module, name: str) -> Kind:
    if "bias" in name:
        return "bias"
    return "norm" if isinstance(module, NORMS) else "weight"


class Surroundings:
    """Find where modules stand in a network, and the weights of the layers next to them.

    Args:
        modules: All modules of the network, or of several.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        known = {id(module): module for module in modules}
        self._parents: dict[int, list[tuple[str, nn.Module]]] = {}
        for module in known.values():
            for name, child in list(module._modules.items()):
                if child is not None:
                    self._parents.setdefault(id(child), []).append((name, module))
        self.placed = [module for module in known.values() if id(module) in self._parents and get_placement(module)]
        self._own = {id(parameter) for module in self.placed for parameter in module.parameters()}
        self._found: dict[int, list[Weight]] = {}

    def find_nearest_weights(self, module: nn.Module, kind: Kind | None = None) -> list[Weight]:
        """Return the weights in the smallest part of the network around a module that has any.

        Those of modules that a swap inserted do not count.

        Args:
            module: The module.
            kind: Their kind. Default: None, any.
        """
        level, seen = [module], {id(module)}
        while level:
            above = [parent for each in level for _, parent in self._parents.get(id(each), ())]
            level = list({id(parent): parent for parent in above if id(parent) not in seen}.values())
            seen.update(map(id, level))
            found = [weight for owner in level for weight in self._list_weights(owner)]
            if found := [weight for weight in found if kind in (None, weight.kind)]:
                return found
        return []

    def _list_weights(self, owner: nn.Module) -> list[Weight]:
        if id(owner) not in self._found:
            self._found[id(owner)] = [each for each in list_weights(owner) if id(each.parameter) not in self._own]
        return self._found[id(owner)]

    def name(self, module: nn.Module) -> str:
        """Return the qualified name of a module in the largest network around it."""
        names: list[str] = []
        seen = {id(module)}
        while above := [each for each in self._parents.get(id(module), ()) if id(each[1]) not in seen]:
            name, module = above[0]
            seen.add(id(module))
            names.insert(0, name)
        return ".".join(names)
