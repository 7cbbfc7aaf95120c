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

from rtdetr_act.errors import (
    InputError,
    ModelError,
    RtdetrActError,
    quote,
    raising_module,
    reason,
    suggest,
)
from rtdetr_act.integrations.ultralytics.arguments import check_file_name
from rtdetr_act.integrations.ultralytics.configs import config_names, find_config
from rtdetr_act.integrations.ultralytics.model_yaml import BUILDING_ERRORS, explain_forward, is_head
from rtdetr_act.surgery.convolutions import patch_by_rules
from rtdetr_act.surgery.model_plan import read_plan, split_model_yaml
from rtdetr_act.surgery.modules import left_as_it_was, unwrap
from rtdetr_act.surgery.patcher import apply_to, patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan, SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


STOCK = "stock"


def load_model(source: str) -> Any:
    """Return the RTDETR or YOLO object of a model YAML, a checkpoint, or a name that Ultralytics can download.

    Raises:
        InputError: There is no such file, or it is no model YAML.
        ModelError: The file is no checkpoint, or holds a class that is not installed.
    """
    check_file_name(source)
    suffix = Path(source).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _load_yaml(source)
    if suffix == ".pt":
        return _load_checkpoint(source)
    if not suffix:
        raise InputError(f"{quote(source)} is not a model file: give a .yaml or a .pt{suggest(source, _model_names())}")
    raise ModelError(
        f"{quote(source)} cannot be trained or swapped: give a .yaml, or the .pt that it was exported from"
    )


def _load_yaml(source: str) -> Any:
    try:
        model_yaml = tasks.yaml_model_load(source)
    except RtdetrActError:
        raise
    # Ultralytics since 8.4 makes a ValueError of all that PyYAML raises, which fails so on a thousand brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{quote(source)} is not a valid YAML: {reason(error)}") from None
    except (OSError, AttributeError, TypeError, IndexError) as error:
        if find_config(source) or check_yaml(source, hard=False):
            why = reason(error) if isinstance(error, OSError) else "it needs 'backbone' and 'head'"
            raise InputError(f"{quote(source)} is not a model YAML: {why}") from None
        raise InputError(f"there is no model {quote(source)} here{suggest(source, _model_names())}") from None
    stock, _ = split_model_yaml(model_yaml)
    head = str(stock["head"][-1][2])
    is_rtdetr = "RTDETR" in head
    if not is_rtdetr and tasks.guess_model_task(stock) is None:
        raise InputError(
            f"{quote(source)} ends with {quote(head)}, which tells no task: let a head such as Detect be last"
        )
    model = (RTDETR if is_rtdetr else YOLO)(source)
    if not is_head(model.model.model[-1]):
        raise InputError(
            f"{quote(source)} ends with {quote(head)}, which is not a head such as Detect or RTDETRDecoder"
        )
    if is_rtdetr and not _is_shipped(source):
        # Ultralytics tries the other models as it builds them, to measure their strides.
        try:
            _try_forward(model.model, int(stock.get("channels", 3)))
        except BUILDING_ERRORS as error:
            if (explained := explain_forward(error, stock)) is None:
                raise
            raise explained from error
    return model


def _is_shipped(source: str) -> bool:
    """Say whether a model YAML is one of ours or of Ultralytics', all of which are known to run."""
    return not Path(source).exists() and "://" not in source


def _try_forward(network: Any, channels: int) -> None:
    """Run an image through a network, which stays as it was."""
    with left_as_it_was(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
        network.eval()(torch.zeros(1, channels, 320, 320))


def _load_checkpoint(source: str) -> Any:
    if not Path(source).is_file() and Path(source).name not in GITHUB_ASSETS_NAMES:
        raise InputError(f"there is no file {quote(source)}")
    try:
        model = YOLO(source)
        if type(model.model.model[-1]).__name__ == "RTDETRDecoder" and not isinstance(model, RTDETR):
            model = RTDETR(source)  # YOLO() switches by itself in newer releases (8.3.160 does, 8.3.99 did not)
    except RtdetrActError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no file {quote(source)}, and it could not be downloaded") from None
    except Exception as error:  # whatever an unpickler makes of bytes that are not a checkpoint
        if raising_module(error).startswith("rtdetr_act."):
            raise
        raise ModelError(
            f"{quote(source)} is not an Ultralytics checkpoint ({type(error).__name__}: {reason(error)})"
        ) from error
    return model


def _model_names() -> list[str]:
    return config_names() + [file.name for file in (ROOT / "cfg" / "models").rglob("*.yaml")]


def check_variants(
    source: str, activations: Iterable[str | None], *, conv: str | None = None, **how: Unpack[SwapOptions]
) -> str:
    """Try every plan on the model before the first of them trains for hours, and return the task of the model.

    Raises:
        RtdetrActError: The model or a plan is wrong.
    """
    model = load_model(source)
    for activation in activations:
        if activation is not None or conv is not None:
            _, model = load_variant(source, activation, conv=conv, **how)
    return str(model.task)


def load_variant(
    source: str,
    activation: str | Mapping[str, Any] | None,
    *,
    pretrained: str | None = None,
    conv: str | None = None,
    **how: Unpack[SwapOptions],
) -> tuple[str, Any]:
    """Return a model with its activations swapped, and the name of the variant.

    Args:
        source: Model YAML or checkpoint.
        activation: A plan, as text or as plain data, "stock" for the model without any swap, None for the model as its
            file has it.
        pretrained: Checkpoint to take weights and, below the plan given, activations from.
        conv: Convolutions to put in, such as "dynamic_conv@backbone", unless the activation is "stock".
        **how: As `patch_model` takes it, for a plan given; plain data says itself how, but for `act_lr`.

    Raises:
        RtdetrActError: The model, the checkpoint or the plan is wrong.
    """
    model = load_model(source)
    if pretrained is not None:
        if old := read_plan(load_model(pretrained).model):
            patch_model(model, old)
        model.load(pretrained)
    if activation == STOCK:
        unpatch_model(model)
    elif isinstance(activation, Mapping):
        plan = replace(Plan.from_yaml(activation), act_lr=how.get("act_lr", 1.0))
        apply_to(unwrap(model), plan, typed=True)
    elif activation is not None:
        patch_model(model, activation, **how)
    if conv is not None and activation != STOCK:
        patch_by_rules(model, conv)
        return (f"{activation}, {conv}" if isinstance(activation, str) else _plan_in(model)), model
    return activation if isinstance(activation, str) else _plan_in(model) or STOCK, model


def _plan_in(model: Any) -> str:
    return str(read_plan(model.model))
