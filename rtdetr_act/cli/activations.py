"""Commands that show activations on their own: acts, plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_act.cli.completion import complete_act, complete_target
from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Dpi, Name, OutputFile, Project, open_file
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError, quote
from rtdetr_act.formatting import UNKNOWN, format_count, format_number, join_words
from rtdetr_act.tables import align_columns

if TYPE_CHECKING:
    from rtdetr_act.workflows.activations import ActivationListing, ListedActivation


@command("", "learnable=True for=rknn")
def acts(
    target: Annotated[
        str | None,
        typer.Option("--for", help="Those that rknn, hailo, edgetpu, … runs natively.", autocompletion=complete_target),
    ] = None,
    learnable: Annotated[
        bool | None, typer.Option("--learnable/--no-learnable", help="Those with parameters; False: without.")
    ] = None,
    maps: Annotated[
        bool | None, typer.Option("--maps/--no-maps", help="Those for feature maps only; False: for tokens too.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", help="Those with all these words in name, formula, source, …")
    ] = None,
) -> None:
    """List the activations that pass all filters.

    Each with what it starts as, its parameters, its cost in training and inference, what it folds to, the formats that
    it can be exported to, its formula, and its source. Exit code 1 if there is none.
    """
    from rtdetr_act.workflows.activations import list_activations

    listing = list_activations(target or None, learnable=learnable, maps=maps, search=search or None)
    if not listing.activations:
        print(f"no activation {_describe_filters(learnable, maps, search)}")
        raise typer.Exit(1)
    shown = [each for each in listing.activations if each.native is not False]
    if shown:
        _print_activations(shown)
    if listing.target:
        _print_target(listing)


def _describe_filters(learnable: bool | None, maps: bool | None, search: str | None) -> str:
    """Return the filters as the end of a sentence about activations."""
    parts = []
    if learnable is not None:
        parts.append("has parameters" if learnable else "has no parameters")
    if maps is not None:
        parts.append("stands on feature maps only" if maps else "stands on tokens too")
    if search is not None:
        parts.append(f"has {join_words([quote(word) for word in search.split()])} in its name or description")
    return join_words(parts)


_COLUMNS = ("", "parameters", "training", "inference", "tokens", "folds to", "exports to")


def _print_activations(activations: Sequence[ListedActivation]) -> None:
    """Print a line of figures for each activation, and below it its formula, its start and its source."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    header, *lines = align_columns([_COLUMNS, *map(_make_row, activations)])
    console.print(Text(header, style="underline"))
    for each, line in zip(activations, lines, strict=True):
        console.print(Text(line, style="bold"))
        for text in _describe(each):
            console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
    console.print()
    for text in _explain(activations):
        console.print(Text(text))


def _make_row(activation: ListedActivation) -> list[str]:
    """Return the cells of an activation, numbers aligned to the right."""
    total, measured = activation.parameters_rtdetr_l, activation.measured
    numbers = (
        UNKNOWN if total is None else f"{total:,}",
        format_number(measured.train if measured else None, "{:.2f}"),
        format_number(measured.inference if measured else None, "{:.2f}"),
    )
    return [
        activation.name,
        *(number.rjust(len(title)) for number, title in zip(numbers, _COLUMNS[1:], strict=False)),
        "yes" if activation.tokens else "no",
        activation.folds_to or ("sometimes" if activation.folds == "sometimes" else "nothing"),
        _describe_exports(measured.exports) if measured else "not measured",
    ]


def _describe_exports(exports: Mapping[str, str]) -> str:
    """Return which formats hold an activation, as a cell."""
    from rtdetr_act.analysis.measured import list_working

    working = list_working(exports)
    if len(working) == len(exports):
        return "all" if exports else "not measured"
    return join_words(working) or "none"


