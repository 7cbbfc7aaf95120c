"""Measure every op, forward and backward, against nn.SiLU, against the form that people copy, and against memory.

    python scripts/bench_ops.py [--output runs/bench] [--turns 15] [--device cpu] [--compiled] [--no-sizes]

Modules of the zoo as they stand in a network, generators and pooling included. "of the limit" is how close one comes to
copying the bytes that must be moved: the time of such a copy, measured in the same run, over the time of the module.
Prints tables, writes ops.json and cost.csv, and draws ops.png, and sizes.png: the cost against the number of elements,
the batch and the channels. About five minutes on two cores, with --compiled ten.
"""

from __future__ import annotations

import csv
import ctypes
import importlib.util
import json
import statistics
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from published import MOVED, NAMES, PUBLISHED, both_ways
from rich.console import Console
from rich.table import Table
from torch import nn

from rtdetr_act import create
from rtdetr_act.analysis.figures import TWO_COLUMNS, figure_style, write_figure
from rtdetr_act.integrations.ultralytics.costs import draw_bars
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

SHAPES = ((4, 64, 80, 80), (4, 256, 40, 40), (2, 128, 160, 160))
ON_GPU = (32, 256, 80, 80)


def installed_arelu() -> nn.Module | None:
    """Return AReLU of the package `activations`, if it is installed; its own __init__ fails without its CUDA part."""
    package = importlib.util.find_spec("activations")
    for folder in (package.submodule_search_locations or []) if package else []:
        spec = importlib.util.spec_from_file_location("activations_arelu", Path(folder) / "arelu.py")
        if spec is not None and spec.loader is not None and Path(folder, "arelu.py").is_file():
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found: nn.Module = module.AReLU()
            return found
    return None


# ---------------------------------------------------------------- measuring


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, where that is the C library; else of two equal calls, one may pay for both.

    It gives memory back once twice the largest block freed so far is free, and a page costs 1 µs on its next touch:
    SiLU on 2x128x160x160 takes 4.1 or 10.2 ms by what was freed before it. The published forms, which allocate most,
    gain most by this.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(threshold, 2**31 - 1)


def measure(
    shape: tuple[int, ...], modules: dict[str, nn.Module], turns: int, device: str, dtype: torch.dtype
) -> dict[str, Ratio]:
    """Time modules on maps of a shape against SiLU and against a copy, in turns."""
    x, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    to = torch.empty_like(x)
    calls = {name: both_ways(module.to(device), x, grad) for name, module in modules.items()}
    all_calls = {"silu": both_ways(nn.SiLU(), x, grad), "copy": lambda: to.copy_(x), **calls}
    return compute_ratios(time_medians(all_calls, turns, repeat=4, device=device), "silu")


def bench(device: str, turns: int, compiled: bool) -> dict[str, dict[str, Ratio]]:
    """Measure every op on every shape; a GPU in bfloat16 on a large one too."""
    found = {}
    settings = [(shape, torch.float32) for shape in SHAPES]
    if device != "cpu":
        settings.append((ON_GPU, torch.bfloat16))
    for shape, dtype in settings:
        if compiled:
            torch._dynamo.reset()  # which counts what it has compiled per function, and from the ninth on does not
        modules: dict[str, nn.Module] = {"relu": nn.ReLU(), "mish": nn.Mish()}
        for name in NAMES:
            modules[name] = create(name, shape[1])
            modules[f"{name}, as published"] = PUBLISHED[name](shape[1])
            if compiled:
                # One size each, as in a network; a second one would make torch compile for any size.
                in_graph = torch.compile(create(name, shape[1]), dynamic=False)
                modules[f"{name}, compiled"] = in_graph  # type: ignore[assignment]
        if (package := installed_arelu()) is not None:
            modules["arelu, package activations"] = package
        if dtype != torch.float32:  # as under autocast: half maps, float32 parameters; published forms keep one type
            modules = {key: m for key, m in modules.items() if "published" not in key and "package" not in key}
        title = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        found[title] = measure(shape, modules, turns, device, dtype)
        print_times(title, found[title])
    return found


def print_times(title: str, times: dict[str, Ratio]) -> None:
    """Print one shape as a table."""
    table = Table("module", title=f"{title}, forward and backward: SiLU takes {times['silu'].seconds * 1e3:.2f} ms")
    for column in ("in units of SiLU: median of paired ratios (quartiles)", "published over ours", "of the limit"):
        table.add_column(column, justify="right")
    for name, ratio in times.items():
        published = times.get(f"{name}, as published")
        faster = f"{published.median / ratio.median:.1f}" if published else ""
        moved = MOVED.get(name.partition(",")[0])
        # A copy moves two maps.
        limit = f"{moved / 2 * times['copy'].median / ratio.median:.0%}" if moved else ""
        table.add_row(name, str(ratio), faster, limit)
    Console(width=110).print(table)


