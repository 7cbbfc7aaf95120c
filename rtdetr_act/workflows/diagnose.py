"""Diagnose variants of a model on the same labelled images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.analysis.diagnosis import Diagnosis, diagnose, preserve_random_state, seed_all
from rtdetr_act.analysis.diagnosis_report import write_diagnosis
from rtdetr_act.errors import InputError
from rtdetr_act.files import output_folder
from rtdetr_act.integrations.ultralytics.arguments import move_to
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.images import load_batches, training_imgsz
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.integrations.ultralytics.shapes import SIDE
from rtdetr_act.surgery.plan import Scope


def diagnose_variants(
    sources: Sequence[str],
    activations: Sequence[str | None],
    data: str,
    output: Path,
    *,
    images: int = 16,
    imgsz: int | None = None,
    batch: int = 4,
    device: str = "cpu",
    scope: Scope = "conv",
    seed: int = 0,
    show: Callable[[Mapping[str, Diagnosis]], object] | None = None,
) -> tuple[dict[str, Diagnosis], list[Path]]:
    """Diagnose variants of models on the same images, without augmentation, from the same random state.

    Models built from a YAML are untrained: each variant starts from the same weights, with the classes of the data.
    All variants are loaded once before the first of them is diagnosed, so that a wrong plan is reported at once.

    Args:
        sources: Model YAMLs or checkpoints.
        activations: For each of them: plans, "stock", or None for the model as its file has it.
        data: Data set, as in Ultralytics; "shapes" for the embedded one.
        output: Folder for the CSV file and the figure, which is made if need be.
        images: Number of labelled images, taken at equal distances from the validation split.
        imgsz: Side of the images, in pixels; None (default) for the one that a checkpoint was trained with, and for
            other models 640 (128 with "shapes").
        batch: Images of a batch.
        device: "cpu", "cuda" or "cuda:1".
        scope: "conv" for convolutional sites, "all" for transformer sites too.
        seed: Seed of the weights and of each batch.
        show: Called with the diagnoses before they are written.

    Returns:
        The diagnoses by the name of the variant, in the order given, and the files written.

    Raises:
        RtdetrActError: A model, a plan, the data or the device is wrong, or the folder cannot be written to.
    """
    for source in sources:
        for activation in activations:
            load_variant(source, activation, scope=scope)
    diagnoses: dict[str, Diagnosis] = {}
    batches: list[dict[str, Any]] = []
    dataset: dict[str, Any] = {}
    with output_folder(output):  # which is not made in vain, nor found wrong after minutes
        for source in sources:
            for activation in activations:
                with preserve_random_state():
                    seed_all(seed)
                    name, model = load_variant(source, activation, scope=scope)
                    dataset = dataset or check_data(resolve_data(data), str(model.task))
                    _fit_classes(model, source, data, int(dataset["nc"]), seed)
                size = _default_imgsz(model, source, data) if imgsz is None else imgsz
                module = move_to(model.model, device)
                batches = batches or load_batches(model, dataset, images, size, batch, device)
                name = name if len(sources) == 1 else run_name(source)
                name = f"{name} {len(diagnoses) + 1}" if name in diagnoses else name
                diagnoses[name] = diagnose(module, batches, seed=seed)
        if show:
            show(diagnoses)
        return diagnoses, write_diagnosis(diagnoses, output, title_of(sources, data))


def title_of(sources: Sequence[str], data: str) -> str:
    """Return the title of a diagnosis.

    >>> title_of(["rtdetr-n.yaml"], "shapes"), title_of(["a.pt", "b.pt"], "sets/coco8.yaml")
    ('rtdetr-n on shapes', '2 models on coco8')
    """
    models = run_name(sources[0]) if len(sources) == 1 else f"{len(sources)} models"
    return f"{models} on {Path(data).stem}"


def run_name(source: str) -> str:
    """Return the name that tells a model from others: the run of a checkpoint `…/run/weights/best.pt`, else the stem.

    >>> run_name("runs/detect/rtdetr-n-arelu/weights/best.pt"), run_name("rtdetr-n.yaml")
    ('rtdetr-n-arelu', 'rtdetr-n')
    """
    path = Path(source)
    return path.parts[-3] if len(path.parts) > 2 and path.parts[-2] == "weights" else path.stem


def _default_imgsz(model: Any, source: str, data: str) -> int:
    default = SIDE if data in ("shapes", "shapes.yaml") else 640
    return training_imgsz(model, default) if source.endswith(".pt") else default


def _fit_classes(model: Any, source: str, data: str, count: int, seed: int) -> None:
    """Give an untrained model the classes of the data, as a training does; refuse a trained one that has fewer."""
    own = int(model.model.yaml["nc"])
    if source.endswith(".pt"):
        if count > own:
            raise InputError(f"'{source}' knows {own} classes, and '{data}' has {count}: give data like its own")
    elif count != own:
        seed_all(seed)
        model_yaml = {**copy.deepcopy(model.model.yaml), "nc": count}
        model.model = type(model.model)(model_yaml, ch=model_yaml.get("channels", 3), verbose=False)
