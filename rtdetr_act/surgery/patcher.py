"""Apply a plan to a model, undo it, report it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rtdetr_act.activations import registry
from rtdetr_act.activations.placed import Placement, get_placement, set_placement
from rtdetr_act.activations.protocol import Replaces
from rtdetr_act.activations.temperature import TAU_EPOCHS, TAU_START
from rtdetr_act.errors import ModelError, SelectionError
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.convolutions import original_convolution
from rtdetr_act.surgery.functional_calls import unseen_calls
from rtdetr_act.surgery.match import match
from rtdetr_act.surgery.model_plan import carries_plan, read_plan, set_plan
from rtdetr_act.surgery.modules import put, unwrap
from rtdetr_act.surgery.plan import Init, Plan, Rule, Scope, SwapOptions, check_overrides, format_layers
from rtdetr_act.surgery.rewired import rewire, unwire
from rtdetr_act.surgery.sites import Site, placed_activations, placed_convolutions, stock_works_in_place, walk
from rtdetr_act.tables import align_columns

KINDS: tuple[Replaces, ...] = ("activation", "convolution")


@dataclass(frozen=True)
class Swap:
    """One swapped site.

    Attributes:
        site: Where.
        before: What stood there.
        after: What stands there now.
        parameters: Parameters of what stands there now.
        parameters_before: Parameters of what stood there.
        misfit: How far it starts from what stood there, as `match` returns it; None where nothing was fitted.
    """

    site: Site
    before: str
    after: str
    parameters: int
    parameters_before: int = 0
    misfit: float | None = None


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` or `patch_convs` did.

    Attributes:
        swaps: One entry per swapped site, in module order.
        kept: Names of the sites left as they were, of the kinds that the plan has rules for.
        plan: The whole plan that the model now carries.
        unseen: Functional activations in the code of foreign blocks, which no swap reaches.
    """

    swaps: tuple[Swap, ...]
    kept: tuple[str, ...] = ()
    plan: Plan = field(default_factory=Plan)
    unseen: tuple[str, ...] = ()

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
        """Number of parameters of all that was placed."""
        return sum(swap.parameters for swap in self.swaps)

    def __str__(self) -> str:
        """Return a table: what became what, how often, where."""
        groups: dict[tuple[str, str, str, str], list[Swap]] = {}
        for swap in self.swaps:
            key = (swap.site.section, swap.before, swap.after, swap.site.layout)
            groups.setdefault(key, []).append(swap)
        rows = [("section", "before", "after", "layout", "sites", "parameters", "layers")]
        for (section, before, after, layout), swaps in groups.items():
            layers = format_layers({swap.site.layer for swap in swaps if swap.site.layer is not None})
            parameters = sum(swap.parameters for swap in swaps)
            rows.append((section or "-", before, after, layout, str(len(swaps)), f"{parameters:,}", layers or "-"))
        lines = align_columns(rows)
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
) -> PatchReport:
    """Swap the activations of a model in place; each site gets an instance of its own.

    Device, dtype, training mode and memory format are kept, and so are all other weights. An Ultralytics model carries
    its plan in `model.yaml`, so that training, resuming and checkpoints keep it. Patching again replaces what it
    selects. Nothing is changed if anything is wrong. In a training loop of your own, patch before the optimizer is
    built: it would not know the new parameters.

    Args:
        model: RTDETR, YOLO, an Ultralytics task model, or any torch.nn.Module.
        activation: A name such as "arelu" or "leaky_relu(negative_slope=0.1)", or a whole plan such as
            "dyrelu_b@backbone, dyrelu_c@neck, silu@22-27".
        layers: Ultralytics layer indices, as "0-9", "0-3+7", 5 or a list.
        include: Glob pattern(s) on qualified site names; one must match.
        exclude: Glob pattern(s) on qualified site names; none may match.
        scope: "conv" for convolutional sites, "all" for transformer sites too.
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters in training.
        init: "paper" (default) for the activation's own start, "match" for the one closest to what it replaces, where
            it has parameters to fit (arelu, prelu, leaky_relu, aconc, aglu, dyrelu_a, dyrelu_b, dyrelu_c);
            Ultralytics' next training then begins with `refit`, whatever the activation.
        example_input: For foreign models, what to call the model with to learn channels and layouts.

    Returns:
        The report; `len(report)` is the number of swapped sites, `print(report)` a table.

    Raises:
        SpecError: The activation, its arguments or the selection cannot be understood.
        SelectionError: A rule matches no site, or its activation cannot stand at one of its sites.
        ModelError: The model is exported, wrapped or compiled.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> len(patch_model(net, "arelu"))
    2
    >>> net[1]
    AReLU()
    """
    root = unwrap(model)
    if isinstance(activation, Plan):
        return apply_plan(root, activation, example_input=example_input)
    how: SwapOptions = {"scope": scope, "act_lr": act_lr, "init": init}
    plan = Plan.parse(activation, layers=layers, include=include, exclude=exclude, **how)
    return apply_plan(root, plan, example_input=example_input, strict=True)


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
) -> PatchReport:
    """Replace the convolutions of a model by dynamic ones, in place (Chen et al., CVPR 2020, arXiv:1912.03458).

    Each starts as the convolution it replaces. An Ultralytics model carries the plan in `model.yaml`, so that training,
    resuming and checkpoints keep it. In a training loop of your own, patch before the optimizer is built, and call
    `set_epoch(model, epoch)` as the epochs go by. The first convolution stays as it is, as in the paper, and
    so do frozen ones, the predictions of an Ultralytics head, and those whose blocks read their weights (RepConv).

    Args:
        model: RTDETR, YOLO, an Ultralytics task model, or any torch.nn.Module.
        kernels: K, the kernels of each convolution.
        layers: Ultralytics layer indices, as "0-9", "0-3+7", 5 or a list.
        include: Glob pattern(s) on qualified names of convolutions; one must match.
        exclude: Glob pattern(s); none may match.
        reduction: Of the channels inside the attention.
        tau: Last temperature of the attention.
        tau_start: First temperature; None for `tau` from the start.
        tau_epochs: Epochs from the first to the last, on a line.

    Returns:
        The report; `len(report)` is the number of replaced convolutions, `print(report)` a table.

    Raises:
        SpecError: An argument is wrong.
        SelectionError: No convolution is selected.
        ModelError: The model is exported, wrapped or compiled.

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
    return apply_plan(unwrap(model), replace(plan, rules=rules), strict=True)


def apply_plan(root: nn.Module, plan: Plan, *, example_input: Any = None, strict: bool = False) -> PatchReport:
    """Apply a plan to a model, on top of the plan that it carries.

    Args:
        root: The module.
        plan: What to place; if it has a base, that is placed first.
        example_input: As in `patch_model`.
        strict: Refuse a rule that later ones leave no site, which is a mistake where a user has just written the plan;
            one that was read back from a model may have such rules.

    Returns:
        The report, with the whole plan that the model carries now.

    Raises:
        SpecError: An activation is unknown, or its arguments are wrong. Nothing is changed, as by the following errors.
        SelectionError: A rule matches no site, or its activation cannot stand at one of its sites.
        ModelError: A BatchNorm was folded into a convolution that is dynamic already.
    """
    sites = walk(root, "", getattr(root, "yaml", None), KINDS, example_input)
    report = swap_sites(sites, plan, strict=strict)
    if carries_plan(root):
        carried = read_plan(root)
        for stage in (*_bases_of(plan), report.plan):
            carried = prune_overridden(sites, carried.followed_by(stage))
        set_plan(root, carried)
        report = replace(report, plan=carried)
    return replace(report, unseen=tuple(unseen_calls(root)))


def swap_sites(sites: Sequence[Site], plan: Plan, *, strict: bool = False) -> PatchReport:
    """Place a plan at sites already found: resolve and build all, then swap all.

    Args:
        sites: Where, as `walk` finds them.
        plan: What to place; a plan that it starts from (`base`) is placed below it.
        strict: As in `apply_plan`.

    Returns:
        The report of the plan itself, resolved and without its base.

    Raises:
        SpecError: An activation is unknown, or its arguments are wrong. Nothing is changed, as by the following errors.
        SelectionError: A rule matches no site, or its activation cannot stand at one of its sites.
        ModelError: A BatchNorm was folded into a convolution that is dynamic already.
    """
    stages = [*_bases_of(plan), resolve_plan(replace(plan, base=None))]
    if strict:
        check_overrides(stages[-1].rules, sites)
    now = {site.name: site for site in sites}
    swaps: dict[str, Swap] = {}
    # A swap must not move the random state: the other weights, the data order and the augmentations of a patched
    # run stay those of the stock run with the same seed, so that the two can be compared in pairs.
    with torch.random.fork_rng(devices=[]):
        for stage in stages:
            _check_matches(sites, stage.rules)
            swaps = {}
            shared: dict[int, nn.Module] = {}  # what takes the place of a convolution does so at all of its places
            for site in now.values():
                if rule := stage.winner(site):
                    swaps[site.name] = _build(site, rule, shared)
            now.update({name: replace(now[name], module=new.site.module) for name, new in swaps.items()})
    for site in sites:
        if now[site.name].module is not site.module:
            _install(site, now[site.name].module)
    kinds = {rule.replaces for rule in stages[-1].rules}
    kept = tuple(site.name for site in sites if site.replaces in kinds and site.name not in swaps)
    return PatchReport(tuple(swaps.values()), kept, stages[-1])


def _bases_of(plan: Plan) -> list[Plan]:
    """Return the plans that a plan starts from, resolved, each without its base, the first one first."""
    if plan.base is None:
        return []
    return [*_bases_of(plan.base), resolve_plan(replace(plan.base, base=None))]


def resolve_plan(plan: Plan) -> Plan:
    """Return the plan with zoo names for aliases, its arguments checked; raises SpecError."""
    rules = (replace(rule, activation=registry.resolve(rule.activation, rule.replaces)) for rule in plan.rules)
    return replace(plan, rules=tuple(rules))


def prune_overridden(sites: Sequence[Site], plan: Plan) -> Plan:
    """Leave out the rules that no site follows any more, so that a plan patched again and again stays short."""
    winners = [plan.winner(site) for site in sites]
    return replace(plan, rules=tuple(rule for rule in plan.rules if any(rule is winner for winner in winners)))


def unpatch_model(model: Any) -> int:
    """Put back the very objects that stood at every swapped site; weights are untouched.

    Works on copies and loaded checkpoints too: each activation remembers what it replaced. So does each dynamic
    convolution; where it has been trained or loaded since, the Conv2d gets the mean of its kernels. The plan leaves
    `model.yaml`, so that the next training is stock again.

    Returns:
        The number of sites restored, 0 for a model that was not patched.

    Raises:
        ModelError: The model is exported, wrapped or compiled, or its weights hold the factors of folded activations or
            of a BatchNorm folded into dynamic convolutions.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> before = net[1]
    >>> len(patch_model(net, "mish")), unpatch_model(net), net[1] is before
    (1, 1, True)
    """
    root = unwrap(model)
    activations = [
        (name, module, placed) for name, module in placed_activations(root) if (placed := get_placement(module))
    ]
    if folded := [name for name, _, placed in activations if placed.folded]:
        raise ModelError(
            f"{len(folded)} activations were folded into the weights ({folded[0]} first), which are no longer those of "
            "the stock model: unpatch the one that it was folded from"
        )
    convolutions = [(name, original_convolution(name, module)) for name, module in placed_convolutions(root)]
    for name, conv in convolutions:
        owner, attribute = _owner_of(root, name)
        put(owner, attribute, conv)
    for name, module, placed in activations:
        owner, attribute = _owner_of(root, name)
        if isinstance(placed.original, nn.Module):
            _move_like(placed.original, module, owner)
        put(owner, attribute, placed.original)
        _update_fast_path(owner, placed.original)
    for module in list(root.modules()):
        if hasattr(module, "hidden_calls"):
            unwire(module)
    set_plan(root, Plan(default_act=read_plan(root).default_act))
    return len(activations) + len(convolutions)


def _owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return root.get_submodule(path), attribute


def _check_matches(sites: Sequence[Site], rules: Iterable[Rule]) -> None:
    """Refuse a rule that matches no site; raises SelectionError."""
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
        wider = replace(rule, scope="all")
        others = sum(wider.selects(site) for site in kind)
        hint = f"; {others} transformer sites match with scope='all'" if others else f" of the {len(kind)} in the model"
        raise SelectionError(f"'{rule}' matches no activation site{hint}")


def _build(site: Site, rule: Rule, shared: dict[int, nn.Module]) -> Swap:
    """Build what a rule places at a site, and say what it is.

    Args:
        site: Where.
        rule: What.
        shared: What was built so far for convolutions, by the ids of these.
    """
    misfit = None
    if rule.replaces == "convolution":
        module = shared.get(id(site.module)) or _build_convolution(site, rule)
        shared[id(site.module)] = module
    else:
        module = _build_activation(site, rule)
        if rule.init == "match":
            misfit = match(module, site.module, site.channels, site.layout)
        _set_inplace(module, site, rule)
        placed = get_placement(site.module)
        set_placement(module, Placement(str(rule.activation), placed.original if placed else site.module))
    counts = [_count_parameters(each) for each in (module, site.module)]
    return Swap(replace(site, module=module), site.current, str(rule.activation), counts[0], counts[1], misfit)


def _count_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0


def _build_convolution(site: Site, rule: Rule) -> nn.Module:
    original = original_convolution(site.name, site.module)
    module = registry.build_convolution(rule.activation, original)
    set_placement(module, Placement(str(rule.activation), original, "convolution"))
    return module


def _build_activation(site: Site, rule: Rule) -> nn.Module:
    entry = registry.get_entry(rule.activation.name)
    if site.layout == "tokens" and not entry.tokens:
        raise SelectionError(
            f"'{entry.name}' works on feature maps only, but {site.name} ({site.owner_class}) holds tokens (B, N, C): "
            "keep scope='conv', or exclude that site"
        )
    if entry.needs_channels and site.channels is None:
        seen = sorted(set(site.widths))
        why = f"is called with {' and '.join(map(str, seen))} channels" if seen else "does not tell its channels"
        raise SelectionError(
            f"'{entry.name}' needs one channel count, but {site.name} {why}: exclude it or give example_input="
        )
    return registry.build(rule.activation, site.channels, site.layout)


def _set_inplace(module: nn.Module, site: Site, rule: Rule) -> None:
    """Let an activation write over its input where that saves memory and is safe, and refuse it elsewhere."""
    if getattr(module, "inplace", False) and not site.overwritable:
        raise SelectionError(
            f"'{rule.activation}' would write over its input, but at {site.name} ({site.owner_class}) others may read "
            "that again: leave inplace out, and it is set where it is safe"
        )
    if hasattr(module, "inplace") and "inplace" not in dict(rule.activation.kwargs):
        # A backward that reads the result needs what the next layer keeps anyway: one map less per site. That of SiLU
        # or Mish reads the input, of which torch would make a copy.
        answer = registry.get_entry(rule.activation.name).backward_reads_result
        if answer is None:
            module.inplace = stock_works_in_place(site.module)  # type: ignore[assignment]
        else:
            module.inplace = answer(module) and site.overwritable  # type: ignore[assignment]


def _install(site: Site, module: nn.Module) -> None:
    """Put a module at a site, in the place of what stands there."""
    if site.hidden and not hasattr(site.owner, "hidden_calls"):
        rewire(site.owner)
    if site.replaces == "activation":
        _move_like(module, getattr(site.owner, site.attribute), site.owner)
    put(site.owner, site.attribute, module)
    _update_fast_path(site.owner, module)


def _update_fast_path(owner: nn.Module, activation: Any) -> None:
    """Keep torch's fused inference path of TransformerEncoderLayer from computing another activation than stands there.

    It runs ReLU or GELU itself while `activation_relu_or_gelu` is 1 or 2, without looking at the attribute again.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        relu = activation is F.relu or isinstance(activation, nn.ReLU)
        gelu = activation is F.gelu or isinstance(activation, nn.GELU)
        owner.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def _move_like(module: nn.Module, current: Any, owner: nn.Module) -> None:
    """Give a module the device, dtype, mode and memory format of the place it comes to."""
    module.train(owner.training)
    near = (p for m in (current, owner) if isinstance(m, nn.Module) for p in m.parameters() if p.is_floating_point())
    reference = next(near, None)
    if reference is None:
        return
    module.to(device=reference.device, dtype=reference.dtype)
    maps = [p for p in owner.parameters() if p.ndim == 4 and not p.is_contiguous()]
    if any(p.is_contiguous(memory_format=torch.channels_last) for p in maps):
        module.to(memory_format=torch.channels_last)
