"""The command that measures what activations cost: bench."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.completion import complete_data
from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import (
    Acts,
    From,
    Models,
    Name,
    Output,
    Pairs,
    Project,
    ScopeOption,
    choose_folder,
    choose_model,
    split_variants,
)
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.integrations.ultralytics.results import list_score_names
from rtdetr_act.surgery.plan import check_scope

if TYPE_CHECKING:
    from rich.table import Table

    from rtdetr_act.integrations.ultralytics.costs import Cost
    from rtdetr_act.integrations.ultralytics.latency import Latency

# Operators or layers that a table of memory tells apart, of those that show with one decimal.
ROWS, SHOWN_BYTES = 10, 2**20 // 20
COLUMNS = 6  # variants side by side in such a table
PAIRED = "median of paired ratios, one per round (quartiles)"


@command(
    "rtdetr-l.yaml act=arelu,dyrelu_b imgsz=640 batch=4 fits=24",
    "a/best.pt b/best.pt format=onnx,openvino data=my.yaml",
)
@no_downloads()
def bench(
    pairs: Pairs = None,
    act: Acts = None,
    model: Models = None,
    replaces: From = None,
    scope: ScopeOption = "conv",
    formats: Annotated[str | None, typer.Option("--format", help="Deployed: onnx,openvino,torchscript,ncnn.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With format=: quantised to 8 bits as well.")] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="With format=: data set to score on.", autocompletion=complete_data)
    ] = None,
    turns: Annotated[int | None, typer.Option("--turns", min=2, help="Measurements that count, per variant.")] = None,
    fits: Annotated[float | None, typer.Option("--fits", help="Estimate the largest batch in so many GiB.")] = None,
    output: Output = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Measure what activations cost in time and memory.

    Training steps, inference and memory of act= in one model (imgsz=224, batch=8, device=cpu), and which operators and
    layers keep that memory for backward; or, with format=, latency, size and, with data=, the scores of exported files
    of every model and act=. JSON and chart: runs/bench.
    """
    from rtdetr_act.workflows.bench import bench_exports, bench_training

    variants = split_variants(act, replaces)
    known = ("imgsz",) if formats else ("imgsz", "batch", "device")
    arguments = parse_pairs(pairs)
    if unknown := set(arguments) - set(known):
        raise InputError(f"bench takes {', '.join(known)}{' with format=' * bool(formats)}, not '{min(unknown)}'")
    if (int8 or data) and not formats:
        raise InputError("int8= and data= measure exported networks: name their formats with format=onnx,openvino")
    if fits is not None and formats:
        raise InputError("fits= estimates the batch of a training: leave out format=")
    if not formats and (not variants or len(model or []) > 1):
        raise InputError("bench compares one model with its stock form: name activations with act=, or a format=")
    models = model or [choose_model(None)]
    swapped = check_scope(scope)
    folder = choose_folder("bench", output, project, name)
    if formats:
        names = [name.strip() for name in formats.split(",")]
        _, files = bench_exports(
            models,
            variants or [None],
            names,
            folder,
            int8=int8,
            data=data,
            rounds=turns or 100,
            scope=swapped,
            show=_print_latencies,
            **arguments,
        )
    else:
        (source,) = models

        def show(costs: Sequence[Cost]) -> None:
            print_costs(Path(source).stem, costs)

        _, files = bench_training(
            source, variants, folder, rounds=turns or 15, scope=swapped, show=show, fits=fits, **arguments
        )
    print_files(files)


def print_costs(title: str, costs: Sequence[Cost]) -> None:
    """Print costs as a table, those of the variants relative to the reference, and what keeps memory for backward."""
    from rich.console import Console

    console = Console(width=110)
    console.print(_make_cost_table(title, costs))
    for kind, column in (("operator", "saved_by_operator"), ("layer", "saved_by_layer")):
        for table in _make_memory_tables(kind, {cost.activation: getattr(cost, column) for cost in costs}):
            console.print(table)


