"""Measure what activations cost, in training and where they are deployed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.files import output_folder
from rtdetr_act.integrations.ultralytics.costs import Cost, compare_costs, write_costs
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.latency import TORCH, Latency, measure_latencies, write_latencies
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variant, load_variants
from rtdetr_act.spec import as_list
from rtdetr_act.surgery.plan import Scope


def bench_training(
    source: str | Path,
    activations: str | Sequence[str],
    output: str | Path,
    *,
    imgsz: int = 224,
    batch: int = 8,
    device: str = "cpu",
    rounds: int = 15,
    scope: Scope = "conv",
    show: Callable[[Sequence[Cost]], object] | None = None,
    fits: float | None = None,
) -> tuple[list[Cost], list[Path]]:
    """Measure training steps, inference and memory of variants of a model against its stock form.

    Args:
        source: Model YAML or checkpoint.
        activations: One plan or several, as `patch_model` takes them.
        output: Folder for `<model>.json` and the chart `<model>.png`, which is made if need be.
        imgsz: Side of the random images, in pixels.
        batch: Images of a training step; inference takes one.
        device: "cpu", "cuda" or "cuda:1".
        rounds: Measurements of the training step that count, per variant; inference takes twice as many.
        scope: "conv" for convolutional sites, "all" for transformer sites too.
        show: Called with the costs before they are written.
        fits: Memory of a device in GiB, for which the largest batch of each variant is estimated, trained in float32
            by AdamW with Ultralytics' moving average of the weights. The memory of the CUDA context, cuDNN's
            workspaces and fragmentation come on top. Default: None, no estimate.

    Returns:
        The costs, those of the stock model first, and the files written.

    Raises:
        RtdetrActError: The model, a plan, the device or `fits` is wrong, or the folder cannot be written to.
    """
    models = load_variants(source, [STOCK, *as_list(activations)], scope=scope)
    name, folder = Path(source).stem, Path(output)
    with output_folder(folder):  # which is not made in vain, nor found wrong after minutes
        costs = compare_costs(models, imgsz=imgsz, batch=batch, device=device, rounds=rounds, fits=fits)
        if show:
            show(costs)
        return costs, write_costs({name: costs}, folder, name)


def bench_exports(
    sources: str | Path | Sequence[str | Path],
    activations: str | Sequence[str | None] | None,
    formats: str | Sequence[str],
    output: str | Path,
    *,
    imgsz: int = 224,
    int8: bool = False,
    data: str | Path | None = None,
    rounds: int = 100,
    scope: Scope = "conv",
    show: Callable[[Sequence[Latency]], object] | None = None,
) -> tuple[list[Latency], list[Path]]:
    """Export variants of models, and measure the latency, size and scores of the files on the CPU.

    Args:
        sources: One model YAML or checkpoint, or several.
        activations: For each of them one or several: plans, "stock", or None for the model as its file has it.
        formats: One format to export to or several, of "onnx", "openvino", "torchscript" and "ncnn". "torch" is always
            measured.
        output: Folder for `formats.json`, with `data` the chart `formats.png`, and the exported files.
        imgsz: Side of the image, in pixels.
        int8: Also quantize to 8 bits, where the format can, calibrated on `data`.
        data: Data set to score every file on; None (default) for no scores.
        rounds: Measurements that count, per file.
        scope: "conv" for convolutional sites, "all" for transformer sites too.
        show: Called with the latencies before they are written.

    Returns:
        One latency per format and variant, in that order, and the files written.

    Raises:
        RtdetrActError: A model, a plan, a format or the data is wrong, or the folder cannot be written to.
    """
    models: dict[str, Any] = {}
    files, folder = as_list(sources), Path(output)
    for source in files:
        for activation in as_list(activations):
            name, model = load_variant(source, activation, scope=scope)
            name = name if len(files) == 1 or not activation else f"{Path(source).stem} {name}"
            models[f"{name} {len(models) + 1}" if name in models else name] = model
    if data is not None:  # before minutes of exporting
        data = resolve_data(data)
        for task in {str(model.task) for model in models.values()}:
            check_data(data, task)
    exported = [name for name in as_list(formats) if name != TORCH]
    latencies = measure_latencies(models, exported, folder, imgsz=imgsz, rounds=rounds, int8=int8, data=data)
    if show:
        show(latencies)
    return latencies, write_latencies(latencies, folder, "formats")
