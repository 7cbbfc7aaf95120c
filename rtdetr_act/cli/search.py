"""The command search."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import ActLr, Acts, Data, Model, Output, Pairs, ScopeOption, choose_model_and_data
from rtdetr_act.cli.printing import print_files
from rtdetr_act.cli.study import interrupt_on_sigterm, print_duration
from rtdetr_act.errors import InputError

if TYPE_CHECKING:
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
    from rtdetr_act.study.leaderboard_tables import make_leaderboard_table
    from rtdetr_act.study.runner import run_search
    from rtdetr_act.study.search import make_search
    from rtdetr_act.study.search_report import make_rung_table

    if not act:
        raise InputError("search needs activations to place: act=arelu,dyrelu_b,silu")
    output = output or Path("runs/search")
    arguments = split_pairs(pairs or [])
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
            _print_rungs(definition, output, cpus)
            return
    interrupt_on_sigterm()
    found = run_search(definition, output, cpus=cpus, retries=retries)
    console = Console()
    console.print(make_rung_table(definition, found.trials))
    console.print(make_leaderboard_table(found.final.rows, found.final.metric))
    print(f"answer: {found.answer.plan}\n{found.answer.explanation}")
    print_files(found.files, f"train {output / 'best.yaml'} data={definition.data}")


def _print_rungs(definition: Search, output: Path, cpus: int | None) -> None:
    """Print the stages, the rungs and their estimated duration on this machine, by the pace of the uniform plans."""
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.study.display import format_seconds
    from rtdetr_act.study.estimates import estimate_search

    estimate = estimate_search(definition, output, cpus=cpus)
    stages = Table(title=f"Stages of {definition.model}")
    for title in ("stage", "sites", "supported activations"):
        stages.add_column(title, overflow="fold", justify="right" if title == "sites" else "left")
    for stage in definition.stages:
        stages.add_row(stage.name, str(stage.sites), ", ".join(stage.choices))
    rungs = Table(title=f"Rungs in {output}")
    for title in ("rung", "plans", "epochs each", "seeds", "epochs", "about"):
        rungs.add_column(title, justify="left" if title == "rung" else "right")
    for rung in definition.rungs:
        cells = (rung.plans, rung.epochs, len(rung.seeds), rung.cost)
        rungs.add_row(rung.name, *map(str, cells), format_seconds(estimate.seconds[rung.name]))
    console = Console()
    console.print(stages)
    console.print(rungs)
    spent = sum(rung.cost for rung in definition.rungs)
    print(f"{spent} epochs of training, of a budget of {definition.budget}")
    print_duration(estimate.total, estimate.slots)
