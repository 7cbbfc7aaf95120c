"""Give blocks a module for each activation that their source code calls as a function, or several times.

The class of a block is changed to a subclass whose methods are compiled from the same source code, with `self.act(x)`
in place of `F.relu(x)`. The subclass shares the globals and closures of the original. Its source code can be read by
`inspect`, so that `torch.compile`, `torch.export` and TorchScript work where they did. A pickle or copy refers to the
original class, whose subclass is made again.
"""

from __future__ import annotations
import __future__

import ast
import copy
import linecache
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from rtdetr_act.surgery.functional_calls import (
    HiddenCall,
    Method,
    find_hidden_calls,
    get_place,
    read_block,
)

_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def is_rewired(module: nn.Module) -> bool:
    """Return whether the class of a block is one that `rewire` made."""
    return "rewired_from" in vars(type(module))


def get_hidden_calls(
    owner: nn.Module, is_activation: Callable[[str, nn.Module, nn.Module], bool]
) -> tuple[HiddenCall, ...]:
    """Return the hidden calls of a block, rewired or not; `is_activation` is as in `find_hidden_calls`."""
    if is_rewired(owner):
        calls: tuple[HiddenCall, ...] = type(owner).hidden_calls  # type: ignore[attr-defined]
        return calls
    return find_hidden_calls(owner, is_activation)


def rewire(owner: nn.Module, calls: Sequence[HiddenCall]) -> None:
    """Change the class of a block, and add a module for each hidden call, in place."""
    children = tuple(sorted({call.child for call in calls if call.child}))
    for call in calls:
        owner.add_module(call.attribute, copy.deepcopy(call.build_original(owner)).train(owner.training))
    owner.__class__ = make_class(type(owner), children)


def unwire(owner: nn.Module) -> None:
    """Undo `rewire`: restore the class of a block, and delete the modules of its hidden calls."""
    cls: Any = type(owner)
    for call in cls.hidden_calls:
        delattr(owner, call.attribute)
    owner.__class__ = cls.rewired_from


def make_class(cls: type, children: tuple[str, ...]) -> type:
    """Return the subclass of a class whose methods call modules.

    Args:
        cls: The class of a block.
        children: The children that it calls several times, each call of which gets a module.
    """
    if (cls, children) not in _classes:
        _classes[cls, children] = _make_class(cls, children)
    return _classes[cls, children]


def _make_class(cls: type, children: tuple[str, ...]) -> type:
    source = read_block(cls, children)
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        # torch's list of classes that a restricted load allows has one for each qualified name.
        "__qualname__": f"{cls.__qualname__}({', '.join(call.attribute for call in source.calls)})",
        "__doc__": cls.__doc__,
        "rewired_from": cls,
        "hidden_calls": source.calls,
        "__reduce_ex__": _make_reduce(cls, children),
    }
    for name, method in source.methods.items():
        namespace[name] = _compile(cls, name, method)
    return type(cls)(cls.__name__, (cls,), namespace)


def _make_reduce(cls: type, children: tuple[str, ...]) -> Callable[[Any, Any], tuple[Any, ...]]:
    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Return the parts of a pickle or copy: the original class, and the attributes."""
        original: Any = cls
        state = original.__reduce_ex__(self, max(protocol, 2))[2:]
        return (rebuild, (cls, children), *state)

    return reduce_ex


def rebuild(cls: type, children: Sequence[str]) -> Any:
    """Return a new object of the subclass of a class, without attributes, for unpickling."""
    made: Any = make_class(cls, tuple(children))
    if hasattr(torch.serialization, "add_safe_globals"):
        # A restricted load, which has allowed the original class, then sets the attributes of this object.
        torch.serialization.add_safe_globals([made])
    return made.__new__(made)


def _compile(cls: type, name: str, method: Method) -> FunctionType:
    """Compile a method in which the hidden calls call attributes of the block."""
    original = method.function
    tree = _Rewriter(method).visit(copy.deepcopy(method.tree))
    freevars = original.__code__.co_freevars
    # The class gives names with two leading underscores their prefix; the function makes its arguments free variables.
    defined_in = original.__qualname__.split(".")[-2] if "." in original.__qualname__ else cls.__name__
    body = ast.ClassDef(defined_in, [], [], [tree], [])
    arguments = ast.arguments([], [ast.arg(each) for each in freevars], None, [], [], None, [])
    outer = ast.FunctionDef("outer", arguments, [body], [])
    text = ast.unparse(ast.fix_missing_locations(ast.Module([outer], [])))
    file = f"<rtdetr_act {cls.__module__}.{cls.__qualname__}.{name} calling {', '.join(method.places.values())}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    flags = original.__code__.co_flags & _FUTURE_FLAGS
    module_code = compile(text, file, "exec", flags, dont_inherit=True)
    code = _find_code(module_code, ("outer", defined_in, original.__name__))
    cells = dict(zip(freevars, original.__closure__ or (), strict=True))
    closure = tuple(cells[each] for each in code.co_freevars)
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    made.__kwdefaults__ = original.__kwdefaults__
    made.__annotations__ = original.__annotations__
    made.__doc__, made.__module__, made.__qualname__ = original.__doc__, original.__module__, original.__qualname__
    return made


def _find_code(code: CodeType, names: Sequence[str]) -> CodeType:
    """Return a code object nested in others, given their names."""
    for name in names:
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name)
    return code


class _Rewriter(ast.NodeTransformer):
    """Replaces hidden calls by calls of the block's attributes."""

    def __init__(self, method: Method) -> None:
        self._places = method.places
        arguments = method.tree.args
        self._me = [*arguments.posonlyargs, *arguments.args][0].arg

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace one call."""
        attribute = self._places.get(get_place(node))
        self.generic_visit(node)
        if attribute is None:
            return node
        named = [keyword.value for keyword in node.keywords if keyword.arg == "input"]
        inputs = [*node.args, *named] or [node.func.value]  # type: ignore[attr-defined]  # a method of a tensor
        return ast.Call(ast.Attribute(ast.Name(self._me, ast.Load()), attribute, ast.Load()), inputs[:1], [])
