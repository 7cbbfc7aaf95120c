"""Count the activations that run in a forward pass, from the operators that torch dispatches.

The count knows nothing of modules and source code: it sees `aten::relu` wherever it is called from, and recognises an
activation of several operators, such as x * sigmoid(x), by its factors having the same elementwise origin. A result
that is multiplied with another tensor computed from the input is a gate: it is not counted, and neither are sigmoids,
softmaxes and activations of parameters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# aten operators, without the underscore of those in place.
_ACTIVATIONS = {
    "relu", "relu6", "gelu", "silu", "mish", "leaky_relu", "elu", "selu", "celu", "hardswish", "hardtanh", "tanh",
    "softplus", "softshrink", "hardshrink", "log_sigmoid_forward", "threshold", "prelu", "_prelu_kernel",
    "rrelu_with_noise",
}  # fmt: skip
# Activations only as a factor of their own input.
_FACTORS = {"sigmoid", "hardsigmoid", "erf", "exp", "sigmoid_backward"}
_GATES = {"sigmoid", "hardsigmoid", "softmax", "_softmax", "_safe_softmax"}
# Elementwise: the result depends on the element of each operand at its place.
_POINTWISE = {
    *_ACTIVATIONS, *_FACTORS, "add", "sub", "rsub", "mul", "div", "pow", "neg", "abs", "clamp", "clamp_min",
    "clamp_max", "log", "log1p", "reciprocal", "sqrt", "rsqrt", "square", "sign", "where", "maximum", "minimum",
}  # fmt: skip
# The values stay the same, in another shape, place or type.
_PASSING = {
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "squeeze", "unsqueeze", "select", "slice",
    "split", "split_with_sizes", "unbind", "clone", "_to_copy", "contiguous", "alias", "detach", "flatten", "unflatten",
    "as_strided", "constant_pad_nd", "repeat", "repeat_interleave", "cat", "stack", "chunk", "lift_fresh", "roll",
    "_reshape_alias", "expand_as", "copy",
}  # fmt: skip
# Whether a layer computes a map; the others compute tokens.
_LAYERS = {
    "convolution": True, "_convolution": True, "native_batch_norm": True, "_native_batch_norm_legit": True,
    "_native_batch_norm_legit_no_training": True, "cudnn_batch_norm": True, "mkldnn_convolution": True,
    "cudnn_convolution": True, "native_group_norm": True, "addmm": False, "mm": False, "linear": False,
    "native_layer_norm": False,
}  # fmt: skip
# The result is a map if the input is one; torch computes pooling in one dimension as that in two.
_RESIZING = {
    "squeeze", "unsqueeze", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "mean",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "constant_pad_nd",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
    "upsample_trilinear3d", "upsample_bicubic2d", "pixel_shuffle", "slice",
}  # fmt: skip
_PRODUCTS = {"mul", "bmm", "mm", "baddbmm", "addbmm"}
_POOLS = {"mean", "sum", "amax", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "max", "var",
          "_adaptive_avg_pool3d", "adaptive_max_pool3d"}  # fmt: skip
_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, str(Path(__file__).parent)))


@dataclass
class Activation:
    """One activation that ran.

    Attributes:
        operator: The operator, such as "relu", or "x*sigmoid(x)"; "" for a module that calls none of those known.
        file: Path of the file that called it.
        line: Line of that file.
        owner: Class of the object whose method called it; "" for a function.
        site: Key of the observed activation that it ran in, None elsewhere.
        counts: Whether it is counted; False for a gate, or a part of another activation.
    """

    operator: str
    file: str
    line: int
    owner: str
    site: Any = None
    counts: bool = True


@dataclass(frozen=True)
class SiteCall:
    """One call of an observed activation.

    Attributes:
        shape: Shape of its input.
        pooled: Whether the input is a map that was pooled to a single position.
        dims: Number of spatial dimensions if the input comes from a convolution or BatchNorm, 0 if it comes from a
            matrix product or LayerNorm, with nothing but elementwise functions in between; else None.
        activation: What ran there.
    """

    shape: tuple[int, ...]
    pooled: bool
    dims: int | None
    activation: Activation


class _State:
    """What is known of a tensor.

    Attributes:
        ancestors: Bit i is set if it was computed from the result of activation i.
        result_of: Number of the activation whose values it has, up to a factor; None if it has others.
        origin: Identifies the tensor that it was computed from elementwise.
        curved: Whether that involved a function that is not linear.
        parts: Numbers of the activations among these functions.
        features: Whether it depends on the input of the model.
        leaf: Whether it is a parameter, a buffer or a constant, or a view of one.
        gate: Whether it holds the values of a sigmoid or softmax.
        pooled: Whether it was pooled to a single position.
        dims: As in `SiteCall`.
    """

    __slots__ = ("ancestors", "curved", "dims", "features", "gate", "leaf", "origin", "parts", "pooled", "result_of")

    def __init__(self) -> None:
        self.ancestors = 0
        self.result_of: int | None = None
        self.origin: object = self
        self.parts: tuple[int, ...] = ()
        self.dims: int | None = None
        self.curved = self.features = self.gate = self.pooled = False
        self.leaf = True


class OperatorCounter(TorchDispatchMode):
    """Record the activations that run inside the `with` block.

    Args:
        inputs: The arguments of the model.

    Attributes:
        activations: What ran, in order.
        calls: The calls of observed activations, by key.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.activations: list[Activation] = []
        self.calls: dict[Any, list[SiteCall]] = {}
        self._states: Any = WeakTensorKeyDictionary()
        self._site: Any = None
        for tensor in _find_tensors(inputs):
            state = self._get(tensor)
            state.features, state.leaf = True, False

    def call(self, site: Any, activation: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the result of an observed activation; whatever runs inside is one activation.

        Args:
            site: Its key.
            activation: The module or function.
            x: Its input.
            *args: Further arguments.
            **kwargs: Further keyword arguments.
        """
        outer, self._site, first = self._site, site, len(self.activations)
        before = self._get(x)
        features, pooled, dims = before.features or not before.leaf, before.pooled, before.dims
        shape = tuple(x.shape)
        try:
            result: Tensor = activation(x, *args, **kwargs)
        finally:
            self._site = outer
        ran = [i for i in range(first, len(self.activations)) if self.activations[i].counts]
        if not ran:
            self.activations.append(Activation("", "", 0, type(activation).__name__, site, counts=features))
        number = ran[0] if ran else len(self.activations) - 1
        for i in ran[1:]:
            self.activations[i].counts = False
        state = self._get(result)
        state.ancestors |= 1 << number
        state.dims = dims
        state.result_of, state.leaf, state.parts = number, False, (*before.parts, number)
        self.calls.setdefault(site, []).append(SiteCall(shape, pooled, dims, self.activations[number]))
        return result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and record what is known of its results."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        inputs = list(_find_tensors(args)) + list(_find_tensors(kwargs.values()))
        states = [self._get(tensor) for tensor in inputs]
        shapes = [tensor.shape for tensor in inputs]
        result = func(*args, **kwargs)
        made = self._combine(name, states)
        if name in _PRODUCTS and len(states) > 1:
            self._record_product(name, made, states[-2:], shapes[-2:])
        if name == "scaled_dot_product_attention" or name.startswith("_scaled_dot_product"):
            self._record_product(name, made, states[:2], shapes[:2])
        if states and (name in _ACTIVATIONS or _is_clamp(name, args, kwargs)):
            self._record(name, made, states[0])
        pools = name in _POOLS
        pooled = any(state.pooled for state in states)
        for tensor in _find_tensors([result]):
            single = tensor.ndim > 2 and all(size == 1 for size in tensor.shape[2:])
            own = _copy(made)
            if name in _LAYERS:
                own.dims = max(tensor.ndim - 2, 0) if _LAYERS[name] else 0
            elif name in _RESIZING and states[0].dims:
                own.dims = max(tensor.ndim - 2, 0)
            own.pooled = single and (pooled or (pools and bool(shapes) and len(shapes[0]) == tensor.ndim))
            self._states[tensor] = own
        return result

    def _get(self, tensor: Tensor) -> _State:
        state: _State | None = self._states.get(tensor)
        if state is None:
            state = self._states[tensor] = _State()
        return state

    def _combine(self, name: str, states: Sequence[_State]) -> _State:
        """Return what is known of the result of an operator from its operands."""
        made = _State()
        features = [state for state in states if not state.leaf]
        for state in states:
            made.ancestors |= state.ancestors
            made.features |= state.features
        made.leaf = not features and bool(states) and name in _PASSING
        if not states:
            return made
        made.gate = name in _GATES
        if features and (name in _POINTWISE or name == "cat") and len({state.dims for state in features}) == 1:
            made.dims = features[0].dims
        if len(features) == 1 and (name in _POINTWISE or name in _PASSING):
            made.result_of = features[0].result_of
            made.gate |= features[0].gate
        if name in _POINTWISE and features and all(state.origin is features[0].origin for state in features):
            made.origin = features[0].origin
            made.parts = tuple(dict.fromkeys(number for state in features for number in state.parts))
            made.curved = any(state.curved for state in features) or name in _ACTIVATIONS or name in _FACTORS
            made.curved |= name.startswith("clamp")
        return made

    def _record(self, name: str, made: _State, source: _State) -> None:
        """Record an activation, unless its input is a parameter."""
        if source.leaf:
            return
        made.result_of = len(self.activations)
        made.ancestors |= 1 << made.result_of
        made.parts = (*source.parts, made.result_of)
        self.activations.append(Activation(name, *_locate_caller(), self._site))

    def _record_product(self, name: str, made: _State, states: Sequence[_State], shapes: Sequence[torch.Size]) -> None:
        """Record a product: an activation x * f(x), or a gate."""
        one, other = states
        if one is other:  # a square
            return
        if name == "mul" and one.origin is other.origin and not one.leaf and (one.curved or other.curved):
            # What both factors have in them came before.
            parts = [i for i in made.parts if (i in one.parts) != (i in other.parts)]
            names = [self.activations[i].operator for i in parts] or ["sigmoid"]
            for i in parts:
                self.activations[i].counts = False
            self._record(f"x*{'*'.join(reversed(names))}(x)", made, one)
            return
        sizes = [shape.numel() for shape in shapes]
        for state, factor, size, own in ((one, other, sizes[1], sizes[0]), (other, one, sizes[0], sizes[1])):
            # A factor that is expanded, such as a mask or one number per channel, does not make features a gate.
            if state.result_of is None or not factor.features or factor.gate or size == 1:
                continue
            if name == "mul" and size < own:
                continue
            if not factor.ancestors >> state.result_of & 1:
                self.activations[state.result_of].counts = False


def _copy(state: _State) -> _State:
    copied = _State()
    for name in _State.__slots__:
        setattr(copied, name, getattr(state, name))
    if state.origin is state:  # its own origin: so is the copy
        copied.origin = copied
    return copied


def _is_clamp(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator is clamp(x, min=0), which is ReLU, or clamp(x, 0, 6)."""
    if name not in ("clamp", "clamp_min"):
        return False
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    return isinstance(low, (int, float)) and low == 0 and (high is None or high == 6)


def _find_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments, in lists, tuples and mappings of them too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _find_tensors(value)
        elif isinstance(value, Mapping):
            yield from _find_tensors(value.values())


def _locate_caller() -> tuple[str, int, str]:
    """Return file, line and class of the innermost caller that is neither in torch nor in this package."""
    frame = sys._getframe(2)
    fallback = frame
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        fallback, frame = frame, frame.f_back  # type: ignore[assignment]
    frame = frame or fallback
    owner = frame.f_locals.get("self")
    return frame.f_code.co_filename, frame.f_lineno, type(owner).__name__ if isinstance(owner, nn.Module) else ""


@contextmanager
def no_fused_attention() -> Iterator[None]:
    """Keep torch's transformer layers from fusing their activation into one operator, inside the block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
