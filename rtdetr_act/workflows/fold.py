"""Fold the activations of a checkpoint into its weights."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils.files import increment_path

from rtdetr_act.deploy.fold import FoldReport, fold_activations
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import convert_write_errors, output_folder, write_atomically
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.surgery.modules import get_named_tensors
from rtdetr_act.surgery.sites import find_sites


def fold_checkpoint(source: str | Path, output: str | Path | None = None) -> tuple[FoldReport, Path]:
    """Fold the activations of a checkpoint into its weights, and write another checkpoint.

    The folded checkpoint trains, validates, predicts and exports like any other. Tensors keep the dtype that they have
    in the file, float16 as a rule; those that were scaled become float32, so that they are not rounded a second time.
    Optimizer and EMA are left out, as in a checkpoint of a finished training.

    Args:
        source: A .pt checkpoint; of the last.pt of an interrupted training, the EMA is folded.
        output: The .pt file to write, which appears only when complete; None (default) for `best-folded.pt` beside
            `best.pt`, with a number if that exists.

    Returns:
        The report, and the path written.

    Raises:
        FoldError: The fold would change what the model computes.
        InputError: There is nothing to fold, the source is not a checkpoint, or the output cannot be written.
        ModelError: The checkpoint holds a class that is not installed.
    """
    source = str(source)
    if Path(source).suffix != ".pt":
        raise InputError(f"{quote(source)} is not a checkpoint to fold: give a .pt file")
    default = Path(source).with_name(f"{Path(source).stem}-folded.pt")
    path = increment_path(default) if output is None else Path(output)
    if path.suffix != ".pt":
        raise InputError(f"{quote(str(path))} is not the name of a checkpoint: let it end in .pt")
    model = load_model(source)
    if _is_same(path, source):
        raise InputError(
            f"{quote(str(path))} is the checkpoint to fold: name another file, since a fold cannot be undone"
        )
    with output_folder(path.parent):
        report = fold_activations(model)
        if not report:
            kinds = Counter(site.current.partition("(")[0] for site in find_sites(model))
            found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            raise InputError(f"there is nothing to fold in {quote(source)}: its activations are {found}")
        stored, _ = torch_safe_load(source)
        dtypes = {
            name: tensor.dtype for name, tensor in get_named_tensors(stored.get("ema") or stored["model"]).items()
        }
        for name, tensor in get_named_tensors(model.model).items():
            if tensor.is_floating_point() and name not in report.changed:
                tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
        left_out = {key: None for key in ("ema", "optimizer", "updates", "scaler") if key in stored}
        _write({**stored, **left_out, "epoch": -1, "model": model.model}, path)
    return report, path


def _is_same(path: Path, source: str) -> bool:
    with convert_write_errors(path):  # the system refuses a name that is too long before it looks for it
        return path.exists() and path.samefile(source)


def _write(checkpoint: dict[str, Any], output: Path) -> None:
    content = io.BytesIO()  # torch's own writer raises RuntimeErrors without an errno
    torch.save(checkpoint, content)
    with convert_write_errors(output):
        write_atomically(output, content.getvalue())
