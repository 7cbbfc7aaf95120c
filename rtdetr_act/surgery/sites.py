"""Find the activations and convolutions of a network, with the channels and layout of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rtdetr_act.activations.dynamic_conv import DynamicConv2d
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.protocol import Layout, Replaces, SiteLayout
from rtdetr_act.activations.registry import find_entry, get_registered_name
from rtdetr_act.results import Result
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.functional_calls import HiddenCall, describe_function, is_activation_function
from rtdetr_act.surgery.model_plan import is_model_yaml, read_plan
from rtdetr_act.surgery.modules import evaluation_mode, find_frozen, get_example_inputs, set_child, unwrap
from rtdetr_act.surgery.operator_counter import OperatorCounter, SiteCall, no_fused_attention
from rtdetr_act.surgery.plan import TreatAs, parse_treat_as
from rtdetr_act.surgery.recognition import get_plugin_treatments, is_activation, is_declared
from rtdetr_act.surgery.rewiring import get_hidden_calls, is_rewired, rewire, unwire

ACTIVATIONS: tuple[Replaces, ...] = ("activation",)
# The normalising flow in Ultralytics' Pose26 loss, whose SiLU and Tanh model a density and do not process features.
_SKIPPED_CLASSES = ("RealNVP",)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.LayerNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, DynamicConv2d)
_NORMS_BY_DIMS = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}
_NORMS = (*sum(_NORMS_BY_DIMS.values(), ()), nn.SyncBatchNorm)
# Blocks that compute one kernel from several by reading the weights of the convolutions inside: RepConv, RepVGGDW and
# Conv2 of Ultralytics, RepVGG and MobileOne of timm.
_WEIGHT_READERS = ("get_equivalent_kernel_bias", "fuse_convs", "reparameterize", "switch_to_deploy")
_EXAMPLE_SIDES = (224, 256)
_WEIGHT_READING_CLASSES = ("RepVGGDW",)


@dataclass(frozen=True, repr=False)
class Site(Result):
    """One activation or convolution of a network that can be replaced.

    Attributes:
        name: Qualified name, such as `model.9.m.3.cv2.act`.
        owner: The module that calls it.
        attribute: The attribute of the owner that holds it, or that will hold it once a hidden call is swapped.
        layer: Index of the Ultralytics layer, None for other models.
        section: "backbone", "neck" or "head" for Ultralytics models and models with children of these names, else "".
        channels: Number of channels C; for a convolution, of its output. None if unknown or different between calls.
        layout: "map" for (B, C, L), (B, C, H, W) or (B, C, D, H, W), "tokens" for (B, N, C) and (B, C), "pooled" for a
            map that was pooled to a single position, (B, C, 1, 1), such as those inside squeeze-and-excitation.
        module: The current module, or function such as `F.relu`; for a hidden call, an equivalent module.
        hidden: Whether it is a functional call in the owner's code, or one of several calls of a shared module.
        widths: Channel counts observed in a forward pass, one per call; empty if none was needed.
        overwritable: Whether an activation may work in place: neither another layer nor the backward of the preceding
            layer reads its input. This holds after the BatchNorm of an Ultralytics convolution, and where the stock
            activation works in place.
        replaces: The kind of site, "activation" or "convolution".
        dims: Number of spatial dimensions of a map: 1, 2 (default) or 3.
        hidden_calls: All hidden calls of the owner, if it is one of them; else empty.
    """

    name: str
    owner: nn.Module
    attribute: str
    layer: int | None
    section: str
    channels: int | None
    layout: SiteLayout
    module: Any
    hidden: bool = False
    widths: tuple[int, ...] = ()
    overwritable: bool = False
    replaces: Replaces = "activation"
    dims: int = 2
    hidden_calls: tuple[HiddenCall, ...] = ()

    @property
    def owner_class(self) -> str:
        """Class name of the owner."""
        return type(self.owner).__name__

    @property
    def current(self) -> str:
        """The current module as text: the spec of a swap, else its class, function or kernel size."""
        if placed := get_placement(self.module):
            return placed.spec
        if self.replaces == "convolution":
            return _describe_convolution(self.module)
        if isinstance(self.module, nn.Module):
            return type(self.module).__name__
        name, arguments = describe_function(self.module)
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return f"F.{name}({given})" if given else f"F.{name}"

    @property
    def input_layout(self) -> Layout:
        """Layout of the input as activations are built for it: that of a pooled map is "map"."""
        return "tokens" if self.layout == "tokens" else "map"

    @property
    def activation(self) -> str | None:
        """The registered name of the activation that it holds, such as "silu"; None for others and for convolutions."""
        if self.replaces == "convolution":
            return None
        if placed := get_placement(self.module):
            return get_registered_name(ActSpec.parse(placed.spec).name)
        if not isinstance(self.module, nn.Module):
            return describe_function(self.module)[0]
        entry = find_entry(self.module)
        return entry.name if entry else None

    def _summarise(self) -> str:
        """Return name, module and channels."""
        return f"{self.name}, {self.current}" + ("" if self.channels is None else f", {self.channels} channels")

    def to_dict(self) -> dict[str, Any]:
        """Return the site as plain data: `owner` is the class of its owner, `current` its module as text."""
        return {
            "name": self.name,
            "layer": self.layer,
            "section": self.section,
            "owner": self.owner_class,
            "current": self.current,
            "channels": self.channels,
            "layout": self.layout,
            "replaces": self.replaces,
        }


def find_sites(model: nn.Module, example_input: Any = None, treat_as: Mapping[Any, str] | None = None) -> list[Site]:
    """Return all activation sites of a model, including hidden functional calls, but not gates and softmaxes.

    A module is an activation by its class, or by what it computes: without parameters and children, and elementwise. A
    gate is one whose result is multiplied with another tensor computed from the input, or that maps to [0, 1].

    For Ultralytics models, the channels of a site are inferred from neighbouring layers. For other models, and where
    that fails, they are observed in a forward pass in evaluation mode.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module.
        example_input: Input of that forward pass, a tensor or a tuple of positional arguments. Default: None, zeros of
            the shape (1, C, 224, 224), or (1, C, 4096) or (1, C, 16, 64, 64) if the first convolution is a `Conv1d` or
            a `Conv3d`.
        treat_as: "activation" or "other" by class, or by its qualified or bare name, where the rules above are wrong.
            Default: None.

    Returns:
        The sites in module order.

    Raises:
        ModelError: The model is exported, wrapped or compiled.
        SpecError: `treat_as` is invalid.

    >>> [site.name for site in find_sites(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU()))]
    ['1', '3']
    """
    root = unwrap(model)
    treatments = {**dict(read_plan(root).treat_as), **parse_treat_as(treat_as)}
    return collect_sites(root, "", getattr(root, "yaml", None), ACTIVATIONS, example_input, treatments)


def collect_sites(
    root: nn.Module,
    name: str,
    model_yaml: Any,
    kinds: Collection[Replaces],
    example_input: Any = None,
    treat_as: Mapping[str, TreatAs] | None = None,
) -> list[Site]:
    """Return the sites of activations and convolutions in a module, in module order.

    Convolutions are sites if their class is exactly `Conv2d`, or if they are dynamic convolutions inserted by a swap.
    Exceptions are the first one of the model, frozen ones, the prediction layers of an Ultralytics head, and those
    inside activations or blocks that read their weights.

    Args:
        root: The module.
        name: Its qualified name in the model, "" for the model itself.
        model_yaml: The YAML of an Ultralytics model, else None.
        kinds: The kinds of sites, of "activation" and "convolution".
        example_input: As in `find_sites`.
        treat_as: As `parse_treat_as` returns it. Default: None.
    """
    ultralytics = is_model_yaml(model_yaml)
    found = []
    treat_as = {**get_plugin_treatments(), **(treat_as or {})}
    walk = _Walk("convolution" in kinds, treat_as, ultralytics)
    for place in walk.iterate(root, name):
        owner, attribute, module = place.owner, place.attribute, place.module
        where = (place.name, owner, attribute, *_get_layer_and_section(place.name, model_yaml))
        if isinstance(module, (nn.Conv2d, DynamicConv2d)):
            found.append(Site(*where, module.out_channels, "map", module, replaces="convolution"))
        elif "activation" in kinds:
            layout: SiteLayout
            channels, layout = _infer_channels(owner, attribute, place.call)
            # An Ultralytics model is built without a forward pass that could tell.
            if place.in_gate and layout == "map":
                layout = "pooled"
            over, dims = _can_overwrite_input(owner, attribute, module), _infer_dims(owner, attribute)
            found.append(
                Site(
                    *where,
                    channels,
                    layout,
                    module,
                    hidden=place.call is not None,
                    overwritable=over,
                    dims=dims,
                    hidden_calls=place.calls,
                )
            )
    stays = _find_fixed_convolutions(root, found, ultralytics)
    declared = {s.name for s in found if is_declared(s.module, treat_as)}
    return _probe(root, [s for s in found if s.name not in stays], declared, ultralytics, example_input)


def _find_fixed_convolutions(root: nn.Module, sites: Sequence[Site], ultralytics: bool) -> set[str]:
    """Return the names of the convolutions that must not be replaced."""
    convs = [site for site in sites if site.replaces == "convolution"]
    first = next((m for m in root.modules() if isinstance(m, (nn.Conv2d, DynamicConv2d))), None)
    frozen = find_frozen(site.module.weight for site in convs)
    stays = set()
    for site in convs:
        # Ultralytics' bias_init writes class frequencies into the biases of prediction layers.
        bare = isinstance(site.owner, (nn.Sequential, nn.ModuleList))
        predicts = ultralytics and site.section == "head" and site.module.bias is not None and bare
        # The weights of DFL are the constants 0, 1, 2, …, even if all parameters are frozen.
        counts = type(site.owner).__name__ == "DFL"
        if site.module is first or id(site.module.weight) in frozen or predicts or counts:
            stays.add(site.name)
    return stays


def _get_layer_and_section(name: str, model_yaml: Any) -> tuple[int | None, str]:
    """Return the layer index and the section of a qualified name.

    Args:
        name: Qualified name of a site.
        model_yaml: The YAML of an Ultralytics model, else None.
    """
    rows = None
    if is_model_yaml(model_yaml):
        rows = len(model_yaml["backbone"]), len(model_yaml["backbone"]) + len(model_yaml["head"])
    layer = int(name.split(".")[1]) if rows and name.startswith("model.") else None
    return layer, _get_section(name, layer, rows)


def iterate_placed_activations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (qualified name, module) for each activation that a swap inserted."""
    for name, module in model.named_modules():
        placed = get_placement(module)
        if placed and placed.replaces == "activation":
            yield name, module


