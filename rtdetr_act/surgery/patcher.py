"""Apply a plan to a model, undo it, report it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rtdetr_act.activations import registry
from rtdetr_act.activations.placed import Placement, get_placement, set_placement
from rtdetr_act.activations.protocol import Entry, Replaces
from rtdetr_act.activations.temperature import TAU_EPOCHS, TAU_START
from rtdetr_act.errors import ModelError, SelectionError, SpecError, quote
from rtdetr_act.formatting import format_count, join_words
from rtdetr_act.results import Result, Table, TableResult, to_plain
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.convolutions import get_original_convolution
from rtdetr_act.surgery.coverage import Coverage, measure_coverage
from rtdetr_act.surgery.functional_calls import find_unreachable_calls
from rtdetr_act.surgery.low_memory import remove_low_memory_hooks, set_low_memory_hooks
from rtdetr_act.surgery.match import match
from rtdetr_act.surgery.model_plan import is_task_model, read_plan, set_plan
from rtdetr_act.surgery.modules import set_child, unwrap
from rtdetr_act.surgery.optimizer import add_to_optimizer, check_optimizer, remove_from_optimizer
from rtdetr_act.surgery.plan import (
    MAX_STAGES,
    Init,
    Memory,
    Plan,
    Rule,
    Scope,
    SwapOptions,
    check_memory,
    check_overrides,
    format_layers,
)
from rtdetr_act.surgery.rewiring import is_rewired, rewire, unwire
from rtdetr_act.surgery.simplify import simplify_plan
from rtdetr_act.surgery.sites import (
    Site,
    collect_sites,
    iterate_placed_activations,
    iterate_placed_convolutions,
    was_in_place,
)
from rtdetr_act.surgery.state_dicts import add_state_dict_hooks, remove_state_dict_hooks
from rtdetr_act.surgery.untrained import watch_optimizers
from rtdetr_act.tables import align_columns

KINDS: tuple[Replaces, ...] = ("activation", "convolution")


@dataclass(frozen=True, repr=False)
class Swap(Result):
    """One swapped site.

    Attributes:
        site: The site, with its new module.
        before: What was replaced, such as "SiLU".
        after: The spec of the new module, such as "arelu".
        parameters: Number of parameters of the new module.
        parameters_before: Number of parameters of what was replaced.
        misfit: Relative error of the fit, as returned by `match`; None if nothing was fitted.
    """

    site: Site
    before: str
    after: str
    parameters: int
    parameters_before: int = 0
    misfit: float | None = None

    def _summarise(self) -> str:
        """Return name of the site, before and after."""
        return f"{self.site.name}, {self.before} -> {self.after}"

    def to_dict(self) -> dict[str, Any]:
        """Return the swap as plain data, with the qualified name of the site as `site`."""
        return {
            "site": self.site.name,
            "layer": self.site.layer,
            "section": self.site.section,
            "owner": self.site.owner_class,
            "channels": self.site.channels,
            "layout": self.site.layout,
            "before": self.before,
            "after": self.after,
            "parameters": self.parameters,
            "parameters_before": self.parameters_before,
            "misfit": to_plain(self.misfit),
        }


@dataclass(frozen=True, repr=False)
class PatchReport(TableResult):
    """The result of `patch_model` or `patch_convs`.

    Attributes:
        swaps: One entry per swapped site, in module order.
        kept: Names of the unchanged sites, of the kinds (activations, convolutions) that the plan has rules for.
        plan: The whole plan of the model after the swap.
        unseen: Functional activations in the code of blocks, which cannot be swapped.
        pooled: Names of the sites unchanged only because they stand on maps that were pooled to a single position, as
            in squeeze-and-excitation, which scope="conv" leaves out.
        measure: Measures `coverage`.
    """

    swaps: tuple[Swap, ...]
    kept: tuple[str, ...] = ()
    plan: Plan = field(default_factory=Plan)
    unseen: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()
    measure: Callable[[], Coverage] | None = field(default=None, compare=False)

    @cached_property
    def coverage(self) -> Coverage:
        """How many activations run in a forward pass, how many of them are swapped, and which are not.

        It is measured when it is first read, in two forward passes of the stock model.

        Raises:
            ModelError: The model cannot be called; `example_input` of `patch_model` is its input.
        """
        if self.measure is None:
            raise ModelError("this report was not made by a swap, so there is no model to count in")
        return self.measure()

    def __len__(self) -> int:
        """Return the number of swapped sites."""
        return len(self.swaps)

    def of(self, kind: Replaces) -> tuple[Swap, ...]:
        """Return the swaps of activations or of convolutions."""
        return tuple(swap for swap in self.swaps if swap.site.replaces == kind)

    @property
    def sites(self) -> list[str]:
        """Qualified names of the swapped sites."""
        return [swap.site.name for swap in self.swaps]

    @property
    def parameters(self) -> int:
        """Total number of parameters of the inserted modules."""
        return sum(swap.parameters for swap in self.swaps)

    def _summarise(self) -> str:
        """Return the number of sites, what stands there now, and its parameters."""
        names = join_words(list(dict.fromkeys(swap.after for swap in self.swaps)), 3)
        counts = f"{format_count(len(self), 'site')} swapped", names, format_count(self.parameters, "parameter")
        return ", ".join(filter(None, counts))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, with the plan as `model.yaml` has it."""
        return {
            "swaps": to_plain(self.swaps),
            "kept": list(self.kept),
            "plan": self.plan.to_yaml(),
            "pooled": list(self.pooled),
            "unseen": list(self.unseen),
            "parameters": self.parameters,
        }

    def _make_table(self) -> Table:
        """Return a row per swapped site."""
        columns = "site layer section owner channels layout before after parameters parameters_before misfit".split()
        return columns, ([swap[column] for column in columns] for swap in to_plain(self.swaps))

    def __str__(self) -> str:
        """Return a table of the swaps, with one row per section, kind of swap and layout."""
        groups: dict[tuple[str, str, str, str], list[Swap]] = {}
        for swap in self.swaps:
            key = (swap.site.section, swap.before, swap.after, swap.site.layout)
            groups.setdefault(key, []).append(swap)
        rows = [("section", "before", "after", "layout", "sites", "parameters", "layers")]
        for (section, before, after, layout), swaps in groups.items():
            layers = format_layers({swap.site.layer for swap in swaps if swap.site.layer is not None})
            parameters = sum(swap.parameters for swap in swaps)
            rows.append((section or "-", before, after, layout, str(len(swaps)), f"{parameters:,}", layers or "-"))
        lines = align_columns(rows) if groups else []
        activations, convolutions = self.of("activation"), self.of("convolution")
        if misfits := [swap.misfit for swap in activations if swap.misfit is not None]:
            lines.append(f"{len(misfits)} fitted to what they replace, {max(misfits):.1%} off at most")
        if activations or not convolutions:
            count = sum(swap.parameters for swap in activations)
            kept = "" if convolutions else f", {len(self.kept)} kept"
            lines.append(f"{len(activations)} sites swapped{kept}, {count:,} activation parameters")
        if convolutions:
            now = sum(swap.parameters for swap in convolutions)
            then = sum(swap.parameters_before for swap in convolutions)
            kept = "" if activations else f", {len(self.kept)} kept"
            size = f"{now:,} parameters in them ({then:,} before)"
            lines.append(f"{len(convolutions)} convolutions replaced{kept}, {size}")
        if activations and convolutions:
            lines.append(f"{len(self.kept)} sites kept")
        if self.pooled:
            left = format_count(len(self.pooled), "site")
            lines.append(f"{left} on maps pooled to one position (squeeze-and-excitation) kept: scope='all' swaps them")
        if self.plan.base or any(rule.holding for rule in self.plan.rules):
            lines.append(f"plan: {self.plan}")
        if self.plan.memory == "low":
            lines.append("memory: low, what is cheap to compute again is not kept for the backward pass")
        return "\n".join([*lines, *([f"not reached: {', '.join(self.unseen)}"] if self.unseen else [])])


