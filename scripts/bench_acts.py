"""Measure every activation of the zoo: time, memory, precision; and write what `rtdetr-act acts` shows.

    python scripts/bench_acts.py [--act arelu --act mish] [--rounds 9] [--output rtdetr_act/analysis/measured.csv]

Times are those of modules alone, float32, in units of SiLU: forward and backward, and forward without gradients in
evaluation mode. A few modules at a time are interleaved with SiLU, so that each round gives a ratio per shape, of which
it takes the median; median and quartiles are over the rounds. The row of silu is another SiLU: its quartiles are noise.

Kept for backward is all memory that the graph of the output holds, input and output included, parameters and buffers
not; and how much of it is the output's, which the next layer keeps anyway. Precision is the largest difference to the
formulas in `tests/reference.py`, which share no code with the package, and `torch.autograd.gradcheck`; both with
parameters away from their start. Export formats are read from `docs/parity.json`, which `scripts/parity.py` writes.

The file is replaced as a whole; with --act, the other rows stay. About four minutes on two quiet cores.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_ops import SHAPES, keep_freed_memory
from parity_table import read_table
from published import both_ways
from torch import Tensor, nn

from rtdetr_act import create, names
from rtdetr_act.activations.registry import get_entry, is_built_in
from rtdetr_act.analysis.measured import COLUMNS, FILE, FORMATS, Measured, read_measured
from rtdetr_act.analysis.memory import measure_step_memory
from rtdetr_act.errors import RtdetrActError
from rtdetr_act.files import write_atomically
from rtdetr_act.timing import time_medians

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from reference import REFERENCE  # noqa: E402

# Modules that are interleaved with one SiLU: with more of them, a round takes so long that the machine changes in it.
GROUP = 5
# What must be given where an activation has arguments without defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {"threshold": {"threshold": 0.1, "value": 0.0}}
EXPORTED_MODEL = "yolo11n"


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ratios to SiLU."""

    low: float
    median: float
    high: float


def bench_times(group: Sequence[str], rounds: int) -> dict[str, tuple[Spread, Spread]]:
    """Return the cost of training and of inference of some activations in units of SiLU."""
    train_ratios: dict[str, list[list[float]]] = {name: [] for name in group}  # by shape and round
    inference_ratios: dict[str, list[list[float]]] = {name: [] for name in group}
    for shape in SHAPES:
        x, grad = torch.randn(shape), torch.randn(shape)
        modules = {name: build(name, shape[1]) for name in group}
        train = {name: both_ways(module, x, grad) for name, module in modules.items()}
        inference = {name: partial(_infer, deepcopy(module).eval(), x) for name, module in modules.items()}
        _add_ratios(train_ratios, train, both_ways(nn.SiLU(), x, grad), rounds)
        _add_ratios(inference_ratios, inference, partial(_infer, nn.SiLU(), x), rounds)
    return {name: (_summarise(train_ratios[name]), _summarise(inference_ratios[name])) for name in group}


def _add_ratios(
    ratios: dict[str, list[list[float]]], calls: Mapping[str, Callable[[], Any]], silu: Callable[[], Any], rounds: int
) -> None:
    """Time calls, and add for each the ratios to SiLU in each round."""
    times = time_medians({"": silu, **calls}, rounds, repeat=4)
    for name in calls:
        ratios[name].append([own / other for own, other in zip(times[name], times[""], strict=True)])


def build(name: str, channels: int) -> nn.Module:
    """Return an activation for maps of some channels."""
    return create(name, channels, **ARGUMENTS.get(name, {}))


@torch.no_grad()
def _infer(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _summarise(ratios: Sequence[Sequence[float]]) -> Spread:
    """Return median and quartiles over the rounds, of the median over the shapes in each."""
    rounds = [statistics.median(shapes) for shapes in zip(*ratios, strict=True)]
    return Spread(*statistics.quantiles(rounds, n=4, method="inclusive"))


# ---------------------------------------------------------------- memory


def measure_kept(name: str) -> tuple[float, float]:
    """Return the bytes per element of x that are kept for the backward, and how many of them are the output's."""
    x, module = torch.randn(SHAPES[0], requires_grad=True), build(name, SHAPES[0][1])
    saved: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    # Times 1, so that x is a result too, as it is behind a layer.
    kept = measure_step_memory(lambda: module(x * 1.0)).kept
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x * 1.0)
    return kept / x.numel(), (y.nbytes if y.data_ptr() in saved else 0) / x.numel()


# ---------------------------------------------------------------- precision