def iterate_placed_convolutions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (qualified name, module) for each convolution that a swap inserted; shared modules once per name."""
    for name, module in model.named_modules(remove_duplicate=False):
        placed = get_placement(module)
        if placed and placed.replaces == "convolution":
            yield name, module


@dataclass(frozen=True)
class _Place:
    """An attribute that holds an activation or a convolution, or that will hold that of a hidden call.

    Attributes:
        name: Qualified name.
        owner: The module with the attribute.
        attribute: The attribute.
        module: The module or function; an equivalent module for a hidden call.
        call: The hidden call, None for others.
        calls: All hidden calls of the owner, if it is one.
        in_gate: Whether it is inside a block that pools its input to a single position, and gates.
    """

    name: str
    owner: nn.Module
    attribute: str
    module: Any
    call: HiddenCall | None = None
    calls: tuple[HiddenCall, ...] = ()
    in_gate: bool = False


class _Walk:
    """Visits the modules of a network, each once.

    Args:
        convolutions: Whether to yield convolutions too.
        treat_as: As in `collect_sites`.
        gates: Whether to look for blocks that gate.
    """

    def __init__(self, convolutions: bool, treat_as: Mapping[str, TreatAs], gates: bool) -> None:
        self._convolutions, self._treat_as, self._gates = convolutions, treat_as, gates
        self._seen: set[int] = set()

    def iterate(
        self, module: nn.Module, name: str, convolutions: bool = True, in_gate: bool = False
    ) -> Iterator[_Place]:
        """Yield the places in a module, in module order.

        Args:
            module: The module.
            name: Its qualified name.
            convolutions: Whether its convolutions may be replaced.
            in_gate: As in `_Place`.
        """
        self._seen.add(id(module))
        dot = f"{name}." if name else ""
        calls = get_hidden_calls(module, self._is_activation)
        covered = {name for call in calls for name in (call.attribute, call.child)}
        convolutions = convolutions and self._convolutions and not _reads_weights(type(module))
        in_gate = in_gate or (self._gates and _is_gate_of_pooled_input(module))
        for attribute, child in module._modules.items():
            if child is None or attribute in covered:
                continue
            if (convolutions and _is_convolution_site(child)) or self._is_activation(attribute, module, child):
                yield _Place(dot + attribute, module, attribute, child, in_gate=in_gate)
            elif id(child) not in self._seen and type(child).__name__ not in _SKIPPED_CLASSES:
                yield from self.iterate(child, dot + attribute, convolutions, in_gate)
        for call in calls:
            attribute = call.attribute
            held = module._modules[attribute] if is_rewired(module) else call.build_original(module)
            yield _Place(dot + attribute, module, attribute, held, call, calls, in_gate)
        for attribute, value in vars(module).items():
            if callable(value) and attribute not in covered and is_activation_function(value):
                yield _Place(dot + attribute, module, attribute, value, in_gate=in_gate)

    def _is_activation(self, attribute: str, owner: nn.Module, child: nn.Module) -> bool:
        return is_activation(attribute, owner, child, self._treat_as)


def _reads_weights(cls: type) -> bool:
    """Return whether blocks of a class read the weights of the convolutions inside."""
    return cls.__name__ in _WEIGHT_READING_CLASSES or any(hasattr(cls, method) for method in _WEIGHT_READERS)


def _is_gate_of_pooled_input(module: nn.Module) -> bool:
    """Return whether a block pools its input to a single position and computes a gate from that, by its children."""
    forward = getattr(type(module), "forward", None)
    names = set(getattr(getattr(forward, "__code__", None), "co_names", ()))
    children = list(module.children())
    pools = bool(names & {"adaptive_avg_pool2d", "mean"}) or any(
        isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)) for child in children
    )
    if not pools:
        return False
    inside = list(module.modules())
    gates = "sigmoid" in names or any("sigmoid" in type(each).__name__.lower() for each in inside)
    wide = any(isinstance(each, _CONVS) and any(size > 1 for size in each.kernel_size) for each in inside)
    return gates and not wide


def _is_convolution_site(child: nn.Module) -> bool:
    """Return whether a child module is a convolution that can be replaced."""
    # Subclasses of Conv2d compute something else, and dynamic convolutions not inserted by a swap are the user's.
    return type(child) is nn.Conv2d or (isinstance(child, DynamicConv2d) and get_placement(child) is not None)


def _describe_convolution(conv: Any) -> str:
    """Return a convolution's kernel size and groups as text."""
    size = "x".join(map(str, conv.kernel_size))
    depthwise = conv.groups == conv.in_channels > 1
    return f"{size} depthwise" if depthwise else f"{size} in {conv.groups} groups" if conv.groups > 1 else size