def _describe(activation: ListedActivation) -> Iterator[str]:
    """Yield the lines of text about an activation."""
    from rtdetr_act.analysis.measured import list_inaccurate

    if activation.formula:
        yield activation.formula
    start = f"start: {activation.start}; " if activation.start not in ("", "fixed") else ""
    yield f"{start}{_describe_size(activation)}{activation.paper and '; ' + activation.paper}"
    if activation.note:
        yield f"not meant for training: {activation.note}"
    if activation.native:
        condition = activation.native_condition and f": {activation.native_condition}"
        yield f"native{condition} ({activation.native_source})"
    exports = activation.measured.exports if activation.measured else {}
    if off := list_inaccurate(exports):
        yield f"exported files differ from torch: {', '.join(f'{form} by {exports[form]}' for form in off)}"


def _describe_size(activation: ListedActivation) -> str:
    """Return the number of parameters of an activation at a site, in words."""
    few, many = activation.parameters_64, activation.parameters_256
    if few is None or many is None:
        return "no parameters but its arguments"
    if few == many:
        return f"{format_count(few, 'parameter')} a site" if few else "no parameters"
    return f"{few:,} parameters a site of 64 channels, {many:,} of 256"


def _explain(activations: Sequence[ListedActivation]) -> Iterator[str]:
    """Yield what the columns mean."""
    yield "parameters: at all convolutional sites of rtdetr-l"
    machines = {each.measured.machine: None for each in activations if each.measured}
    measured = "; ".join(machines) or "not measured"
    yield f"training, inference: time of the activation alone, in units of SiLU ({measured})"
    yield "tokens: whether it can stand at transformer sites too"
    yield "folds to: what it is deployed as; sometimes: where its parameters or arguments make it one of torch's"
    yield "exports to: torchscript, onnx, openvino, ncnn, tried on yolo11n; no RT-DETR can be exported to ncnn"


def _print_target(listing: ActivationListing) -> None:
    """Print what the target does not run, and what becomes of it."""
    from rtdetr_act.deploy.targets import get_target

    target = get_target(str(listing.target))
    others = [each.name for each in listing.activations if not each.native]
    print(f"native on {listing.target}: {target.title}")
    print(f"not native: {', '.join(others) or 'none'}")
    for sentence in filter(None, (target.otherwise, target.caveat)):
        print(sentence)


@command("silu 'leaky_relu(0.1)' dyrelu_b xlim=-6,6 -o curves.pdf", "best.pt dpi=300")
def plot(
    act: Annotated[
        list[str] | None,
        typer.Argument(metavar="ACTIVATION… | CHECKPOINT", autocompletion=complete_act, show_default=False),
    ] = None,
    xlim: Annotated[str | None, typer.Option("--xlim", help="Lowest and highest x; -4,4 if not given.")] = None,
    ylim: Annotated[str | None, typer.Option("--ylim", help="Lowest and highest f(x) that is shown.")] = None,
    dpi: Dpi = 150,
    output: OutputFile = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Draw activations and their gradients.

    They are drawn at their initial parameters, dynamic ones as a band over inputs; those of a checkpoint as they were
    trained, a line per site, coloured by depth. The figure is a PNG, SVG or PDF file; runs/plot/curves.png if -o does
    not name one.
    """
    if not act:
        raise InputError("plot needs activations or a checkpoint: rtdetr-act plot arelu silu")
    checkpoints = [word for word in act if word.endswith(".pt")]
    if checkpoints and len(act) > 1:
        raise InputError(f"plot draws activations, or one checkpoint alone: rtdetr-act plot {checkpoints[0]}")
    shown: dict[str, Any] = {"xlim": _parse_limits("xlim", xlim), "ylim": _parse_limits("ylim", ylim), "dpi": dpi}
    with open_file("plot", "curves.png", output, project, name) as path:
        if checkpoints:
            from rtdetr_act.integrations.ultralytics.downloads import no_downloads
            from rtdetr_act.workflows.curves import plot_checkpoint

            with no_downloads():
                plot_checkpoint(checkpoints[0], path, **shown)
        else:
            from rtdetr_act.analysis.curves import plot_activations

            plot_activations(act, path, **shown)
        print_files([path])


def _parse_limits(key: str, text: str | None) -> tuple[float, float] | None:
    """Return the limits of an axis given as text; None if they are not given."""
    from rtdetr_act.analysis.figures import check_limits

    return None if text is None else check_limits(key, text)
