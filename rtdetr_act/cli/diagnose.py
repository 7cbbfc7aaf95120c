"""The command that measures what activations do inside a network: diagnose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import (
    Acts,
    Data,
    From,
    Models,
    Name,
    Output,
    Pairs,
    Project,
    ScopeOption,
    choose_folder,
    choose_model_and_data,
    split_variants,
)
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.surgery.plan import check_scope

if TYPE_CHECKING:
    from rtdetr_act.analysis.diagnosis import Diagnosis


@command("rtdetr-l.yaml act=arelu,dyrelu_b data=my.yaml imgsz=320", "a/best.pt b/best.pt data=my.yaml sites=True")
@no_downloads()
def diagnose(
    pairs: Pairs = None,
    model: Models = None,
    act: Acts = None,
    data: Data = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Labelled images to look at.")] = 16,
    replaces: From = None,
    scope: ScopeOption = "conv",
    sites: Annotated[bool, typer.Option("--sites", help="Print every site, not a summary per section.")] = False,
    output: Output = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Measure what activations do inside a network.

    On real images: gradients, dead units, scale, saturation and effective rank, site by site. Nothing is trained
    and no file of the model changes. A checkpoint is diagnosed as it is; with act=, from its weights, or those of a
    fresh model, the stock activations first. Takes imgsz=, batch=4 and device=cpu as well.
    """
    from rtdetr_act.integrations.ultralytics.models import STOCK
    from rtdetr_act.workflows.diagnose import diagnose_variants, title_of

    variants = split_variants(act, replaces)
    arguments = parse_pairs(pairs)
    if unknown := set(arguments) - {"imgsz", "batch", "device"}:
        raise InputError(f"diagnose takes imgsz, batch and device, not '{min(unknown)}'")
    if variants and len(model or []) > 1:
        raise InputError("act= compares activations in one model: leave it out to compare several checkpoints")
    if scope != "conv" and not variants:
        raise InputError("scope= says how an activation is swapped in: name one with act=")
    first, source = choose_model_and_data(model[0] if model else None, data)
    sources = model or [first]

    def show(diagnoses: Mapping[str, Diagnosis]) -> None:
        _print_diagnoses(title_of(sources, source), diagnoses, sites)

    _, files = diagnose_variants(
        sources,
        list(dict.fromkeys([STOCK, *variants])) if variants else [None],
        source,
        choose_folder("diagnose", output, project, name),
        images=images,
        scope=check_scope(scope),
        show=show,
        **arguments,
    )
    print_files(files)


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
