"""Functions whose results are cheap to compute again: a pass or a few over memory, the same result for the same input.

`torch.overrides.TorchFunctionMode` sees the calls of torch's own functions. It sees those of an op of this package, or
of anybody, if the op is marked by `recomputable`: what an autograd function computes inside is hidden from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

Op = TypeVar("Op", bound=Callable[..., Any])

_NAMES = (
    # Activations. Those that draw random numbers (rrelu, dropout) are left out, and softmaxes: their input is kept by
    # nobody, while the product that follows keeps the result.
    "relu relu6 leaky_relu prelu threshold hardtanh elu celu selu silu mish gelu hardswish hardsigmoid sigmoid tanh "
    "logsigmoid softplus softsign softshrink hardshrink tanhshrink glu "
    # Arithmetic, of which activations, gates and residual connections are made.
    "add sub mul div neg rsub square exp maximum minimum clamp __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ "
    "__truediv__ __neg__ "
    # Copies.
    "cat concat clone contiguous reshape flatten pad interpolate "
    # Normalisation over the channels of each position.
    "layer_norm"
).split()
_OWNERS = (F, torch, Tensor, torch._C._nn)
_marked: set[Any] = set()
_functions: dict[Any, int | None] = {}  # with the position of their argument `inplace`, None without it


def _add(function: Callable[..., Any]) -> None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        names = []
    _functions[function] = names.index("inplace") if "inplace" in names else None


for _name in _NAMES:
    for _owner in _OWNERS:
        if hasattr(_owner, _name):
            _add(getattr(_owner, _name))


def is_recomputable(function: Any) -> bool:
    """Return whether a function of torch, or an op, is one whose result is cheap to compute again.

    >>> is_recomputable(F.silu), is_recomputable(torch.cat), is_recomputable(F.conv2d)
    (True, True, False)
    """
    return function in _functions


def saves_copy_in_place(function: Any) -> bool:
    """Return whether, called in place, a function whose backward reads the input saves a copy of it.

    torch's own do. What a marked op saves beside its arguments and its result is not known.

    >>> saves_copy_in_place(F.silu)
    True
    """
    return function not in _marked


def split_inplace(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], bool]:
    """Take the argument `inplace`, which is the last of a function that has it, out of the arguments of a call.

    Returns:
        The other arguments, the other keyword arguments, and whether the call works in place.

    >>> split_inplace(F.leaky_relu, ("x", 0.1, True), {})
    (('x', 0.1), {}, True)
    """
    position = _functions[function]
    if position is None:
        return args, kwargs, False
    inplace = args[position] if len(args) > position else kwargs.get("inplace", False)
    return args[:position], {key: value for key, value in kwargs.items() if key != "inplace"}, bool(inplace)


def recomputable(op: Op) -> Op:
    """Mark an op whose result is cheap to compute again from its arguments, so that `memory="low"` need not keep it.

    Ops made of torch's functions need no mark. Those with an autograd function of their own do: a decorator for the
    Python function that calls `apply`. It must be elementwise in its cost, return one tensor that depends on nothing
    but its arguments, and draw no random numbers. If it can write over its first argument, its last parameter is called
    `inplace`.

    Args:
        op: A function whose first argument is the tensor x.

    >>> @recomputable
    ... def double(x: Tensor) -> Tensor:
    ...     return 2 * x
    >>> is_recomputable(double)
    True
    """

    @wraps(op)
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function_unary(x):  # a mode is active, or x is a tensor with functions of its own
            return handle_torch_function(call, (x,), x, *args, **kwargs)
        return op(x, *args, **kwargs)

    _add(call)
    _marked.add(call)
    return cast(Op, call)
