"""Choose the backend of a tensor, and load Triton where it can serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.kernels.aten import is_tracing, is_transformed

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# Importing Triton takes up to 3 s, so only where it has something to run on: a GPU, or its own interpreter in tests.
triton: Any = None
tl: Any = None
if torch.cuda.is_available() or INTERPRETING:
    with suppress(ImportError):  # there is no wheel for every system
        triton, tl = import_module("triton"), import_module("triton.language")

# Kernels name it bare: Triton 3.0's interpreter compares the text of an annotation with "constexpr".
constexpr: Any = tl.constexpr if tl is not None else None

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def wants_plain(x: Tensor) -> bool:
    """Say whether a graph is being recorded, or x is no tensor with memory of its own (fake, functional, wrapped)."""
    return (
        torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS or x.is_meta or is_tracing() or is_transformed()
    )


def wants_triton(x: Tensor) -> bool:
    """Say whether the Triton kernels serve a tensor: on CUDA, in float32 or a half type, and not empty."""
    return triton is not None and (x.is_cuda or INTERPRETING) and x.dtype in _FLOATS and x.numel() > 0


def records(*tensors: Tensor | None) -> bool:
    """Say whether autograd has to know of a call; without, an autograd function would only cost its 10 µs."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute in: float32 for half types, else the type itself.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in a type; asking each of a small op for it in vain costs 1 µs a time.

    >>> [t.dtype for t in widened([torch.zeros(1), torch.zeros(1, dtype=torch.float16)], torch.float32)]
    [torch.float32, torch.float32]
    """
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of `plain(*inputs)` as a graph of their own, for a backward of a backward.

    Args:
        plain: The op in differentiable operators.
        inputs: Its tensors as saved; None for one that was left out.
        grad: Gradient of its result.
        needed: Which of the inputs need a gradient.
    """
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(plain(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)]


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `torch.ops.rtdetr_act.<name>` with its Triton launcher and its shapes, and return it.

    Tests run the same operators on CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1).
    """
    _library.define(f"{name}{schema}")
    _library.impl(name, run, "CPU" if INTERPRETING else "CUDA")
    torch.library.register_fake(f"rtdetr_act::{name}", fake, lib=_library)
    return getattr(torch.ops.rtdetr_act, name).default


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the device of x; Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


_library = torch.library.Library("rtdetr_act", "DEF")
