"""Commands that train: train, resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_act.cli.completion import complete_model
from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import (
    ActLr,
    Acts,
    Data,
    From,
    Init,
    Memory,
    Model,
    Output,
    Pairs,
    ScopeOption,
    TargetOption,
    add_output,
    choose_model_and_data,
    require,
    split_variants,
)
from rtdetr_act.cli.printing import print_next, print_scores, print_warning
from rtdetr_act.errors import InputError, TrainingError, quote
from rtdetr_act.integrations.ultralytics.results import list_score_names
from rtdetr_act.surgery.plan import SwapOptions, check_init, check_memory, check_scope

if TYPE_CHECKING:
    from rtdetr_act.integrations.ultralytics.runs import Outcome


@command(
    "best.pt act=arelu init=match data=my.yaml epochs=50",
    "rtdetr-l.yaml act=stock,arelu,mish data=coco8.yaml epochs=100",
)
def train(
    pairs: Pairs = None,
    act: Acts = None,
    model: Model = None,
    data: Data = None,
    replaces: From = None,
    scope: ScopeOption = "conv",
    init: Init = "paper",
    act_lr: ActLr = 1.0,
    memory: Memory = None,
    conv: Annotated[
        str | None, typer.Option("--conv", help="Convolutions to put in, such as dynamic_conv@backbone.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="Checkpoint to take weights from.", autocompletion=complete_model)
    ] = None,
    target: TargetOption = None,
    output: Output = None,
) -> None:
    """Fine-tune or train a model with other activations.

    Several variants train one after the other and end in one table. Any argument of Ultralytics passes: epochs, batch,
    device, project, name. Results go to runs/TASK/NAME.
    """
    from rtdetr_act.workflows.train import train_variants

    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume"))
    add_output(arguments, output)
    options: SwapOptions = {"scope": check_scope(scope), "act_lr": act_lr, "init": check_init(init)}
    variants = split_variants(act, replaces)
    _check_options(variants, options, conv)
    options["memory"] = check_memory(memory)
    source, dataset = choose_model_and_data(model, data)
    outcomes: list[Outcome] = []
    try:
        for outcome in train_variants(
            source,
            variants or [None],
            dataset,
            arguments,
            conv=conv,
            pretrained=_read_pretrained(pretrained, arguments),
            target=target,
            warn=print_warning,
            **options,
        ):
            outcomes.append(outcome)
    finally:
        _print_outcomes(f"{Path(source).name} on {Path(dataset).name}", outcomes)
    if failed := [outcome.activation for outcome in outcomes if outcome.failure]:
        raise TrainingError(f"{len(failed)} of {len(outcomes)} variants gave no result: {', '.join(failed)}")


def _check_options(activations: Sequence[str], options: SwapOptions, conv: str | None) -> None:
    from rtdetr_act.integrations.ultralytics.models import STOCK

    defaults: SwapOptions = {"scope": "conv", "act_lr": 1.0, "init": "paper"}
    if options != defaults and set(activations) <= {STOCK}:
        raise InputError(f"{', '.join(defaults)} say how an activation is swapped in: name one with act=")
    if conv is not None and set(activations) == {STOCK}:
        raise InputError("'stock' is the model without conv= as well: leave act= out to train with conv= alone")


def _read_pretrained(value: str | None, arguments: dict[str, Any]) -> str | None:
    """Return the checkpoint to take weights from; True and False are Ultralytics' own, and go to the arguments."""
    if value is None or value.endswith(".pt"):
        return value
    if value.lower() not in ("true", "false"):
        raise InputError(f"pretrained is a .pt checkpoint, True or False, not {quote(value)}")
    arguments["pretrained"] = value.lower() == "true"
    return None


@command("runs/detect/rtdetr-l-arelu/weights/last.pt", "model=runs/detect/rtdetr-l-arelu/weights/last.pt device=0")
def resume(pairs: Pairs = None, model: Model = None) -> None:
    """Go on with an interrupted training, from its last.pt."""
    from rtdetr_act.workflows.train import resume_training

    weights = require(model, "resume needs the last.pt of a training", "rtdetr-act resume runs/…/weights/last.pt")
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume", "data"))
    scores, folder = resume_training(weights, arguments)
    print_scores(scores)
    print(f"files: {folder}")
    print_next(f"val {folder / 'weights' / 'best.pt'}")


def _print_outcomes(title: str, outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not outcomes:
        return
    scores = list_score_names(outcome.scores for outcome in outcomes) or ["mAP50", "mAP50-95"]
    table = Table(title=f"{title}: scores of the best checkpoint")
    table.add_column("activation", overflow="fold")
    for title in ("sites", "parameters", "GFLOPs (640)", *scores, "s/epoch"):
        table.add_column(title, justify="right")
    for outcome in outcomes:
        if outcome.failure:
            table.add_row(outcome.activation, *["-"] * (4 + len(scores)))
            continue
        cells = [f"{(outcome.scores or {}).get(name, float('nan')):.4f}" for name in scores]
        time = f"{outcome.seconds_per_epoch:.1f}"
        counts = str(outcome.sites), f"{outcome.parameters:,}", f"{outcome.gflops_640:.2f}"
        table.add_row(outcome.activation, *counts, *cells, time)
    Console().print(table)
    for outcome in outcomes:
        print(f"{outcome.activation}: {outcome.failure or outcome.folder}")
    if trained := [str(outcome.folder / "weights" / "best.pt") for outcome in outcomes if outcome.folder]:
        print_next(f"val {' '.join(trained)}", f"doctor {trained[-1]}", f"export {trained[-1]} format=onnx")
