"""Stages of a model, to each of which a search gives one activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from rtdetr_act.errors import InputError, ModelError, SelectionError
from rtdetr_act.integrations.ultralytics.models import STOCK
from rtdetr_act.surgery.model_plan import is_model_yaml
from rtdetr_act.surgery.modules import evaluating, example_inputs, unwrap
from rtdetr_act.surgery.patcher import patch_model, unpatch_model
from rtdetr_act.surgery.plan import format_layers
from rtdetr_act.surgery.sites import Site, find_sites

# Each stage more multiplies the assignments by the number of activations; RT-DETR has five or six as it is.
MAX_STAGES = 6


@dataclass(frozen=True)
class Stage:
    """Layers that get one activation together.

    Attributes:
        name: Section and layers, such as "backbone 0-1" or "neck 10-27".
        layers: Indices of the Ultralytics layers.
        sites: Activation sites in them, those of the scope.
        choices: Activations of the search that can stand at all of these sites, in the order given.
    """

    name: str
    layers: tuple[int, ...]
    sites: int
    choices: tuple[str, ...] = ()


def find_stages(model: Any, activations: Sequence[str], *, scope: str = "conv") -> tuple[Stage, ...]:
    """Split a model into stages, and say which of some activations can stand in each.

    The backbone is split where the resolution changes, seen in one forward pass on zeros; the neck is a stage, and so
    is the head. Layers without a site of the scope (with "conv", the decoder of an RT-DETR) are in none. Of more than
    six stages, the neighbours in the backbone with the fewest sites are merged.

    Args:
        model: RTDETR or YOLO, or a task model; swaps in it are undone.
        activations: Names with arguments, as `registry.resolve` gives them, and "stock", which can stand anywhere.
        scope: "conv", or "all" for transformer sites too.

    Raises:
        InputError: In some stage, none of the activations can stand.
        ModelError: It is no Ultralytics model.
    """
    root = unwrap(model)
    if not is_model_yaml(getattr(root, "yaml", None)):
        raise ModelError("stages are found in Ultralytics models only")
    sites = [site for site in find_sites(root) if scope == "all" or site.layout == "map"]
    backbone = [found for layers in _split_backbone(root) if (found := _make_stage("backbone", layers, sites))]
    first, last = len(root.yaml["backbone"]), len(root.model) - 1  # type: ignore[index, arg-type]
    ends = (_make_stage("neck", range(first, last), sites), _make_stage("head", [last], sites))
    rest = [stage for stage in ends if stage]
    while len(backbone) > max(1, MAX_STAGES - len(rest)):
        at = min(range(len(backbone) - 1), key=lambda k: backbone[k].sites + backbone[k + 1].sites)
        merged = _make_stage("backbone", backbone[at].layers + backbone[at + 1].layers, sites)
        backbone[at : at + 2] = [merged] if merged else []
    return tuple(_find_choices(model, stage, activations, scope) for stage in [*backbone, *rest])


def _split_backbone(root: Any) -> list[list[int]]:
    """Return the layers of the backbone in groups of one resolution; a layer without a map is of the one before."""
    shapes: dict[int, torch.Size] = {}

    def note(number: int) -> Any:
        def hook(layer: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and out.ndim == 4:
                shapes[number] = out.shape[2:]

        return hook

    count = len(root.yaml["backbone"])
    handles = [layer.register_forward_hook(note(number)) for number, layer in enumerate(root.model[:count])]
    try:
        with evaluating(root), torch.no_grad(), torch.random.fork_rng(devices=[]):
            root(*(example_inputs(root, None) or ()))
    finally:
        for handle in handles:
            handle.remove()
    known: list[torch.Size | None] = []
    for number in range(count):
        known.append(shapes.get(number, known[-1] if known else None))
    return [list(group) for _, group in groupby(range(count), key=lambda number: known[number])]


def _make_stage(section: str, layers: Sequence[int], sites: Sequence[Site]) -> Stage | None:
    count = sum(site.layer in layers for site in sites)
    return Stage(f"{section} {format_layers(layers)}", tuple(layers), count) if count else None


def _find_choices(model: Any, stage: Stage, activations: Sequence[str], scope: str) -> Stage:
    """Try each activation there, by the patcher itself, which knows best."""
    choices, reason = [], ""
    for activation in activations:
        if activation != STOCK:
            try:
                patch_model(model, activation, layers=stage.layers, scope=scope)
            except SelectionError as error:
                reason = str(error)
                continue
            unpatch_model(model)
        choices.append(activation)
    if not choices:
        raise InputError(f"none of the activations can stand at the stage '{stage.name}': {reason}")
    return Stage(stage.name, stage.layers, stage.sites, tuple(choices))
