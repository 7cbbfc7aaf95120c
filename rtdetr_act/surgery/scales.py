"""Where a constant factor can go: into which weights, so that a network computes the same without it.

Give every tensor of a network a scale: by how much the folded network holds a multiple of it. An operator that is
linear without an offset, or homogeneous such as ReLU and max-pooling, passes its scale on; what it joins (a sum, a
concatenation) must have one scale. A convolution, Linear or BatchNorm may change it: its weight takes up the ratio of
the scales behind and in front of it, its bias the scale behind. Anything else (a sigmoid, a product of two tensors, the
network's results) needs scale 1. An activation `s * leaky_relu(x)` that loses its factor s divides the scale by s.

So each operator is an equation between logarithms of scales, and the network is solved by a union-find that keeps the
difference of each member to its root. That needs no knowledge of any block: skip connections, RepConv's branches,
concatenations and layers used twice are all equations. An activation whose equation contradicts the others stays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.modules import evaluating
from rtdetr_act.surgery.sites import Site, find_sites, observing

ONE = 0  # the node of everything that must keep its scale

# Reads nothing of the values.
_HARMLESS = frozenset(
    "shape dtype device ndim layout size dim numel nelement stride element_size requires_grad is_floating_point "
    "is_contiguous is_cuda is_mps is_cpu is_meta is_sparse is_quantized is_complex type names __len__ _version "
    "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like storage_offset".split()
)
# Pass a positive factor of all their tensors on to their result.
_HOMOGENEOUS = frozenset(
    "view reshape flatten unflatten permute transpose t swapaxes movedim contiguous clone detach to float double "
    "type_as chunk split tensor_split unbind __getitem__ narrow select squeeze unsqueeze expand expand_as repeat roll "
    "T flip cat concat concatenate stack pixel_shuffle pixel_unshuffle channel_shuffle "
    "add __add__ __radd__ __iadd__ add_ sub __sub__ __isub__ sub_ neg __neg__ mean sum "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d max_pool2d max_pool3d "
    "adaptive_max_pool2d amax amin maximum minimum interpolate upsample pad dropout dropout2d "
    "relu relu_ leaky_relu leaky_relu_ abs".split()
)
# By a number, not by a tensor.
_PRODUCTS = frozenset("mul __mul__ __rmul__ __imul__ mul_ div __truediv__ __itruediv__ div_ multiply divide".split())
# Functions with a weight and a bias that may take up a factor: the names of their first arguments.
_CONVOLUTION = ("input", "weight", "bias")
_LAYERS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _CONVOLUTION),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
}
# What a cast from float64 loses.
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class Scales:
    """Equations `log scale(a) = log scale(b) + difference`, solved as they come: a union-find with differences."""

    def __init__(self) -> None:
        self._parents: list[int] = [ONE]
        self._differences: list[float] = [0.0]  # to the parent

    def add(self) -> int:
        """Return a new node, tied to nothing."""
        self._parents.append(len(self._parents))
        self._differences.append(0.0)
        return len(self._parents) - 1

    def root(self, node: int) -> tuple[int, float]:
        """Return the root of a node and the node's difference to it."""
        path, total = [], 0.0
        while self._parents[node] != node:
            path.append(node)
            node = self._parents[node]
        for step in reversed(path):
            total += self._differences[step]
            self._parents[step], self._differences[step] = node, total
        return node, total

    def join(self, a: int, b: int, difference: float = 0.0) -> bool:
        """Add an equation; False, and nothing added, where it contradicts the others.

        >>> scales = Scales()
        >>> a, b = scales.add(), scales.add()
        >>> scales.join(a, b, 0.5), scales.join(b, ONE), scales.join(a, ONE, 0.5), scales.join(a, ONE)
        (True, True, True, False)
        """
        (first, of_a), (second, of_b) = self.root(a), self.root(b)
        if first == second:
            return math.isclose(of_a - of_b, difference, abs_tol=1e-9)
        if first == ONE:  # stays a root
            self._parents[second], self._differences[second] = first, of_a - of_b - difference
        else:
            self._parents[first], self._differences[first] = second, of_b - of_a + difference
        return True

    def copy(self) -> Scales:
        """Return equations of their own."""
        other = Scales()
        other._parents, other._differences = self._parents.copy(), self._differences.copy()
        return other


@dataclass(frozen=True)
class Layer:
    """A use of weights that can take up a factor: their names in the model, and the nodes on both sides."""

    weight: str
    bias: str | None
    mean: str | None
    before: int
    after: int


