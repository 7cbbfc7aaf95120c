"""Commands that show and change nothing: acts, sites, plot, learned, bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_act.cli.app import app
from rtdetr_act.cli.running import Data, Weights
from rtdetr_act.integrations.ultralytics.downloads import no_downloads

if TYPE_CHECKING:
    from rtdetr_act.workflows.learned import Learned


@app.command()
def acts(
    target: Annotated[
        str | None,
        typer.Option("--for", help="Say which of them rknn, hailo, edgetpu, vitis-dpu or openvino runs natively."),
    ] = None,
) -> None:
    """List the activations: formula, parameters per site, where they can stand, source."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rtdetr_act.activations.registry import entry, names

    if target:
        _print_natives(target)
        return
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


def _print_natives(name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.activations.registry import names
    from rtdetr_act.deploy.targets import find_target, native_form

    target = find_target(name)
    table = Table(title=f"native on {name}: {target.title}")
    for title in ("activation", "condition", "source"):
        table.add_column(title, overflow="fold")
    others = []
    for activation in names():
        if native := native_form(activation, target):
            table.add_row(activation, native.note, native.source)
        else:
            others.append(activation)
    Console().print(table)
    print(f"not native: {', '.join(others)}")
    for sentence in filter(None, (target.otherwise, target.caveat)):
        print(sentence)


@app.command()
@no_downloads()
def sites(
    model: Annotated[str, typer.Argument(help="Model YAML or checkpoint; shipped ones by bare name.")],
    act: Annotated[str | None, typer.Option("--act", help="Activation or plan to show the effect of.")] = None,
    scope: Annotated[str, typer.Option("--scope", help="conv, or all to swap transformer sites too.")] = "conv",
) -> None:
    """List the activation sites of a model and, with --act, what a plan would change there; nothing is written."""
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.integrations.ultralytics.models import load_model
    from rtdetr_act.surgery.functional_calls import unseen_calls
    from rtdetr_act.surgery.modules import unwrap
    from rtdetr_act.surgery.patcher import patch_model
    from rtdetr_act.surgery.plan import check_scope
    from rtdetr_act.surgery.sites import find_sites

    check_scope(scope)
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
    from rtdetr_act.analysis.curves import plot_activations

    print(f"file: {plot_activations(activations, output)}")


@app.command()
@no_downloads()
def learned(
    weights: Weights,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, SVG or PDF file to write.")] = Path(
        "learned.png"
    ),
    data: Data = None,
) -> None:
    """Show what the activations of a checkpoint learned, per site, since their start where the run kept its history.

    What DY-ReLU and Meta-ACON make from the image is measured on validation images of --data, else as the run
    noted it: mean ± standard deviation over images.
    """
    from rtdetr_act.analysis.figures import check_figure_path
    from rtdetr_act.analysis.history import make_history
    from rtdetr_act.analysis.history_figure import draw_history
    from rtdetr_act.workflows.learned import read_checkpoint

    check_figure_path(output)
    found = read_checkpoint(weights, data)
    _print_learned(found)
    if found.note:
        print(found.note)
    history = found.history if found.history is not None else make_history(found.quantities)
    print(f"file: {draw_history(history, output, weights)}")


def _print_learned(found: Learned) -> None:
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.analysis.history_figure import select_quantities
    from rtdetr_act.analysis.learned import layer_index

    for activation in dict.fromkeys(read.activation for read in found.quantities):
        own = [read for read in found.quantities if read.activation == activation]
        names, _ = select_quantities(read.name for read in own)
        table = Table(title=f"{activation}: {'start → now' if found.start else 'now'}")
        for title in ("layer", "site", *names):
            table.add_column(title, justify="left" if title == "site" else "right", overflow="fold")
        for site, group in groupby(own, key=lambda read: read.site):
            values = {read.name: read.value for read in group}
            layer = layer_index(site)
            cells = [_change(found, site, name, values) for name in names]
            table.add_row("" if layer is None else str(layer), site, *cells)
        Console().print(table)


