"""Find the weights into which the constant factors of activations can be folded without changing a network's output.

Each tensor of the network has a scale, the factor by which it differs in the folded network. An operator that is linear
without an offset, or homogeneous such as ReLU and max-pooling, preserves the scale, and all its operands (of a sum or a
concatenation) must have the same one. A convolution, Linear or BatchNorm can change it: its weight is multiplied by the
ratio of the output's scale to the input's, its bias by the output's. All other operators (a sigmoid, a product of two
tensors) and the outputs of the network need scale 1. Removing the factor s of an activation `s * leaky_relu(x)` divides
the scale by s.

Each operator is therefore an equation between logarithms of scales. They are solved by a union-find that stores the
difference of each node to its root. No knowledge of particular blocks is needed: skip connections, RepConv's branches,
concatenations and shared layers are all equations. An activation whose equation contradicts the others is not changed.
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
from rtdetr_act.surgery.modules import evaluation_mode
from rtdetr_act.surgery.sites import Site, find_sites, observe_activations

UNIT = 0  # the node with scale 1

# Functions that do not read the values of a tensor.
_METADATA = frozenset(
    "shape dtype device ndim layout size dim numel nelement stride element_size requires_grad is_floating_point "
    "is_contiguous is_cuda is_mps is_cpu is_meta is_sparse is_quantized is_complex type names __len__ _version "
    "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like storage_offset".split()
)
# Homogeneous functions: a positive factor on all tensor arguments is a factor on the result.
_HOMOGENEOUS = frozenset(
    "view reshape flatten unflatten permute transpose t swapaxes movedim contiguous clone detach to float double "
    "type_as chunk split tensor_split unbind __getitem__ narrow select squeeze unsqueeze expand expand_as repeat roll "
    "T flip cat concat concatenate stack pixel_shuffle pixel_unshuffle channel_shuffle "
    "add __add__ __radd__ __iadd__ add_ sub __sub__ __isub__ sub_ neg __neg__ mean sum "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d max_pool2d max_pool3d "
    "adaptive_max_pool2d amax amin maximum minimum interpolate upsample pad dropout dropout2d "
    "relu relu_ leaky_relu leaky_relu_ abs".split()
)
# Products, homogeneous if the other factor is a number.
_PRODUCTS = frozenset("mul __mul__ __rmul__ __imul__ mul_ div __truediv__ __itruediv__ div_ multiply divide".split())
# Functions with a weight and a bias into which a factor can be folded, with the names of their first arguments.
_CONVOLUTION = ("input", "weight", "bias")
_LAYERS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _CONVOLUTION),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
}
# Relative rounding error of a cast from float64.
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class Scales:
    """A system of equations `log scale(a) = log scale(b) + difference`, solved incrementally by a union-find."""

    def __init__(self) -> None:
        self._parents: list[int] = [UNIT]
        self._differences: list[float] = [0.0]  # to the parent

    def add(self) -> int:
        """Add a node without equations, and return it."""
        self._parents.append(len(self._parents))
        self._differences.append(0.0)
        return len(self._parents) - 1

    def root(self, node: int) -> tuple[int, float]:
        """Return the root of a node and the difference between the node and its root."""
        path, total = [], 0.0
        while self._parents[node] != node:
            path.append(node)
            node = self._parents[node]
        for step in reversed(path):
            total += self._differences[step]
            self._parents[step], self._differences[step] = node, total
        return node, total

    def join(self, a: int, b: int, difference: float = 0.0) -> bool:
        """Add the equation `a = b + difference`; return False, without adding it, if it contradicts the others.

        >>> scales = Scales()
        >>> a, b = scales.add(), scales.add()
        >>> scales.join(a, b, 0.5), scales.join(b, UNIT), scales.join(a, UNIT, 0.5), scales.join(a, UNIT)
        (True, True, True, False)
        """
        (first, of_a), (second, of_b) = self.root(a), self.root(b)
        if first == second:
            return math.isclose(of_a - of_b, difference, abs_tol=1e-9)
        if first == UNIT:  # which remains a root
            self._parents[second], self._differences[second] = first, of_a - of_b - difference
        else:
            self._parents[first], self._differences[first] = second, of_b - of_a + difference
        return True

    def copy(self) -> Scales:
        """Return an independent copy."""
        other = Scales()
        other._parents, other._differences = self._parents.copy(), self._differences.copy()
        return other


@dataclass(frozen=True)
class Layer:
    """One call of a layer into whose weights a factor can be folded.

    Attributes:
        weight: Name of the weight in the model.
        bias: Name of the bias, None if there is none.
        mean: Name of the running mean, None if there is none.
        before: Node of the input.
        after: Node of the output.
    """

    weight: str
    bias: str | None
    mean: str | None
    before: int
    after: int


@dataclass
class Flow:
    """The equations of a network, recorded in one forward pass.

    Attributes:
        scales: The equations of all operators, except of the activations to fold.
        layers: Calls of layers into which factors can be folded.
        calls: For each activation to fold, the input and output nodes of its calls.
        rounding: Relative rounding error of the narrowest dtype that a tensor was cast to, 0 if there was no cast.
    """

    scales: Scales = field(default_factory=Scales)
    layers: list[Layer] = field(default_factory=list)
    calls: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    rounding: float = 0.0


@dataclass(frozen=True)
class Solution:
    """The factors by which to multiply weights.

    Attributes:
        factors: Factor of each parameter or buffer by name, without factors of 1.
        sides: For each folded activation, the scales of its input and output.
        kept: The activations that cannot be folded, with the reason.
        outputs: For each layer, by the name of its weight, the scale of its output.
    """

    factors: dict[str, float]
    sides: dict[str, tuple[float, float]]
    kept: dict[str, str]
    outputs: dict[str, float]


def record(root: nn.Module, folded: Collection[str], inputs: tuple[Any, ...]) -> Flow:
    """Run a model once in evaluation mode, and record its equations.

    Args:
        root: The model.
        folded: Names of the activations to fold, whose equations `solve` adds. Of the others, homogeneous ones
            preserve scales, and all others need scale 1.
        inputs: Positional arguments of the call.
    """
    sites = find_sites(root, inputs)
    # Functional activations are recorded as torch functions.
    modules = [s for s in sites if isinstance(s.module, nn.Module) and s.attribute in s.owner._modules]
    kinds = [(site, _classify(site, folded)) for site in modules]
    flow = Flow(calls={site.name: [] for site, kind in kinds if kind == "scaling"})
    recorder = _Recorder(flow, {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]})
    kinds_by_name = {site.name: kind for site, kind in kinds}

    def observe(site: Site) -> Callable[[nn.Module, Tensor], Tensor]:
        """Return a function that records each call of an activation as one operator."""

        def call(module: nn.Module, x: Tensor) -> Tensor:
            with recorder.paused():
                y: Tensor = module.forward(x.clone())  # a copy, since it may work in place
            recorder.record_activation(site.name, kinds_by_name[site.name], x, y)
            return y

        return call

    with observe_activations(modules, observe), evaluation_mode(root), torch.no_grad(), recorder:
        result = root(*inputs)
    recorder.finish(result)
    return flow


def _classify(site: Site, folded: Collection[str]) -> str:
    """Return the kind of an activation: "scaling" if it is to be folded, "passing" if homogeneous, else "opaque"."""
    if site.name in folded:
        return "scaling"
    entry = find_entry(site.module)
    passes = isinstance(site.module, nn.Identity) or (entry is not None and entry.homogeneous)
    return "passing" if passes else "opaque"


# Requirement of an activation: the factor that is removed, or the scales of its input and output.
Requirement = float | tuple[float, float]


def solve(flow: Flow, requirements: Mapping[str, Requirement]) -> Solution:
    """Solve for the scales of a network, given the requirements of its activations.

    Args:
        flow: The recorded equations.
        requirements: Requirements by the names of activations; those that contradict the equations are dropped.
    """
    kept = {name: "it is not run in evaluation" for name in requirements if not flow.calls[name]}
    scales = _try_solve(flow, requirements, kept)
    while scales is None:
        scales = _try_solve(flow, requirements, kept)
    values = _assign_scales(scales, flow.layers)
    found: dict[str, float] = {}
    outputs: dict[str, float] = {}
    for layer in flow.layers:
        before, after = values(layer.before), values(layer.after)
        outputs[layer.weight] = after
        found[layer.weight] = after / before
        found.update({name: value for name, value in ((layer.bias, after), (layer.mean, before)) if name})
    first = {name: flow.calls[name][0] for name in requirements if name not in kept}
    sides = {name: (values(before), values(behind)) for name, (before, behind) in first.items()}
    return Solution({name: value for name, value in found.items() if value != 1}, sides, kept, outputs)


def _try_solve(flow: Flow, requirements: Mapping[str, Requirement], kept: dict[str, str]) -> Scales | None:
    """Add the equations of the activations; at the first that contradicts, add it to `kept` and return None."""
    scales = flow.scales.copy()
    for name in kept:
        _join_call(scales, flow.calls[name], (1.0, 1.0) if isinstance(requirements[name], tuple) else 1.0)
    for name, requirement in requirements.items():
        if name not in kept and not _join_call(scales, flow.calls[name], requirement):
            kept[name] = "its input and output are combined again before a weight that could absorb its factor"
            return None
    return scales


def _join_call(scales: Scales, calls: Sequence[tuple[int, int]], requirement: Requirement) -> bool:
    """Add the equations of an activation's calls; return False at the first that contradicts the others."""
    if not isinstance(requirement, tuple):
        return all(scales.join(before, after, math.log(requirement)) for before, after in calls)
    ends = [(node, math.log(scale)) for call in calls for node, scale in zip(call, requirement, strict=True)]
    return all(scales.join(node, UNIT, difference) for node, difference in ends)


