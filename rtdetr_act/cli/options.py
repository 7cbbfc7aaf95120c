"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_MODEL = "rtdetr-n.yaml"
DEFAULT_DATA = "shapes"

Pairs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]…", help="Any Ultralytics argument, such as epochs=100 imgsz=640 batch=16."),
]
Weights = Annotated[str, typer.Argument(help="A checkpoint, such as runs/detect/rtdetr-n-arelu/weights/best.pt.")]
Data = Annotated[str | None, typer.Option("--data", help="Data set YAML, or 'shapes', the embedded one.")]
ScopeOption = Annotated[str, typer.Option("--scope", help="conv, or all to swap transformer sites too.")]
TargetOption = Annotated[
    str | None,
    typer.Option("--for", help="Warn of activations that rknn, hailo, edgetpu, vitis-dpu or openvino does not run."),
]
Fold = Annotated[bool, typer.Option("--fold", help="Fold the activations into the weights first.")]
