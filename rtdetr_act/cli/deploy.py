"""Commands that prepare a trained checkpoint for deployment: fold, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtdetr_act.cli.app import app
from rtdetr_act.cli.options import Data, Pairs, TargetOption, Weights
from rtdetr_act.cli.printing import print_warning
from rtdetr_act.integrations.ultralytics.downloads import no_downloads


@app.command()
@no_downloads()
def fold(
    weights: Weights,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Checkpoint to write; best.pt becomes best-folded.pt beside it."),
    ] = None,
) -> None:
    """Write a checkpoint that computes the same with torch's own activations: AReLU becomes LeakyReLU, for free."""
    from rtdetr_act.workflows.fold import fold_checkpoint

    report, path = fold_checkpoint(weights, output)
    print(report)
    print(f"file: {path}")


@app.command()
def export(
    weights: Weights,
    pairs: Pairs = None,
    data: Data = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits, calibrated on the data.")] = False,
    fold: Annotated[bool, typer.Option(help="Fold the activations into the weights first.")] = True,
    target: TargetOption = None,
) -> None:
    """Export a checkpoint, folded: format=onnx (default), openvino, torchscript, ncnn and the others of Ultralytics."""
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.workflows.export import export_checkpoint

    arguments = parse_arguments(pairs or [], reserved=("model", "task", "mode", "resume", "data"))
    export_format = str(arguments.pop("format", None) or "onnx")
    path = export_checkpoint(
        weights, export_format, data, arguments, int8=int8, fold=fold, target=target, warn=print_warning
    )
    print(f"file: {path}")