@dataclass
class Flow:
    """What one forward pass showed of a network.

    Attributes:
        scales: The equations of all operators, those of the activations in question left out.
        layers: The layers that can take up a factor.
        calls: Nodes before and behind each activation in question, for each of its calls.
        rounding: The unit of rounding of the narrowest type that a tensor was cast to; 0 if none was.
    """

    scales: Scales = field(default_factory=Scales)
    layers: list[Layer] = field(default_factory=list)
    calls: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    rounding: float = 0.0


@dataclass(frozen=True)
class Solution:
    """Where the factors go.

    Attributes:
        factors: What to multiply each parameter or buffer by, those of 1 left out.
        sides: For each activation that loses its factor, the scales before and behind it.
        kept: The activations that cannot, each with the reason.
    """

    factors: dict[str, float]
    sides: dict[str, tuple[float, float]]
    kept: dict[str, str]


def record(root: nn.Module, demanding: Collection[str], inputs: tuple[Any, ...]) -> Flow:
    """Run a model once and write down its equations.

    Args:
        root: The model.
        demanding: Names of its activations whose equations `solve` will add. Of the others, those that are homogeneous
            pass a factor on, and those that are not need scale 1.
        inputs: Positional arguments of the call.
    """
    sites = find_sites(root, inputs)
    # Functions are seen when they are called.
    modules = [s for s in sites if isinstance(s.module, nn.Module) and s.attribute in s.owner._modules]
    kinds = [(site, _kind(site, demanding)) for site in modules]
    flow = Flow(calls={site.name: [] for site, kind in kinds if kind == "scaling"})
    recorder = _Recorder(flow, {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]})
    kinds_by_name = {site.name: kind for site, kind in kinds}

    def observe(site: Site) -> Callable[[nn.Module, Tensor], Tensor]:
        def call(module: nn.Module, x: Tensor) -> Tensor:
            with recorder.paused():
                y: Tensor = module.forward(x.clone())  # it may work in place
            recorder.saw_activation(site.name, kinds_by_name[site.name], x, y)
            return y

        return call

    with observing(modules, observe), evaluating(root), torch.no_grad(), recorder:
        result = root(*inputs)
    recorder.finish(result)
    return flow


def _kind(site: Site, demanding: Collection[str]) -> str:
    if site.name in demanding:
        return "scaling"
    entry = find_entry(site.module)
    passes = isinstance(site.module, nn.Identity) or (entry is not None and entry.homogeneous)
    return "passing" if passes else "opaque"


# What an activation demands: the factor that it loses, or the scales before and behind it.
Demand = float | tuple[float, float]


def solve(flow: Flow, demands: Mapping[str, Demand]) -> Solution:
    """Find scales for a network whose activations demand these; what contradicts stays as it is."""
    kept = {name: "it is not run in evaluation" for name in demands if not flow.calls[name]}
    scales = _try(flow, demands, kept)
    while scales is None:
        scales = _try(flow, demands, kept)
    values = _settle(scales, flow.layers)
    found: dict[str, float] = {}
    for layer in flow.layers:
        before, after = values(layer.before), values(layer.after)
        found[layer.weight] = after / before
        found.update({name: value for name, value in ((layer.bias, after), (layer.mean, before)) if name})
    first = {name: flow.calls[name][0] for name in demands if name not in kept}
    sides = {name: (values(before), values(behind)) for name, (before, behind) in first.items()}
    return Solution({name: value for name, value in found.items() if value != 1}, sides, kept)


def _try(flow: Flow, demands: Mapping[str, Demand], kept: dict[str, str]) -> Scales | None:
    """Add the equations of the activations; None after one that contradicts, which then is among the kept."""
    scales = flow.scales.copy()
    for name in kept:
        _join_call(scales, flow.calls[name], (1.0, 1.0) if isinstance(demands[name], tuple) else 1.0)
    for name, demand in demands.items():
        if name not in kept and not _join_call(scales, flow.calls[name], demand):
            kept[name] = "what it reads and what it gives meet again before any weight could take its factor up"
            return None
    return scales


def _join_call(scales: Scales, calls: Sequence[tuple[int, int]], demand: Demand) -> bool:
    """Add the equations of an activation's calls; False, and some of them missing, where they contradict the others."""
    if not isinstance(demand, tuple):
        return all(scales.join(before, after, math.log(demand)) for before, after in calls)
    ends = [(node, math.log(scale)) for call in calls for node, scale in zip(call, demand, strict=True)]
    return all(scales.join(node, ONE, difference) for node, difference in ends)


def _settle(scales: Scales, layers: Sequence[Layer]) -> Callable[[int], float]:
    """Return a function from nodes to scales, the free ones chosen so that what layers read is 1, or about 1.

    Then a factor goes into the weights before an activation wherever it can, and along a chain of skip connections,
    where the factors multiply, the scales spread evenly to both sides of 1.
    """
    read: dict[int, list[float]] = {}
    for layer in layers:
        root, difference = scales.root(layer.before)
        read.setdefault(root, []).append(difference)
    middle = {root: statistics.median_low(found) for root, found in read.items() if root != ONE}

    def value(node: int) -> float:
        root, difference = scales.root(node)
        exponent = difference - middle.get(root, 0.0)
        return math.exp(exponent) if abs(exponent) > 1e-12 else 1.0

    return value


