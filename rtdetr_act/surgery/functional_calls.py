"""Functional activations in the code of blocks, found in their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from types import FunctionType

import torch
from torch import nn
from torch.nn import functional as F

from rtdetr_act.surgery.rewired import rewired_class

FUNCTIONS = {
    getattr(space, name): name
    for space in (F, torch)
    for name in ("relu", "gelu", "silu", "mish", "leaky_relu", "elu", "selu", "hardswish", "relu6", "tanh")
    if hasattr(space, name)
}


def unseen_calls(root: nn.Module) -> list[str]:
    """List functional activations in the code of foreign blocks, which no swap reaches: `relu in Block (2 modules)`."""
    blocks = Counter(type(module) for module in root.modules() if rewired_class(module) is None)
    found = []
    for cls, count in blocks.items():
        modules = f"{count} module{'s' if count > 1 else ''}"
        found += [f"{name} in {cls.__name__} ({modules})" for name in _called_functions(cls)]
    return found


def _called_functions(cls: type) -> tuple[str, ...]:
    """Return the activation functions and tensor methods that the methods of a class call; torch's own have none."""
    if cls.__module__.startswith(("torch.nn.", "rtdetr_act.")):
        return ()
    known = set(FUNCTIONS.values())
    found: set[str] = set()
    for method in vars(cls).values():
        # The names in the bytecode rule out nearly all: reading the source of every block takes 0.8 s for rtdetr-l.
        if inspect.isfunction(method) and known & {name.rstrip("_") for name in method.__code__.co_names}:
            found |= known & _called_names(method)
    return tuple(sorted(found))


def _called_names(method: FunctionType) -> set[str]:
    """Return the names that a method calls as `F.name(…)` or `tensor.name(…)`, child modules left out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # no source to read, as for a class typed into an interpreter
        return set()
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (call for call in calls if isinstance(call, ast.Attribute) and not _is_own_attribute(call))
    return {call.attr.rstrip("_") for call in named}


def _is_own_attribute(node: ast.expr) -> bool:
    """Return whether an expression is `self.a.b`, the call of a child module."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"
