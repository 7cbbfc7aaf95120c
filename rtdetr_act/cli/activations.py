"""Commands that show activations on their own: acts, plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.completion import complete_act, complete_target
from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Name, OutputFile, Project, open_file
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError

if TYPE_CHECKING:
    from rtdetr_act.workflows.activations import ActivationListing, ListedActivation


@command("", "for=rknn")
def acts(
    target: Annotated[
        str | None,
        typer.Option("--for", help="What rknn, hailo, edgetpu, … runs natively.", autocompletion=complete_target),
    ] = None,
) -> None:
    """List the activations.

    Each with its formula, its parameters per site, where it can stand, and its source.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rtdetr_act.workflows.activations import list_activations

    listing = list_activations(target or None)
    if listing.target:
        _print_natives(listing)
        return
    table = Table(title="x: input; C: channels at the site; parameters are those of one site", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("on", no_wrap=True)
    table.add_column("formula, parameters, source")
    for each in listing.activations:
        lines = Text(f"{each.formula}\n{_describe_size(each)}; {each.paper}")
        if each.note:
            lines.append(f"\nnot meant for training: {each.note}", style="italic")
        table.add_row(each.name, "maps, tokens" if each.tokens else "maps", lines)
    Console().print(table)


def _describe_size(activation: ListedActivation) -> str:
    """Return the number of parameters of an activation at a site, in words."""
    few, many = activation.parameters_64, activation.parameters_256
    if few is None or many is None:
        return "no parameters but its arguments"
    if few == many:
        return f"{few} parameters, learned" if few else "no parameters"
    return f"{few:,} parameters at C = 64, {many:,} at C = 256, learned"


def _print_natives(listing: ActivationListing) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.deploy.targets import get_target

    target = get_target(str(listing.target))
    table = Table(title=f"native on {listing.target}: {target.title}")
    for title in ("activation", "condition", "source"):
        table.add_column(title, overflow="fold")
    for each in listing.activations:
        if each.native:
            table.add_row(each.name, each.native_condition, each.native_source)
    Console().print(table)
    print(f"not native: {', '.join(each.name for each in listing.activations if not each.native)}")
    for sentence in filter(None, (target.otherwise, target.caveat)):
        print(sentence)


@command("arelu silu mish -o curves.png", "silu 'leaky_relu(0.1)' dyrelu_b")
def plot(
    act: Annotated[
        list[str] | None, typer.Argument(metavar="ACTIVATION…", autocompletion=complete_act, show_default=False)
    ] = None,
    output: OutputFile = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Draw activations and their gradients.

    They are drawn at their initial parameters, dynamic ones as a band over inputs. The figure is a PNG, SVG or PDF
    file; runs/plot/curves.png if -o does not name one.
    """
    from rtdetr_act.analysis.curves import plot_activations

    if not act:
        raise InputError("plot needs activations: rtdetr-act plot arelu silu")
    with open_file("plot", "curves.png", output, project, name) as path:
        print_files([plot_activations(act, path)])
