"""The commands study and report."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_act.cli.completion import complete_data, complete_word
from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Acts, From, Models, Output, choose_model_and_data, require, split_variants
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError, Interrupted, TrainingError, quote

if TYPE_CHECKING:
    from rtdetr_act.study.engines import Engine
    from rtdetr_act.study.grid import RunConfig, Study
    from rtdetr_act.study.leaderboard import LeaderboardRow
    from rtdetr_act.study.local import Slot


@command(
    "rtdetr-l.yaml act=stock,arelu seeds=5 data=my.yaml epochs=50",
    "study.yaml -o runs/rates engine=ray",
)
def study(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL | STUDY.yaml] [key=value]…", autocompletion=complete_word, show_default=False),
    ] = None,
    act: Acts = None,
    where: Annotated[str | None, typer.Option("--where", help="Each at each place: backbone,neck,head,all.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Runs of each variant; 3 if not given.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Activation to compare with; stock.")] = None,
    model: Models = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Data sets, such as coco8.yaml.", autocompletion=complete_data)
    ] = None,
    replaces: From = None,
    scope: Annotated[str | None, typer.Option("--scope", help="conv, or all for transformer sites too.")] = None,
    act_lr: Annotated[float | None, typer.Option("--act-lr", help="Factor on the learning rate of slopes.")] = None,
    output: Output = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="CPU cores of each run; 1 if not given.")] = None,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Further tries of a run that broke; 1.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray for many machines.")] = "local",
    address: Annotated[str | None, typer.Option("--address", help="With engine=ray: where the cluster is.")] = None,
    halving: Annotated[bool, typer.Option("--halving", help="With engine=ray: stop hopeless variants early.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their time; start none.")] = False,
) -> None:
    """Compare activations over several seeds.

    A process per run, statistics, a leaderboard and an HTML report. Any argument of Ultralytics may be a list,
    lr0=[0.01,0.02], and multiplies the runs. Results go to runs/study; the same command continues an interrupted
    study, and more act= and seeds= extend it.
    """
    from rtdetr_act.study.engines import open_engine, parse_engine
    from rtdetr_act.study.grid import make_study
    from rtdetr_act.study.preparation import is_study_finished, prepare_runs
    from rtdetr_act.study.storage import REPORT_FILES, check_writable_files, lock_folder

    options = {
        "activations": split_variants(act) if act else None, "where": where, "seeds": seeds, "baseline": baseline,
        "model": model, "data": data, "scope": scope, "act_lr": act_lr,
    }  # fmt: skip
    given = {**_parse_words(words or []), **{key: value for key, value in options.items() if value is not None}}
    source, dataset = choose_model_and_data(given.get("model"), given.get("data"))
    definition = make_study(given, defaults={"model": source, "data": dataset})
    output = output or Path("runs/study")
    engine_name = parse_engine(engine, address, halving)
    device = definition.arguments.get("device")
    if dry_run:
        _print_runs(definition, output, device, cpus)
        return
    check_writable_files(output, REPORT_FILES)
    opening = open_engine(
        engine_name,
        device=device,
        cpus=cpus,
        retries=retries,
        address=address,
        halving=definition.baseline if halving else None,
    )
    with ExitStack() as stack:
        # The report of a finished study needs no engine, such as the cluster that it ran on.
        run = None if is_study_finished(definition, output) else stack.enter_context(opening)
        stack.enter_context(lock_folder(output))
        folders = prepare_runs(definition, output)
        if run:
            run_with_display(folders, run)
        rows = _write_report(output, measure=True)
    if failed := sum(row.failed for row in rows):
        raise TrainingError(
            f"{failed} runs gave no score: {output / 'leaderboard.md'} counts them, report.html says why"
        )


@command("runs/study", "runs/detect baseline=stock")
def report(
    folder: Annotated[str | None, typer.Argument(metavar="FOLDER", show_default=False)] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Activation to compare with; the study's.")] = None,
) -> None:
    """Write the report of a study or of runs again.

    Leaderboard and HTML page, from the folder of a study, or from one with run folders of Ultralytics.
    """
    found = require(folder, "report needs the folder of a study or of runs", "rtdetr-act report runs/study")
    _write_report(Path(found), baseline=baseline)


def _parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a study file, models and Ultralytics arguments among some words; the last ones win."""
    from rtdetr_act.integrations.ultralytics.arguments import split_pairs
    from rtdetr_act.study.grid import is_study_file, read_study_file

    bare = [word for word in words if "=" not in word]
    files = [word for word in bare if is_study_file(word)]
    if len(files) > 1:
        raise InputError(f"a study has one file, not {len(files)}: {', '.join(map(quote, files[:10]))}")
    models = [word for word in bare if word not in files]
    given = split_pairs(word for word in words if word not in bare)
    return {**(read_study_file(Path(files[0])) if files else {}), **({"model": models} if models else {}), **given}


