"""Find the activations and convolutions of a network, with the channels and layout of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rtdetr_act.activations.dynamic_conv import DynamicConv2d
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.protocol import Layout, Replaces
from rtdetr_act.activations.registry import find_entry, get_registered_name
from rtdetr_act.activations.temperature import Scheduled
from rtdetr_act.results import Result
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.functional_calls import FUNCTIONS
from rtdetr_act.surgery.model_plan import is_model_yaml
from rtdetr_act.surgery.modules import evaluation_mode, find_frozen, get_example_inputs, set_child, unwrap
from rtdetr_act.surgery.rewired import rewired_class
from rtdetr_act.surgery.rewired.hidden_call import HiddenCall

ACTIVATIONS: tuple[Replaces, ...] = ("activation",)
# Functions that gate or normalise (attention, scores) are not activations to swap; GLU halves the channels.
_NOT_SITES = (
    nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention,
    DynamicConv2d, Scheduled,
)  # fmt: skip
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "ultralytics.nn.modules.activation", "rtdetr_act.activations")
# The normalising flow in Ultralytics' Pose26 loss, whose SiLU and Tanh model a density and do not process features.
_SKIPPED_CLASSES = ("RealNVP",)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.LayerNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, DynamicConv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.SyncBatchNorm)
# Blocks that compute one kernel from several by reading the weights of the convolutions inside: RepConv, RepVGGDW and
# Conv2 of Ultralytics, RepVGG and MobileOne of timm.
_WEIGHT_READERS = ("get_equivalent_kernel_bias", "fuse_convs", "reparameterize", "switch_to_deploy")
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
        layout: "map" for (B, C, H, W), "tokens" for (B, N, C).
        module: The current module, or function such as `F.relu`; for a hidden call, an equivalent module.
        hidden: Whether it is a functional call in the owner's forward, or one of several calls of a shared module.
        widths: Channel counts observed in a forward pass, one per call; empty if none was needed.
        overwritable: Whether an activation may work in place: neither another layer nor the backward of the preceding
            layer reads its input. This holds after the BatchNorm of an Ultralytics convolution, and where the stock
            activation works in place.
        replaces: The kind of site, "activation" or "convolution".
    """

    name: str
    owner: nn.Module
    attribute: str
    layer: int | None
    section: str
    channels: int | None
    layout: Layout
    module: Any
    hidden: bool = False
    widths: tuple[int, ...] = ()
    overwritable: bool = False
    replaces: Replaces = "activation"

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
        return type(self.module).__name__ if isinstance(self.module, nn.Module) else f"F.{FUNCTIONS[self.module]}"

    @property
    def activation(self) -> str | None:
        """The registered name of the activation that it holds, such as "silu"; None for others and for convolutions."""
        if self.replaces == "convolution":
            return None
        if placed := get_placement(self.module):
            return get_registered_name(ActSpec.parse(placed.spec).name)
        if not isinstance(self.module, nn.Module):
            return FUNCTIONS[self.module]
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


def find_sites(model: nn.Module, example_input: Any = None) -> list[Site]:
    """Return all activation sites of a model, including hidden functional calls, but not gates and softmaxes.

    For Ultralytics models, the channels of a site are inferred from neighbouring layers. For other models, and where
    that fails, they are observed in a forward pass in evaluation mode.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module.
        example_input: Input of that forward pass, a tensor or a tuple of positional arguments. Default: None, zeros of
            the shape (1, C, 224, 224).

    Returns:
        The sites in module order.

    Raises:
        ModelError: The model is exported, wrapped or compiled.

    >>> [site.name for site in find_sites(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU()))]
    ['1', '3']
    """
    root = unwrap(model)
    return collect_sites(root, "", getattr(root, "yaml", None), ACTIVATIONS, example_input)