def _get_section(name: str, layer: int | None, rows: tuple[int, int] | None) -> str:
    """Return the section of a site from its layer, or from the first part of its name."""
    if layer is not None and rows is not None:
        return "backbone" if layer < rows[0] else "head" if layer == rows[1] - 1 else "neck"
    first = name.split(".")[0]
    return first if first in ("backbone", "neck", "head") else ""


def _infer_channels(owner: nn.Module, attribute: str, call: HiddenCall | None) -> tuple[int | None, Layout]:
    """Infer the channels (None if unknown) and the layout of an activation from the modules beside it."""
    if call is not None:
        producer = call.find_producer(owner)
        out = None if producer is None else _out_channels(producer)
        return (out, _layout_after(producer)) if out and producer is not None else (None, _guess_layout(owner))
    if isinstance(owner, nn.Sequential):
        before = list(owner._modules.values())[: list(owner._modules).index(attribute)]
        for module in reversed(before):
            if module is not None and (out := _out_channels(module)):
                return out, _layout_after(module)
            if not isinstance(module, _TRANSPARENT):
                break
        return None, "map"
    layers = getattr(owner, "layers", None)
    producers = [getattr(owner, name, None) for name in ("bn", "conv", "conv_transpose", "conv1")]
    producers += [getattr(owner, name, None) for name in ("fc1", "linear1", "lin1")]
    producers += list(layers)[:1] if isinstance(layers, (nn.ModuleList, nn.Sequential)) else []
    for producer in producers:
        if isinstance(producer, nn.Module) and (out := _out_channels(producer)):
            return out, _layout_after(producer)
    return None, _guess_layout(owner)


