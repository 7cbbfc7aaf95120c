"""Commands that run a trained checkpoint: val, predict."""

from __future__ import annotations

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import Data, Fold, Model, Output, Pairs, add_output, require
from rtdetr_act.cli.printing import print_scores


@command("best.pt", "best.pt data=my.yaml imgsz=640 fold=True")
def val(pairs: Pairs = None, model: Model = None, data: Data = None, fold: Fold = False, output: Output = None) -> None:
    """Validate a checkpoint.

    The data is that of its training unless data= names another.
    """
    from rtdetr_act.workflows.validate import validate_checkpoint

    weights = require(model, "val needs a checkpoint", "rtdetr-act val best.pt")
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume"))
    add_output(arguments, output)
    print_scores(validate_checkpoint(weights, data, arguments, fold=fold, show_fold=print))


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