def _change(found: Learned, site: str, name: str, values: dict[str, float]) -> str:
    """Return `0.9 → 0.873`, and below it `± 0.021` where the value differs between images."""
    from rtdetr_act.analysis.learned import SPREAD

    if name not in values:
        return ""
    start = found.start.get((site, name))
    spread = values.get(name + SPREAD)
    before = "" if start is None else f"{start:.3g} → "
    return f"{before}{values[name]:.3g}" + ("" if spread is None else f"\n± {spread:.2g}")


@app.command()
@no_downloads()
def bench(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]…", help="imgsz=224 (default); without --format batch=8 and device=cpu."),
    ] = None,
    act: Annotated[list[str] | None, typer.Option("--act", help="Activation or plan to measure; repeatable.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Model YAML or checkpoint, rtdetr-n.yaml if not given; repeatable with --format."),
    ] = None,
    scope: Annotated[str, typer.Option("--scope", help="conv, or all to swap transformer sites too.")] = "conv",
    formats: Annotated[
        str | None, typer.Option("--format", help="Measure deployed networks: onnx,openvino,torchscript,ncnn.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With --format: also quantised to 8 bits.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="With --format: data set to score every file on.")] = None,
    turns: Annotated[int | None, typer.Option("--turns", min=2, help="Measurements that count, per variant.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON and the chart.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure what activations cost: in training, against the stock model, or with --format where they are deployed.

    Training steps, inference and memory of --act in one model; or, with --format, latency, size and, with --data, the
    scores of exported files, for every --model and --act.
    """
    from rtdetr_act.errors import InputError
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.integrations.ultralytics.models import check_variants

    models = model or ["rtdetr-n.yaml"]
    known = ("imgsz",) if formats else ("imgsz", "batch", "device")
    arguments = parse_arguments(pairs or [])
    if unknown := set(arguments) - set(known):
        raise InputError(f"bench takes {', '.join(known)}{' with --format' * bool(formats)}, not '{min(unknown)}'")
    if (int8 or data) and not formats:
        raise InputError("--int8 and --data measure exported networks: name their formats with --format onnx,openvino")
    for source in models:
        check_variants(source, act or [], scope=scope)
    if formats:
        _bench_formats(models, act or [None], scope, formats.split(","), output, int8, data, turns or 100, arguments)
        return
    from rtdetr_act.files import output_folder
    from rtdetr_act.integrations.ultralytics.costs import bench_model, print_costs, write_costs

    if not act or len(models) > 1:
        raise InputError("bench compares one --model with its stock form: name activations with --act, or --format")
    stem = Path(models[0]).stem
    with output_folder(output):  # which is not made in vain, nor found wrong after minutes
        costs = bench_model(models[0], act, turns=turns or 15, scope=scope, **arguments)
        print_costs(stem, costs)
        for path in write_costs({stem: costs}, output, stem):
            print(f"file: {path}")


def _bench_formats(
    sources: list[str],
    activations: Sequence[str | None],
    scope: str,
    formats: list[str],
    output: Path,
    int8: bool,
    data: str | None,
    turns: int,
    arguments: dict[str, Any],
) -> None:
    from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
    from rtdetr_act.integrations.ultralytics.latency import bench_formats, print_latencies, write_latencies
    from rtdetr_act.integrations.ultralytics.models import load_variant

    models: dict[str, Any] = {}
    for source in sources:
        for activation in activations:
            name, loaded = load_variant(source, activation, scope=scope)
            name = name if len(sources) == 1 or not activation else f"{Path(source).stem} {name}"
            models[f"{name} {len(models) + 1}" if name in models else name] = loaded
    if data is not None:  # before minutes of exporting
        data = resolve_data(data)
        for task in {str(loaded.task) for loaded in models.values()}:
            check_data(data, task)
    found = bench_formats(
        models,
        [form.strip() for form in formats if form.strip() != "torch"],
        output,
        turns=turns,
        int8=int8,
        data=data,
        **arguments,
    )
    print_latencies("Latency of one image on this CPU, median and 95th percentile", found)
    for path in write_latencies(found, output, "formats"):
        print(f"file: {path}")