def patch_model(
    model: Any,
    activation: str | Plan,
    *,
    layers: str | int | Iterable[int] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    scope: Scope = "conv",
    act_lr: float = 1.0,
    init: Init = "paper",
    example_input: Any = None,
    replaces: str | Iterable[str] | None = None,
    optimizer: Optimizer | None = None,
    treat_as: Mapping[Any, str] | None = None,
    memory: Memory | None = None,
) -> PatchReport:
    """Swap the activations of a model in place; each site gets a separate instance.

    Device, dtype, training mode, memory format and all other weights are kept. For an Ultralytics model the plan is
    stored in `model.yaml`, so that training, resuming and checkpoints keep it; for any other model, `plan_of` reads it
    from the model and from its state dicts. A later call replaces the activations at the sites it selects. If an error
    is raised, the model is not changed. In a custom training loop, patch the model before building the optimizer and
    call `add_to_optimizer`, or give the optimizer here.

    Args:
        model: RTDETR, YOLO, an Ultralytics task model, or any torch.nn.Module.
        activation: A name such as "arelu" or "leaky_relu(negative_slope=0.1)", or a whole plan such as
            "dyrelu_b@backbone, dyrelu_c@neck, silu@22-27".
        layers: Ultralytics layers, as "0-9", "0-3+7", "backbone", "backbone+12", 5 or a list of indices. Default: None,
            all layers.
        include: Glob pattern(s) on qualified site names, of which one must match. Default: None.
        exclude: Glob pattern(s) on qualified site names, of which none may match. Default: None.
        scope: "conv" (default) for convolutional sites, "all" for transformer sites too.
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters in training. Default: 1.0.
        init: "paper" (default) for the activation's default initialisation, "match" to fit it to the activation that it
            replaces, if it has parameters or a constant to fit, as prelu, leaky_relu, pwlu and dyrelu_b have.
            With "match" the next training with Ultralytics begins with `refit`, for any activation.
        example_input: Input of a model that is not from Ultralytics, a tensor or a tuple of arguments, for a forward
            pass that determines channels and layouts. Default: None, zeros (1, C, 224, 224), or (1, C, 4096) or
            (1, C, 16, 64, 64) if the first convolution is a `Conv1d` or a `Conv3d`.
        replaces: Name(s) of activations, such as "silu" or ["silu", "relu"]: only sites that hold one of them now are
            swapped. Default: None, whatever they hold.
        optimizer: The optimizer that trains the model, which gets the new parameters as by `add_to_optimizer`, and no
            longer holds those of activations that were replaced. Default: None.
        treat_as: "activation" or "other" by class, or by its qualified or bare name, for modules of your own that
            `find_sites` takes for something else. Default: None.
        memory: "low" to keep about half as much for the backward pass, or less: the results of BatchNorm, activations,
            sums and concatenations are computed again there, exactly, which costs 5 to 11 % of a step of rtdetr-l on a
            CPU, more in small networks. "normal" to end that. It is of the whole model, and "memory=low" alone is an
            `activation` that swaps nothing. `torch.compile` plans memory by itself. Default: None, as the model has it.

    Returns:
        The report; `len(report)` is the number of swapped sites, and `print(report)` prints a table.

    Raises:
        SpecError: The activation, its arguments or the selection is invalid.
        SelectionError: A rule matches no site, or its activation does not support one of its sites.
        ModelError: The model is exported, wrapped or compiled, or the optimizer is another model's or has a scheduler
            that cannot learn of a new group.
        InputError: `optimizer` is not an optimizer of torch.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> len(patch_model(net, "arelu"))
    2
    >>> net[1]
    AReLU()
    """
    root = unwrap(model)
    if isinstance(activation, Plan):
        plan = replace(activation, memory=check_memory(memory) or activation.memory)
        return _patch(root, plan, optimizer, example_input)
    how: SwapOptions = {"scope": scope, "act_lr": act_lr, "init": init, "replaces": replaces, "memory": memory}
    plan = Plan.parse(activation, layers=layers, include=include, exclude=exclude, treat_as=treat_as, **how)
    return _patch(root, plan, optimizer, example_input, strict=True)


