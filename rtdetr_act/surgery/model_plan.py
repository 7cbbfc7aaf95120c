"""The plan that an Ultralytics model carries in its `yaml`: read it, set it, split it off a model YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rtdetr_act.errors import SpecError, quote
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.plan import Plan, Rule


def split_model_yaml(model_yaml: Mapping[str, Any]) -> tuple[dict[str, Any], Plan]:
    """Split a model YAML into what stock Ultralytics parses (four items a row, no `activation`) and its plan.

    The input is left as it is. Rows named later win over the top-level `activation:`, which covers the convolutional
    sites of all others; a named row covers its transformer sites too. `convolution: dynamic_conv@backbone` is the plan
    of the convolutions.

    Raises:
        SpecError: A row has not four or five items, or an activation in it is wrong.
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
                    rules.append(Rule(ActSpec.parse(row[4]), layers=(index,), scope="all"))
                except SpecError as error:
                    raise SpecError(f"row {number} of '{part}' in the model YAML: {error}") from None
            rows.append(list(row[:4]))
            index += 1
        stock[part] = rows
    return stock, replace(plan, rules=plan.rules + tuple(rules))


def normalise_model_yaml(model_yaml: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model YAML with four items a row and its whole plan under `activation`, the form that survives."""
    return with_plan(model_yaml, split_model_yaml(model_yaml)[1])


def with_plan(model_yaml: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the model YAML with four items a row and `plan` as its only plan."""
    stock, _ = split_model_yaml(model_yaml)
    value = plan.to_yaml()
    return stock if value is None else {**stock, "activation": value}


def is_model_yaml(data: object) -> bool:
    """Return whether something is the YAML of an Ultralytics task model."""
    return isinstance(data, Mapping) and "backbone" in data and "head" in data


def carries_plan(model: Any) -> bool:
    """Return whether a model is an Ultralytics task model, whose `yaml` its rebuilds are made from."""
    return is_model_yaml(getattr(model, "yaml", None))


def read_plan(model: Any) -> Plan:
    """Return the plan that a task model carries in its `yaml`; an empty plan for any other model."""
    return split_model_yaml(model.yaml)[1] if carries_plan(model) else Plan()


def set_plan(model: Any, plan: Plan) -> None:
    """Let a task model carry a plan, which replaces the one that it has; other models carry none."""
    if carries_plan(model):
        model.yaml = with_plan(model.yaml, plan)


def mark_fitted(model: Any) -> None:
    """Write into a model's plan that the network has its start after the swap, so that no training gives it another."""
    plan = read_plan(model)
    if plan.awaits_fit:
        set_plan(model, replace(plan, fitted=True))
