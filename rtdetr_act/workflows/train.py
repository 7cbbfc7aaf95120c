"""Train variants of a model, and go on with a training that was interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_act.deploy.targets import list_target_warnings
from rtdetr_act.errors import InputError, Interrupted, RtdetrActError, quote
from rtdetr_act.integrations.ultralytics.arguments import check_device
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.models import STOCK, load_checkpoint, load_model, load_variant
from rtdetr_act.integrations.ultralytics.results import read_scores
from rtdetr_act.integrations.ultralytics.runs import Outcome, outcome_of, run_training, slug
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
from rtdetr_act.surgery.plan import SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_variants(
    source: str,
    activations: Sequence[str | None] = (None,),
    data: str = "shapes",
    arguments: Mapping[str, Any] | None = None,
    *,
    conv: str | None = None,
    pretrained: str | None = None,
    target: str | None = None,
    warn: Callable[[str], object] = warnings.warn,
    **options: Unpack[SwapOptions],
) -> Iterator[Outcome]:
    """Train variants of a model one after the other; yield the outcome of each when its training has ended.

    Model, plans, data and device are checked for all variants before the first training starts, at the first `next()`.

    Args:
        source: Model YAML or checkpoint.
        activations: Plans, as `patch_model` takes them; "stock" for the model without any swap, None (default) for the
            model as its file has it.
        data: Data set, as in Ultralytics; "shapes" (default) for the embedded one, with settings that suit it.
        arguments: Ultralytics' training arguments, such as {"epochs": 100, "imgsz": 640}. Results go to `runs/<task>`
            unless `project` says otherwise. With several variants, the name of each is appended to `name`.
        conv: Convolutions to replace, such as "dynamic_conv@backbone"; not in the "stock" variant.
        pretrained: Checkpoint to take weights from.
        target: Deployment target, such as "hailo": `warn` is called for activations that it does not run natively.
        warn: Called with each warning, one sentence, before the first training starts.
        **options: `scope`, `act_lr` and `init` of `patch_model`.

    Yields:
        Outcomes in the order of the variants. Where there are several, one that fails has `failure` set, and the next
        one is trained.

    Raises:
        RtdetrActError: The model, a plan, the data, the device or the target is wrong, or the only variant failed.
        Interrupted: The user pressed Ctrl-C.
    """
    settings = dict(arguments or {})
    if pretrained is not None:
        load_model(pretrained)
        settings["pretrained"] = pretrained
    if data == "shapes":
        settings = {**SHAPES_SETTINGS, **settings}
    sentences: list[str] = []
    for activation in activations:
        _, model = load_variant(source, activation, conv=conv, **options)
        if target:
            sentences += list_target_warnings(model, target)
    for sentence in sentences:
        warn(sentence)
    task = str(model.task)
    settings["data"] = resolve_data(data)
    check_data(settings["data"], task)
    check_device(settings.get("device"))
    settings.setdefault("project", str(Path("runs", task).absolute()))
    for activation in activations:
        own = dict(settings)
        if len(activations) > 1 and "name" in own:  # with exist_ok=True they would overwrite one another
            own["name"] = f"{own['name']}-{slug(str(activation))}"
        try:
            outcome = train_variant(source, activation, own, conv=conv, **options)
        except RtdetrActError as error:
            if len(activations) == 1 or isinstance(error, Interrupted):
                raise
            outcome = Outcome(str(activation), failure=str(error))
        yield outcome


def train_variant(
    source: str,
    activation: str | None,
    arguments: Mapping[str, Any],
    *,
    conv: str | None = None,
    **options: Unpack[SwapOptions],
) -> Outcome:
    """Load a variant of a model, train it, and return its outcome.

    Args:
        source: Model YAML or checkpoint.
        activation: A plan, "stock" for the model without any swap, None for the model as its file has it.
        arguments: Ultralytics' training arguments, `data` and perhaps `pretrained` among them.
        conv: Convolutions to replace, such as "dynamic_conv@backbone"; ignored if the activation is "stock".
        **options: `scope`, `act_lr` and `init` of `patch_model`.

    Raises:
        RtdetrActError: The model, the plan or the data is wrong, or the loss became non-finite.
        Interrupted: The user pressed Ctrl-C.
    """
    given = dict(arguments)
    # A fit starts from the pretrained weights, which must therefore be loaded before the swap.
    fits = options.get("init") == "match" and activation not in (None, STOCK)
    pretrained = given.pop("pretrained", None) if fits else None
    name, model = load_variant(source, activation, pretrained=pretrained, conv=conv, **options)
    run_training(model, **{**given, "name": arguments.get("name") or f"{Path(source).stem}-{slug(name)}"})
    return outcome_of(name, model)


def resume_training(weights: str, arguments: Mapping[str, Any] | None = None) -> tuple[dict[str, float], Path]:
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
        raise InputError(f"{quote(weights)} is of a finished training: resume takes the last.pt of an interrupted one")
    scores = read_scores(run_training(model, resume=True, **(arguments or {})))
    return scores, Path(model.trainer.save_dir)