def patch_convs(
    model: Any,
    kernels: int = 4,
    layers: str | int | Iterable[int] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    reduction: int = 4,
    tau: float = 1.0,
    tau_start: float | None = TAU_START,
    tau_epochs: float = TAU_EPOCHS,
    optimizer: Optimizer | None = None,
) -> PatchReport:
    """Replace the convolutions of a model by dynamic convolutions, in place.

    Each one is initialised as the convolution that it replaces. For an Ultralytics model the plan is stored in
    `model.yaml`, so that training, resuming and checkpoints keep it. In a custom training loop, patch the model before
    building the optimizer or give the optimizer here, and call `set_epoch(model, epoch)` during training. The first
    convolution is kept, as in the paper, and so are frozen ones, the prediction layers of an Ultralytics head, and
    those whose blocks read their weights (RepConv).

    Args:
        model: RTDETR, YOLO, an Ultralytics task model, or any torch.nn.Module.
        kernels: Number K of kernels per convolution. Default: 4.
        layers: Ultralytics layers, as "0-9", "0-3+7", "backbone", "backbone+12", 5 or a list of indices. Default: None,
            all layers.
        include: Glob pattern(s) on qualified names of convolutions, of which one must match. Default: None.
        exclude: Glob pattern(s), of which none may match. Default: None.
        reduction: Reduction of the channels in the hidden layer of the attention. Default: 4.
        tau: Final temperature of the attention. Default: 1.
        tau_start: Initial temperature, None for a constant temperature `tau`. Default: 30.
        tau_epochs: Epochs over which the temperature is annealed linearly. Default: 10.
        optimizer: The optimizer that trains the model, as in `patch_model`. Default: None.

    Returns:
        The report; `len(report)` is the number of replaced convolutions, and `print(report)` prints a table.

    Raises:
        SpecError: An argument is invalid.
        SelectionError: No convolution is selected.
        ModelError: The model is exported, wrapped or compiled.

    Paper: Chen et al., CVPR 2020, arXiv:1912.03458.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> patch_convs(net, kernels=2).sites
    ['2']
    """
    defaults = registry.get_default_arguments("dynamic_conv")
    values = (kernels, reduction, tau, tau_start, tau_epochs)
    given = {name: value for name, value in zip(defaults, values, strict=True) if value != defaults[name]}
    plan = Plan.parse("dynamic_conv", layers=layers, include=include, exclude=exclude)
    spec = ActSpec("dynamic_conv", (), tuple(given.items()))
    rules = tuple(replace(rule, activation=spec) for rule in plan.rules)
    return _patch(unwrap(model), replace(plan, rules=rules), optimizer, strict=True)


