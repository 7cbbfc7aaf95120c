"""RTDETR and YOLO objects by name: from a YAML, a checkpoint, with a plan applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks
from ultralytics.utils import ROOT
from ultralytics.utils.checks import check_yaml
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from rtdetr_act.activations.registry import is_known
from rtdetr_act.errors import InputError, ModelError, RtdetrActError, quote, raising_module, reason, suggest
from rtdetr_act.integrations.ultralytics.arguments import check_file_name
from rtdetr_act.integrations.ultralytics.configs import config_names, find_config
from rtdetr_act.integrations.ultralytics.model_yaml import BUILD_ERRORS, can_be_head, explain_forward_error
from rtdetr_act.surgery.model_plan import read_plan, split_model_yaml
from rtdetr_act.surgery.modules import preserve_attributes, unwrap
from rtdetr_act.surgery.patcher import apply_plan, patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan, SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOCK = "stock"  # the variant without any swap


def load_model(source: str) -> Any:
    """Load an RTDETR or YOLO object.

    Args:
        source: Model YAML or .pt checkpoint: a path, a bare name of a shipped YAML such as "rtdetr-n.yaml", or a name
            that Ultralytics can download, such as "rtdetr-l.pt".

    Raises:
        InputError: The file does not exist, or is not a model YAML.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
        SpecError: The model YAML names an activation or a module that does not exist.
    """
    check_file_name(source)
    suffix = Path(source).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _load_yaml(source)
    if suffix == ".pt":
        return _load_weights(source)
    if not suffix:
        hint = suggest(source, _model_names()) or (f"; did you mean act={source}?" if is_known(source) else "")
        raise InputError(f"{quote(source)} is not a model file: give a .yaml or a .pt{hint}")
    raise ModelError(
        f"{quote(source)} cannot be trained or swapped: give a .yaml, or the .pt that it was exported from"
    )


def load_checkpoint(weights: str) -> Any:
    """Load an RTDETR or YOLO object from a .pt checkpoint.

    Raises:
        InputError: The file does not exist, or its name does not end in .pt.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
    """
    if not weights.endswith(".pt"):
        raise InputError(f"{quote(weights)} is not a checkpoint: give a .pt file")
    return load_model(weights)


def _load_yaml(source: str) -> Any:
    try:
        model_yaml = tasks.yaml_model_load(source)
    except RtdetrActError:
        raise
    # Ultralytics 8.4 and newer raise ValueError for any error of PyYAML, and PyYAML exceeds the recursion limit on a
    # thousand nested brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{quote(source)} is not a valid YAML: {reason(error)}") from None
    except (OSError, AttributeError, TypeError, IndexError) as error:
        if find_config(source) or check_yaml(source, hard=False):
            problem = reason(error) if isinstance(error, OSError) else "it needs 'backbone' and 'head'"
            raise InputError(f"{quote(source)} is not a model YAML: {problem}") from None
        raise InputError(f"there is no model {quote(source)} here{suggest(source, _model_names())}") from None
    stock, _ = split_model_yaml(model_yaml)
    head = str(stock["head"][-1][2])
    is_rtdetr = "RTDETR" in head
    if not is_rtdetr and tasks.guess_model_task(stock) is None:
        raise InputError(
            f"{quote(source)} ends with {quote(head)}, which does not tell the task: let a head such as Detect be last"
        )
    model = (RTDETR if is_rtdetr else YOLO)(source)
    if not can_be_head(model.model.model[-1]):
        raise InputError(
            f"{quote(source)} ends with {quote(head)}, which is not a head such as Detect or RTDETRDecoder"
        )
    if is_rtdetr and not _is_shipped(source):
        # Ultralytics runs the other models while it builds them, to measure their strides.
        try:
            _run_forward(model.model, int(stock.get("channels", 3)))
        except BUILD_ERRORS as error:
            if (explained := explain_forward_error(error, stock)) is None:
                raise
            raise explained from error
    return model


def _is_shipped(source: str) -> bool:
    """Return whether a model YAML ships with this package or with Ultralytics; those are known to run."""
    return not Path(source).exists() and "://" not in source


def _run_forward(model: Any, channels: int) -> None:
    """Run one image of 320 x 320 pixels through a task model; its state and the random state are restored."""
    with preserve_attributes(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()(torch.zeros(1, channels, 320, 320))


def _load_weights(source: str) -> Any:
    if not Path(source).is_file() and Path(source).name not in GITHUB_ASSETS_NAMES:
        raise InputError(f"there is no file {quote(source)}")
    try:
        model = YOLO(source)
        if type(model.model.model[-1]).__name__ == "RTDETRDecoder" and not isinstance(model, RTDETR):
            model = RTDETR(source)  # YOLO() returns one itself in newer releases (8.3.160 does, 8.3.99 did not)
    except RtdetrActError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no file {quote(source)}, and it could not be downloaded") from None
    except Exception as error:  # unpickling a file that is not a checkpoint raises errors of many classes
        if raising_module(error).startswith("rtdetr_act."):
            raise
        raise ModelError(
            f"{quote(source)} is not an Ultralytics checkpoint ({type(error).__name__}: {reason(error)})"
        ) from error
    return model


def _model_names() -> list[str]:
    return config_names() + [file.name for file in (ROOT / "cfg" / "models").rglob("*.yaml")]


def load_variants(source: str, activations: Iterable[str], **options: Unpack[SwapOptions]) -> dict[str, Any]:
    """Load variants of a model, as `load_variant` does; return them by their activation, in the order given.

    Args:
        source: Model YAML or checkpoint.
        activations: Plans, or "stock".
        **options: `scope`, `act_lr` and `init` of `patch_model`.

    Raises:
        RtdetrActError: The model or a plan is wrong.
    """
    return {activation: load_variant(source, activation, **options)[1] for activation in activations}


def load_variant(
    source: str,
    activation: str | Mapping[str, Any] | None,
    *,
    pretrained: str | None = None,
    conv: str | None = None,
    **options: Unpack[SwapOptions],
) -> tuple[str, Any]:
    """Load a variant of a model: its activations swapped, or the stock ones restored.

    Args:
        source: Model YAML or checkpoint.
        activation: A plan, as text or as plain data; "stock" for the model without any swap; None for the model as its
            file has it.
        pretrained: Checkpoint to take weights and, below the plan given, activations from.
        conv: Convolutions to replace, such as "dynamic_conv@backbone"; ignored if the activation is "stock".
        **options: `scope`, `act_lr` and `init` of `patch_model`, for a plan given as text. A plan given as plain data
            has its own scope and init, so that only `act_lr` (1.0 by default) is taken.

    Returns:
        The name of the variant, which is its plan as text or "stock", and the RTDETR or YOLO object.

    Raises:
        RtdetrActError: The model, the checkpoint or the plan is wrong.
    """
    model = load_model(source)
    if pretrained is not None:
        if plan := read_plan(load_model(pretrained).model):
            patch_model(model, plan)
        model.load(pretrained)
    if activation == STOCK:
        unpatch_model(model)
    elif isinstance(activation, Mapping):
        plan = replace(Plan.from_yaml(activation), act_lr=options.get("act_lr", 1.0))
        apply_plan(unwrap(model), plan, strict=True)
    elif activation is not None:
        patch_model(model, activation, **options)
    if conv is not None and activation != STOCK:
        apply_plan(unwrap(model), Plan.parse_convolutions(conv), strict=True)
        return (f"{activation}, {conv}" if isinstance(activation, str) else str(read_plan(model.model))), model
    return activation if isinstance(activation, str) else str(read_plan(model.model)) or STOCK, model
