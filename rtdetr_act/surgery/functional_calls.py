"""Find calls of functional activations in the source code of blocks."""

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


def find_unreachable_calls(root: nn.Module) -> list[str]:
    """Return descriptions of the functional activations that cannot be swapped, such as `relu in Block (2 modules)`."""
    blocks = Counter(type(module) for module in root.modules() if rewired_class(module) is None)
    found = []
    for cls, count in blocks.items():
        modules = f"{count} module{'s' if count > 1 else ''}"
        found += [f"{name} in {cls.__name__} ({modules})" for name in _find_called_functions(cls)]
    return found


def _find_called_functions(cls: type) -> tuple[str, ...]:
    """Return the names of the activation functions that the methods of a class call; none for classes of torch."""
    if cls.__module__.startswith(("torch.nn.", "rtdetr_act.")):
        return ()
    known = set(FUNCTIONS.values())
    found: set[str] = set()
    for method in vars(cls).values():
        # The names in the bytecode exclude most methods: reading the source of every block takes 0.8 s for rtdetr-l.
        if inspect.isfunction(method) and known & {name.rstrip("_") for name in method.__code__.co_names}:
            found |= known & _find_called_names(method)
    return tuple(sorted(found))


def _find_called_names(method: FunctionType) -> set[str]:
    """Return the names that a method calls as `F.name(…)` or `tensor.name(…)`, without calls of child modules."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # the source is unavailable, as for a class defined in an interpreter
        return set()
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (call for call in calls if isinstance(call, ast.Attribute) and not _is_child_call(call))
    return {call.attr.rstrip("_") for call in named}


def _is_child_call(node: ast.expr) -> bool:
    """Return whether a called expression is an attribute of self, such as `self.a.b`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"
