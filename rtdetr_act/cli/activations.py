"""Commands that show activations on their own: acts, plot."""

from __future__ import annotations

from typing import Annotated

import typer

from rtdetr_act.cli.completion import complete_act, complete_target
from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Name, OutputFile, Project, open_file
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError


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

    from rtdetr_act.activations.registry import get_entry, names

    if target:
        _print_natives(target)
        return
    table = Table(title="x: input; C: channels at the site; parameters are those of one site", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("on", no_wrap=True)
    table.add_column("formula, parameters, source")
    for name in names():
        item = get_entry(name)
        lines = Text(f"{item.formula}\n{_describe_size(name)}; {item.paper}")
        if item.note:
            lines.append(f"\nnot meant for training: {item.note}", style="italic")
        table.add_row(name, "maps, tokens" if item.tokens else "maps", lines)
    Console().print(table)


def _describe_size(name: str) -> str:
    """Return the number of parameters of an activation at a site, in words."""
    from rtdetr_act.activations.registry import count_parameters
    from rtdetr_act.errors import SpecError

    try:
        few, many = (count_parameters(name, channels) for channels in (64, 256))
    except SpecError:  # it has arguments without defaults
        return "no parameters but its arguments"
    if few == many:
        return f"{few} parameters, learned" if few else "no parameters"
    return f"{few:,} parameters at C = 64, {many:,} at C = 256, learned"


def _print_natives(name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.activations.registry import names
    from rtdetr_act.deploy.targets import get_native_support, get_target

    target = get_target(name)
    table = Table(title=f"native on {name}: {target.title}")
    for title in ("activation", "condition", "source"):
        table.add_column(title, overflow="fold")
    others = []
    for activation in names():
        if native := get_native_support(activation, name):
            table.add_row(activation, native.note, native.source)
        else:
            others.append(activation)
    Console().print(table)
    print(f"not native: {', '.join(others)}")
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
