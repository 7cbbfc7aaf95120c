"""Commands that run trained checkpoints: val, predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import (
    Acts,
    Data,
    Fold,
    From,
    Init,
    Model,
    Models,
    Output,
    OutputFile,
    Pairs,
    ScopeOption,
    add_output,
    check_csv,
    require,
    split_variants,
)
from rtdetr_act.cli.printing import print_scores, print_warning
from rtdetr_act.errors import InputError, TrainingError
from rtdetr_act.integrations.ultralytics.results import list_score_names
from rtdetr_act.surgery.plan import SwapOptions, check_init, check_scope

if TYPE_CHECKING:
    from rtdetr_act.workflows.validate import Validation


@command("a/best.pt b/best.pt data=my.yaml", "best.pt act=stock,relu init=match")
def val(
    pairs: Pairs = None,
    model: Models = None,
    data: Data = None,
    act: Acts = None,
    replaces: From = None,
    scope: ScopeOption = "conv",
    init: Init = "paper",
    fold: Fold = False,
    output: OutputFile = None,
) -> None:
    """Validate checkpoints, or a swap without training.

    The data and the image size are those of the training unless data= and imgsz= name others. Several checkpoints,
    folders of runs, or several act= end in one table, which -o writes as CSV. The exit code is 1 if one of them failed;
    the scores of the others are printed.
    """
    from rtdetr_act.workflows.validate import validate_checkpoints, validate_variants

    models = model or []
    variants = split_variants(act, replaces)
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume"))
    options: SwapOptions = {"scope": check_scope(scope), "init": check_init(init)}
    _check_words(models, variants, options, output)
    if variants:
        validations = validate_variants(models[0], variants, data, arguments, fold=fold, show_fold=print, **options)
    else:
        validations = validate_checkpoints(models, data, arguments, fold=fold, show_fold=print, warn=print_warning)
    found: list[Validation] = []
    try:
        for each in validations:
            found.append(each)
    finally:
        _print_validations(found, output, alone=len(models) == 1 and not variants)
    if failed := [each.name for each in found if each.failure]:
        raise TrainingError(f"{len(failed)} of {len(found)} gave no scores: {', '.join(failed)}")


def _check_words(models: Sequence[str], act: Sequence[str], options: SwapOptions, output: Path | None) -> None:
    require("".join(models), "val needs a checkpoint, or a folder of runs", "rtdetr-act val best.pt")
    if act and len(models) > 1:
        raise InputError("act= validates activations in one checkpoint: leave it out to compare several checkpoints")
    if not act and options != {"scope": "conv", "init": "paper"}:
        raise InputError("scope= and init= say how an activation is swapped in: name one with act=")
    check_csv(output)


def _print_validations(validations: Sequence[Validation], output: Path | None, *, alone: bool) -> None:
    """Print the scores of the only checkpoint in one line, those of several in a table, and where their files are."""
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.workflows.validate import ValidationTable

    if validations and output is not None:
        ValidationTable(tuple(validations)).to_csv(output)
    if alone and len(validations) == 1 and validations[0].scores is not None:
        print_scores(validations[0].scores)
        if validations[0].folder:
            print(f"files: {validations[0].folder}")
    elif validations:
        scores = list_score_names(each.scores for each in validations) or ["mAP50", "mAP50-95"]
        table = Table(title=_describe_settings(validations))
        for title in ("name", "activation"):
            table.add_column(title, overflow="fold")
        for title in ("sites", "parameters", "GFLOPs (640)", *scores):
            table.add_column(title, justify="right")
        for each in validations:
            counts = (str(each.sites), f"{each.parameters:,}", f"{each.gflops_640:.2f}")
            cells = [f"{(each.scores or {}).get(name, float('nan')):.4f}" for name in scores]
            failed = ["-"] * (3 + len(scores))
            table.add_row(each.name, each.activation or "-", *(failed if each.failure else [*counts, *cells]))
        Console().print(table)
        for each in validations:
            if each.failure or each.folder:
                print(f"{each.name}: {each.failure or each.folder}")
    if validations and output is not None:
        print(f"file: {output}")


def _describe_settings(validations: Sequence[Validation]) -> str:
    """Return the data and the image size that all validations have."""
    done = next((each for each in validations if not each.failure), None)
    return "No validation ended" if done is None else f"Validated on {Path(done.data).name} at {done.imgsz} pixels"


@command("best.pt source=images/", "best.pt source=video.mp4 conf=0.25 save_txt=True")
def predict(pairs: Pairs = None, model: Model = None, fold: Fold = False, output: Output = None) -> None:
    """Detect objects in images or videos.

    source= is a file, a folder, a video, a URL or a camera.
    """
    from rtdetr_act.workflows.predict import predict_source

    weights = require(model, "predict needs a checkpoint", "rtdetr-act predict best.pt source=images/")
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume", "data"))
    add_output(arguments, output)
    source = arguments.pop("source", None)
    print(f"files: {predict_source(weights, source, arguments, fold=fold, show_fold=print)}")