def _patch(
    root: nn.Module, plan: Plan, optimizer: Optimizer | None, example_input: Any = None, strict: bool = False
) -> PatchReport:
    """Apply a plan to a model, and let an optimizer, if there is one, follow."""
    if optimizer is None:
        return apply_plan(root, plan, example_input=example_input, strict=strict)
    check_optimizer(root, optimizer, new_group=True)  # before the model is changed
    before = list(root.parameters())
    report = apply_plan(root, plan, example_input=example_input, strict=strict)
    kept = {id(parameter) for parameter in root.parameters()}
    remove_from_optimizer(optimizer, [parameter for parameter in before if id(parameter) not in kept])
    add_to_optimizer(root, optimizer)
    return report


def apply_plan(root: nn.Module, plan: Plan, *, example_input: Any = None, strict: bool = False) -> PatchReport:
    """Apply a plan to a model in addition to the plan that it already has; on an error, nothing is changed.

    Args:
        root: The module.
        plan: The plan; its base, if any, is applied first.
        example_input: As in `patch_model`.
        strict: Raise if later rules override a rule at all of its sites. That is a mistake in a plan that a user has
            just written, but normal in one that was read from a model. Default: False.

    Returns:
        The report, with the whole plan of the model.

    Raises:
        SpecError: An activation is unknown, or its arguments are invalid.
        SelectionError: A rule matches no site, or its activation does not support one of its sites.
        ModelError: A BatchNorm was folded into a dynamic convolution, or too many swaps build on one another.
    """
    plan = resolve_plan(plan)
    treat_as = {**dict(read_plan(root).treat_as), **dict(plan.treat_as)}
    sites = collect_sites(root, "", getattr(root, "yaml", None), KINDS, example_input, treat_as)
    if not sites and any(rule.replaces == "activation" for rule in plan.rules):
        raise SelectionError(f"the model has no activation site{_describe_leaves(root)}")
    carried = _extend_plan(sites, read_plan(root), plan)
    report = swap_sites(sites, plan, strict=strict)
    set_plan(root, carried)
    set_low_memory_hooks(root)
    if carried.rules and not is_task_model(root):
        add_state_dict_hooks(root)
    measure = partial(measure_coverage, root, example_input)
    return replace(report, plan=carried, unseen=tuple(find_unreachable_calls(root)), measure=measure)


