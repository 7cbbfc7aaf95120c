"""Train variants of a model, and go on with a training that was interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_act.deploy.targets import list_target_warnings
from rtdetr_act.errors import InputError, Interrupted, RtdetrActError, quote
from rtdetr_act.integrations.ultralytics.arguments import check_device, set_project
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.models import STOCK, load_checkpoint, load_model, load_variant
from rtdetr_act.integrations.ultralytics.results import read_scores
from rtdetr_act.integrations.ultralytics.runs import Outcome, outcome_of, run_training, slug
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
from rtdetr_act.spec import as_list
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.plan import Plan, SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_variants(
    source: str | Path,
    activations: str | Sequence[str | None] | None = None,
    data: str | Path = "shapes",
    arguments: Mapping[str, Any] | None = None,
    *,
    conv: str | None = None,
    pretrained: str | Path | None = None,
    target: str | None = None,
    warn: Callable[[str], object] = warnings.warn,
    **options: Unpack[SwapOptions],
) -> Iterator[Outcome]:
    """Train variants of a model one after the other; yield the outcome of each when its training has ended.

    All variants are loaded, and data and device checked, before the first training starts, at the first `next()`.

    Args:
        source: Model YAML or checkpoint.
        activations: One plan or several, as `patch_model` takes them; "stock" for the model without any swap, None
            (default) for the model as its file has it.
        data: Data set, as in Ultralytics; "shapes" (default) for the embedded one, with settings that suit it.
        arguments: Ultralytics' training arguments, such as {"epochs": 100, "imgsz": 640}. Results go to `runs/<task>`
            unless `project` says otherwise. With several variants, the name of each is appended to `name`.
        conv: Convolutions to replace, such as "dynamic_conv@backbone"; not in the "stock" variant.
        pretrained: Checkpoint to take weights from.
        target: Deployment target, such as "hailo": `warn` is called for activations that it does not run natively.
        warn: Called with each warning, one sentence, before the first training starts.
        **options: `scope`, `act_lr`, `init`, `replaces` and `memory` of `patch_model`.

    Yields:
        Outcomes in the order of the variants. Where there are several, one that fails has `failure` set, and the next
        one is trained.

    Raises:
        RtdetrActError: The model, a plan, the data, the device or the target is wrong, or the only variant failed.
        Interrupted: The user pressed Ctrl-C.
    """
    settings, plans = dict(arguments or {}), as_list(activations)
    trained = pretrained or (source if Path(source).suffix == ".pt" else None)
    if pretrained is not None:
        load_model(pretrained)
    if data == "shapes":
        settings = {**SHAPES_SETTINGS, **settings}
    variants = [_load(source, activation, pretrained, conv, options) for activation in plans]
    sentences = [line for _, model, _ in variants for line in list_target_warnings(model, target)] if target else []
    plain = {each for each in plans if each not in (None, STOCK) and not Plan.parse(str(each), **options).needs_fit}
    if trained and plain and plain - {str(read_plan(load_model(trained).model))}:
        sentences.append(
            f"{quote(str(trained))} does not know its new activations, and a plain swap ruins what it learned: "
            "init=match starts from that"
        )
    for sentence in sentences:
        warn(sentence)
    task = str(variants[-1][1].task)
    settings["data"] = resolve_data(data)
    check_data(settings["data"], task)
    check_device(settings.get("device"))
    set_project(settings, task)
    several = len(variants) > 1
    while variants:
        name, model, weights = variants.pop(0)  # what it takes on the device is freed before the next one trains
        folder = settings.get("name") or Path(source).stem
        # With exist_ok=True, variants of the same name would overwrite one another.
        own = {**settings, **weights, "name": f"{folder}-{slug(name)}" if several or "name" not in settings else folder}
        try:
            run_training(model, **own)
            outcome = outcome_of(name, model)
        except RtdetrActError as error:
            if not several or isinstance(error, Interrupted):
                raise
            outcome = Outcome(name, failure=str(error))
        yield outcome


def _load(
    source: str | Path, activation: str | None, pretrained: str | Path | None, conv: str | None, options: SwapOptions
) -> tuple[str, Any, dict[str, str]]:
    """Load a variant; return its name, the model, and the training argument that takes `pretrained`, if any is left."""
    if pretrained is not None and activation not in (None, STOCK) and Plan.parse(activation, **options).needs_fit:
        # A fit starts from the pretrained weights, which must therefore be loaded before the swap.
        return *load_variant(source, activation, pretrained=pretrained, conv=conv, **options), {}
    left = {} if pretrained is None else {"pretrained": str(pretrained)}
    return *load_variant(source, activation, conv=conv, **options), left


def resume_training(weights: str | Path, arguments: Mapping[str, Any] | None = None) -> tuple[dict[str, float], Path]:
    """Go on with an interrupted training, to the epochs that it was started with.

    Args:
        weights: The `last.pt` of the training.
        arguments: Ultralytics' training arguments that may change on resume, such as {"batch": 8, "device": 0}.

    Returns:
        The two headline scores of the task on the best checkpoint, and the run folder.

    Raises:
        InputError: The checkpoint does not exist or is of a finished training, or Ultralytics cannot use an argument.
        ModelError: The file is not a checkpoint.
        TrainingError: The loss became non-finite, or memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    model = load_checkpoint(weights)
    if (model.ckpt or {}).get("epoch", -1) < 0 or model.ckpt.get("optimizer") is None:
        raise InputError(
            f"{quote(str(weights))} is of a finished training: resume takes the last.pt of an interrupted one"
        )
    scores = read_scores(run_training(model, resume=True, **(arguments or {})))
    return scores, Path(model.trainer.save_dir)