class _Recorder(TorchFunctionMode):
    """Sees every call of torch from Python, and writes its equation down."""

    def __init__(self, flow: Flow, names: Mapping[int, str]) -> None:
        super().__init__()
        self._flow, self._names = flow, names
        self._nodes: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no id is given twice
        self._taken: set[str] = set()  # weights that something else than their layer reads
        self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            self._note(_name_of(func), args, kwargs, result)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Write nothing down for a while."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def saw_activation(self, name: str, kind: str, x: Tensor, y: Tensor) -> None:
        """Write the call of an activation down."""
        self._born(y)
        if kind == "scaling":
            self._flow.calls[name].append((self._node(x), self._node(y)))
        else:
            self._tie([x, y], to_one=kind == "opaque")

    def _tie(self, values: Sequence[Any], *, to_one: bool) -> None:
        """Give tensors one scale, or scale 1."""
        nodes = [self._node(t) for t in values]
        for node in nodes:
            self._flow.scales.join(node, ONE if to_one else nodes[0])

    def _node(self, t: Tensor) -> int:
        """Return the node of a tensor; one that comes from nowhere, an input or a constant, has scale 1."""
        if id(t) in self._names:
            self._taken.add(self._names[id(t)])
            return ONE
        return self._nodes.get(id(t), ONE)

    def _born(self, result: Any) -> None:
        """Give nodes of their own to results seen for the first time."""
        for t in tensors(result):
            if id(t) not in self._nodes and id(t) not in self._names:
                self._nodes[id(t)] = self._flow.scales.add()
                self._held.append(t)

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        if name in _HARMLESS:
            return
        if name in _LAYERS and self._note_layer(name, args, kwargs, result):
            return
        operands = tensors((args, kwargs))
        passes = name in _HOMOGENEOUS and _without_offset(name, args, kwargs)
        if name in _PRODUCTS:
            passes = len(operands) == 1 and isinstance(args[0], Tensor) and "rounding_mode" not in kwargs
        floats = [t.dtype for t in tensors(result) if t.is_floating_point()]
        passes = passes and len(floats) == len(tensors(result))  # an integer is rounded
        if operands and operands[0].dtype == torch.float64:
            self._flow.rounding = max([self._flow.rounding, *(_EPS[dtype] for dtype in floats if dtype in _EPS)])
        self._born(result)
        self._tie([*operands, *tensors(result)], to_one=not passes)

    def _note_layer(self, name: str, args: Any, kwargs: Any, result: Any) -> bool:
        """Write a layer down; False where its weights are not the model's own, or its statistics those of the batch."""
        given = {**dict(zip(_LAYERS[name], args, strict=False)), **kwargs}
        weight, bias, mean = (given.get(key) for key in ("weight", "bias", "running_mean"))
        if given.get("training") or id(weight) not in self._names or (bias is not None and id(bias) not in self._names):
            return False
        if mean is not None and id(mean) not in self._names:
            return False
        before = self._node(given["input"])
        if name in ("layer_norm", "group_norm"):  # they undo a factor of their input, but for eps
            self._tie([given["input"]], to_one=True)
            before = ONE
        self._born(result)
        named = [None if t is None else self._names[id(t)] for t in (weight, bias, mean)]
        self._flow.layers.append(Layer(str(named[0]), named[1], named[2], before, self._node(result)))
        return True

    def finish(self, result: Any) -> None:
        """Add the equations of the network's results, and of weights used more than once."""
        self._tie(tensors(result), to_one=True)
        scales, first = self._flow.scales, dict[str, Layer]()
        for layer in self._flow.layers:
            for weight in filter(None, (layer.weight, layer.bias)):
                if weight in self._taken:
                    scales.join(layer.before, ONE)
                    scales.join(layer.after, ONE)
                other = first.setdefault(weight, layer)
                scales.join(layer.before, other.before)
                scales.join(layer.after, other.after)


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return str(getattr(func.__self__, "__name__", "")) if name == "__get__" else str(name)


def _without_offset(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a homogeneous function is called without a number that it adds."""
    if name in ("add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__isub__", "sub_"):
        return all(isinstance(value, Tensor) or value == 0 for value in (*args[:2], kwargs.get("other", 0)))
    if name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        return mode != "constant" or not kwargs.get("value", args[3] if len(args) > 3 else 0)
    return True


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif is_dataclass(value):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in tensors(item)]