def run_with_display(folders: Sequence[Path], run: Engine) -> None:
    """Run all unfinished runs of a study, and show the progress.

    Args:
        folders: Run folders of the study.
        run: Engine, as `open_engine` yields it.

    Raises:
        Interrupted: The user pressed Ctrl-C, or the process received SIGTERM.
        InputError: The disk is full.
    """
    from rtdetr_act.study.display import Display

    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        with Display(folders) as display:
            run(folders, watch=display)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing is lost: the same command continues") from None
    except OSError as error:
        raise InputError(f"the study stopped: {error.strerror or error}; the same command continues") from error


def _raise_interrupt(*_: object) -> None:
    """Handle SIGTERM like Ctrl-C."""
    raise KeyboardInterrupt


def _write_report(folder: Path, *, baseline: str | None = None, measure: bool = False) -> Sequence[LeaderboardRow]:
    """Write the report of a study, print the leaderboard, and return its rows."""
    from rich.console import Console

    from rtdetr_act.study.leaderboard import make_leaderboard_table
    from rtdetr_act.study.report import write_report

    written = write_report(folder, baseline=baseline, measure=measure)
    Console().print(make_leaderboard_table(written.rows, written.metric))
    print_files(written.files)
    return written.rows


def _print_runs(definition: Study, folder: Path, device: Any, cpus: int | None) -> None:
    """Print the runs of a study and their estimated duration on this machine; downloads and writes nothing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rtdetr_act.integrations.ultralytics.downloads import no_downloads
    from rtdetr_act.study.display import format_seconds
    from rtdetr_act.study.local import find_slots
    from rtdetr_act.study.preparation import check_study

    slots = find_slots(device, cpus)
    with no_downloads():
        runs, _ = check_study(definition, folder, read_only=True)
        seconds = estimate_run_seconds(runs, folder, slots)
    table = Table(title=escape(f"{len(runs)} runs in {folder}"))
    for title in ("run", "activation", "seed", "settings", "alone"):
        table.add_column(title, overflow="fold")
    for run in runs:
        time = format_seconds(seconds[run.name]) if seconds[run.name] else "finished"
        table.add_row(*map(escape, (run.name, run.variant, str(run.seed), run.setting, time)))
    Console().print(table)
    total = sum(seconds.values()) / min(len(slots), max(1, sum(map(bool, seconds.values()))))
    print(f"about {format_seconds(total)} with {len(slots)} at once on this machine, measured on random images")


def estimate_run_seconds(runs: Sequence[RunConfig], folder: Path, slots: Sequence[Slot]) -> dict[str, float]:
    """Return the estimated duration of each run in seconds, by name, on the first of some slots.

    Args:
        runs: The runs.
        folder: Folder of the study, which need not exist.
        slots: Slots of this machine.
    """
    import torch

    from rtdetr_act.study.preparation import estimate_seconds

    first = slots[0].device.split(",")[0]
    torch.set_num_threads(slots[0].threads or torch.get_num_threads())
    return estimate_seconds(runs, folder, device=f"cuda:{first}" if first.isdigit() else first)
