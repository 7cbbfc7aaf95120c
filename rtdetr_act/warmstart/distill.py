"""The network before a swap teaches the new one while its activations blend: feature maps, compared at the borders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.patcher import leave_old

# In units of the task's own loss, for maps that have nothing in common with the teacher's: the same for every task.
_WEIGHT = 1.0


def borders(model: Any) -> list[int]:
    """Return the layers of an Ultralytics model whose maps cross from one section to the next.

    >>> from ultralytics.nn.tasks import DetectionModel
    >>> borders(DetectionModel("yolo11n.yaml", verbose=False))
    [4, 6, 10, 16, 19, 22]
    """
    layers, rows = model.model, len(model.yaml["backbone"])

    def section(index: int) -> int:
        return 2 if index == len(layers) - 1 else int(index >= rows)

    found = {
        source
        for index, layer in enumerate(layers)
        for source in _sources(layer, index)
        if source >= 0 and section(source) != section(index)
    }
    return sorted(found)


def _sources(layer: Any, index: int) -> list[int]:
    given = [layer.f] if isinstance(layer.f, int) else layer.f
    return [index + source if source < 0 else source for source in given]


class Teacher:
    """Adds to the loss of a task model how far its maps are from those of the network that it was before its swap.

    Both see the same batch, with statistics of that batch, so that the difference is zero while the blend is at its
    start. It counts relative to the task's own loss, less and less until the blend is over.

    Args:
        model: The task model that is trained, at the start of its blend.
        weights: Its state dict at that time, where the model has gone on since.
    """

    def __init__(self, model: Any, weights: dict[str, Tensor] | None = None) -> None:
        teacher = copy.deepcopy(model)
        if weights is not None:
            teacher.load_state_dict(weights)
        leave_old(teacher)
        self.share = 1.0  # what is left of the weight
        self.borders = borders(model)
        self.layers: Sequence[Any] = list(teacher.requires_grad_(False).train().model)[: max(self.borders) + 1]
        self.maps: dict[int, Tensor] = {}
        self.hooks = [model.register_forward_hook(_Hook(self._teach))]
        for index in self.borders:
            hook = _Hook(lambda layer, _, output, index=index: self._note(index, layer, output))
            self.hooks.append(model.model[index].register_forward_hook(hook))

    def remove(self) -> None:
        """Teach no more."""
        for hook in self.hooks:
            hook.remove()

    def _teach(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Return the output of a training step with the difference added to its loss, None for any other forward."""
        if not (model.training and inputs and isinstance(inputs[0], dict)):
            self.maps.clear()
            return None
        loss, items = output
        extra = _WEIGHT * self.share * self._difference(inputs[0]["img"]) * loss.detach().sum()
        return loss + extra / loss.numel(), items

    def _difference(self, images: Tensor) -> Tensor:
        """Return the mean over the borders of the squared error in units of the teacher's mean square."""
        maps, self.maps = self.maps, {}
        with torch.no_grad():
            wanted = self._forward(images)
        parts = [
            (maps[index].float() - wanted[index].float()).square().mean()
            / wanted[index].float().square().mean().clamp(min=1e-6)
            for index in self.borders
        ]
        return torch.stack(parts).mean()

    def _forward(self, images: Tensor) -> dict[int, Tensor]:
        found: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            given = [found[source] if source >= 0 else images for source in _sources(layer, index)]
            found.append(layer(given if isinstance(layer.f, Iterable) else given[0]))
        return {index: found[index] for index in self.borders}

    def _note(self, index: int, layer: nn.Module, output: Tensor) -> None:
        if layer.training:
            self.maps[index] = output


class _Hook:
    """A forward hook of which a copy of the model, such as the averaged or the saved one, has nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return self.call(module, inputs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(_change_nothing)


def _change_nothing(*_: Any) -> None:
    """Stand where a hook stood."""
