"""Load a model by name, check Ultralytics arguments, and train one variant: what every command that runs needs."""

from __future__ import annotations

import ast
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_act.arguments import check_ranges
from rtdetr_act.configs import config_names, find_config
from rtdetr_act.errors import (
    InputError,
    ModelError,
    RtdetrActError,
    TrainingError,
    origin,
    quote,
    reason,
    suggest,
)
from rtdetr_act.failures import explain, find_holder, find_roots, is_full, remove_empty
from rtdetr_act.plan import Plan, SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOCK = "stock"


@dataclass(frozen=True)
class Outcome:
    """What training one variant gave.

    Attributes:
        activation: The plan as the user wrote it, or "stock".
        sites: Number of sites swapped.
        parameters: Parameters of the whole model.
        gflops: Floating-point operations of one image at the training size, in 1e9, activations included.
        scores: The two headline metrics of the task on the best checkpoint, such as {"mAP50": …, "mAP50-95": …}.
        seconds_per_epoch: Mean wall time of an epoch, validation included.
        folder: The run folder with Ultralytics' own files.
        failure: Why the run gave no result, else "".
    """

    activation: str
    sites: int = 0
    parameters: int = 0
    gflops: float = 0.0
    scores: dict[str, float] | None = None
    seconds_per_epoch: float = math.nan
    folder: Path | None = None
    failure: str = ""


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


def check_file_name(source: str) -> None:
    """Refuse what no file can be called, such as 300 characters; raises InputError."""
    try:
        Path(source).exists()
    except (OSError, ValueError) as error:  # ValueError: a zero byte, before Python 3.12
        raise InputError(f"{quote(source)} cannot be the name of a file: {reason(error)}") from None


