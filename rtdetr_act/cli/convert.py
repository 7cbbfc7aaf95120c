"""Command that converts a trained checkpoint to another activation."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import Acts, Data, Model, Output, Pairs, ScopeOption, TargetOption, require, split_variants
from rtdetr_act.cli.printing import print_next
from rtdetr_act.errors import InputError
from rtdetr_act.surgery.plan import check_scope


def split_words(values: list[str] | None) -> list[str]:
    """Return the words of an option that is given several times, or joined by commas."""
    return [word.strip() for value in values or [] for word in value.split(",") if word.strip()]


@command("best.pt act=relu data=my.yaml for=rknn", "best.pt act=relu,relu6,hardswish int8=True dry_run=True")
def convert(
    pairs: Pairs = None,
    model: Model = None,
    act: Acts = None,
    data: Data = None,
    target: TargetOption = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Sites that stay: head, 22-23, or 'model.23.*'.")
    ] = None,
    scope: ScopeOption = "conv",
    epochs: Annotated[int, typer.Option("--epochs", help="Training where the loss exceeds bound=; 0 for none.")] = 3,
    bound: Annotated[float, typer.Option("--bound", help="Loss of the score that needs no training: 0.01.")] = 0.01,
    export_format: Annotated[str, typer.Option("--format", help="onnx, openvino, …; several, or none.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits, too.")] = False,
    images: Annotated[int, typer.Option("--images", help="Training images for the fit.")] = 128,
    output: Output = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes.")] = False,
) -> None:
    """Convert a trained checkpoint to another activation, without training or with little of it.

    The activations are swapped, the network is fitted to what it computed before, and trained for epochs= only if it
    loses more than bound=. The best of several act= is folded, exported, quantised and measured. An interrupted
    conversion goes on with the same command. The folder has the checkpoint, the exported files and a report.
    """
    weights = require(model, "convert needs a checkpoint", "rtdetr-act convert best.pt act=relu data=my.yaml")
    variants = split_variants(act)
    if not variants:
        raise InputError("convert needs an activation: rtdetr-act convert best.pt act=relu")
    formats = [] if export_format in ("none", "None", "") else [name.strip() for name in export_format.split(",")]
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume", "project", "name", "exist_ok"))
    options: dict[str, Any] = {
        "keep": split_words(keep), "scope": check_scope(scope), "target": target, "bound": bound, "epochs": epochs,
        "formats": formats, "int8": int8, "images": images, "arguments": arguments,
    }  # fmt: skip
    if dry_run:
        from rtdetr_act.workflows.conversion_estimate import estimate_conversion

        print(estimate_conversion(weights, variants, data, **options))
        return
    from rtdetr_act.workflows.conversion_report import summarise_conversion
    from rtdetr_act.workflows.convert import convert_checkpoint

    conversion = convert_checkpoint(
        weights, variants, data, output, **options, show=lambda text: print(text, flush=True)
    )
    print(" ".join(summarise_conversion(conversion)))
    checkpoint = conversion.folder / next(each.path for each in conversion.files if each.path)
    print(f"files: {conversion.folder}")
    print_next(f"train {checkpoint} data={data or '…'}")
