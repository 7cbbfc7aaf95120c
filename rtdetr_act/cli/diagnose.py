"""The command that measures what activations do inside a network: diagnose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.app import app
from rtdetr_act.cli.options import DEFAULT_DATA, DEFAULT_MODEL, ScopeOption
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.surgery.plan import check_scope

if TYPE_CHECKING:
    from rtdetr_act.analysis.diagnosis import Diagnosis


@app.command()
@no_downloads()
def diagnose(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]…", help="imgsz (default: that of the checkpoint's training), batch=4, device=cpu."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Model YAML or checkpoint, rtdetr-n.yaml if not given; repeatable, to compare checkpoints."
        ),
    ] = None,
    act: Annotated[
        list[str] | None,
        typer.Option("--act", help="Activation or plan to look at beside the stock model; repeatable."),
    ] = None,
    data: Annotated[str, typer.Option("--data", help="Data set YAML, or 'shapes', the embedded one.")] = DEFAULT_DATA,
    images: Annotated[int, typer.Option("--images", min=1, help="Labelled images to look at.")] = 16,
    scope: ScopeOption = "conv",
    sites: Annotated[bool, typer.Option("--sites", help="Print every site, not only a summary per section.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the CSV file and the figure.")] = Path(
        "runs/diagnosis"
    ),
) -> None:
    """Measure what activations do on real images: to gradients, dead units, scale, saturation and effective rank.

    Nothing is trained and no file of the model changes. A checkpoint is diagnosed as it is; with --act, from its
    weights, or those of a fresh model, with the stock activations first and each of the others beside them.
    """
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.integrations.ultralytics.models import STOCK
    from rtdetr_act.workflows.diagnose import diagnose_variants, title_of

    sources = model or [DEFAULT_MODEL]
    arguments = parse_arguments(pairs or [])
    if unknown := set(arguments) - {"imgsz", "batch", "device"}:
        raise InputError(f"diagnose takes imgsz, batch and device, not '{min(unknown)}'")
    if act and len(sources) > 1:
        raise InputError("--act compares activations in one --model: leave it out to compare several checkpoints")
    if scope != "conv" and not act:
        raise InputError("--scope says how an activation is swapped in: name one with --act")

    def show(diagnoses: Mapping[str, Diagnosis]) -> None:
        _print_diagnoses(title_of(sources, data), diagnoses, sites)

    _, files = diagnose_variants(
        sources,
        list(dict.fromkeys([STOCK, *act])) if act else [None],
        data,
        output,
        images=images,
        scope=check_scope(scope),
        show=show,
        **arguments,
    )
    for path in files:
        print(f"file: {path}")


def _print_diagnoses(title: str, diagnoses: Mapping[str, Diagnosis], sites: bool) -> None:
    from rtdetr_act.analysis.diagnosis_report import describe_gradients, print_sites, print_summary

    if sites:
        print_sites(title, diagnoses)
    else:
        print_summary(f"{title}: medians over the sites, means of shares", diagnoses)
    for sentence in describe_gradients(diagnoses):
        print(sentence)
    if left_out := list(dict.fromkeys(name for each in diagnoses.values() for name in each.left_out)):
        print(f"not seen: {', '.join(left_out)}")
