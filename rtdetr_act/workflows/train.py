"""Train variants of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_act.integrations.ultralytics.models import STOCK, load_variant
from rtdetr_act.integrations.ultralytics.runs import Outcome, outcome_of, run_training, slug
from rtdetr_act.surgery.plan import SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
