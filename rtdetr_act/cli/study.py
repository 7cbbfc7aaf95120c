"""The commands study, report and plan."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_act.cli.completion import complete_data, complete_word
from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Acts, From, Models, Output, choose_model_and_data, require, split_variants
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError, TrainingError, quote

if TYPE_CHECKING:
    from rtdetr_act.study.grid import Study
    from rtdetr_act.study.power import PowerPlan
    from rtdetr_act.study.report import StudyReport


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
    split_seeds: Annotated[bool, typer.Option("--split-seeds", help="Seeds divide the images anew too.")] = False,
    average_last: Annotated[
        int | None, typer.Option("--average-last", help="Score mean weights of so many epochs too.")
    ] = None,
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
    from rtdetr_act.study.engines import parse_engine
    from rtdetr_act.study.grid import make_study
    from rtdetr_act.study.runner import run_study

    options = {
        "activations": split_variants(act, replaces) or None, "where": where, "seeds": seeds, "baseline": baseline,
        "model": model, "data": data, "scope": scope, "act_lr": act_lr, "split_seeds": split_seeds or None,
        "average_last": average_last,
    }  # fmt: skip
    given = {**_parse_words(words or []), **{key: value for key, value in options.items() if value is not None}}
    source, dataset = choose_model_and_data(given.get("model"), given.get("data"))
    definition = make_study(given, defaults={"model": source, "data": dataset})
    output = output or Path("runs/study")
    engine_name = parse_engine(engine, address, halving)
    if dry_run:
        _print_runs(definition, output, cpus)
        return
    interrupt_on_sigterm()
    written = run_study(
        definition, output, cpus=cpus, retries=retries, engine=engine_name, address=address, halving=halving
    )
    _print_report(written)
    if failed := sum(row.failed for row in written.rows):
        raise TrainingError(
            f"{failed} runs gave no score: {output / 'leaderboard.md'} counts them, report.html says why"
        )


@command("runs/study latex=True", "runs/detect baseline=stock")
def report(
    folder: Annotated[str | None, typer.Argument(metavar="FOLDER", show_default=False)] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Activation to compare with; the study's.")] = None,
    latex: Annotated[
        bool, typer.Option("--latex", help="Also tables and figures for a paper, in FOLDER/paper.")
    ] = False,
) -> None:
    """Write the report of a study or of runs again.

    Leaderboard and HTML page, from the folder of a study, or from one with run folders of Ultralytics.
    """
    from rtdetr_act.study.report import report_study

    found = require(folder, "report needs the folder of a study or of runs", "rtdetr-act report runs/study")
    _print_report(report_study(found, baseline=baseline, latex=latex))


@command("runs/pilot", "runs/pilot difference=0.01 comparisons=5")
def plan(
    folder: Annotated[str | None, typer.Argument(metavar="FOLDER", show_default=False)] = None,
    difference: Annotated[float, typer.Option("--difference", help="In mAP50-95, as a fraction of 1: 0.005.")] = 0.005,
    comparisons: Annotated[int, typer.Option("--comparisons", help="Variants that will be compared; 1.")] = 1,
    baseline: Annotated[str, typer.Option("--baseline", help="Activation to compare with; stock.")] = "stock",
) -> None:
    """Say how many seeds and images would show a difference.

    From the spread in a pilot study of a detector, with two variants and two seeds or more.
    """
    from rtdetr_act.study.power import plan_seeds

    found = require(folder, "plan needs the folder of a study", "rtdetr-act plan runs/pilot difference=0.005")
    _print_plan(plan_seeds(found, difference, comparisons=comparisons, baseline=baseline))


def _print_plan(found: PowerPlan) -> None:
    """Print where the noise of a pilot study comes from, and what it takes to see through it."""
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.formatting import format_count, format_number

    noise = found.noise
    print(f"noise of mAP50-95 in {format_count(noise.runs, 'run')} on {format_count(noise.images, 'image')}:")
    print(f"  {noise.of_seeds:.4f}  between seeds, whatever the images")
    print(f"  {noise.of_images:.4f}  between seeds, by the images: halved by four times as many")
    print(f"  {noise.of_differences:.4f}  between sets of images, in the difference: more seeds do not help")
    interval = ""
    if isfinite(noise.correlation_low):
        low, high = (format_number(each, "{:+.2f}") for each in (noise.correlation_low, noise.correlation_high))
        interval = f" ({low} to {high})"
    print(f"correlation of runs with equal seeds: {format_number(noise.correlation, '{:+.2f}')}{interval}")
    for images, seeds in found.seeds_needed.items():
        answer = format_count(seeds, "seed") if seeds else "no number of seeds"
        print(f"{found.difference:g} is shown in four cases of five by {answer} on {format_count(images, 'image')}")
    table = Table(title="Smallest difference that is shown in four cases of five")
    numbers = list(found.seeds_needed)
    for title in ("seeds", *(format_count(images, "image") for images in numbers)):
        table.add_column(title, justify="right")
    for seeds in dict.fromkeys(seeds for seeds, _ in found.detectable):
        table.add_row(str(seeds), *(format_number(found.detectable[seeds, images], "{:.4f}") for images in numbers))
    Console().print(table)


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


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _raise_interrupt)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _print_report(written: StudyReport) -> None:
    """Print the leaderboard, and the files of the report."""
    from rich.console import Console

    from rtdetr_act.study.leaderboard_tables import (
        describe_missing_averages,
        describe_missing_detections,
        make_average_table,
        make_conclusion_table,
        make_leaderboard_table,
    )

    Console().print(make_leaderboard_table(written.rows, written.metric))
    if any(row.over_images for row in written.rows):
        Console().print(make_conclusion_table(written.rows))
    if any(row.averaged for row in written.rows):
        Console().print(make_average_table(written.rows))
    for missing in filter(None, (describe_missing_detections(written.rows), describe_missing_averages(written.rows))):
        print(missing)
    print_files(written.files)


def _print_runs(definition: Study, folder: Path, cpus: int | None) -> None:
    """Print the runs of a study and their estimated duration on this machine."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rtdetr_act.study.display import format_seconds
    from rtdetr_act.study.estimates import estimate_study

    estimate = estimate_study(definition, folder, cpus=cpus)
    table = Table(title=escape(f"{len(estimate.runs)} runs in {folder}"))
    for title in ("run", "activation", "seed", "settings", "alone"):
        table.add_column(title, overflow="fold")
    for run in estimate.runs:
        seconds = estimate.seconds[run.name]
        time = format_seconds(seconds) if seconds else "finished"
        table.add_row(*map(escape, (run.name, run.variant, str(run.seed), run.setting, time)))
    Console().print(table)
    print_duration(estimate.total, estimate.slots)


def print_duration(seconds: float, slots: int) -> None:
    """Print the estimated duration of a study or a search, with the number of runs at once."""
    from rtdetr_act.study.display import format_seconds

    print(f"about {format_seconds(seconds)} with {slots} at once on this machine, measured on random images")