def _load_yaml(source: str) -> Any:
    import yaml
    from ultralytics import RTDETR, YOLO
    from ultralytics.nn import tasks
    from ultralytics.utils.checks import check_yaml

    from rtdetr_act.model_yaml import BUILDING_ERRORS, explain_forward, is_head
    from rtdetr_act.plan import split_model_yaml

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
    import torch

    from rtdetr_act.sites import left_as_it_was

    with left_as_it_was(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
        network.eval()(torch.zeros(1, channels, 320, 320))


def _load_checkpoint(source: str) -> Any:
    from ultralytics import RTDETR, YOLO
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

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
        if origin(error).startswith("rtdetr_act."):
            raise
        raise ModelError(
            f"{quote(source)} is not an Ultralytics checkpoint ({type(error).__name__}: {reason(error)})"
        ) from error
    return model


def _model_names() -> list[str]:
    from ultralytics.utils import ROOT

    return config_names() + [file.name for file in (ROOT / "cfg" / "models").rglob("*.yaml")]


def resolve_data(source: str) -> str:
    """Return what to give Ultralytics as `data`: a path for `shapes` (generated if need be) and for local files.

    Raises:
        InputError: There is no such data set.
    """
    from ultralytics.utils import ROOT

    from rtdetr_act.data import shapes

    check_file_name(source)
    if source in ("shapes", "shapes.yaml") and not Path(source).exists():
        return str(shapes())
    known = {file.name for file in (ROOT / "cfg" / "datasets").glob("*.yaml")}
    if Path(source).exists() or source in known or "://" in source:
        return source
    if Path(source).suffix in (".yaml", ".yml") or "/" in source:
        raise InputError(f"there is no data set {quote(source)}{suggest(Path(source).name, [*known, 'shapes'])}")
    return source  # a classification set such as imagenet10, which Ultralytics finds or downloads by name


def training_data(model: Any) -> str:
    """Return the data set that a checkpoint was trained with, as `resolve_data` does.

    Raises:
        InputError: The checkpoint does not tell, or the data set is no longer there. Ultralytics would take coco8 then.
    """
    from rtdetr_act.data import VERSION

    data = ((model.ckpt or {}).get("train_args") or {}).get("data")
    if not isinstance(data, str) or not data:
        raise InputError("the checkpoint does not tell what it was trained with: name a data set with --data")
    if (Path(data).parent.name, Path(data).name) == (f"shapes-v{VERSION}", "shapes.yaml"):
        data = "shapes"  # of another machine, or of a cache that was cleared
    try:
        return resolve_data(data)
    except InputError:
        raise InputError(
            f"the data set that the checkpoint was trained with, {quote(data)}, is not here: name one with --data"
        ) from None


def check_data(data: str, task: str) -> dict[str, Any]:
    """Return what Ultralytics knows of a data set, paths of its images among it, downloading it where it can.

    Raises:
        InputError: Images are missing, or the YAML is wrong.
    """
    from ultralytics.data.utils import check_cls_dataset, check_det_dataset

    from rtdetr_act.model_yaml import BUILDING_ERRORS

    try:
        with one_sentence():
            return check_cls_dataset(data) if task == "classify" else check_det_dataset(data)
    except RtdetrActError as error:
        raise InputError(f"data set {quote(data)}: {error}") from error
    except BUILDING_ERRORS as error:  # a YAML with other contents raises whatever its use raised
        if origin(error).startswith("rtdetr_act."):
            raise
        why = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{quote(data)} is not a data set that Ultralytics can read ({why})") from error


def parse_arguments(pairs: Iterable[str], taken: Iterable[str] = ()) -> dict[str, Any]:
    """Turn `key=value` words into Ultralytics arguments, checked as `check_arguments` does; raises InputError."""
    arguments = split_pairs(pairs)
    check_arguments(arguments, taken)
    return arguments


def split_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` words into values by key: Python literals, `True`, `none` and the like in any case, or text.

    Raises:
        InputError: A word is no pair.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{quote(pair)} is not an argument: write key=value, such as epochs=100")
        arguments[key] = _parse_value(value)
    return arguments


def check_arguments(arguments: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
    """Check Ultralytics arguments, with a suggestion where Ultralytics has no such key.

    Args:
        arguments: Their values by key.
        taken: Keys that the caller sets itself.

    Raises:
        InputError: A key is unknown or taken, or a value has a wrong type.
    """
    from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

    for key, value in arguments.items():
        if key in taken:
            raise InputError(f"'{key}' is set by this command itself: leave {quote(f'{key}={value}')} out")
        if key not in DEFAULT_CFG_DICT:
            hint = suggest(key, DEFAULT_CFG_DICT) or ", see docs.ultralytics.com/usage/cfg"
            raise InputError(f"Ultralytics has no argument {quote(key)}{hint}")
    try:
        get_cfg(overrides=dict(arguments))
    except (TypeError, ValueError, SyntaxError, KeyError, OverflowError) as error:
        raise InputError(reason(error)) from None
    check_ranges(arguments)


def _parse_value(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as of '{[]: 1}' and of '((((…'
        return text


def check_device(device: Any) -> None:
    """Check a device as Ultralytics does once a run has its folder already; raises InputError."""
    from ultralytics.utils.torch_utils import select_device

    with one_sentence():
        select_device("" if device is None else device, verbose=False)


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


def train_variant(
    source: str,
    activation: str | None,
    arguments: Mapping[str, Any],
    *,
    conv: str | None = None,
    **how: Unpack[SwapOptions],
) -> Outcome:
    """Build a model, swap its activations, train it, and read what came out.

    Args:
        source: Model YAML or checkpoint.
        activation: A plan, "stock" for the model without any swap, None for the model as its file has it.
        arguments: Ultralytics arguments of `train`, `data` and perhaps `pretrained` among them.
        conv: Convolutions to put in, such as "dynamic_conv@backbone", unless the activation is "stock".
        **how: As `patch_model` takes it, for a plan given.

    Raises:
        RtdetrActError: The model, the plan or the data is wrong, or the loss became non-finite.
    """
    given = dict(arguments)
    # A fit starts from what the weights were trained with, so the weights must be there before the swap.
    early = given.pop("pretrained", None) if how.get("init") == "match" and activation not in (None, STOCK) else None
    name, model = load_variant(source, activation, pretrained=early, conv=conv, **how)
    run_training(model, **{**given, "name": arguments.get("name") or f"{Path(source).stem}-{slug(name)}"})
    return outcome_of(name, model)


def outcome_of(name: str, model: Any) -> Outcome:
    """Return what the training of an RTDETR or YOLO object gave, under the name of its activation."""
    from rtdetr_act.flops import count_gflops

    return Outcome(
        activation=name,
        sites=count_sites(model),
        parameters=sum(parameter.numel() for parameter in model.model.parameters()),
        gflops=count_gflops(model.model, model.trainer.args.imgsz),
        scores=read_scores(model.metrics),
        seconds_per_epoch=read_epoch_time(Path(model.trainer.csv)),
        folder=Path(model.trainer.save_dir),
    )


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
    from rtdetr_act.convolutions.patching import patch_by_rules
    from rtdetr_act.patcher import apply_to, patch_model, unpatch_model
    from rtdetr_act.sites import unwrap
    from rtdetr_act.ultralytics_hooks import plan_of

    model = load_model(source)
    if pretrained is not None:
        if old := plan_of(load_model(pretrained).model):
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


def run_training(model: Any, **arguments: Any) -> Any:
    """Train, and return Ultralytics' metrics; a run that fails before its first checkpoint leaves no folder.

    Raises:
        InputError: Ultralytics cannot use an argument or the data, or the run folder cannot be written.
        TrainingError: The loss became non-finite, or memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    from rtdetr_act.ultralytics_hooks import started_here

    model.add_callback("on_train_epoch_end", stop_at_non_finite_loss)
    model.add_callback("on_pretrain_routine_start", started_here)
    place = Path(str(arguments.get("project")), str(arguments.get("name")))
    resumed, started = bool(arguments.get("resume")), time.time()
    reused = resumed or (bool(arguments.get("exist_ok")) and place.exists())
    roots = find_roots(arguments)
    try:
        return model.train(**arguments)
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        trainer = find_holder(error)
        last = Path(trainer.last) if hasattr(trainer, "last") else None
        # The last.pt of a folder that is used again may be of the run before. File systems keep time to two seconds.
        begun = last is not None and last.exists() and (resumed or last.stat().st_mtime > started - 2)
        if trainer is not None and not reused and not begun:
            shutil.rmtree(trainer.save_dir, ignore_errors=True)
            remove_empty(Path(trainer.save_dir), roots)
        if isinstance(error, KeyboardInterrupt) or is_full(error):
            on = f"go on with: rtdetr-act resume {last}" if begun else "no epoch was finished"
            raise type(explained)(f"{explained}; {on}") from error
        if explained is error:
            raise
        raise explained from error


@contextmanager
def one_sentence(**arguments: Any) -> Iterator[None]:
    """Turn what Ultralytics raises on wrong arguments and data into errors of one sentence; bugs stay tracebacks.

    A folder that was made for results and got none is removed.

    Args:
        **arguments: Those that Ultralytics is called with; `project` and `name` say where results go.

    Raises:
        InputError: For a device, format or data set that Ultralytics cannot use, and for a full disk.
        TrainingError: For a loss that stayed NaN, and where memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    roots = find_roots(arguments)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        if holder := find_holder(error):
            remove_empty(Path(holder.save_dir), roots)
        if explained is error:
            raise
        raise explained from error


def stop_at_non_finite_loss(trainer: Any) -> None:
    """End a training whose loss is NaN or infinite after its first epoch, where Ultralytics would go on.

    From the second epoch on, Ultralytics goes back to the last checkpoint by itself, three times (8.3.220 does, 8.3.210
    did not).
    """
    import torch

    recovers = hasattr(trainer, "_handle_nan_recovery") and trainer.epoch > trainer.start_epoch
    if not recovers and not bool(torch.isfinite(trainer.loss).all()):
        raise TrainingError(
            f"the loss became {float(trainer.loss.detach()):g} in epoch {trainer.epoch + 1} of {trainer.save_dir}: "
            "try a smaller lr0, another activation, or amp=False"
        )


def count_sites(model: Any) -> int:
    """Return how many sites of a model hold a swapped activation."""
    from rtdetr_act.sites import placed_activations, unwrap

    return sum(1 for _ in placed_activations(unwrap(model)))


def read_scores(metrics: Any) -> dict[str, float]:
    """Return the two headline scores of Ultralytics metrics: mAP50 and mAP50-95, or top1 and top5 for classification.

    Segmentation and pose have boxes too; their own mask or keypoint scores come last in Ultralytics' dictionary and
    are the ones taken.
    """
    found = metrics if isinstance(metrics, dict) else getattr(metrics, "results_dict", {})
    scores = {}
    for key, value in found.items():
        short = key.removeprefix("metrics/").split("(")[0].removeprefix("accuracy_")
        if short in ("mAP50", "mAP50-95", "top1", "top5"):
            scores[short] = float(value)
    return scores


def read_epoch_time(results: Path) -> float:
    """Return the mean seconds of an epoch, validation included, from a results.csv; NaN where it has no times.

    Ultralytics writes the seconds since the start of the training; 8.3.0 did not yet.
    """
    if not results.is_file():
        return math.nan
    try:
        header, *rows = (line.replace(" ", "").split(",") for line in results.read_text(encoding="utf-8").splitlines())
        return float(rows[-1][header.index("time")]) / len(rows)
    except (ValueError, IndexError):  # no line, no times, or a last line that was cut
        return math.nan


def slug(text: str) -> str:
    """Turn a plan into a folder name: `leaky_relu(0.1)@0-9` becomes `leaky_relu-0.1-0-9`."""
    words = "".join(char if char.isalnum() or char in "._-" else " " for char in text).split()
    return "-".join(words)[:80]


def _plan_in(model: Any) -> str:
    from rtdetr_act.ultralytics_hooks import plan_of

    return str(plan_of(model.model))
