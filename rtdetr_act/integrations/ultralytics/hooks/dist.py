"""ultralytics.utils.dist: training on several GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtdetr_act.errors import ModelError
from rtdetr_act.integrations.ultralytics.hooks.replacing import replace
from rtdetr_act.surgery.model_plan import read_plan, split_model_yaml


def hook_dist(dist: Any) -> None:
    """Hook `ultralytics.utils.dist`."""
    # A DDP worker is a new process that runs a generated file, which must import the plugin to build patched rows.
    replace(dist, "generate_ddp_file", _generate_ddp_file)


def _generate_ddp_file(original: Callable[..., Any], trainer: Any) -> str:
    """Wrap `generate_ddp_file` to import the plugin in DDP workers."""
    path = str(original(trainer))
    source = Path(path).read_text(encoding="utf-8")
    if 'state["model"]' not in source and _plan_is_lost_in_workers(trainer):
        Path(path).unlink()
        raise ModelError(
            "this Ultralytics gives multi-GPU workers the model file only, not the activations patched in Python: "
            "name them in the model YAML, or use Ultralytics 8.4.160 or newer"
        )
    lines = source.splitlines(keepends=True)
    anchors = [
        i for i, line in enumerate(lines) if line.strip().startswith(("sys.path =", 'if __name__ == "__main__"'))
    ]
    if not anchors:
        raise ModelError("this Ultralytics writes multi-GPU workers in a form that rtdetr-act does not know yet")
    lines.insert(anchors[-1] + 1, "    import rtdetr_act  # its hooks rebuild the patched model\n")
    Path(path).write_text("".join(lines), encoding="utf-8")
    return path


def _plan_is_lost_in_workers(trainer: Any) -> bool:
    """Return whether workers would build the model without the plan of the trainer's model."""
    from torch import nn
    from ultralytics.nn.tasks import yaml_model_load

    if not isinstance(trainer.model, nn.Module):
        return False
    source = str(trainer.args.model)
    if source.endswith((".yaml", ".yml")):
        return split_model_yaml(yaml_model_load(source))[1] != read_plan(trainer.model)
    from ultralytics import YOLO

    return read_plan(YOLO(source).model) != read_plan(trainer.model)