def _extend_plan(sites: Sequence[Site], carried: Plan, plan: Plan) -> Plan:
    """Return the plan that a model carries after another one has been applied to it."""
    for stage in plan.stages:
        carried = simplify_plan(sites, carried.followed_by(stage))
    if len(carried.stages) > MAX_STAGES:
        raise ModelError(
            f"more than {MAX_STAGES} swaps with from= or init='match' would build on one another: unpatch the model "
            "before this one"
        )
    return replace(carried, memory=None) if carried.memory == "normal" else carried


def swap_sites(sites: Sequence[Site], plan: Plan, *, strict: bool = False) -> PatchReport:
    """Apply a plan to sites: build all modules, then insert them; on an error, nothing is changed.

    Args:
        sites: The sites, as returned by `collect_sites`.
        plan: The plan, as returned by `resolve_plan`; its base, if any, is applied first.
        strict: As in `apply_plan`.

    Returns:
        The report.

    Raises:
        SelectionError: A rule matches no site, or its activation does not support one of its sites.
        ModelError: A BatchNorm was folded into a dynamic convolution.
    """
    stages = plan.stages
    now = {site.name: site for site in sites}
    swaps: dict[str, Swap] = {}
    # A swap must not change the random state, so that a patched run has the same other weights, data order and
    # augmentations as the stock run with the same seed, and the two can be compared as a pair.
    with torch.random.fork_rng(devices=[]):
        for stage in stages:
            current = list(now.values())
            _check_selections(current, stage.rules)
            if strict and stage is stages[-1]:
                check_overrides(stage.rules, current)
            shared: dict[int, nn.Module] = {}  # a convolution that is used at several sites has one replacement
            for site in current:
                if rule := stage.find_rule(site):
                    swap = _build_swap(site, rule, shared)
                    now[site.name] = swap.site
                    if earlier := swaps.get(site.name):
                        swap = replace(swap, before=earlier.before, parameters_before=earlier.parameters_before)
                    swaps[site.name] = swap
    for site in sites:
        if site.name in swaps:
            _insert(site, swaps[site.name].site.module)
    if any(swap.parameters for swap in swaps.values() if swap.site.replaces == "activation"):
        watch_optimizers()
    kinds = {rule.replaces for stage in stages for rule in stage.rules}
    kept = tuple(site.name for site in sites if site.replaces in kinds and site.name not in swaps)
    everywhere = [replace(rule, scope="all") for stage in stages for rule in stage.rules]
    left = (site for site in sites if site.layout == "pooled" and site.name not in swaps)
    pooled = tuple(site.name for site in left if any(rule.selects(site) for rule in everywhere))
    return PatchReport(tuple(swaps[site.name] for site in sites if site.name in swaps), kept, plan, pooled=pooled)


