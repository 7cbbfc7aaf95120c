"""Commands that run a trained checkpoint: val, predict."""

from __future__ import annotations

from rtdetr_act.cli.app import app
from rtdetr_act.cli.options import Data, Fold, Pairs, Weights
from rtdetr_act.cli.printing import print_scores


@app.command()
def val(weights: Weights, pairs: Pairs = None, data: Data = None, fold: Fold = False) -> None:
    """Validate a checkpoint, on the data it was trained with unless --data names another."""
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.workflows.validate import validate_checkpoint

    arguments = parse_arguments(pairs or [], reserved=("model", "task", "mode", "resume", "data"))
    print_scores(validate_checkpoint(weights, data, arguments, fold=fold, show_fold=print))


@app.command()
def predict(weights: Weights, pairs: Pairs = None, fold: Fold = False) -> None:
    """Detect in images or videos: source=folder, conf=0.25, save=True and so on."""
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.workflows.predict import predict_source

    arguments = parse_arguments(pairs or [], reserved=("model", "task", "mode", "resume", "data"))
    source = arguments.pop("source", None)
    print(f"files: {predict_source(weights, source, arguments, fold=fold, show_fold=print)}")
