"""Commands that bring a trained checkpoint to its target: fold, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtdetr_act.cli.app import app
from rtdetr_act.cli.running import Data, Pairs, TargetOption, Weights, prepare, warn_for
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
    from rtdetr_act.integrations.ultralytics.export import export_model
    from rtdetr_act.integrations.ultralytics.failures import one_sentence

    model, arguments = prepare(weights, pairs, data)
    warn_for(model, target)
    form = str(arguments.pop("format", None) or "onnx")
    with one_sentence(**arguments):
        print(f"file: {export_model(model, form, int8=int8, fold=fold, **arguments)}")