def resolve_plan(plan: Plan) -> Plan:
    """Return a plan with registered names for aliases, after validating all arguments, those of its base included.

    Raises:
        SpecError: An activation is unknown, its arguments are invalid, or a rule for convolutions has `from`.
    """
    rules = tuple(map(_resolve_rule, plan.rules))
    return replace(plan, rules=rules, base=None if plan.base is None else resolve_plan(plan.base))


def _resolve_rule(rule: Rule) -> Rule:
    """Return a rule with registered names for aliases."""
    kind = rule.replaces
    spec = registry.resolve(rule.activation, kind)
    if rule.holding and kind == "convolution":
        raise SpecError(f"{quote(str(rule))} replaces convolutions, but from= selects by activation: leave it out")
    names = []
    for name in rule.holding:
        try:
            entry = registry.get_entry(name)
        except SpecError as error:
            raise SpecError(f"from= is wrong: {error}") from None
        if entry.replaces == "convolution":
            raise SpecError(f"from= takes names of activations, but '{entry.name}' replaces a convolution")
        names.append(entry.name)
    return replace(rule, activation=spec, holding=tuple(dict.fromkeys(names)))


def unpatch_model(model: Any) -> int:
    """Restore the original module at every swapped site, in place; other weights are not changed.

    This also works for copies and loaded checkpoints, since each inserted module keeps a reference to the one that it
    replaced. If a dynamic convolution has been trained or loaded since, its Conv2d gets the mean of its kernels. The
    plan is removed from `model.yaml`, or from the model, so that the next training is stock again.

    Args:
        model: A model as accepted by `patch_model`.

    Returns:
        The number of restored sites, 0 for a model that is not patched.

    Raises:
        ModelError: The model is exported, wrapped or compiled, or factors of activations or a BatchNorm were folded
            into its weights.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> before = net[1]
    >>> len(patch_model(net, "mish")), unpatch_model(net), net[1] is before
    (1, 1, True)
    """
    root = unwrap(model)
    activations = [
        (name, module, placed) for name, module in iterate_placed_activations(root) if (placed := get_placement(module))
    ]
    if folded := [name for name, _, placed in activations if placed.folded]:
        raise ModelError(
            f"{len(folded)} activations were folded into the weights ({folded[0]} first), so the stock model cannot be "
            "restored: unpatch the model from before folding"
        )
    convolutions = [
        (name, get_original_convolution(name, module)) for name, module in iterate_placed_convolutions(root)
    ]
    for name, conv in convolutions:
        owner, attribute = _get_owner(root, name)
        set_child(owner, attribute, conv)
    for name, module, placed in activations:
        owner, attribute = _get_owner(root, name)
        if isinstance(placed.original, nn.Module):
            _move_like(placed.original, module, owner)
        set_child(owner, attribute, placed.original)
        _update_fast_path(owner, placed.original)
    for module in list(root.modules()):
        if is_rewired(module):
            unwire(module)
    for module in root.modules():
        remove_state_dict_hooks(module)
        remove_low_memory_hooks(module)
        set_plan(module, Plan(default_act=read_plan(module).default_act))
    return len(activations) + len(convolutions)


