"""Give blocks a module for each activation that their source code calls as a function, or several times.

The class of a block is changed to a subclass whose methods are compiled from the same source code, with `self.act(x)`
in place of `F.relu(x)`. The subclass shares the globals and closures of the original. Its source code can be read by
`inspect`, so that `torch.compile`, `torch.export` and TorchScript work where they did. A pickle or copy refers to the
original class, whose subclass is made again.
"""

from __future__ import annotations

import ast
import copy
import functools
import linecache
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from rtdetr_act.surgery.functional_calls import (
    HiddenCall,
    Method,
    compile_method,
    find_bound_methods,
    find_hidden_calls,
    get_place,
    read_block,
    wrap_method,
)

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
    _change_class(owner, make_class(type(owner), children))


def unwire(owner: nn.Module) -> None:
    """Undo `rewire`: restore the class of a block, and delete the modules of its hidden calls."""
    cls: Any = type(owner)
    for call in cls.hidden_calls:
        delattr(owner, call.attribute)
    _change_class(owner, cls.rewired_from)


def _change_class(owner: nn.Module, cls: type) -> None:
    """Set the class of a block, and renew the methods that the block holds, as after `self.forward = self.run`."""
    bound = find_bound_methods(owner)
    owner.__class__ = cls
    vars(owner).update({key: getattr(cls, name).__get__(owner) for key, name in bound.items()})


def make_class(cls: type, children: tuple[str, ...]) -> type:
    """Return the subclass of a class whose methods call modules.

    Args:
        cls: The class of a block.
        children: The children that it calls several times, each call of which gets a module.
    """
    if (cls, children) not in _classes:
        # Threads that come together get one class.
        _classes.setdefault((cls, children), _make_class(cls, children))
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
        "__init__": _make_init(cls),
        "__reduce_ex__": _make_reduce(cls, children),
    }
    for name, method in source.methods.items():
        namespace[name] = _compile(cls, name, method)
    return type(cls)(cls.__name__, (cls,), namespace)


def _make_init(cls: Any) -> Callable[..., None]:
    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        """Turn a new object, which has no hidden modules, into one of the original class."""
        self.__class__ = cls
        cls.__init__(self, *args, **kwargs)

    return init


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
    wrapped, scopes = wrap_method(original, tree)
    text = ast.unparse(wrapped)
    file = f"<rtdetr_act {cls.__module__}.{cls.__qualname__}.{name} calling {', '.join(method.places.values())}>"
    while file in linecache.cache:  # another class of the same name
        file += "+"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    code = compile_method(text, file, original, scopes)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    closure = tuple(cells[each] for each in code.co_freevars)
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    made.__kwdefaults__ = original.__kwdefaults__
    made.__annotations__ = original.__annotations__
    vars(made).update(vars(original))
    made.__doc__, made.__module__, made.__qualname__ = original.__doc__, original.__module__, original.__qualname__
    return made


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
