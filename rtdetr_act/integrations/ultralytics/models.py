"""RTDETR and YOLO objects by name: from a YAML, a checkpoint, with a plan applied."""

from __future__ import annotations

import io
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
from rtdetr_act.files import convert_write_errors, write_atomically
from rtdetr_act.integrations.ultralytics.arguments import check_file_name
from rtdetr_act.integrations.ultralytics.checkpoints import describe_foreign_file
from rtdetr_act.integrations.ultralytics.configs import config_names, find_config
from rtdetr_act.integrations.ultralytics.model_yaml import BUILD_ERRORS, can_be_head, explain_forward_error
from rtdetr_act.surgery.model_plan import read_plan, split_model_yaml
from rtdetr_act.surgery.modules import preserve_attributes, unwrap
from rtdetr_act.surgery.patcher import apply_plan, patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan, SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOCK = "stock"  # the variant without any swap


def load_model(
    source: str | Path,
    activation: str | Plan | Mapping[str, Any] | None = None,
    *,
    pretrained: str | Path | None = None,
    conv: str | None = None,
    **options: Unpack[SwapOptions],
) -> Any:
    """Load an RTDETR or YOLO object by name, with its activations swapped if a plan is given.

    Args:
        source: Model YAML or .pt checkpoint: a path, a bare name of a shipped YAML such as "rtdetr-n.yaml", or a name
            that Ultralytics can download, such as "rtdetr-l.pt".
        activation: A plan, as `patch_model` takes it or as plain data; "stock" to undo every swap. Default: None, the
            model as its file has it.
        pretrained: Checkpoint to take weights and, below the plan given, activations from. Default: None.
        conv: Convolutions to replace, such as "dynamic_conv@backbone"; ignored if the activation is "stock". Default:
            None.
        **options: `scope`, `act_lr`, `init` and `memory` of `patch_model`, for a plan given as text. A plan given as
            plain data has its own, so that only `act_lr` (1.0 by default) is taken. `memory` alone swaps nothing.

    Raises:
        InputError: The file does not exist, or is not a model YAML.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
        SpecError: The model YAML or the plan names an activation or a module that does not exist.
        SelectionError: The plan matches no site, or its activation cannot stand at one of its sites.

    >>> from rtdetr_act import find_sites
    >>> find_sites(load_model("rtdetr-n.yaml", "arelu@neck"))[-7].current
    'arelu'
    """
    model = _load(str(source))
    if pretrained is not None:
        if plan := read_plan(_load(str(pretrained)).model):
            patch_model(model, plan)
        model.load(str(pretrained))
    if activation == STOCK:
        unpatch_model(model)
    elif isinstance(activation, Mapping):
        plan = replace(Plan.from_yaml(activation), act_lr=options.get("act_lr", 1.0))
        apply_plan(unwrap(model), plan, strict=True)
    elif activation is not None:
        patch_model(model, activation, **options)
    if activation in (None, STOCK) and options.get("memory") is not None:
        patch_model(model, Plan(memory=options["memory"]))
    if conv is not None and activation != STOCK:
        apply_plan(unwrap(model), Plan.parse_convolutions(conv), strict=True)
    return model


def _load(source: str) -> Any:
    """Load an RTDETR or YOLO object as its file has it."""
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


def load_checkpoint(weights: str | Path) -> Any:
    """Load an RTDETR or YOLO object from a .pt checkpoint.

    Raises:
        InputError: The file does not exist, or its name does not end in .pt.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
    """
    if not str(weights).endswith(".pt"):
        raise InputError(f"{quote(str(weights))} is not a checkpoint: give a .pt file")
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
        what = describe_foreign_file(source)
        problem = f" ({type(error).__name__}: {reason(error)})" if what is None else f": {what}"
        raise ModelError(f"{quote(source)} is not an Ultralytics checkpoint{problem}") from error
    return model


def _model_names() -> list[str]:
    return config_names() + [file.name for file in (ROOT / "cfg" / "models").rglob("*.yaml")]


def load_variants(source: str | Path, activations: Iterable[str], **options: Unpack[SwapOptions]) -> dict[str, Any]:
    """Load variants of a model, as `load_variant` does; return them by their activation, in the order given.

    Args:
        source: Model YAML or checkpoint.
        activations: Plans, or "stock".
        **options: `scope`, `act_lr`, `init`, `replaces` and `memory` of `patch_model`.

    Raises:
        RtdetrActError: The model or a plan is wrong.
    """
    return {activation: load_variant(source, activation, **options)[1] for activation in activations}


def load_variant(
    source: str | Path,
    activation: str | Mapping[str, Any] | None,
    *,
    pretrained: str | Path | None = None,
    conv: str | None = None,
    **options: Unpack[SwapOptions],
) -> tuple[str, Any]:
    """Load a variant of a model, as `load_model` does, and name it.

    Takes the arguments of `load_model`.

    Returns:
        The name of the variant, which is its plan as text or "stock", and the RTDETR or YOLO object.

    Raises:
        RtdetrActError: The model, the checkpoint or the plan is wrong.
    """
    model = load_model(source, activation, pretrained=pretrained, conv=conv, **options)
    if not isinstance(activation, str):
        return str(read_plan(model.model)) or STOCK, model
    return activation if conv is None or activation == STOCK else f"{activation}, {conv}", model


def save_checkpoint(model: Any, path: Path) -> None:
    """Write a model as the checkpoint of a finished training, in half precision as Ultralytics does.

    Args:
        model: RTDETR or YOLO object.
        path: The .pt file, which appears only when it is complete.

    Raises:
        InputError: The file cannot be written.
    """
    # Without what a training goes on with: of a last.pt, the average of the weights of before would be loaded.
    left_out = {"ema": None, "optimizer": None, "updates": None, "scaler": None, "epoch": -1}
    model.ckpt = {**(model.ckpt or {}), **left_out}  # None in 8.3 for a model made from a YAML
    content = io.BytesIO()  # torch's own writer raises RuntimeErrors without an errno
    model.save(content)
    with convert_write_errors(path):
        write_atomically(path, content.getvalue())