def _assign_scales(scales: Scales, layers: Sequence[Layer]) -> Callable[[int], float]:
    """Return a function from nodes to scales; free scales are chosen so that the median scale of layer inputs is 1.

    Factors are thus folded into the weights before an activation where possible. Along a chain of skip connections,
    where factors multiply, the scales are spread evenly around 1.
    """
    read: dict[int, list[float]] = {}
    for layer in layers:
        root, difference = scales.root(layer.before)
        read.setdefault(root, []).append(difference)
    middle = {root: statistics.median_low(found) for root, found in read.items() if root != UNIT}

    def value(node: int) -> float:
        root, difference = scales.root(node)
        exponent = difference - middle.get(root, 0.0)
        return math.exp(exponent) if abs(exponent) > 1e-12 else 1.0

    return value


class _Recorder(TorchFunctionMode):
    """Record the equation of every torch function called from Python."""

    def __init__(self, flow: Flow, names: Mapping[int, str]) -> None:
        super().__init__()
        self._flow, self._names = flow, names
        self._nodes: dict[int, int] = {}
        self._kept_alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
        self._read_elsewhere: set[str] = set()  # weights that are read outside their layer
        self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            self._record_call(_name_of(func), args, kwargs, result)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def record_activation(self, name: str, kind: str, x: Tensor, y: Tensor) -> None:
        """Record a call of an activation."""
        self._add_nodes(y)
        if kind == "scaling":
            self._flow.calls[name].append((self._get_node(x), self._get_node(y)))
        else:
            self._equate([x, y], to_one=kind == "opaque")

    def _equate(self, values: Sequence[Any], *, to_one: bool) -> None:
        """Add equations that give tensors the same scale, or scale 1."""
        nodes = [self._get_node(t) for t in values]
        for node in nodes:
            self._flow.scales.join(node, UNIT if to_one else nodes[0])

    def _get_node(self, t: Tensor) -> int:
        """Return the node of a tensor; inputs, constants and parameters have scale 1."""
        if id(t) in self._names:
            self._read_elsewhere.add(self._names[id(t)])
            return UNIT
        return self._nodes.get(id(t), UNIT)

    def _add_nodes(self, result: Any) -> None:
        """Add nodes for results that have none."""
        for t in flatten_tensors(result):
            if id(t) not in self._nodes and id(t) not in self._names:
                self._nodes[id(t)] = self._flow.scales.add()
                self._kept_alive.append(t)

    def _record_call(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Record the equation of a call of a torch function."""
        if name in _METADATA:
            return
        if name in _LAYERS and self._record_layer(name, args, kwargs, result):
            return
        operands = flatten_tensors((args, kwargs))
        passes = name in _HOMOGENEOUS and _has_no_offset(name, args, kwargs)
        if name in _PRODUCTS:
            passes = len(operands) == 1 and isinstance(args[0], Tensor) and "rounding_mode" not in kwargs
        floats = [t.dtype for t in flatten_tensors(result) if t.is_floating_point()]
        passes = passes and len(floats) == len(flatten_tensors(result))  # an integer is rounded
        if operands and operands[0].dtype == torch.float64:
            self._flow.rounding = max([self._flow.rounding, *(_EPS[dtype] for dtype in floats if dtype in _EPS)])
        self._add_nodes(result)
        self._equate([*operands, *flatten_tensors(result)], to_one=not passes)

    def _record_layer(self, name: str, args: Any, kwargs: Any, result: Any) -> bool:
        """Record a layer; return False if its weights are not parameters, or if it uses batch statistics."""
        given = {**dict(zip(_LAYERS[name], args, strict=False)), **kwargs}
        weight, bias, mean = (given.get(key) for key in ("weight", "bias", "running_mean"))
        if given.get("training") or id(weight) not in self._names or (bias is not None and id(bias) not in self._names):
            return False
        if mean is not None and id(mean) not in self._names:
            return False
        before = self._get_node(given["input"])
        if name in ("layer_norm", "group_norm"):  # invariant to a factor on the input except for eps
            self._equate([given["input"]], to_one=True)
            before = UNIT
        self._add_nodes(result)
        named = [None if t is None else self._names[id(t)] for t in (weight, bias, mean)]
        self._flow.layers.append(Layer(str(named[0]), named[1], named[2], before, self._get_node(result)))
        return True

    def finish(self, result: Any) -> None:
        """Add the equations of the network's outputs, and of weights that are used more than once."""
        self._equate(flatten_tensors(result), to_one=True)
        scales, first = self._flow.scales, dict[str, Layer]()
        for layer in self._flow.layers:
            for weight in filter(None, (layer.weight, layer.bias)):
                if weight in self._read_elsewhere:
                    scales.join(layer.before, UNIT)
                    scales.join(layer.after, UNIT)
                other = first.setdefault(weight, layer)
                scales.join(layer.before, other.before)
                scales.join(layer.after, other.after)


def _name_of(func: Any) -> str:
    """Return the name of a torch function, or of the attribute that a getter reads."""
    name = getattr(func, "__name__", "")
    return str(getattr(func.__self__, "__name__", "")) if name == "__get__" else str(name)


def _has_no_offset(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a call of a homogeneous function adds no constant."""
    if name in ("add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__isub__", "sub_"):
        return all(isinstance(value, Tensor) or value == 0 for value in (*args[:2], kwargs.get("other", 0)))
    if name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        return mode != "constant" or not kwargs.get("value", args[3] if len(args) > 3 else 0)
    return True


def flatten_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif is_dataclass(value):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in flatten_tensors(item)]
