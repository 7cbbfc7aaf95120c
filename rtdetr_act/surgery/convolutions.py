"""Put dynamic convolutions into a model, report it, take them out again."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rtdetr_act.activations.dynamic_conv import CONV_MARK, DynamicConv2d, original_of
from rtdetr_act.errors import ModelError, SelectionError, SpecError, suggest
from rtdetr_act.spec import TAU_EPOCHS, TAU_START, ActSpec
from rtdetr_act.surgery.model_plan import carries_plan, is_model_yaml, read_plan, set_plan
from rtdetr_act.surgery.modules import frozen_among, put, unwrap
from rtdetr_act.surgery.plan import Plan, Rule, format_layers, last_match, require_followers
from rtdetr_act.surgery.sites import MARK, locate
from rtdetr_act.tables import align_columns

NAME = "dynamic_conv"
_ARGUMENTS = ("kernels", "reduction", "tau", "tau_start", "tau_epochs")
_DEFAULTS = {name: inspect.signature(DynamicConv2d.from_conv).parameters[name].default for name in _ARGUMENTS}
# Blocks that compute one kernel from several by reading the weights of the convolutions inside: RepConv, RepVGGDW and
# Conv2 of Ultralytics, RepVGG and MobileOne of timm.
_OWN_KERNELS = ("get_equivalent_kernel_bias", "fuse_convs", "reparameterize", "switch_to_deploy")
_OWN_KERNEL_CLASSES = ("RepVGGDW",)


@dataclass(frozen=True)
class ConvPlace:
    """One place where a convolution stands that may become a dynamic one.

    Attributes:
        name: Qualified name, as in `model.9.m.3.cv2.conv`.
        owner: The module that holds it.
        attribute: Its attribute there.
        layer: Index of the Ultralytics layer, None for other models.
        section: "backbone", "neck" or "head" for Ultralytics models and models with such children, else "".
        conv: What stands there now.
    """

    name: str
    owner: nn.Module = field(repr=False)
    attribute: str
    layer: int | None
    section: str
    conv: nn.Conv2d | DynamicConv2d


@dataclass(frozen=True)
class ConvSwap:
    """One convolution that became a dynamic one: where, and the parameters before and after."""

    place: ConvPlace
    after: str
    parameters: tuple[int, int]


@dataclass(frozen=True)
class ConvReport:
    """What `patch_convs` did.

    Attributes:
        swaps: One entry per replaced convolution, in module order.
        kept: Names of the convolutions that could be replaced and were not selected.
        plan: The whole plan that the model now carries.
    """

    swaps: tuple[ConvSwap, ...]
    kept: tuple[str, ...] = ()
    plan: Plan = field(default_factory=Plan)

    def __len__(self) -> int:
        """Return the number of replaced convolutions."""
        return len(self.swaps)

    @property
    def places(self) -> list[str]:
        """Qualified names of the replaced convolutions."""
        return [swap.place.name for swap in self.swaps]

    @property
    def parameters(self) -> int:
        """Number of parameters that the dynamic convolutions hold."""
        return sum(swap.parameters[1] for swap in self.swaps)

    def __str__(self) -> str:
        """Return a table: what became what, how often, where."""
        groups: dict[tuple[str, str, str], list[ConvSwap]] = {}
        for swap in self.swaps:
            groups.setdefault((swap.place.section, _describe(swap.place.conv), swap.after), []).append(swap)
        rows = [("section", "convolution", "after", "places", "parameters", "before", "layers")]
        for (section, before, after), swaps in groups.items():
            layers = format_layers({swap.place.layer for swap in swaps if swap.place.layer is not None})
            old, new = (f"{sum(swap.parameters[i] for swap in swaps):,}" for i in (0, 1))
            rows.append((section or "-", before, after, str(len(swaps)), new, old, layers or "-"))
        lines = align_columns(rows)
        before_all = sum(swap.parameters[0] for swap in self.swaps)
        total = f"{len(self)} convolutions replaced, {len(self.kept)} kept, {self.parameters:,} parameters in them "
        return "\n".join([*lines, f"{total}({before_all:,} before)"])


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
) -> ConvReport:
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
    >>> patch_convs(net, kernels=2).places
    ['2']
    """
    given = dict(zip(_ARGUMENTS, (kernels, reduction, tau, tau_start, tau_epochs), strict=True))
    spec = ActSpec(NAME, (), tuple((name, value) for name, value in given.items() if value != _DEFAULTS[name]))
    # Through Plan.parse, which checks the selection.
    rules = Plan.parse(NAME, layers=layers, include=include, exclude=exclude).convolutions
    return patch_by_rules(model, tuple(replace(rule, activation=spec) for rule in rules))


