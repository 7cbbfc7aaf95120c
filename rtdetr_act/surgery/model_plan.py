"""Read and write the plan of a model: in the `yaml` of an Ultralytics model, in an attribute of any other one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rtdetr_act.errors import SpecError, quote
from rtdetr_act.surgery.plan import Plan, Rule

METADATA_KEY = "rtdetr_act"  # under which the metadata of a state dict holds the plan of a module
_ATTRIBUTE = "_rtdetr_act_plan"
_GUARD = "rtdetr_act and "  # before the module of the first row, see `require_plugin`


def split_model_yaml(model_yaml: Mapping[str, Any]) -> tuple[dict[str, Any], Plan]:
    """Split a model YAML into a stock one, with four items per row and no `activation`, and its plan.

    The top-level `activation:` covers the convolutional sites of all rows. The activation of a row overrides it, and
    covers the transformer sites of that row too; `from=` and `init=` may follow it. `convolution:` is the plan of the
    convolutions, such as `dynamic_conv@backbone`.

    Args:
        model_yaml: The model YAML, which is not modified.

    Returns:
        The stock model YAML and the plan.

    Raises:
        SpecError: A row does not have four or five items, or an activation is invalid.
    """
    if not isinstance(model_yaml, Mapping):
        raise SpecError(f"a model YAML is a mapping with 'backbone' and 'head', not {quote(model_yaml)}")
    plan = Plan.from_yaml(model_yaml.get("activation"))
    if (convolution := model_yaml.get("convolution")) is not None:
        plan = replace(plan, rules=plan.rules + Plan.parse_convolutions(convolution).rules)
    stock = {key: value for key, value in model_yaml.items() if key not in ("activation", "convolution")}
    rules, index = [], 0
    for part in ("backbone", "head"):
        rows = []
        if not isinstance(model_yaml.get(part), list):
            raise SpecError(f"the model YAML has no list '{part}': is it a model, not a data set?")
        for number, row in enumerate(model_yaml[part]):
            if not isinstance(row, (list, tuple)) or len(row) not in (4, 5):
                count = len(row) if isinstance(row, (list, tuple)) else "no"
                raise SpecError(
                    f"row {number} of '{part}' in the model YAML has {count} items, "
                    "but takes [from, repeats, module, args] and optionally an activation"
                )
            if len(row) == 5:
                try:
                    rules.append(_parse_row_rule(row[4], index))
                except SpecError as error:
                    raise SpecError(f"row {number} of '{part}' in the model YAML: {error}") from None
            rows.append(_without_guard(row[:4]))
            index += 1
        stock[part] = rows
    return stock, replace(plan, rules=plan.rules + tuple(rules))


def _parse_row_rule(text: str, index: int) -> Rule:
    """Parse the activation of a row, such as `arelu from=relu`, into the rule of its layer."""
    rule = Rule.parse(text)
    if rule.layers or rule.sections:
        raise SpecError(f"{quote(text)} names layers, but stands in the row of its own layer: leave out '@…'")
    return replace(rule, layers=(index,), scope="all", init="paper" if rule.replaces == "convolution" else rule.init)


def _without_guard(row: Sequence[Any]) -> list[Any]:
    """Return a row without what `require_plugin` puts before its module."""
    return [item.removeprefix(_GUARD) if isinstance(item, str) else item for item in row]


def require_plugin(model_yaml: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model YAML on which a repository fails that does not know `activation:`; idempotent.

    YOLOv7 would build the stock network from it without a word. It evaluates the module of each row, so that it stops
    with "name 'rtdetr_act' is not defined", as Ultralytics and YOLOv5 do for the plan itself.
    """
    (source, repeats, module, args), *rows = model_yaml["backbone"]
    return {**model_yaml, "backbone": [[source, repeats, f"{_GUARD}{str(module).removeprefix(_GUARD)}", args], *rows]}


def _requires_plugin(model_yaml: Mapping[str, Any]) -> bool:
    return any(str(row[2]).startswith(_GUARD) for row in model_yaml["backbone"][:1])


def normalise_model_yaml(model_yaml: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model YAML with four items per row and its whole plan under `activation`, as checkpoints store it."""
    return set_yaml_plan(model_yaml, split_model_yaml(model_yaml)[1])


def set_yaml_plan(model_yaml: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return a model YAML with four items per row and `plan` in place of its own plan."""
    stock, _ = split_model_yaml(model_yaml)
    value = plan.to_model_yaml()
    if value is None:
        return stock
    changed = {**stock, "activation": value}
    return require_plugin(changed) if plan and _requires_plugin(model_yaml) else changed


def is_model_yaml(data: object) -> bool:
    """Return whether an object is the YAML of an Ultralytics task model."""
    return isinstance(data, Mapping) and "backbone" in data and "head" in data


def is_task_model(model: Any) -> bool:
    """Return whether a model is an Ultralytics task model, which is rebuilt from its `yaml`."""
    return is_model_yaml(getattr(model, "yaml", None))


def read_plan(model: Any) -> Plan:
    """Return the plan that a model carries, an empty one for a model that is not patched."""
    if is_task_model(model):
        return split_model_yaml(model.yaml)[1]
    return Plan.from_yaml(getattr(model, _ATTRIBUTE, None))


def set_plan(model: Any, plan: Plan) -> None:
    """Let a model carry a plan, which replaces the one that it has.

    A task model carries it in its `yaml`. Any other model carries it as plain data in an attribute, which deepcopy and
    pickle keep and state dicts leave out.
    """
    if is_task_model(model):
        model.yaml = set_yaml_plan(model.yaml, plan)
    elif plan:
        setattr(model, _ATTRIBUTE, plan.to_yaml())
    else:
        vars(model).pop(_ATTRIBUTE, None)


def read_plain_plan(model: Any) -> dict[str, Any] | None:
    """Return a copy of the plain data that a model other than a task model carries; None for one without a plan."""
    return copy.deepcopy(getattr(model, _ATTRIBUTE, None))


def mark_fitted(model: Any) -> None:
    """Record in a model's plan that the network is fitted after the swap, so that training does not fit it again."""
    plan = read_plan(model)
    if plan.needs_fit:
        set_plan(model, replace(plan, fitted=True))