def collect_sites(
    root: nn.Module, name: str, model_yaml: Any, kinds: Collection[Replaces], example_input: Any = None
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
    """
    found = []
    for site, owner, attribute, module, call in _iterate_sites(root, name, set(), "convolution" in kinds):
        where = (site, owner, attribute, *_get_layer_and_section(site, model_yaml))
        if isinstance(module, (nn.Conv2d, DynamicConv2d)):
            found.append(Site(*where, module.out_channels, "map", module, replaces="convolution"))
        elif "activation" in kinds:
            channels, layout = (call.channels(owner), call.layout) if call else _infer_channels(owner, attribute)
            over = _can_overwrite_input(owner, attribute, module)
            found.append(Site(*where, channels, layout, module, hidden=call is not None, overwritable=over))
    stays = _find_fixed_convolutions(root, found, is_model_yaml(model_yaml))
    return _probe(root, [s for s in found if s.name not in stays], is_model_yaml(model_yaml), example_input)


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


def is_activation_site(attribute: str, owner: nn.Module, child: nn.Module) -> bool:
    """Return whether a child module is an activation site.

    It is if its class is an activation of torch, Ultralytics or this package, or if it is the `act` of an Ultralytics
    convolution.
    """
    if placement := get_placement(child):  # which may be a gate in the place of an activation
        return placement.replaces == "activation"
    if isinstance(child, _NOT_SITES):
        return False
    if type(child).__module__.startswith(_ACTIVATION_MODULES):
        return True
    return attribute == "act" and hasattr(type(owner), "default_act") and not isinstance(child, nn.Identity)


def _iterate_sites(
    module: nn.Module, name: str, seen: set[int], convolutions: bool
) -> Iterator[tuple[str, nn.Module, str, Any, HiddenCall | None]]:
    """Yield (qualified name, owner, attribute, module or function, hidden call) in module order, each owner once."""
    seen.add(id(module))
    dot = f"{name}." if name else ""
    cls = rewired_class(module)
    calls: dict[str, HiddenCall] = cls.hidden_calls if cls else {}
    covered = (*calls, *getattr(cls, "unused", ()))
    reads_weights = any(hasattr(type(module), method) for method in _WEIGHT_READERS)
    convolutions = convolutions and not reads_weights and type(module).__name__ not in _WEIGHT_READING_CLASSES
    for attribute, child in module._modules.items():
        if child is None or attribute in covered:
            continue
        if is_activation_site(attribute, module, child) or (convolutions and _is_convolution_site(child)):
            yield dot + attribute, module, attribute, child, None
        elif id(child) not in seen and type(child).__name__ not in _SKIPPED_CLASSES:
            yield from _iterate_sites(child, dot + attribute, seen, convolutions)
    for attribute, call in calls.items():
        activation = module._modules[attribute] if attribute in module._modules else call.original(module)
        yield dot + attribute, module, attribute, activation, call
    for attribute, value in vars(module).items():
        if callable(value) and not isinstance(value, type) and _is_function(value):
            yield dot + attribute, module, attribute, value, None


def _is_convolution_site(child: nn.Module) -> bool:
    """Return whether a child module is a convolution that can be replaced."""
    # Subclasses of Conv2d compute something else, and dynamic convolutions not inserted by a swap are the user's.
    return type(child) is nn.Conv2d or (isinstance(child, DynamicConv2d) and get_placement(child) is not None)


def _describe_convolution(conv: Any) -> str:
    """Return a convolution's kernel size and groups as text."""
    size = "x".join(map(str, conv.kernel_size))
    depthwise = conv.groups == conv.in_channels > 1
    return f"{size} depthwise" if depthwise else f"{size} in {conv.groups} groups" if conv.groups > 1 else size


def _is_function(value: Any) -> bool:
    """Return whether a value is a known functional activation."""
    try:
        return value in FUNCTIONS
    except TypeError:  # unhashable callables
        return False


def _get_section(name: str, layer: int | None, rows: tuple[int, int] | None) -> str:
    """Return the section of a site from its layer, or from the first part of its name."""
    if layer is not None and rows is not None:
        return "backbone" if layer < rows[0] else "head" if layer == rows[1] - 1 else "neck"
    first = name.split(".")[0]
    return first if first in ("backbone", "neck", "head") else ""


def _infer_channels(owner: nn.Module, attribute: str) -> tuple[int | None, Layout]:
    """Infer the channels (None if unknown) and the layout of an activation from the modules beside it."""
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
    children = list(owner.children())
    linear = any(isinstance(child, nn.Linear) for child in children)
    return None, "tokens" if linear and not any(isinstance(child, _CONVS) for child in children) else "map"


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
    inner = getattr(module, "bn", getattr(module, "conv", None))
    return _out_channels(inner) if isinstance(inner, nn.Module) else None


def _layout_after(module: nn.Module) -> Layout:
    """Return the layout of a layer's output."""
    return "tokens" if isinstance(module, nn.Linear) else "map"


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
        sites: The sites.
        observe: Returns the `observe` function for a site, as in `Observer`.
    """
    pairs = [(site, Observer(site.module, observe(site))) for site in sites]
    try:
        for site, observer in pairs:
            set_child(site.owner, site.attribute, observer)
        yield
    finally:
        for site, _ in pairs:
            set_child(site.owner, site.attribute, site.module)


def _probe(root: nn.Module, sites: list[Site], ultralytics: bool, example_input: Any) -> list[Site]:
    """Return the sites with the channels and layouts observed in a forward pass.

    Those without channels are observed; in a model that is not from Ultralytics, all that are not hidden.
    """
    unknown = [
        site
        for site in sites
        if site.replaces == "activation" and not site.hidden and (not ultralytics or site.channels is None)
    ]
    inputs = get_example_inputs(root, example_input) if unknown else None
    if inputs is None:
        return sites
    shapes: dict[tuple[int, str], list[tuple[int, ...]]] = {}

    def observe(site: Site) -> Callable[..., torch.Tensor]:
        """Return a function that records the input shape of each call of a site."""
        seen = shapes.setdefault((id(site.owner), site.attribute), [])

        def call(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(tuple(x.shape))
            result: torch.Tensor = module(x, *args, **kwargs)
            return result

        return call

    with (
        observe_activations(unknown, observe),
        evaluation_mode(root),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            root(*inputs)
        except Exception:
            if example_input is not None:
                raise
            # The model does not take an image: keep what was inferred from the owners.
    return [_add_shapes(site, shapes.get((id(site.owner), site.attribute), [])) for site in sites]


def _add_shapes(site: Site, shapes: Sequence[tuple[int, ...]]) -> Site:
    """Return a site with the channels and layout inferred from the input shapes of its calls."""
    if not shapes:
        return site
    shape = shapes[0]
    # Neighbouring layers are more reliable than the shape: (B, C, L) after a Conv1d is a map, (B, H, W, C) after a
    # Linear (ConvNeXt, Swin) is tokens.
    if site.channels is not None and site.channels == shape[1 if site.layout == "map" else -1]:
        layout = site.layout
    else:
        layout = "map" if len(shape) >= 4 else "tokens"
    widths = tuple(shape[1] if layout == "map" else shape[-1] for shape in shapes)
    return replace(site, layout=layout, channels=widths[0] if len(set(widths)) == 1 else None, widths=widths)
