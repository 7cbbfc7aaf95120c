"""Keep the plan of a model that is patched often short, by what it gives at each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.protocol import Replaces, SiteLayout
from rtdetr_act.activations.registry import get_registered_name
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.plan import Plan, Rule, merge_rules
from rtdetr_act.surgery.sites import Site


@dataclass(frozen=True)
class _State:
    """What a site holds after some stages of a plan.

    Attributes:
        name: As in `Site`, and so are the next four.
        layer: Index of the layer.
        section: The section.
        layout: The layout.
        replaces: The kind of site.
        activation: Registered name of the activation.
        spec: What a rule inserted; None for the stock module.
        fitted_to: What the site held before, if the rule has `init="match"`: constants depend on it, such as the slope
            of `leaky_relu`.
    """

    name: str
    layer: int | None
    section: str
    layout: SiteLayout
    replaces: Replaces
    activation: str | None
    spec: ActSpec | None = None
    fitted_to: _State | None = None


def simplify_plan(sites: Sequence[Site], plan: Plan) -> Plan:
    """Return a plan with fewer stages and rules that gives the same at every site, also when the model is rebuilt.

    The last stage is merged with its base where both can be applied at once, and rules without effect are left out.

    Args:
        sites: All sites of the model, patched or not.
        plan: The plan that the model carries, which is applied to the stock model.
    """
    stock = [_get_stock_state(site) for site in sites]
    result = _get_result(stock, plan)
    if plan.base is not None and not any(rule.init == "match" for rule in plan.rules):
        merged = replace(plan.base, rules=merge_rules(plan.base.rules, plan.rules))
        merged = _with_options(merged, plan)
        plan = merged if _get_result(stock, merged) == result else plan
    plan = _drop_overridden(stock, plan)
    if plan.base is None:
        return plan
    stages = plan.stages
    for number, stage in enumerate(stages):
        for rule in stage.rules:
            shorter = list(stages)
            shorter[number] = _without(stages[number], rule)
            if _get_result(stock, _join(shorter)) == result:
                stages = shorter
    return _join(stages)


def _get_stock_state(site: Site) -> _State:
    """Return what a site holds in the stock model."""
    placed = get_placement(site.module)
    if placed and site.replaces == "activation":
        site = replace(site, module=placed.original)
    return _State(site.name, site.layer, site.section, site.layout, site.replaces, site.activation)


def _apply_stage(stage: Plan, state: _State) -> _State:
    """Return what a site holds after a stage."""
    rule = stage.find_rule(state)
    if rule is None:
        return state
    name = get_registered_name(rule.activation.name)
    return replace(state, activation=name, spec=rule.activation, fitted_to=state if rule.init == "match" else None)


def _get_result(stock: Sequence[_State], plan: Plan) -> tuple[list[_State], list[_State] | None]:
    """Return what the sites hold in the end, and in the network that the next training fits to, if it does."""
    states = [list(stock)]
    for stage in plan.stages:
        states.append([_apply_stage(stage, state) for state in states[-1]])
    if not plan.needs_fit:
        return states[-1], None
    reference = plan.reference
    return states[-1], states[len(reference.stages) if reference else 0]


def _drop_overridden(stock: Sequence[_State], plan: Plan) -> Plan:
    """Return a plan without the rules that are the last one to match at none of the sites."""
    states, stages = list(stock), []
    for stage in plan.stages:
        last = [stage.find_rule(state) for state in states]
        states = [_apply_stage(stage, state) for state in states]
        stages.append(replace(stage, rules=tuple(rule for rule in stage.rules if any(rule is each for each in last))))
    return _join(stages)


def _without(stage: Plan, rule: Rule) -> Plan:
    return replace(stage, rules=tuple(each for each in stage.rules if each is not rule))


def _join(stages: Sequence[Plan]) -> Plan:
    """Return the plan with these stages, of which those without rules are left out."""
    plan: Plan | None = None
    for stage in stages:
        if stage.rules or plan is None:
            plan = replace(stage, base=plan if plan is not None and plan.rules else None)
    assert plan is not None
    return _with_options(plan, stages[-1])


def _with_options(plan: Plan, last: Plan) -> Plan:
    """Return a plan with the options of the last of several stages that it stands for."""
    return replace(
        plan,
        default_act=last.default_act,
        act_lr=last.act_lr,
        fitted=plan.fitted or last.fitted,
        treat_as=last.treat_as,
        memory=last.memory,
    )
