"""Choose the backend for a tensor, and import Triton where it can run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from rtdetr_act.kernels.aten import has_modes, is_functorch_active, is_tracing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# Importing Triton takes up to 3 s, so it is imported only where it can run: on a GPU, or in its interpreter in tests.
triton: Any = None
tl: Any = None
if torch.cuda.is_available() or INTERPRETING:
    with suppress(ImportError):  # not every platform has a wheel
        triton, tl = import_module("triton"), import_module("triton.language")

# An unqualified name for annotations: Triton 3.0's interpreter compares their source text with "constexpr".
constexpr: Any = tl.constexpr if tl is not None else None

PLAIN_TENSORS = (Tensor, nn.Parameter)
_LAYERS = (nn.Linear, nn.Conv2d)
_WIDE_TYPES = (torch.float32, torch.float64)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def needs_plain_ops(x: Tensor) -> bool:
    """Return whether an op must use torch's own operators: a graph is being recorded, or x is not a plain tensor.

    Tensors that are not plain are those without storage of their own: fake, functional, wrapped or on "meta".
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN_TENSORS
        or x.is_meta
        or is_tracing()
        or is_functorch_active()
    )


def is_exporting() -> bool:
    """Return whether a graph is recorded for another runtime: by `torch.export`, tracing or an export to ONNX.

    Before torch 2.7, `torch.export` does not tell.
    """
    asks = getattr(torch.compiler, "is_exporting", None)
    return is_tracing() or torch.onnx.is_in_onnx_export() or bool(asks and asks())


def read_parameters(x: Tensor, module: nn.Module, names: Sequence[str]) -> list[Tensor] | None:
    """Return weight and bias of each layer of a module where they may be used in its stead, without a call of it.

    That is so on a CPU where neither autograd nor a graph, a mode, autocast or a hook sees the calls, the layers are
    torch's own `Linear` or `Conv2d`, and all are in the dtype of x, which is float32 or float64. Elsewhere it returns
    None. The dictionaries are read since `Module.__getattr__` takes 0.3 µs, a third of the time of an operator.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> read_parameters(torch.zeros(1, 2), net, "0") is None  # autograd is on
    True
    >>> with torch.no_grad():
    ...     len(read_parameters(torch.zeros(1, 2), net, "0"))
    2
    """
    dtype = x.dtype
    if torch.is_grad_enabled() or needs_plain_ops(x) or not x.is_cpu or dtype not in _WIDE_TYPES or INTERPRETING:
        return None
    if has_modes() or torch.is_autocast_enabled("cpu"):
        return None
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return None
    parameters: list[Tensor] = []
    for name in names:
        layer = module._modules.get(name)
        if layer is None or type(layer) not in _LAYERS or layer._forward_hooks or layer._forward_pre_hooks:
            return None  # a pruned or quantized one, or one that is watched
        if "forward" in layer.__dict__:
            return None  # an offloaded one
        for parameter in (layer._parameters.get("weight"), layer._parameters.get("bias")):
            if parameter is None or type(parameter) not in PLAIN_TENSORS or parameter.dtype != dtype:
                return None
            parameters.append(parameter)
    return parameters


def can_use_triton(x: Tensor) -> bool:
    """Return whether the Triton kernels support x: on CUDA, in float32, float16 or bfloat16, and not empty."""
    return triton is not None and (x.is_cuda or INTERPRETING) and x.dtype in _FLOATS and x.numel() > 0


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Return whether autograd has to record a call on these tensors.

    Where it does not, calling an autograd function would waste its overhead of 10 µs. None counts as a constant.
    """
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32 for float16 and bfloat16, else the dtype itself.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors cast to a dtype, skipping those that have it: a `to` without effect costs 1 µs.

    >>> [t.dtype for t in cast_all([torch.zeros(1), torch.zeros(1, dtype=torch.float16)], torch.float32)]
    [torch.float32, torch.float32]
    """
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def differentiable_grad(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of `plain(*inputs)` with a graph of their own, for double backward.

    Args:
        plain: The op written in differentiable operators.
        inputs: Its saved tensors; None for an optional one that was not given.
        grad: Gradient with respect to its output.
        needed: Which of the inputs need a gradient, as `ctx.needs_input_grad`.

    Returns:
        One gradient per input, None where none is needed.
    """
    differentiated = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    with torch.enable_grad():
        grads = iter(torch.autograd.grad(plain(*inputs), differentiated, grad, create_graph=True, allow_unused=True))
    return [next(grads) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)]


def register_operator(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register the operator `torch.ops.rtdetr_act.<name>` and return its overload.

    With TRITON_INTERPRET=1, as in tests, it is registered for CPU tensors and runs in Triton's interpreter.

    Args:
        name: Name of the operator.
        schema: Its arguments and results, as in "(Tensor x) -> Tensor".
        run: Launches the Triton kernel; called with the arguments.
        fake: Returns empty outputs of the right shapes and dtypes, for tracing.
    """
    _library.define(f"{name}{schema}")
    _library.impl(name, run, "CPU" if INTERPRETING else "CUDA")
    torch.library.register_fake(f"rtdetr_act::{name}", fake, lib=_library)
    return getattr(torch.ops.rtdetr_act, name).default


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context manager that makes the device of x current, where Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


_library = torch.library.Library("rtdetr_act", "DEF")