def _get_owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the owner and the attribute of a qualified name."""
    path, _, attribute = name.rpartition(".")
    return root.get_submodule(path), attribute


def _check_selections(sites: Sequence[Site], rules: Iterable[Rule]) -> None:
    """Check that every rule matches a site; raise SelectionError otherwise."""
    for rule in rules:
        kind = [site for site in sites if site.replaces == rule.replaces]
        layers = {site.layer for site in sites if site.layer is not None}
        if rule.layers and not layers:
            raise SelectionError(f"'{rule}' selects layers, but this model has no Ultralytics layers: use include=")
        if unknown := [index for index in rule.layers if layers and index > max(layers)]:
            raise SelectionError(f"'{rule}' names layer {unknown[0]}, but the model's layers end at {max(layers)}")
        if any(rule.selects(site) for site in kind):
            continue
        if rule.replaces == "convolution":
            raise SelectionError(
                f"'{rule}' matches none of the {len(kind)} convolutions that can be replaced (the first one, RepConvs "
                "and the predictions of the head cannot)"
            )
        raise SelectionError(f"'{rule}' matches no activation site{_describe_others(rule, kind)}")


def _describe_others(rule: Rule, sites: Sequence[Site]) -> str:
    """Return the end of a message that says which activation sites there are for a rule that matches none."""
    wider = replace(rule, scope="all")
    if others := sum(wider.selects(site) for site in sites):
        pooled = all(site.layout == "pooled" for site in sites if wider.selects(site))
        which = "site on a pooled map" if pooled else "transformer site"
        plural = which.replace("site", "sites").replace("a pooled map", "pooled maps")
        return f"; {others} {plural if others > 1 else which} match{'' if others > 1 else 'es'} with scope='all'"
    anything = replace(rule, holding=())
    if rule.holding and (found := [site for site in sites if anything.selects(site)]):
        held = Counter(site.activation or site.current for site in found).most_common()
        *rest, last = [f"{name} ({count})" for name, count in held]
        held_as_text = f"{', '.join(rest)} and {last}" if rest else last
        which = "convolutional sites" if rule.scope == "conv" else "sites"
        where = f"{len(found)} {which} of '{anything.where}'" if anything.where else f"model's {len(found)} {which}"
        return f": the {where} hold {held_as_text}"
    return f" of the {len(sites)} in the model"


def _describe_leaves(root: nn.Module) -> str:
    """Return the end of a message that says which modules without parameters, and functions, there are instead."""
    leaves = (type(m).__name__ for m in root.modules() if not m._modules and next(m.parameters(), None) is None)
    held = [f"{name} ({count})" for name, count in Counter(leaves).most_common()]
    found = f"; its modules without parameters are {join_words(held)}" if held else ""
    unreachable = find_unreachable_calls(root)
    found += f"; its code calls {join_words(unreachable)}" if unreachable else ""
    return f"{found}: say treat_as={{'Class': 'activation'}} of a module that is one" if held else found


def _build_swap(site: Site, rule: Rule, shared: dict[int, nn.Module]) -> Swap:
    """Build the module that a rule inserts at a site, and return the swap.

    Args:
        site: The site.
        rule: The rule.
        shared: The replacements built so far, by the ids of the convolutions; updated.
    """
    entry = registry.get_entry(rule.activation.name)
    misfit = replaced = None
    if entry.replaces == "convolution":
        original = get_original_convolution(site.name, site.module)
        module = shared.get(id(site.module)) or registry.build(
            rule.activation, site.channels, site.input_layout, original
        )
        shared[id(site.module)] = module
    else:
        _check_support(site, entry)
        placed = get_placement(site.module)
        original = placed.original if placed else site.module
        replaced = site.module if placed and rule.init == "match" else None
        module = registry.build(rule.activation, site.channels, site.input_layout, dims=site.dims)
        if rule.init == "match":
            misfit = match(module, site.module, site.channels, site.input_layout)
        _set_inplace(module, site, rule, entry)
    set_placement(module, Placement(str(rule.activation), original, entry.replaces, replaced=replaced))
    counts = [_count_parameters(each) for each in (module, site.module)]
    return Swap(replace(site, module=module), site.current, str(rule.activation), counts[0], counts[1], misfit)


def _count_parameters(module: Any) -> int:
    """Return the number of parameters of a module, 0 for a function."""
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0


def _check_support(site: Site, entry: Entry) -> None:
    """Raise SelectionError if an activation does not support a site."""
    if site.layout == "tokens" and not entry.tokens:
        raise SelectionError(
            f"'{entry.name}' works on feature maps only, but {site.name} ({site.owner_class}) has tokens (B, N, C): "
            "use scope='conv', or exclude that site"
        )
    if site.layout == "pooled" and entry.not_pooled_because:
        raise SelectionError(
            f"'{entry.name}' makes no sense on maps pooled to a single position, as at {site.name} "
            f"({site.owner_class}): {entry.not_pooled_because}; use scope='conv', or exclude that site"
        )
    if entry.needs_channels and site.channels is None:
        seen = sorted(set(site.widths))
        why = f"is called with {' and '.join(map(str, seen))} channels" if seen else "has an unknown number of channels"
        raise SelectionError(
            f"'{entry.name}' needs one channel count, but {site.name} {why}: exclude it or give example_input="
        )


def _set_inplace(module: nn.Module, site: Site, rule: Rule, entry: Entry) -> None:
    """Make an activation work in place where that is safe and saves memory; raise if the rule asks for it elsewhere."""
    if getattr(module, "inplace", False) and not site.overwritable:
        raise SelectionError(
            f"'{rule.activation}' would write over its input, but at {site.name} ({site.owner_class}) other layers may "
            "read it again: omit inplace, which is set automatically where it is safe"
        )
    if hasattr(module, "inplace") and "inplace" not in dict(rule.activation.kwargs):
        # A backward that reads the output needs only what the next layer saves anyway, which saves one map per site.
        # That of SiLU or Mish reads the input, of which torch would make a copy.
        # Of another class nobody knows whether it can: those of the package torch-activation raise an error.
        if entry.backward_reads_result is None and type(module).__module__.startswith("torch.nn."):
            module.inplace = was_in_place(site.module)  # type: ignore[assignment]
        elif entry.backward_reads_result is not None:
            module.inplace = entry.backward_reads_result(module) and site.overwritable  # type: ignore[assignment]


def _insert(site: Site, module: nn.Module) -> None:
    """Insert a module at a site, in place of the current one."""
    if site.hidden and not is_rewired(site.owner):
        rewire(site.owner, site.hidden_calls)
    if site.replaces == "activation":
        _move_like(module, getattr(site.owner, site.attribute), site.owner)
    set_child(site.owner, site.attribute, module)
    _update_fast_path(site.owner, module)


def _update_fast_path(owner: nn.Module, activation: Any) -> None:
    """Set the activation that the fused inference path of TransformerEncoderLayer computes.

    That path computes ReLU or GELU if `activation_relu_or_gelu` is 1 or 2, without reading the `activation` attribute.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        relu = activation is F.relu or isinstance(activation, nn.ReLU)
        gelu = activation is F.gelu or isinstance(activation, nn.GELU)
        owner.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def _move_like(module: nn.Module, current: Any, owner: nn.Module) -> None:
    """Move a module to the device, dtype, training mode and memory format of the module that it replaces."""
    module.train(owner.training)
    near = (p for m in (current, owner) if isinstance(m, nn.Module) for p in m.parameters() if p.is_floating_point())
    reference = next(near, None)
    if reference is None:
        return
    module.to(device=reference.device, dtype=reference.dtype)
    maps = [p for p in owner.parameters() if p.ndim == 4 and not p.is_contiguous()]
    if any(p.is_contiguous(memory_format=torch.channels_last) for p in maps):
        module.to(memory_format=torch.channels_last)
