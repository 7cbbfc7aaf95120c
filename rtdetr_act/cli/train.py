"""Commands that train: train, resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.app import app
from rtdetr_act.cli.options import DEFAULT_DATA, DEFAULT_MODEL, Pairs, ScopeOption, TargetOption, Weights
from rtdetr_act.cli.printing import print_scores, print_warning
from rtdetr_act.errors import InputError, TrainingError, quote
from rtdetr_act.surgery.plan import SwapOptions, check_init, check_scope

if TYPE_CHECKING:
    from rtdetr_act.integrations.ultralytics.runs import Outcome


@app.command()
def train(
    pairs: Pairs = None,
    act: Annotated[
        list[str] | None,
        typer.Option(
            "--act",
            help="Activation or plan, such as arelu or 'dyrelu_b@backbone, dyrelu_c@neck'; 'stock'; repeatable.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Model YAML or checkpoint; shipped ones by bare name.")
    ] = DEFAULT_MODEL,
    data: Annotated[str, typer.Option("--data", help="Data set YAML, or 'shapes', the embedded one.")] = DEFAULT_DATA,
    scope: ScopeOption = "conv",
    act_lr: Annotated[float, typer.Option("--act-lr", help="Factor on the learning rate of slopes.")] = 1.0,
    conv: Annotated[
        str | None,
        typer.Option(
            "--conv", help="Convolutions to put in, such as dynamic_conv or 'dynamic_conv(kernels=2)@backbone'."
        ),
    ] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Checkpoint to take weights from.")] = None,
    init: Annotated[
        str, typer.Option("--init", help="paper, or match to start closest to the network before the swap.")
    ] = "paper",
    target: TargetOption = None,
) -> None:
    """Train a model with other activations; several --act train one after the other and end in one table."""
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.workflows.train import train_variants

    arguments = parse_arguments(pairs or [], reserved=("model", "data", "pretrained", "task", "mode", "resume"))
    options: SwapOptions = {"scope": check_scope(scope), "act_lr": act_lr, "init": check_init(init)}
    _check_options(act or [], options, conv, pretrained)
    outcomes: list[Outcome] = []
    try:
        for outcome in train_variants(
            model,
            act or [None],
            data,
            arguments,
            conv=conv,
            pretrained=pretrained,
            target=target,
            warn=print_warning,
            **options,
        ):
            outcomes.append(outcome)
    finally:
        _print_outcomes(outcomes)
    if failed := [outcome.activation for outcome in outcomes if outcome.failure]:
        raise TrainingError(f"{len(failed)} of {len(outcomes)} variants gave no result: {', '.join(failed)}")


def _check_options(activations: Sequence[str], options: SwapOptions, conv: str | None, pretrained: str | None) -> None:
    from rtdetr_act.integrations.ultralytics.models import STOCK

    defaults: SwapOptions = {"scope": "conv", "act_lr": 1.0, "init": "paper"}
    if options != defaults and set(activations) <= {STOCK}:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in defaults)
        raise InputError(f"{names} say how an activation is swapped in: name one with --act")
    if conv is not None and set(activations) == {STOCK}:
        raise InputError("'stock' is the model without --conv as well: leave --act out to train --conv alone")
    if pretrained is not None and not pretrained.endswith(".pt"):
        raise InputError(f"--pretrained takes a .pt checkpoint, not {quote(pretrained)}")


@app.command()
def resume(weights: Weights, pairs: Pairs = None) -> None:
    """Go on with a training that was interrupted: give its last.pt."""
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.workflows.train import resume_training

    arguments = parse_arguments(pairs or [], reserved=("model", "task", "mode", "resume", "data"))
    scores, folder = resume_training(weights, arguments)
    print_scores(scores)
    print(f"files: {folder}")


def _print_outcomes(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not outcomes:
        return
    scores = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores or {})) or ["mAP50", "mAP50-95"]
    table = Table(title="Variants, scored on their best checkpoint")
    table.add_column("activation", overflow="fold")
    for title in ("sites", "parameters", "GFLOPs", *scores, "s/epoch"):
        table.add_column(title, justify="right")
    for outcome in outcomes:
        if outcome.failure:
            table.add_row(outcome.activation, *["-"] * (4 + len(scores)))
            continue
        cells = [f"{(outcome.scores or {}).get(name, float('nan')):.4f}" for name in scores]
        time = f"{outcome.seconds_per_epoch:.1f}"
        counts = str(outcome.sites), f"{outcome.parameters:,}", f"{outcome.gflops:.2f}"
        table.add_row(outcome.activation, *counts, *cells, time)
    Console().print(table)
    for outcome in outcomes:
        print(f"{outcome.activation}: {outcome.failure or outcome.folder}")