def _guess_layout(owner: nn.Module) -> Layout:
    """Return the layout of what a block computes, from its children."""
    children = list(owner.children())
    linear = any(isinstance(child, nn.Linear) for child in children)
    return "tokens" if linear and not any(isinstance(child, _CONVS) for child in children) else "map"


def was_in_place(activation: Any) -> bool:
    """Return whether the original activation of a site works in place."""
    placed = get_placement(activation)
    stock = placed.original if placed else activation
    return isinstance(stock, nn.Module) and bool(getattr(stock, "inplace", False))


def _can_overwrite_input(owner: nn.Module, attribute: str, activation: Any) -> bool:
    """Return whether an activation at this place may work in place."""
    if was_in_place(activation):
        return True
    # Conv, ConvTranspose, RepConv and similar: act(bn(conv(x))), or act(conv(x)) once fused. The backward of the
    # preceding layer reads its input, not its output.
    cls = type(owner)
    return attribute == "act" and hasattr(cls, "default_act") and cls.__module__.startswith("ultralytics.")


def _out_channels(module: nn.Module) -> int | None:
    """Return the number of output channels of a layer, None if unknown."""
    if isinstance(module, _CONVS):
        return int(module.out_channels)
    if isinstance(module, nn.Linear):
        return int(module.out_features)
    if isinstance(module, _NORMS):
        return int(module.num_features)
    if isinstance(module, nn.Sequential):
        return next((out for child in reversed(module) if (out := _out_channels(child))), None)
    inner = getattr(module, "bn", getattr(module, "conv", None))
    return _out_channels(inner) if isinstance(inner, nn.Module) else None


