"""Commands that prepare a trained checkpoint for deployment: fold, export."""

from __future__ import annotations

from typing import Annotated

import typer

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import Data, Model, OutputFile, Pairs, TargetOption, require
from rtdetr_act.cli.printing import print_files, print_warning
from rtdetr_act.integrations.ultralytics.downloads import no_downloads


@command("best.pt", "model=best.pt -o deployed.pt")
@no_downloads()
def fold(model: Model = None, output: OutputFile = None) -> None:
    """Fold activations into the weights.

    The checkpoint written computes the same with torch's own activations: AReLU becomes LeakyReLU, for free.
    best.pt becomes best-folded.pt beside it, with a number if that exists.
    """
    from rtdetr_act.workflows.fold import fold_checkpoint

    weights = require(model, "fold needs a checkpoint", "rtdetr-act fold best.pt")
    report, path = fold_checkpoint(weights, output)
    print(report)
    print_files([path], f"export {path} format=onnx")


@command("best.pt format=onnx imgsz=640", "best.pt format=openvino int8=True data=my.yaml for=openvino")
def export(
    pairs: Pairs = None,
    model: Model = None,
    export_format: Annotated[
        str, typer.Option("--format", help="onnx, openvino, torchscript, ncnn, engine, …")
    ] = "onnx",
    data: Data = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits, calibrated on the data.")] = False,
    fold: Annotated[bool, typer.Option("--fold/--no-fold", help="Fold the activations into the weights first.")] = True,
    target: TargetOption = None,
) -> None:
    """Export a checkpoint.

    Its activations are folded into the weights first, and the file is written beside it. With for=, the operators of an
    ONNX file are listed with what the target runs natively.
    """
    from rtdetr_act.deploy.operators import format_operators, list_operators, summarise_operators
    from rtdetr_act.workflows.export import export_checkpoint

    weights = require(model, "export needs a checkpoint", "rtdetr-act export best.pt format=onnx")
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume"))
    path = export_checkpoint(
        weights, export_format, data, arguments, int8=int8, fold=fold, target=target, warn=print_warning
    )
    if target is not None and path.suffix == ".onnx":
        operators = list_operators(path, target)
        print(format_operators(operators))
        print(summarise_operators(operators, target))
    print_files([path], f"bench {weights} format={export_format}")
