"""Fold a checkpoint into another one."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ultralytics.nn.tasks import torch_safe_load

from rtdetr_act.deploy.fold import FoldReport, fold_activations
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import convert_write_errors, output_folder, write_atomically
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.surgery.modules import tensors_of
from rtdetr_act.surgery.sites import find_sites


def fold_checkpoint(source: str, output: Path | None = None) -> tuple[FoldReport, Path]:
    """Fold a checkpoint into another one, which trains, validates, predicts and exports like any.

    Tensors keep the type they have in the file, float16 as a rule; those that were multiplied become float32, so that
    no second rounding comes on top. Optimizer and EMA are left out, as in a finished training.

    Args:
        source: A .pt checkpoint; an interrupted training's last.pt gives its EMA.
        output: The .pt file to write, which appears only when complete; `best-folded.pt` beside `best.pt` if None.

    Returns:
        The report, and the path written.

    Raises:
        FoldError: The fold would change what the model computes.
        InputError: There is nothing to fold, the source is no checkpoint, or the output cannot be written.
        ModelError: The checkpoint holds a class that is not installed.
    """
    if Path(source).suffix != ".pt":
        raise InputError(f"{quote(source)} is not a checkpoint to fold: give a .pt file")
    target = output or Path(source).with_name(f"{Path(source).stem}-folded.pt")
    if target.suffix != ".pt":
        raise InputError(f"{quote(str(target))} is not the name of a checkpoint: let it end in .pt")
    model = load_model(source)
    if _is_same(target, source):
        raise InputError(
            f"{quote(str(target))} is the checkpoint to fold: name another file, since a fold cannot be undone"
        )
    with output_folder(target.parent):
        report = fold_activations(model)
        if not report:
            kinds = Counter(site.current.partition("(")[0] for site in find_sites(model))
            found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            raise InputError(f"there is nothing to fold in {quote(source)}: its activations are {found}")
        stored, _ = torch_safe_load(source)
        types = {name: t.dtype for name, t in tensors_of(stored.get("ema") or stored["model"]).items()}
        for name, t in tensors_of(model.model).items():
            if t.is_floating_point() and name not in report.changed:
                t.data = t.data.to(types.get(name, t.dtype))
        left_out = {key: None for key in ("ema", "optimizer", "updates", "scaler") if key in stored}
        _write({**stored, **left_out, "epoch": -1, "model": model.model}, target)
    return report, target


def _is_same(target: Path, source: str) -> bool:
    with convert_write_errors(target):  # the system does not even look for a name that is too long
        return target.exists() and target.samefile(source)


def _write(checkpoint: dict[str, Any], output: Path) -> None:
    content = io.BytesIO()  # torch's own writer knows no errno, and none of its errors is an OSError
    torch.save(checkpoint, content)
    with convert_write_errors(output):
        write_atomically(output, content.getvalue())
