"""Commands that show and change nothing: acts, sites, plot, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtdetr_act.cli import app


@app.command()
def acts() -> None:
    """List the activations: formula, parameters per site, where they can stand, source."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rtdetr_act.activations.registry import entry, names

    table = Table(title="x: input; C: channels at the site; parameters are those of one site", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("on", no_wrap=True)
    table.add_column("formula, parameters, source")
    for name in names():
        item = entry(name)
        counted = f"{item.parameters} parameters, learned" if item.learnable else "no parameters"
        lines = Text(f"{item.formula}\n{counted}; {item.paper}")
        if item.note:
            lines.append(f"\nnot meant for training: {item.note}", style="italic")
        table.add_row(name, "maps, tokens" if item.tokens else "maps", lines)
    Console().print(table)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="Model YAML or checkpoint; shipped ones by bare name.")],
    act: Annotated[str | None, typer.Option("--act", help="Activation or plan to show the effect of.")] = None,
    scope: Annotated[str, typer.Option("--scope", help="conv, or all to swap transformer sites too.")] = "conv",
) -> None:
    """List the activation sites of a model and, with --act, what a plan would change there; nothing is written."""
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.patcher import patch_model
    from rtdetr_act.runs import load_model
    from rtdetr_act.sites import find_sites, unseen_calls, unwrap

    loaded = load_model(model)
    found = [(site, site.current) for site in find_sites(loaded)]
    report = patch_model(loaded, act, scope=scope) if act else None
    after = {swap.site.name: swap.after for swap in report.swaps} if report else {}
    table = Table(title=f"{model}: {len(found)} activation sites")
    for title in ("layer", "section", "site", "owner", "channels", "layout", "before", *(["after"] if report else [])):
        table.add_column(title, justify="right" if title in ("layer", "channels") else "left", overflow="fold")
    for site, before in found:
        layer = "" if site.layer is None else str(site.layer)
        channels = "" if site.channels is None else str(site.channels)
        change = [after.get(site.name, "")] if report else []
        table.add_row(layer, site.section, site.name, site.owner_class, channels, site.layout, before, *change)
    Console().print(table)
    if report:
        print(report)
    elif missed := unseen_calls(unwrap(loaded)):
        print(f"no swap reaches: {', '.join(missed)}")


@app.command()
def plot(
    activations: Annotated[list[str], typer.Argument(help="Names or specs, such as arelu silu 'leaky_relu(0.1)'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG or SVG file to write.")] = Path("curves.png"),
) -> None:
    """Draw activations and their gradients at their initial parameters, dynamic ones as a band over inputs."""
    from rtdetr_act.plot import plot_activations

    print(f"file: {plot_activations(activations, output)}")


@app.command()
def bench(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]…", help="imgsz=224 (default), batch=8 and device=cpu."),
    ] = None,
    act: Annotated[list[str] | None, typer.Option("--act", help="Activation or plan to measure; repeatable.")] = None,
    model: Annotated[str, typer.Option("--model", help="Model YAML or checkpoint; shipped ones by bare name.")] = (
        "rtdetr-n.yaml"
    ),
    scope: Annotated[str, typer.Option("--scope", help="conv, or all to swap transformer sites too.")] = "conv",
    turns: Annotated[int, typer.Option("--turns", min=2, help="Training steps that count, per variant.")] = 15,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON and the chart.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure what activations cost in a model, in units of its stock form: time of training and inference, memory."""
    from rtdetr_act.bench import bench_model, print_costs, write_costs
    from rtdetr_act.errors import InputError
    from rtdetr_act.runs import check_variants, parse_arguments

    arguments = parse_arguments(pairs or [])
    if unknown := set(arguments) - {"imgsz", "batch", "device"}:
        raise InputError(f"bench takes imgsz, batch and device, not '{sorted(unknown)[0]}'")
    if not act:
        raise InputError("bench compares a model with its stock form: name an activation with --act")
    check_variants(model, act, scope=scope)
    costs = bench_model(model, act, turns=turns, scope=scope, **arguments)
    print_costs(Path(model).stem, costs)
    for path in write_costs({Path(model).stem: costs}, output, Path(model).stem):
        print(f"file: {path}")