def measure_errors(name: str) -> tuple[float | None, float | None]:
    """Return the largest difference to the independent formula in float64, of the module in float64 and in float32."""
    reference = REFERENCE.get(name)
    if reference is None:
        return None, None
    torch.manual_seed(0)
    module = unsettle(build(name, 8)).eval()
    x = 2 * torch.randn(4, 8, 16, 16)
    exact = deepcopy(module).double()
    state = {key: value.detach().numpy() for key, value in exact.state_dict().items()}
    expected = torch.from_numpy(np.asarray(reference(x.double().numpy(), state, 1, **ARGUMENTS.get(name, {}))))
    with torch.no_grad():
        return _differ(exact(x.double()), expected), _differ(module(x), expected)


def _differ(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).abs().max())


def unsettle(module: nn.Module) -> nn.Module:
    """Move parameters away from their start, where many are 0 or 1, and return the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    return module


def check_gradients(name: str) -> bool:
    """Return whether the gradients of x and of all parameters are those of finite differences, in float64."""
    torch.manual_seed(0)
    module = unsettle(build(name, 4)).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    x = torch.where(x.abs() < 0.05, 0.3, x).requires_grad_()  # away from a kink at 0
    keys = [key for key, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(keys, values, strict=True)), (x,))

    return torch.autograd.gradcheck(call, (x, *module.parameters()), raise_exception=False)


# ---------------------------------------------------------------- rows


def measure_rows(chosen: Sequence[str], rounds: int, machine: str) -> Iterator[Measured]:
    """Yield the measurements of each activation, but for what was exported."""
    for start in range(0, len(chosen), GROUP):
        group = chosen[start : start + GROUP]
        for name, (train, inference) in bench_times(group, rounds).items():
            kept, output = measure_kept(name)
            error, rounded = measure_errors(name)
            yield Measured(
                name, train.median, train.low, train.high, inference.median, inference.low, inference.high,
                kept, output, error, rounded, check_gradients(name), machine=machine,
            )  # fmt: skip


def add_exports(row: Measured, table: dict[str, dict[str, dict[str, str]]]) -> Measured:
    """Return a row with what the parity table says of the export formats, without the detections it counts."""
    cells = table.get(EXPORTED_MODEL, {}).get(row.activation, {})
    found: dict[str, Any] = {form: cells.get(form, "").partition(",")[0].partition(" (")[0] for form in FORMATS}
    return replace(row, **found)


def format_rows(rows: dict[str, Measured]) -> str:
    """Return rows as CSV, sorted by name; `read_measured` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_format_cell(c, getattr(rows[name], c)) for c in COLUMNS] for name in sorted(rows))
    return text.getvalue()


def _format_cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.2f}" if not column.startswith("error") else f"{value:.0e}" if value else "0"
    return str(value)


def describe_machine() -> str:
    """Return what the times are measured on, in words."""
    threads = torch.get_num_threads()
    cores = f"{threads} CPU core{'s' if threads > 1 else ''}"
    return f"{cores}, torch {torch.__version__.partition('+')[0]}, {date.today().isoformat()}"


def main(
    act: Annotated[list[str] | None, typer.Option(help="Activations to measure; all of the zoo if none.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds that count, per shape.")] = 9,
    output: Annotated[Path, typer.Option(help="CSV file to write.")] = FILE,
    parity: Annotated[Path, typer.Option(help="What was exported.")] = ROOT / "docs" / "parity.json",
    machine: Annotated[str, typer.Option(help="What the times are measured on, if this is not said by itself.")] = "",
) -> None:
    """Measure, print, write."""
    try:
        zoo = [name for name in names() if is_built_in(name)]
        chosen = [get_entry(name).name for name in act] if act else zoo
    except RtdetrActError as error:
        raise typer.BadParameter(str(error)) from None
    keep_freed_memory()
    torch.manual_seed(0)
    table = read_table(parity)
    old = read_measured(output) if output.is_file() else {}
    rows = {name: row for name, row in old.items() if name in zoo}
    for row in measure_rows(chosen, rounds, machine or describe_machine()):
        rows[row.activation] = row
        print(_describe_row(row), flush=True)
    rows = {name: add_exports(row, table) for name, row in rows.items()}
    write_atomically(output, format_rows(rows).encode())
    print(f"file: {output}")


def _describe_row(row: Measured) -> str:
    values = ("train", "train_low", "train_high", "inference", "inference_low", "inference_high", "kept", "kept_output")
    shown = [_format_cell(column, getattr(row, column)) for column in values]
    times = "train {} ({}-{}), inference {} ({}-{}), kept {} of which output {}".format(*shown)
    error = "no formula" if row.error is None else f"off by {row.error:.0e}, {row.error_float32:.0e} in float32"
    return f"{row.activation:12} {times}, {error}, gradcheck {'passed' if row.gradcheck else 'failed'}"


if __name__ == "__main__":
    typer.run(main)
