"""Diagnose variants of a model on the same labelled images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.analysis.diagnosis import Diagnosis, diagnose, preserve_random_state, seed_all
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.argument_ranges import move_to
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.images import load_batches, trained_side
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.integrations.ultralytics.shapes import SIDE


def diagnose_variants(
    sources: Sequence[str],
    activations: Sequence[str | None],
    data: str,
    *,
    images: int = 16,
    imgsz: int | None = None,
    batch: int = 4,
    device: str = "cpu",
    scope: str = "conv",
    seed: int = 0,
) -> dict[str, Diagnosis]:
    """Diagnose variants on the same images, without augmentation, from the same random state.

    Models built from a YAML are untrained: each variant starts from the same weights, with the classes of the data.

    Args:
        sources: Model YAMLs or checkpoints.
        activations: For each of them: plans, "stock", or None for the model as its file has it.
        data: Data set, as in Ultralytics; "shapes" for the embedded one.
        images: Labelled images, taken at equal distances from the validation split.
        imgsz: Side of the images; None for what a checkpoint was trained at, 640 for others (128 with "shapes").
        batch: Images at a time.
        device: "cpu", "cuda" or "cuda:1".
        scope: "conv" or "all".
        seed: Random state of the weights and of each batch.

    Returns:
        Diagnoses by the name of the variant, in the order given.

    Raises:
        RtdetrActError: A model, a plan, the data or the device is wrong.
    """
    found: dict[str, Diagnosis] = {}
    batches: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    for source in sources:
        for activation in activations:
            with preserve_random_state():
                seed_all(seed)
                name, model = load_variant(source, activation, scope=scope)
                known = known or check_data(resolve_data(data), str(model.task))
                _fit_classes(model, source, data, int(known["nc"]), seed)
            size = _usual_size(model, source, data) if imgsz is None else imgsz
            root = move_to(model.model, device)
            batches = batches or load_batches(model, known, images, size, batch, device)
            name = name if len(sources) == 1 else name_of(source)
            found[f"{name} {len(found) + 1}" if name in found else name] = diagnose(root, batches, seed=seed)
    return found


def name_of(source: str) -> str:
    """Return what tells a model from others: the run of a checkpoint `…/run/weights/best.pt`, else the file's name."""
    path = Path(source)
    return path.parts[-3] if len(path.parts) > 2 and path.parts[-2] == "weights" else path.stem


def _usual_size(model: Any, source: str, data: str) -> int:
    usual = SIDE if data in ("shapes", "shapes.yaml") else 640
    return trained_side(model, usual) if source.endswith(".pt") else usual


def _fit_classes(model: Any, source: str, data: str, count: int, seed: int) -> None:
    """Give an untrained model the classes of the data, as a training would; refuse a trained one that has fewer."""
    own = int(model.model.yaml["nc"])
    if source.endswith(".pt"):
        if count > own:
            raise InputError(f"'{source}' knows {own} classes, and '{data}' has {count}: give data like its own")
    elif count != own:
        seed_all(seed)
        model_yaml = {**copy.deepcopy(model.model.yaml), "nc": count}
        model.model = type(model.model)(model_yaml, ch=model_yaml.get("channels", 3), verbose=False)
