"""The command search."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import ActLr, Acts, Data, Model, Output, Pairs, ScopeOption, choose_model_and_data
from rtdetr_act.cli.printing import print_files
from rtdetr_act.cli.study import estimate_run_seconds, run_with_display
from rtdetr_act.errors import InputError

if TYPE_CHECKING:
    from rtdetr_act.study.grid import Study
    from rtdetr_act.study.local import Slot
    from rtdetr_act.study.search import Search


@command(
    "rtdetr-l.yaml act=arelu,silu data=my.yaml dry_run=True",
    "act=arelu,dyrelu_b,silu budget=180 -o runs/places",
)
def search(
    pairs: Pairs = None,
    act: Acts = None,
    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help="Epochs of all trainings; 14 whole ones and the final.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each of the two plans in the final; 3.")] = 3,
    model: Model = None,
    data: Data = None,
    scope: ScopeOption = "conv",
    act_lr: ActLr = 1.0,
    output: Output = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="CPU cores of each run; 1 if not given.")] = None,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Further tries of a run that broke; 1.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print rungs and time; start no run.")] = False,
) -> None:
    """Find the best activation for each stage.

    Many short trainings, fewer longer ones, a final with new seeds. The result is a model YAML, best.yaml in
    runs/search, with the evidence in search.md. It mixes activations only if that is significantly better than the
    best single one. The same command continues an interrupted search.
    """
    from rich.console import Console

    from rtdetr_act.integrations.ultralytics.arguments import split_pairs
    from rtdetr_act.integrations.ultralytics.downloads import no_downloads
    from rtdetr_act.study.engines import open_engine
    from rtdetr_act.study.leaderboard import make_leaderboard_table
    from rtdetr_act.study.local import find_slots
    from rtdetr_act.study.report import write_report
    from rtdetr_act.study.search import FINAL, SEARCH_REPORT_FILES, make_search, run_search
    from rtdetr_act.study.search_report import choose_answer, make_rung_table, write_search_report
    from rtdetr_act.study.storage import SEARCH_FILE, check_writable_files, lock_folder

    if not act:
        raise InputError("search needs activations to place: act=arelu,dyrelu_b,silu")
    output = output or Path("runs/search")
    arguments = split_pairs(pairs or [])
    device = arguments.get("device")
    slots = find_slots(device, cpus)
    check_writable_files(output, [*SEARCH_REPORT_FILES, SEARCH_FILE])
    source, dataset = choose_model_and_data(model, data)
    with no_downloads() if dry_run else nullcontext():
        definition = make_search(
            act,
            model=source,
            data=dataset,
            budget=budget,
            seeds=seeds,
            scope=scope,
            act_lr=act_lr,
            arguments=arguments,
        )
        if dry_run:
            _print_rungs(definition, output, slots)
            return

    with open_engine("local", device=device, cpus=cpus, retries=retries) as engine, lock_folder(output):

        def run(study: Study, folders: Sequence[Path]) -> None:
            print(f"{folders[0].parents[1]}: {len(folders)} runs of {study.arguments['epochs']} epochs", flush=True)
            run_with_display(folders, engine)

        trials = run_search(definition, output, run)
        final = write_report(output / FINAL, measure=True)
        answer = choose_answer(definition, trials, final.rows)
        files = write_search_report(definition, trials, final.rows, answer, output)
    console = Console()
    console.print(make_rung_table(definition, trials))
    console.print(make_leaderboard_table(final.rows, final.metric))
    print(f"answer: {answer.plan}\n{answer.explanation}")
    print_files([*files, *final.files], f"train {output / 'best.yaml'} data={definition.data}")


def _print_rungs(definition: Search, output: Path, slots: Sequence[Slot]) -> None:
    """Print the stages, the rungs and their estimated duration on this machine, by the pace of the uniform plans."""
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.study.display import format_seconds
    from rtdetr_act.study.grid import check_runs, expand_study
    from rtdetr_act.study.preparation import STARTUP_SECONDS
    from rtdetr_act.study.search import check_search_folder, make_rung_study, select_candidates

    check_search_folder(definition, output)
    first = definition.rungs[0]
    candidates = select_candidates(definition, 0, [])
    check_runs(expand_study(make_rung_study(definition, first, candidates)), read_only=True)
    uniform = expand_study(
        make_rung_study(definition, first, [each for each in candidates if each.origin == "uniform"])
    )
    seconds = estimate_run_seconds(uniform, output / "none", slots)
    pace = (sum(seconds.values()) / len(seconds) - STARTUP_SECONDS) / first.epochs

    stages = Table(title=f"Stages of {definition.model}")
    for title in ("stage", "sites", "supported activations"):
        stages.add_column(title, overflow="fold", justify="right" if title == "sites" else "left")
    for stage in definition.stages:
        stages.add_row(stage.name, str(stage.sites), ", ".join(stage.choices))
    rungs = Table(title=f"Rungs in {output}")
    for title in ("rung", "plans", "epochs each", "seeds", "epochs", "about"):
        rungs.add_column(title, justify="left" if title == "rung" else "right")
    total = 0.0
    for rung in definition.rungs:
        runs = rung.plans * len(rung.seeds)
        time = runs * (STARTUP_SECONDS + pace * rung.epochs) / min(len(slots), runs)
        total += time
        cells = (rung.plans, rung.epochs, len(rung.seeds), rung.cost)
        rungs.add_row(rung.name, *map(str, cells), format_seconds(time))
    console = Console()
    console.print(stages)
    console.print(rungs)
    spent = sum(rung.cost for rung in definition.rungs)
    print(f"{spent} epochs of training, of a budget of {definition.budget}")
    print(f"about {format_seconds(total)} with {len(slots)} at once on this machine, measured on random images")