def _make_cost_table(title: str, costs: Sequence[Cost]) -> Table:
    from rich.table import Table

    estimate = costs[0].largest_batch
    caption = f"times: {PAIRED}; memory: a single ratio"
    if estimate:
        caption += (
            f"\nbatch in {estimate.gib:g} GiB: an estimate for AdamW, EMA and float32, without the memory of"
            "\nthe CUDA context, cuDNN's workspaces and fragmentation"
        )
    table = Table(title=f"{title}: in units of the stock model", caption=caption)
    table.add_column("activation", overflow="fold")
    for column in ("training step", "inference", "peak memory", "saved for backward"):
        table.add_column(column, justify="right")
    if estimate:
        table.add_column(f"batch in {estimate.gib:g} GiB", justify="right")
    for number, cost in enumerate(costs):
        if number == 0:
            times = f"{cost.train.seconds * 1e3:.1f} ms", f"{cost.inference.seconds * 1e3:.2f} ms"
            memory = f"{_format_mib(cost.peak_bytes)} MiB", f"{_format_mib(cost.saved_bytes)} MiB"
        else:
            times, memory = (str(cost.train), str(cost.inference)), (f"{cost.peak:.2f}", f"{cost.saved:.2f}")
        batch = [str(cost.largest_batch.batch)] if cost.largest_batch else []
        table.add_row(cost.activation, *times, *memory, *batch)
    return table


def _make_memory_tables(kind: str, sizes: Mapping[str, Mapping[str, int]]) -> Iterator[Table]:
    """Yield tables of the memory that variants keep for backward, a column each, the largest rows first.

    Args:
        kind: What the rows are: "operator" or "layer".
        sizes: Bytes by variant and row.
    """
    from rich.table import Table

    largest = {row: max(each.get(row, 0) for each in sizes.values()) for each in sizes.values() for row in each}
    shown = [row for row in sorted(largest, key=lambda row: -largest[row]) if largest[row] >= SHOWN_BYTES][:ROWS]
    others = largest.keys() - shown
    names = list(sizes)
    for start in range(0, len(names), COLUMNS):
        part = [sizes[name] for name in names[start : start + COLUMNS]]
        table = Table(title=f"MiB saved for backward, by {kind}")
        table.add_column(kind, no_wrap=True)
        for name in names[start : start + COLUMNS]:
            table.add_column(name, justify="right", overflow="fold", min_width=7, max_width=20)
        for row in shown:
            table.add_row(row, *(_format_mib(each.get(row, 0)) for each in part))
        if others:
            rest = (_format_mib(sum(each.get(row, 0) for row in others)) for each in part)
            table.add_row(f"{len(others)} other{'s' * (len(others) > 1)}", *rest)
        table.add_section()
        table.add_row("all", *(_format_mib(sum(each.values())) for each in part))
        yield table


def _format_mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size else "-"


def _print_latencies(latencies: Sequence[Latency]) -> None:
    from rich.console import Console
    from rich.table import Table

    base, imgsz = latencies[0].activation, latencies[0].imgsz
    scores = list_score_names(latency.scores for latency in latencies)
    table = Table(
        title=f"Latency of one image of {imgsz} x {imgsz} pixels on this CPU, median and 95th percentile",
        caption=f"/ {base}: {PAIRED}; GFLOPs (…): of one image of so many pixels a side",
    )
    table.add_column("activation", overflow="fold")
    table.add_column("format")
    sizes = dict.fromkeys((640, imgsz))
    for column in ("ms", "p95", f"/ {base}", "parameters", *(f"GFLOPs ({size})" for size in sizes), "MB", *scores):
        table.add_column(column, justify="right")
    for latency in latencies:
        ratio = "1" if latency.activation == base else str(latency.ratio)
        times = f"{latency.median:.2f}", f"{latency.p95:.2f}", ratio
        counts = [f"{count:.3f}" for count in (latency.gflops_640, latency.gflops)[: len(sizes)]]
        cells = [f"{(latency.scores or {}).get(name, math.nan):.3f}" for name in scores]
        table.add_row(
            latency.activation,
            latency.format,
            *times,
            f"{latency.parameters:,}",
            *counts,
            f"{latency.megabytes:.2f}",
            *cells,
        )
    Console(width=140).print(table)