def _layout_after(module: nn.Module) -> Layout:
    """Return the layout of a layer's output."""
    if isinstance(module, nn.Sequential) and len(module):
        return _layout_after(module[-1])
    return "tokens" if isinstance(module, nn.Linear) else "map"


def _infer_dims(owner: nn.Module, attribute: str) -> int:
    """Infer the number of spatial dimensions at an activation from the layers beside it, 2 if they do not say."""
    beside = list(owner._modules.items())
    place = next((i for i, (name, _) in enumerate(beside) if name == attribute), len(beside))
    before, behind = beside[:place], beside[place:]
    known = (_count_dims(child) for _, child in (*reversed(before), *behind) if child is not None)
    return next((dims for dims in known if dims), 2)


def _count_dims(module: nn.Module) -> int | None:
    """Return the number of spatial dimensions of a layer's maps, None if unknown."""
    if isinstance(module, (nn.modules.conv._ConvNd, DynamicConv2d)):
        return len(module.kernel_size)
    for dims, classes in _NORMS_BY_DIMS.items():
        if isinstance(module, classes):
            return dims
    inner = getattr(module, "conv", getattr(module, "bn", None))
    return _count_dims(inner) if isinstance(inner, nn.Module) else None


class Observer(nn.Module):
    """Wrap an activation so that a function handles its calls.

    Args:
        module: The activation, a module or a function.
        observe: Called with the activation and the arguments of each call; returns the output.
    """

    def __init__(self, module: Any, observe: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.module, self.observe = module, observe

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of `observe` for this call."""
        return self.observe(self.module, x, *args, **kwargs)


@contextmanager
def observe_activations(
    sites: Iterable[Site], observe: Callable[[Site], Callable[..., torch.Tensor]]
) -> Iterator[None]:
    """Wrap the activations of sites in an `Observer` inside the block.

    Args:
        sites: The sites; blocks with hidden ones are rewired for as long.
        observe: Returns the `observe` function for a site, as in `Observer`.
    """
    pairs = [(site, Observer(site.module, observe(site))) for site in sites]
    rewired: dict[int, nn.Module] = {}
    held = []
    try:
        for site, observer in pairs:
            if site.hidden and not is_rewired(site.owner):
                rewire(site.owner, site.hidden_calls)
                rewired[id(site.owner)] = site.owner
            held.append((site, getattr(site.owner, site.attribute)))
            set_child(site.owner, site.attribute, observer)
        yield
    finally:
        for site, activation in held:
            if not (site.hidden and id(site.owner) in rewired):
                set_child(site.owner, site.attribute, activation)
        for owner in rewired.values():
            unwire(owner)


def _probe(
    root: nn.Module, sites: list[Site], declared: Collection[str], ultralytics: bool, example_input: Any
) -> list[Site]:
    """Return the sites with the channels and layouts observed in a forward pass, without those that are gates there.

    Those without channels are observed; in a model that is not from Ultralytics, all of activations.

    Args:
        root: The model.
        sites: The sites.
        declared: Names of those that are activations whatever is done with their results.
        ultralytics: Whether it is an Ultralytics model.
        example_input: As in `find_sites`.
    """
    unknown = [site for site in sites if site.replaces == "activation" and (not ultralytics or site.channels is None)]
    if not unknown:
        return sites
    try:
        counter = count_in_example(root, example_input, unknown)
    except Exception:
        if example_input is not None:
            raise
        return sites  # the model does not take such an input: keep what was inferred from the owners
    if counter is None:
        return sites
    calls = {site.name: counter.calls.get(site.name, []) for site in sites}
    gates = {name for name, own in calls.items() if own and not any(call.activation.counts for call in own)}
    return [_add_calls(site, calls[site.name]) for site in sites if site.name not in gates or site.name in declared]


def count_in_example(root: nn.Module, example_input: Any, sites: Sequence[Site]) -> OperatorCounter | None:
    """Run a model on an example input, as `count_operators` does, and return the count.

    Without an input of the user, images of several sizes are tried, since some models take multiples of 32 or 64 only.

    Args:
        root: The model.
        example_input: As in `find_sites`.
        sites: As in `count_operators`.

    Returns:
        The count; None if no input is given and the model has no convolution.

    Raises:
        Exception: What the model raises for the last input.
    """
    for side in _EXAMPLE_SIDES:
        inputs = get_example_inputs(root, example_input, side)
        if inputs is None:
            return None
        try:
            return count_operators(root, inputs, sites)
        except Exception:
            if example_input is not None or side == _EXAMPLE_SIDES[-1]:
                raise
    return None


def count_operators(root: nn.Module, inputs: tuple[Any, ...], sites: Sequence[Site]) -> OperatorCounter:
    """Run a model in evaluation mode, and return the count of its activations, by site.

    Args:
        root: The model.
        inputs: Its positional arguments.
        sites: The sites of which calls are recorded, by name.
    """
    counter = OperatorCounter(inputs)
    with (
        observe_activations(sites, lambda site: partial(counter.call, site.name)),
        evaluation_mode(root),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        no_fused_attention(),
        counter,
    ):
        root(*inputs)
    return counter


def _add_calls(site: Site, calls: Sequence[SiteCall]) -> Site:
    """Return a site with the channels, layout and dimensions of the inputs of its calls."""
    if not calls:
        return site
    shape = calls[0].shape
    # Neighbouring layers are more reliable than the shape: (B, C, L) after a Conv1d is a map, (B, H, W, C) after a
    # Linear (ConvNeXt, Swin) is tokens.
    layout: SiteLayout
    if site.channels is not None and site.channels == shape[1 if site.layout == "map" else -1]:
        layout = site.layout
    else:
        layout = _get_layout(calls[0])
    widths = tuple(call.shape[1] if layout == "map" else call.shape[-1] for call in calls)
    dims = len(shape) - 2 if layout == "map" and 3 <= len(shape) <= 5 else site.dims
    if layout == "map" and all(call.pooled for call in calls):
        layout = "pooled"
    channels = widths[0] if len(set(widths)) == 1 else None
    return replace(site, layout=layout, channels=channels, widths=widths, dims=dims)


def _get_layout(call: SiteCall) -> Layout:
    """Return the layout of the input of a call, from the layer that computed it, or else from its shape."""
    if call.dims is not None:
        return "map" if call.dims else "tokens"
    return "map" if len(call.shape) >= 4 else "tokens"
