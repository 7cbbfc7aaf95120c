"""Apply a plan to a model, undo it, report it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rtdetr_act.activations import registry
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.errors import ModelError, SelectionError
from rtdetr_act.surgery.convolutions import build, find_convs, install, resolve_convolutions, take_out
from rtdetr_act.surgery.functional_calls import unseen_calls
from rtdetr_act.surgery.match import match
from rtdetr_act.surgery.model_plan import carries_plan, read_plan, set_plan
from rtdetr_act.surgery.modules import put, unwrap
from rtdetr_act.surgery.plan import Plan, Rule, SwapOptions, format_layers, require_followers
from rtdetr_act.surgery.rewired import rewire, unwire
from rtdetr_act.surgery.sites import MARK, Site, find_sites, placed_activations, stock_works_in_place
from rtdetr_act.tables import align_columns


@dataclass(frozen=True)
class Swap:
    """One swapped site.

    Attributes:
        site: Where.
        before: What stood there.
        after: What stands there now.
        parameters: Parameters of the new activation.
        misfit: How far it starts from what stood there, as `match` returns it; None where nothing was fitted.
    """

    site: Site
    before: str
    after: str
    parameters: int
    misfit: float | None = None


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` did.

    Attributes:
        swaps: One entry per swapped site, in module order.
        kept: Names of the sites left as they were.
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

    @property
    def sites(self) -> list[str]:
        """Qualified names of the swapped sites."""
        return [swap.site.name for swap in self.swaps]

    @property
    def parameters(self) -> int:
        """Number of parameters that the new activations hold."""
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
        total = f"{len(self)} sites swapped, {len(self.kept)} kept, {self.parameters:,} activation parameters"
        more = [f"not reached: {', '.join(self.unseen)}"] if self.unseen else []
        if misfits := [swap.misfit for swap in self.swaps if swap.misfit is not None]:
            more.insert(0, f"{len(misfits)} fitted to what they replace, {max(misfits):.1%} off at most")
        return "\n".join([*lines, total, *more])


def patch_model(
    model: Any,
    activation: str | Plan,
    *,
    layers: str | int | Iterable[int] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    scope: str = "conv",
    act_lr: float = 1.0,
    init: str = "paper",
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
        return apply_to(root, activation, example_input=example_input)
    how: SwapOptions = {"scope": scope, "act_lr": act_lr, "init": init}
    plan = Plan.parse(activation, layers=layers, include=include, exclude=exclude, **how)
    return apply_to(root, plan, example_input=example_input, typed=True)


def apply_to(root: nn.Module, plan: Plan, *, example_input: Any = None, typed: bool = False) -> PatchReport:
    """Do the work of `patch_model` with a plan.

    Args:
        root: The module.
        plan: What to place.
        example_input: As in `patch_model`.
        typed: Whether a user has just written the plan: a rule that later ones leave no site is a mistake then. One
            that was read back from a model may have such rules.
    """
    if plan.base:
        apply_to(root, plan.base, example_input=example_input)
        plan = replace(plan, base=None)
    new = resolve_plan(plan)
    sites = find_sites(root, example_input)
    convs = find_convs(root, "", getattr(root, "yaml", None)) if new.convolutions else []
    if typed:
        require_followers(new.rules, sites)
        require_followers(new.convolutions, convs)
    built = build(convs, new.convolutions)
    report = replace(apply_plan(sites, new), unseen=tuple(unseen_calls(root)))
    install(built, convs)
    if carries_plan(root):
        plan = _drop_beaten(sites, read_plan(root).followed_by(new))
        set_plan(root, plan)
        report = replace(report, plan=plan)
    return report


def resolve_plan(plan: Plan) -> Plan:
    """Return the plan with zoo names for aliases, its arguments checked; raises SpecError."""
    rules = (replace(rule, activation=registry.resolve(rule.activation)) for rule in plan.rules)
    return replace(plan, rules=tuple(rules), convolutions=resolve_convolutions(plan.convolutions))


def apply_plan(sites: Sequence[Site], plan: Plan) -> PatchReport:
    """Place the activations of a resolved plan at sites already found: build all, then swap all.

    Raises:
        SelectionError: A rule matches no site, or its activation cannot stand at one of its sites.
    """
    _require_matches(sites, plan.rules)
    won = [(site, plan.winner(site.name, site.layer, site.section, site.layout)) for site in sites]
    # A swap must not move the random state: the other weights, the data order and the augmentations of a patched
    # run stay those of the stock run with the same seed, so that the two can be compared in pairs.
    with torch.random.fork_rng(devices=[]):
        built = [(site, rule, *_build(site, rule)) for site, rule in won if rule is not None]
    swaps = []
    for site, rule, module, error in built:
        _install(site, rule, module)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        swaps.append(Swap(site, site.current, str(rule.activation), parameters, error))
    return PatchReport(tuple(swaps), tuple(site.name for site, rule in won if rule is None), plan)


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
    placed = [(name, module) for name, module in placed_activations(root)]
    if folded := [name for name, module in placed if getattr(module, MARK).get("folded")]:
        raise ModelError(
            f"{len(folded)} activations were folded into the weights ({folded[0]} first), which are no longer those of "
            "the stock model: unpatch the one that it was folded from"
        )
    convolutions = take_out(root)
    for name, module in placed:
        path, _, attribute = name.rpartition(".")
        owner = root.get_submodule(path)
        original = getattr(module, MARK)["original"][0]
        if isinstance(original, nn.Module):
            _move_like(original, module, owner)
        put(owner, attribute, original)
        _tell_fast_path(owner, original)
    for module in list(root.modules()):
        if hasattr(module, "hidden_calls"):
            unwire(module)
    set_plan(root, Plan(default_act=read_plan(root).default_act))
    return len(placed) + convolutions


def _require_matches(sites: Sequence[Site], rules: Iterable[Rule]) -> None:
    for rule in rules:
        layers = {site.layer for site in sites if site.layer is not None}
        if rule.layers and not layers:
            raise SelectionError(f"'{rule}' selects layers, but this model has no Ultralytics layers: use include=")
        if missing := [index for index in rule.layers if layers and index > max(layers)]:
            raise SelectionError(f"'{rule}' names layer {missing[0]}, but the model's layers end at {max(layers)}")
        if any(rule.selects(site.name, site.layer, site.section, site.layout) for site in sites):
            continue
        wider = replace(rule, scope="all")
        others = sum(wider.selects(site.name, site.layer, site.section, site.layout) for site in sites)
        hint = (
            f"; {others} transformer sites match with scope='all'" if others else f" of the {len(sites)} in the model"
        )
        raise SelectionError(f"'{rule}' matches no activation site{hint}")


def _build(site: Site, rule: Rule) -> tuple[nn.Module, float | None]:
    """Return the activation of a rule for a site, and how far from the one there it starts, where it was fitted."""
    spec, entry = rule.activation, registry.entry(rule.activation.name)
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
    module = registry.build(spec, site.channels, site.layout)
    misfit = match(module, site.activation, site.channels, site.layout) if rule.init == "match" else None
    _set_inplace(module, site, rule)
    return module, misfit


def _set_inplace(module: nn.Module, site: Site, rule: Rule) -> None:
    """Let an activation write over its input where that saves memory and is safe, and refuse it elsewhere."""
    if getattr(module, "inplace", False) and not site.overwritable:
        raise SelectionError(
            f"'{rule.activation}' would write over its input, but at {site.name} ({site.owner_class}) others may read "
            "that again: leave inplace out, and it is set where it is safe"
        )
    if hasattr(module, "inplace") and "inplace" not in dict(rule.activation.kwargs):
        # Their backward reads the result, which the next layer keeps anyway: one map less per site. That of SiLU or
        # Mish reads the input, of which torch would make a copy; LeakyReLU's with a negative slope cannot tell signs.
        leaky = isinstance(module, nn.LeakyReLU)
        by_result = isinstance(module, AReLU) or (leaky and module.negative_slope > 0)  # type: ignore[operator]
        over = site.overwritable if by_result else stock_works_in_place(site.activation) and not leaky
        module.inplace = over  # type: ignore[assignment]


def _install(site: Site, rule: Rule, module: nn.Module) -> None:
    if site.hidden and not hasattr(site.owner, "hidden_calls"):
        rewire(site.owner)
    current = getattr(site.owner, site.attribute)
    mark = getattr(current, MARK, None)
    original = mark["original"][0] if mark else current
    # In a list inside a dict, so that torch does not register the old module as a child of the new one.
    setattr(module, MARK, {"activation": str(rule.activation), "original": [original]})
    _move_like(module, current, site.owner)
    put(site.owner, site.attribute, module)
    _tell_fast_path(site.owner, module)


def _tell_fast_path(owner: nn.Module, activation: Any) -> None:
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


def _drop_beaten(sites: Sequence[Site], plan: Plan) -> Plan:
    """Leave out the rules that no site follows any more, so that a plan patched again and again stays short."""
    winners = [plan.winner(site.name, site.layer, site.section, site.layout) for site in sites]
    return replace(plan, rules=tuple(rule for rule in plan.rules if any(rule is winner for winner in winners)))