def patch_by_rules(model: Any, rules: str | tuple[Rule, ...]) -> ConvReport:
    """Do the work of `patch_convs` for rules, or for a text such as "dynamic_conv@backbone"."""
    root = unwrap(model)
    if isinstance(rules, str):
        named = Plan.parse(rules)
        rules = named.rules + named.convolutions
    rules = resolve_convolutions(rules)
    model_yaml = getattr(root, "yaml", None)
    places = find_convs(root, "", model_yaml)
    require_followers(rules, places)
    report = install(build(places, rules), places)
    if not carries_plan(root):
        return replace(report, plan=Plan(convolutions=rules))
    old = read_plan(root)
    plan = old.followed_by(Plan(convolutions=rules, act_lr=old.act_lr))
    winners = [_winner(place, plan.convolutions) for place in places]
    beaten = tuple(rule for rule in plan.convolutions if any(rule is winner for winner in winners))
    plan = replace(plan, convolutions=beaten)
    set_plan(root, plan)
    return replace(report, plan=plan)


def resolve_convolutions(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return rules for convolutions with their arguments named and checked; raises SpecError.

    >>> resolve_convolutions(Plan.parse("dynamic_conv(kernels=1)").convolutions)
    Traceback (most recent call last):
    rtdetr_act.errors.SpecError: 'dynamic_conv(kernels=1)' is wrong: kernels is an integer of at least 2, not 1
    """
    specs = (ActSpec(NAME, (), tuple(_settings(rule.activation).items())) for rule in rules)
    return tuple(replace(rule, activation=spec) for rule, spec in zip(rules, specs, strict=True))


def _settings(spec: ActSpec) -> dict[str, Any]:
    """Return the arguments of `DynamicConv2d.from_conv` that a spec names."""
    if spec.name != NAME:
        raise SpecError(f"there is no convolution '{spec.name}' to put in: write '{NAME}'{suggest(spec.name, [NAME])}")
    signature = inspect.signature(DynamicConv2d.from_conv)
    own = signature.replace(parameters=[signature.parameters[name] for name in _ARGUMENTS])
    try:
        given = own.bind(*spec.args, **dict(spec.kwargs)).arguments
        with torch.random.fork_rng(devices=[]):
            DynamicConv2d(1, 1, 1, **given)
    except ValueError as error:
        raise SpecError(f"'{spec}' is wrong: {error}") from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        takes = ", ".join(f"{name}={value!r}" for name, value in _DEFAULTS.items())
        hint = suggest(unknown[1], _ARGUMENTS) if unknown else ""
        raise SpecError(f"'{spec}' is wrong: {error}; it takes ({takes}){hint}") from None
    return dict(given)


def find_convs(root: nn.Module, name: str, model_yaml: Any) -> list[ConvPlace]:
    """Find the convolutions below a module of that qualified name that may become dynamic, in module order.

    Those are the ones of exactly the class `Conv2d` (and those that are dynamic already), but for the first of the
    model, frozen ones, the predictions of an Ultralytics head, and those inside activations or blocks that read their
    weights.
    """
    found = [(*where, *locate(where[0], model_yaml)) for where in _walk(root, name)]
    first = next((m for m in root.modules() if isinstance(m, (nn.Conv2d, DynamicConv2d))), None)
    frozen = frozen_among(conv.weight for *_, conv, _, _ in found)
    places = []
    for qualified, owner, attribute, conv, layer, section in found:
        # bias_init writes the class frequencies into the biases of these.
        predicts = section == "head" and conv.bias is not None and is_model_yaml(model_yaml) and _is_bare(owner)
        # The DFL's weights are numbers to count with, even where everything is frozen.
        if conv is not first and id(conv.weight) not in frozen and not predicts and type(owner).__name__ != "DFL":
            places.append(ConvPlace(qualified, owner, attribute, layer, section, conv))
    return places


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str, nn.Conv2d | DynamicConv2d]]:
    """Yield (qualified name, owner, attribute, convolution), leaving out what must stay."""
    reads_weights = any(hasattr(module, method) for method in _OWN_KERNELS)
    if hasattr(module, MARK) or reads_weights or type(module).__name__ in _OWN_KERNEL_CLASSES:
        return
    for attribute, child in module._modules.items():
        qualified = f"{name}.{attribute}" if name else attribute
        if isinstance(child, DynamicConv2d):
            if hasattr(child, CONV_MARK):
                yield qualified, module, attribute, child
        elif type(child) is nn.Conv2d:  # a subclass computes something else
            yield qualified, module, attribute, child
        elif child is not None:
            yield from _walk(child, qualified)


def _is_bare(owner: nn.Module) -> bool:
    """Say whether a convolution's owner is a list of modules, not a block with a BatchNorm of its own."""
    return isinstance(owner, (nn.Sequential, nn.ModuleList))


def build(places: Sequence[ConvPlace], rules: tuple[Rule, ...]) -> list[tuple[ConvPlace, Rule, DynamicConv2d]]:
    """Build the dynamic convolutions of some rules, without a change to the model or to the random state.

    A convolution that stands at several places is replaced by one at all of them.

    Raises:
        SelectionError: A rule matches no convolution.
        ModelError: A BatchNorm was folded into one that is dynamic already.
    """
    _require_matches(places, rules)
    made: dict[int, DynamicConv2d] = {}
    built = []
    with torch.random.fork_rng(devices=[]):
        for place in places:
            if rule := _winner(place, rules):
                if id(place.conv) not in made:
                    made[id(place.conv)] = _build(place, rule)
                built.append((place, rule, made[id(place.conv)]))
    return built


def _build(place: ConvPlace, rule: Rule) -> DynamicConv2d:
    original = place.conv
    if isinstance(original, DynamicConv2d):
        original = _unfolded_original(place.name, original)
    new = DynamicConv2d.from_conv(original, **_settings(rule.activation))
    # In a list inside a dict, so that torch does not register the old module as a child of the new one.
    setattr(new, CONV_MARK, {"convolution": str(rule.activation), "original": [original]})
    return new


def install(built: Sequence[tuple[ConvPlace, Rule, DynamicConv2d]], places: Sequence[ConvPlace]) -> ConvReport:
    """Put built convolutions in their places, of all that there are."""
    swaps = []
    for place, rule, conv in built:
        counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (place.conv, conv)]
        put(place.owner, place.attribute, conv)
        swaps.append(ConvSwap(place, str(rule.activation), (counts[0], counts[1])))
    names = {swap.place.name for swap in swaps}
    return ConvReport(tuple(swaps), tuple(place.name for place in places if place.name not in names))


