"""Stages of a model, each of which has one activation in a search."""

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
from rtdetr_act.surgery.modules import evaluation_mode, get_example_inputs, unwrap
from rtdetr_act.surgery.patcher import patch_model, unpatch_model
from rtdetr_act.surgery.plan import Scope, format_layers
from rtdetr_act.surgery.sites import Site, find_sites

# Each further stage multiplies the assignments by the number of activations; RT-DETR has five or six stages.
MAX_STAGES = 6


@dataclass(frozen=True)
class Stage:
    """Group of layers that have the same activation in a search.

    Attributes:
        name: Section and layers, such as "backbone 0-1" or "neck 10-27".
        layers: Indices of the Ultralytics layers.
        sites: Number of activation sites of the scope in these layers.
        choices: Activations of the search that all of these sites support, in the given order.
    """

    name: str
    layers: tuple[int, ...]
    sites: int
    choices: tuple[str, ...] = ()


def find_stages(model: Any, activations: Sequence[str], *, scope: Scope = "conv") -> tuple[Stage, ...]:
    """Return the stages of a model, with the activations that each supports.

    The backbone is split where the resolution of the feature maps changes, observed in one forward pass on zeros. The
    neck is one stage, and the head another. Layers without a site of the scope, such as the decoder of RT-DETR with
    "conv", belong to no stage. If there are more than six stages, neighbours in the backbone with the fewest sites are
    merged.

    Args:
        model: RTDETR, YOLO or a task model; swaps in it are undone.
        activations: Names with arguments as `registry.resolve` returns them, and "stock", which every site supports.
        scope: "conv" for convolutional sites, "all" for transformer sites too.

    Raises:
        InputError: A stage supports none of the activations.
        ModelError: The model is not an Ultralytics model.
    """
    root = unwrap(model)
    if not is_model_yaml(getattr(root, "yaml", None)):
        raise ModelError("only Ultralytics models have stages")
    sites = [site for site in find_sites(root) if scope == "all" or site.layout == "map"]
    backbone = [stage for layers in _split_backbone(root) if (stage := _make_stage("backbone", layers, sites))]
    first, last = len(root.yaml["backbone"]), len(root.model) - 1  # type: ignore[index, arg-type]
    ends = (_make_stage("neck", range(first, last), sites), _make_stage("head", [last], sites))
    rest = [stage for stage in ends if stage]
    while len(backbone) > max(1, MAX_STAGES - len(rest)):
        at = min(range(len(backbone) - 1), key=lambda k: backbone[k].sites + backbone[k + 1].sites)
        merged = _make_stage("backbone", backbone[at].layers + backbone[at + 1].layers, sites)
        backbone[at : at + 2] = [merged] if merged else []
    return tuple(_find_choices(model, stage, activations, scope) for stage in [*backbone, *rest])


def _split_backbone(root: Any) -> list[list[int]]:
    """Return the layers of the backbone grouped by resolution; a layer without a map belongs to the previous group."""
    shapes: dict[int, torch.Size] = {}

    def record_shape(number: int) -> Any:
        def hook(layer: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and out.ndim == 4:
                shapes[number] = out.shape[2:]

        return hook

    count = len(root.yaml["backbone"])
    handles = [layer.register_forward_hook(record_shape(number)) for number, layer in enumerate(root.model[:count])]
    try:
        with evaluation_mode(root), torch.no_grad(), torch.random.fork_rng(devices=[]):
            root(*(get_example_inputs(root, None) or ()))
    finally:
        for handle in handles:
            handle.remove()
    known: list[torch.Size | None] = []
    for number in range(count):
        known.append(shapes.get(number, known[-1] if known else None))
    return [list(group) for _, group in groupby(range(count), key=lambda number: known[number])]


def _make_stage(section: str, layers: Sequence[int], sites: Sequence[Site]) -> Stage | None:
    """Return a stage of some layers, its choices still empty, or None if the layers have no site."""
    count = sum(site.layer in layers for site in sites)
    return Stage(f"{section} {format_layers(layers)}", tuple(layers), count) if count else None


def _find_choices(model: Any, stage: Stage, activations: Sequence[str], scope: Scope) -> Stage:
    """Return a stage with the activations that the patcher accepts there."""
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
        raise InputError(f"the stage '{stage.name}' supports none of the activations: {reason}")
    return Stage(stage.name, stage.layers, stage.sites, tuple(choices))
