"""Diagnose a model, or variants of models on the same labelled images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.analysis.diagnosis import Diagnosis, Loss, diagnose_batches, preserve_random_state, seed_all
from rtdetr_act.analysis.diagnosis_report import write_diagnosis
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import output_folder
from rtdetr_act.integrations.ultralytics.arguments import move_to
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.images import load_batches, training_imgsz
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.integrations.ultralytics.run_folders import name_checkpoints
from rtdetr_act.integrations.ultralytics.shapes import SIDE
from rtdetr_act.spec import as_list
from rtdetr_act.surgery.modules import unwrap
from rtdetr_act.surgery.plan import Scope


def diagnose(
    model: Any,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    example_input: Any = None,
    seed: int = 0,
    data: str | Path | None = None,
    images: int = 16,
    imgsz: int | None = None,
    batch: int = 4,
) -> Diagnosis:
    """Measure gradients and features at every activation of a model, on real batches in training mode.

    The measurement runs in a copy of the model: weights, gradients, modes, BatchNorm statistics, in-place flags and
    the random state are left unchanged. It takes the memory of forward and backward pass of one batch, and of a copy
    of the weights.

    Args:
        model: RTDETR, YOLO, a task model or any module.
        batches: Batches in the form that `loss` takes; for an Ultralytics model, those of its data loaders with images
            scaled to [0, 1]. Default: None, batches of `data`.
        loss: Function of (model, batch) that returns a scalar tensor; it must call the model it is given. Default: the
            training loss of an Ultralytics model.
        example_input: Input with which to call a model other than Ultralytics', to find channels and layouts.
        seed: Seed of the first batch; each following batch has the next integer.
        data: For an RTDETR or YOLO object in place of `batches`: a data set as in Ultralytics, or "shapes". Its
            validation images are loaded without augmentation. Default: None.
        images: Number of labelled images of `data`, taken at equal distances. Default: 16.
        imgsz: Side of these images, in pixels. Default: None, the size that the model was trained with, and for an
            untrained one 640 (128 with "shapes").
        batch: Images of a batch. Default: 4.

    Returns:
        The measurements of each site, averaged over the batches.

    Raises:
        ModelError: The model is exported, wrapped or compiled, has no activation site, or cannot be copied.
        InputError: There is no batch, `data` cannot be used with the model, or the loss is not a scalar or does not
            depend on the model given.
        TrainingError: The loss is not finite.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> diagnose(net, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())
    <Diagnosis: 1 site on 1 batch>
    """
    if batches is not None and data is not None:
        raise InputError("batches and data= are two sources of images: give either")
    if data is not None:
        batches = _load_batches_for(model, data, images, imgsz, batch)
    if batches is None:
        raise InputError("diagnose needs images: give data=, such as data='coco8.yaml', or batches")
    return diagnose_batches(model, batches, loss, example_input=example_input, seed=seed)


def _load_batches_for(model: Any, data: str | Path, images: int, imgsz: int | None, batch: int) -> list[dict[str, Any]]:
    """Return batches of a data set for an RTDETR or YOLO object, on its device; the random state is restored."""
    module = unwrap(model)
    if module is model:
        raise InputError(
            f"data= is for RTDETR and YOLO objects, which know their task, not for a {type(model).__name__}: give "
            "batches"
        )
    dataset = check_data(resolve_data(data), str(model.task))
    own, count = int(module.yaml["nc"]), int(dataset["nc"])  # type: ignore[index]
    if count > own:
        raise InputError(f"{quote(str(data))} has {count} classes, and the model only {own}: give data like its own")
    size = training_imgsz(model, _default_imgsz(data)) if imgsz is None else imgsz
    with preserve_random_state():
        return load_batches(model, dataset, images, size, batch, str(next(module.parameters()).device))


def diagnose_variants(
    sources: str | Path | Sequence[str | Path],
    activations: str | Sequence[str | None] | None,
    data: str | Path,
    output: str | Path,
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
        sources: One model YAML or checkpoint, or several.
        activations: For each of them one or several: plans, "stock", or None for the model as its file has it.
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
    files, plans, folder = list(map(str, as_list(sources))), as_list(activations), Path(output)
    for source in files:
        for activation in plans:
            load_variant(source, activation, scope=scope)
    diagnoses: dict[str, Diagnosis] = {}
    batches: list[dict[str, Any]] = []
    dataset: dict[str, Any] = {}
    with output_folder(folder):  # which is not made in vain, nor found wrong after minutes
        for source in files:
            for activation in plans:
                with preserve_random_state():
                    seed_all(seed)
                    name, model = load_variant(source, activation, scope=scope)
                    dataset = dataset or check_data(resolve_data(data), str(model.task))
                    _fit_classes(model, source, str(data), int(dataset["nc"]), seed)
                default = _default_imgsz(data)
                trained = training_imgsz(model, default) if source.endswith(".pt") else default
                size = trained if imgsz is None else imgsz
                module = move_to(model.model, device)
                batches = batches or load_batches(model, dataset, images, size, batch, device)
                name = name if len(files) == 1 else name_checkpoints([Path(source)])[0]
                name = f"{name} {len(diagnoses) + 1}" if name in diagnoses else name
                diagnoses[name] = diagnose_batches(module, batches, seed=seed)
        if show:
            show(diagnoses)
        return diagnoses, write_diagnosis(diagnoses, folder, title_of(files, str(data)))


def title_of(sources: Sequence[str], data: str) -> str:
    """Return the title of a diagnosis.

    >>> title_of(["rtdetr-n.yaml"], "shapes"), title_of(["a.pt", "b.pt"], "sets/coco8.yaml")
    ('rtdetr-n on shapes', '2 models on coco8')
    """
    models = name_checkpoints([Path(sources[0])])[0] if len(sources) == 1 else f"{len(sources)} models"
    return f"{models} on {Path(data).stem}"


def _default_imgsz(data: str | Path) -> int:
    """Return the side of the images that an untrained model is diagnosed on."""
    return SIDE if str(data) in ("shapes", "shapes.yaml") else 640


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
