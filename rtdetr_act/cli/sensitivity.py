"""The command that measures which sites of a checkpoint a swap costs most: sensitivity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import (
    Act,
    Data,
    From,
    Model,
    Name,
    Output,
    Pairs,
    Project,
    ScopeOption,
    choose_folder,
    require,
    split_variants,
)
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.surgery.plan import check_scope

if TYPE_CHECKING:
    from rtdetr_act.analysis.sensitivity import Sensitivity


@command("best.pt act=relu data=my.yaml", "best.pt act=relu6 bound=0 most=0.25 -o sensitivity")
@no_downloads()
def sensitivity(
    pairs: Pairs = None,
    model: Model = None,
    act: Act = None,
    data: Data = None,
    images: Annotated[int, typer.Option("--images", min=2, help="Labelled images to measure on.")] = 128,
    bound: Annotated[float, typer.Option("--bound", help="Relative rise of the loss that is allowed.")] = 0.01,
    most: Annotated[float, typer.Option("--most", help="Largest share of the sites to keep.")] = 0.25,
    replaces: From = None,
    scope: ScopeOption = "conv",
    output: Output = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Measure what swapping each site costs.

    Each site and each layer alone gets the activation, the network is refitted, and its loss on validation images is
    compared. Then the fewest sites are kept, those that change the loss most first, with which the whole swap is within
    bound=. The plan is chosen on half of the images and scored on the others. Takes imgsz=, batch=4 and device=cpu as
    well.
    """
    from rich.console import Console

    from rtdetr_act.analysis.sensitivity_report import print_sensitivity
    from rtdetr_act.workflows.sensitivity import measure_checkpoint_sensitivity

    example = "rtdetr-act sensitivity best.pt act=relu data=my.yaml"
    weights = require(model, "sensitivity needs a checkpoint", example)
    variants = split_variants([require(act, "sensitivity needs an activation", example)], replaces)
    if len(variants) > 1:
        raise InputError(f"sensitivity takes one activation or plan, not {len(variants)}")
    arguments = parse_pairs(pairs)
    if unknown := set(arguments) - {"imgsz", "batch", "device"}:
        raise InputError(f"sensitivity takes imgsz, batch and device, not '{min(unknown)}'")
    console = Console(stderr=True)
    with console.status("loading") as status:

        def show(title: str, found: Sensitivity) -> None:
            status.stop()
            print_sensitivity(title, found)

        _, files = measure_checkpoint_sensitivity(
            weights,
            variants[0],
            data,
            choose_folder("sensitivity", output, project, name),
            images=images,
            bound=bound,
            most=most,
            scope=check_scope(scope),
            show=show,
            show_progress=status.update,
            **arguments,
        )
    print_files(files)