def placed_convs(model: nn.Module) -> Iterator[tuple[str, DynamicConv2d]]:
    """Yield (qualified name, convolution) of the dynamic ones that a swap put into a model, at every place."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicConv2d) and hasattr(module, CONV_MARK):
            yield name, module


def take_out(root: nn.Module) -> int:
    """Put the very Conv2d back wherever a dynamic one replaced it, and return how many.

    Weights are as they were, or the mean of the kernels if these have been trained or loaded since.

    Raises:
        ModelError: A BatchNorm was folded into one of them; nothing was changed.
    """
    originals = [(name, _unfolded_original(name, conv)) for name, conv in placed_convs(root)]
    for name, original in originals:
        path, _, attribute = name.rpartition(".")
        put(root.get_submodule(path), attribute, original)
    return len(originals)


def load_plain(model: nn.Module, given: dict[str, torch.Tensor]) -> int:
    """Let dynamic convolutions start from the weights of plain ones of the same names, and return how many did.

    Args:
        model: The model that holds the dynamic ones.
        given: State dict of another one.
    """
    count = 0
    with torch.random.fork_rng(devices=[]):
        for name, conv in placed_convs(model):
            weight = given.get(f"{name}.weight")
            if weight is not None and weight.shape == conv.weight.shape[1:]:
                conv.start_from(weight, given.get(f"{name}.bias"))
                count += 1
    return count


def _unfolded_original(name: str, conv: DynamicConv2d) -> nn.Conv2d:
    if getattr(conv, CONV_MARK).get("folded"):
        raise ModelError(
            f"the BatchNorm behind {name} was folded into its kernels, which are no longer those of the stock model: "
            "take the model that was fused"
        )
    return original_of(conv)


def _winner(place: ConvPlace, rules: tuple[Rule, ...]) -> Rule | None:
    return last_match(rules, place.name, place.layer, place.section, "map")


def _require_matches(places: Sequence[ConvPlace], rules: Iterable[Rule]) -> None:
    for rule in rules:
        if any(_winner(place, (rule,)) for place in places):
            continue
        layers = [place.layer for place in places if place.layer is not None]
        if rule.layers and not layers:
            raise SelectionError(f"'{rule}' selects layers, but this model has no Ultralytics layers: use include=")
        raise SelectionError(
            f"'{rule}' matches none of the {len(places)} convolutions that can be replaced (the first one, RepConvs "
            "and the predictions of the head cannot)"
        )


def _describe(conv: nn.Conv2d | DynamicConv2d) -> str:
    size = "x".join(map(str, conv.kernel_size))
    depthwise = conv.groups == conv.in_channels > 1
    return f"{size} depthwise" if depthwise else f"{size} in {conv.groups} groups" if conv.groups > 1 else size
