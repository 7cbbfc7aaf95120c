"""Convert a trained network to another activation, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rtdetr_act.errors import InputError
from rtdetr_act.surgery.calibrate import move_to_model
from rtdetr_act.surgery.modules import unwrap
from rtdetr_act.surgery.patcher import PatchReport, patch_model
from rtdetr_act.surgery.plan import Plan, Scope
from rtdetr_act.surgery.refit import refit


def convert(
    model: Any,
    activation: str | Plan,
    images: Tensor | Sequence[Tensor],
    *,
    keep: str | Sequence[str] | None = None,
    scope: Scope = "conv",
) -> PatchReport:
    """Swap the activations of a trained network and fit its weights to what it computed before, in place.

    It is `patch_model` with `init="match"`, followed by `refit`. The images need no labels.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images; trained.
        activation: A name with optional arguments, such as "relu", or a plan.
        images: (B, C, H, W), or a sequence of such batches; for Ultralytics models RGB in 0..1. Use 128 images.
        keep: Glob pattern(s) on qualified names of sites that stay as they are, such as "model.23.*". Default: None.
        scope: "conv" (default) for convolutional sites, "all" for transformer sites too.

    Returns:
        The report of the swap.

    Raises:
        InputError: There are no images.
        SpecError: The activation is unknown, or its arguments are invalid.
        SelectionError: No site is selected, or the activation does not support one of the sites.
        ModelError: The model is exported, wrapped or compiled.

    >>> from torch import nn, randn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    >>> convert(net, "relu", randn(16, 3, 16, 16)).sites
    ['1']
    """
    batches = [images] if isinstance(images, Tensor) else images
    if not len(batches) or not len(batches[0]):
        raise InputError("convert got no images: give at least one")
    report = patch_model(
        model,
        activation,
        exclude=keep,
        scope=scope,
        init="match",
        example_input=move_to_model(unwrap(model), batches[0][:1]),
    )
    refit(model, images)
    return report