def summarise(found: dict[str, dict[str, Ratio]], compiled: bool, path: Path) -> None:
    """Print the medians over the float32 shapes, and write them to a CSV file."""
    shapes = [times for title, times in found.items() if title.endswith("float32")]

    def median(name: str, over: str = "") -> float:
        """Return the median cost of a module, in units of SiLU or of another module."""
        return statistics.median(times[name].median / (times[over].median if over else 1) for times in shapes)

    extra = ["under torch.compile"] if compiled else []
    header = ["activation", "in units of SiLU", *extra, "published form over ours"]
    rows = []
    for name in NAMES:
        in_graph = [f"{median(f'{name}, compiled'):.2f}"] if compiled else []
        rows.append([name, f"{median(name):.2f}", *in_graph, f"{median(f'{name}, as published', name):.1f}"])
    table = Table(header[0], title="Medians over the shapes, of medians of paired ratios")
    for column in header[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def sweep(device: str, turns: int) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Measure the cost against the number of elements, the batch and the channels."""
    largest = 8 if device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 2**34 else 9
    sides = {10**power: max(round((10**power / 64) ** 0.5), 1) for power in range(4, largest + 1)}
    axes: dict[str, list[tuple[int, tuple[int, ...]]]] = {
        "elements (64 channels)": [(count, (1, 64, side, side)) for count, side in sides.items()],
        "batch (64 channels, 40x40)": [(size, (size, 64, 40, 40)) for size in (1, 4, 16, 64)],
        "channels (batch 4, 40x40)": [(count, (4, count, 40, 40)) for count in (8, 32, 128, 512)],
    }
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for axis, points in axes.items():
        found[axis] = []
        for value, shape in points:
            modules = {name: create(name, shape[1]) for name in ("arelu", "prelu", "aconc", "dyrelu_b")}
            elements = torch.Size(shape).numel()
            times = measure(shape, modules, turns if elements < 10**7 else max(turns // 8, 4), device, torch.float32)
            found[axis].append((value, {name: times[name].median for name in modules}))
            print(f"{axis} {value}: " + ", ".join(f"{name} {times[name]}" for name in modules))
    return found


@figure_style()
def draw_sizes(found: dict[str, list[tuple[int, dict[str, float]]]], path: Path) -> Path:
    """Draw the cost against sizes, one panel for each axis."""
    figure = Figure(figsize=(TWO_COLUMNS, 2.6))
    panels = figure.subplots(1, len(found), sharey=True)
    for panel, (axis, points) in zip(panels, found.items(), strict=True):
        for name in points[0][1]:
            panel.plot([value for value, _ in points], [costs[name] for _, costs in points], marker="o", label=name)
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.axhline(1, color="grey", linewidth=1)
        panel.set_xlabel(axis)
    panels[0].set_ylabel("time in units of SiLU (median of paired ratios)")
    panels[0].legend()
    figure.suptitle("Forward and backward, float32: the cost against the size", x=0.01, ha="left")
    return write_figure(figure, path)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the charts.")] = Path("runs/bench"),
    turns: Annotated[int, typer.Option(min=2, help="Turns that count, per module and shape.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Each op by torch.compile too; needs a compiler.")
    ] = False,
    sizes: Annotated[bool, typer.Option(help="Measure the cost against sizes too.")] = True,
) -> None:
    """Measure, print, write, draw."""
    keep_freed_memory()
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found = bench(device, turns, compiled)
    summarise(found, compiled, output / "cost.csv")
    swept = sweep(device, turns) if sizes else {}
    data = {title: {name: asdict(ratio) for name, ratio in times.items()} for title, times in found.items()}
    (output / "ops.json").write_text(json.dumps({"shapes": data, "sizes": swept}, indent=1))
    shown = {title: times for title, times in found.items() if title.endswith("float32")}
    bars: dict[str, dict[str, float]] = {}
    for name in NAMES:
        for suffix in ("", ", compiled", ", as published"):
            values = [times[name + suffix].median for times in shown.values() if name + suffix in times]
            if values:
                bars.setdefault(name, {})[suffix.removeprefix(", ") or "rtdetr-act"] = statistics.median(values)
    title = f"Forward and backward on {device}, median over {len(shown)} shapes"
    chart = draw_bars({title: bars}, output / "ops.png", axis="time in units of SiLU (medians of paired ratios)")
    print(f"file: {chart}\nfile: {output / 'cost.csv'}")
    if swept:
        print(f"file: {draw_sizes(swept, output / 'sizes.png')}")


if __name__ == "__main__":
    typer.run(main)
