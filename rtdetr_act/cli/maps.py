"""The command that draws feature maps of trained models side by side: maps."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.completion import complete_model
from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Dpi, Name, OutputFile, Project, open_file, require
from rtdetr_act.cli.printing import print_files
from rtdetr_act.integrations.ultralytics.downloads import no_downloads

if TYPE_CHECKING:
    from rtdetr_act.analysis.feature_maps import ValueSummary
    from rtdetr_act.workflows.maps import FeatureMaps


@command(
    "a/best.pt b/best.pt image=photo.jpg layers=2,4 -o maps.pdf",
    "best.pt image=photo.jpg include='*.cv2.act' channels=16",
)
@no_downloads()
def maps(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Checkpoints; or the first words.", autocompletion=complete_model),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="The image.")] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers such as 2,4; the last activation of each.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Sites, such as '*.cv2.act'; all that match.")
    ] = None,
    channels: Annotated[int, typer.Option("--channels", min=1, help="Maps of each model at each site.")] = 8,
    imgsz: Annotated[int | None, typer.Option("--imgsz", min=1, help="Side of the image.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")] = "cpu",
    dpi: Dpi = 150,
    output: OutputFile = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Compare feature maps of an image before and after activations.

    Those of trained models, side by side, with histograms and the shares of zeros and of negative values. Each model
    shows the channels whose output varies most over the image. Without layers= and include=, three layers of the
    backbone are drawn. The figure is runs/maps/maps.png if -o does not name a PNG, SVG or PDF.
    """
    from rtdetr_act.workflows.maps import compare_feature_maps

    example = "rtdetr-act maps stock/best.pt arelu/best.pt image=photo.jpg"
    require("".join(model or []), "maps needs a checkpoint", example)
    photo = require(str(image or ""), "maps needs an image", example)
    patterns = [part.strip() for each in include or [] for part in each.split(",")]
    with open_file("maps", "maps.png", output, project, name) as path:
        compare_feature_maps(
            model or [],
            photo,
            path,
            layers=layers,
            include=patterns or None,
            channels=channels,
            imgsz=imgsz,
            device=device,
            dpi=dpi,
            show=_print_maps,
        )
        print_files([path])


def _print_maps(found: FeatureMaps) -> None:
    from rich.table import Table

    from rtdetr_act.tables import print_wide_table

    table = Table(title=f"{found.image} at {found.width} x {found.height} pixels, before and after activations")
    for title in ("site", "model", "activation"):
        table.add_column(title, overflow="fold")
    table.add_column("values")
    for title in ("mean", "std", "min", "max", "zeros", "negative", "dead channels"):
        table.add_column(title, justify="right")
    for _, rows in groupby(found.sites, key=lambda each: each.site):
        for each in rows:
            table.add_row(each.site, each.model, each.activation, "before", *_format_values(each.before))
            table.add_row("", "", "", "after", *_format_values(each.after), f"{each.dead:.1%}")
        table.add_section()
    print_wide_table(table)
    if found.left_out:
        print(f"not seen: {', '.join(found.left_out)}")


def _format_values(values: ValueSummary) -> list[str]:
    numbers = (values.mean, values.std, values.minimum, values.maximum)
    return [*(f"{number:.3g}" for number in numbers), f"{values.zeros:.1%}", f"{values.negative:.1%}"]
