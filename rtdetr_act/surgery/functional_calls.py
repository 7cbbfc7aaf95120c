"""Find the activations that the source code of a block calls where no module of their own stands.

Three kinds of calls are found in the methods of a class: functions (`F.relu(x)`, an alias of it, `torch.relu`), methods
of tensors (`x.relu()`), and a child module or function attribute that one method calls several times. `rewiring` turns
each into the call of a module of its own.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import linecache
from abc import ABCMeta
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Generic
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from rtdetr_act.activations.registry import get_entry
from rtdetr_act.formatting import format_count

# Names of the activations in the zoo that torch has as functions.
_NAMES = (
    "relu", "gelu", "silu", "mish", "leaky_relu", "elu", "selu", "celu", "hardswish", "relu6", "hardtanh", "tanh",
    "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink", "logsigmoid",
)  # fmt: skip
FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(space, written): name
    for space in (F, torch)
    for name in _NAMES
    for written in (name, f"{name}_")
    if hasattr(space, written)
}
_IDS = set(map(id, FUNCTIONS))
_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_TENSOR_METHODS = {f"{name}{end}": name for name in ("relu", "tanh", "hardshrink") for end in ("", "_")}


@dataclass(frozen=True)
class HiddenCall:
    """An activation that a method of a block calls, and that a module can replace.

    Attributes:
        activation: Name of the function; "" for a child that is called several times.
        arguments: Keyword arguments of the function beside its input.
        child: Name of that child; "" for a function.
        producer: Qualified name, below the block, of the child whose result is the input; "" if unknown.
        attribute: Name of the attribute that holds the module in a rewired block.
    """

    activation: str
    arguments: tuple[tuple[str, Any], ...]
    child: str
    producer: str
    attribute: str = ""

    def build_original(self, owner: nn.Module) -> nn.Module:
        """Return a module that computes what the call computes in a block without this module."""
        if not self.child:
            return build_equivalent(self.activation, dict(self.arguments))
        held = getattr(owner, self.child)
        return held if isinstance(held, nn.Module) else build_equivalent(*describe_function(held))

    def find_producer(self, owner: nn.Module) -> nn.Module | None:
        """Return the child of a block whose result is the input of the call, None if unknown."""
        try:
            found = owner.get_submodule(self.producer) if self.producer else None
        except AttributeError:
            return None
        return found


@dataclass(frozen=True)
class UnreachableCall:
    """An activation in the source code of a class that no module can replace.

    Attributes:
        activation: Name of the function.
        file: Path of the file.
        line: Line of the file.
        reason: Why it cannot be replaced.
    """

    activation: str
    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Method:
    """A method with hidden calls.

    Attributes:
        function: The function.
        tree: Its source code.
        places: The attribute of each hidden call, by the place of the call in `tree`.
    """

    function: FunctionType
    tree: ast.FunctionDef
    places: dict[tuple[int, ...], str]


@dataclass(frozen=True)
class BlockSource:
    """What the source code of a class calls.

    Attributes:
        calls: The hidden calls, in the order of their first appearance.
        unreachable: The calls that no module can replace.
        methods: The methods with hidden calls, by name.
    """

    calls: tuple[HiddenCall, ...] = ()
    unreachable: tuple[UnreachableCall, ...] = ()
    methods: dict[str, Method] = field(default_factory=dict)


def find_hidden_calls(
    owner: nn.Module, is_activation: Callable[[str, nn.Module, nn.Module], bool]
) -> tuple[HiddenCall, ...]:
    """Return the hidden calls of a block that is not rewired, with the attributes for their modules.

    Args:
        owner: The block.
        is_activation: Whether a child is an activation, as a function of its attribute, the block and the child.
    """
    names_function, repeated = _summarise_class(type(owner))
    # Copies of a child with parameters would no longer share them.
    children = []
    for name in repeated:
        held = owner._modules.get(name) or vars(owner).get(name)
        if held is None or getattr(owner, name) is not held:  # an attribute of the class is what is called
            continue
        if isinstance(held, nn.Module):
            leaf = not held._modules and not held._parameters
            if leaf and is_activation(name, owner, held):
                children.append(name)
        elif callable(held) and is_activation_function(held):
            children.append(name)
    if not names_function and not children:
        return ()
    source = read_block(type(owner), tuple(children))
    return () if _is_changed(owner, source) else source.calls


def _is_changed(owner: nn.Module, source: BlockSource) -> bool:
    """Return whether a block has a method or the name of a module of its own, beside those of its class."""
    own = {*vars(owner), *owner._modules, *owner._parameters, *owner._buffers}
    replaced = own & set(source.methods) - set(find_bound_methods(owner))
    return bool(replaced or own & {call.attribute for call in source.calls})


def find_bound_methods(owner: nn.Module) -> dict[str, str]:
    """Return the attributes of a block that hold a method of its own class, such as `forward`, with their names."""
    held = {
        key: value for key, value in vars(owner).items() if isinstance(value, MethodType) and value.__self__ is owner
    }
    names = ((key, value.__func__.__name__, value.__func__) for key, value in held.items())
    return {key: name for key, name, function in names if getattr(type(owner), name, None) is function}


def build_equivalent(activation: str, arguments: dict[str, Any]) -> nn.Module:
    """Return torch's module for a function with the given keyword arguments."""
    module: nn.Module = get_entry(activation).factory(**arguments)
    return module


def describe_function(value: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the keyword arguments of a function such as `F.relu` or `partial(F.leaky_relu, …)`.

    Raises:
        KeyError: It is not an activation, or its arguments cannot be bound.

    >>> describe_function(functools.partial(F.leaky_relu, negative_slope=0.2))
    ('leaky_relu', {'negative_slope': 0.2})
    """
    if isinstance(value, functools.partial):
        name, given = describe_function(value.func)
        if value.args:
            raise KeyError("positional arguments come before the input")
        return name, {**given, **value.keywords}
    name = FUNCTIONS[value]
    inplace = value.__name__.endswith("_") and "inplace" in get_entry(name).parameters
    return name, {"inplace": True} if inplace else {}


def is_activation_function(value: Any) -> bool:
    """Return whether a value is an activation function of torch, or a partial application of one."""
    try:
        describe_function(value)
    except (KeyError, TypeError):  # TypeError: it cannot be hashed
        return False
    return True


def read_block(cls: type, children: tuple[str, ...] = ()) -> BlockSource:
    """Return what the source code of a class calls; nothing for classes of torch and of this package.

    Args:
        cls: The class of a block.
        children: Its children and function attributes that are activations, in alphabetical order. Default: (), which
            leaves out the calls of children.
    """
    found = _read.setdefault(cls, {})
    if children not in found:
        found[children] = _read_block(cls, children)
    return found[children]


def find_unreachable_calls(root: nn.Module) -> list[str]:
    """Return descriptions of the activations in source code that no swap reaches, by class.

    Such as `relu in Block (block.py:12, 2 modules)`. Only what is written as a call of a function or of a tensor's
    method is found; `measure_coverage` counts whatever runs.
    """
    modules = list(root.modules())
    blocks = Counter(map(type, modules))
    found = []
    for cls, count in blocks.items():
        for call in read_block(getattr(cls, "rewired_from", cls)).unreachable:
            where = f"{Path(call.file).name}:{call.line}, {format_count(count, 'module')}"
            found.append(f"{call.activation} in {cls.__name__} ({where})")
    hiding = {cls for cls in blocks if read_block(cls).methods and not hasattr(cls, "rewired_from")}
    held = (module for module in modules if type(module) in hiding)
    changed = Counter(type(module) for module in held if _is_changed(module, read_block(type(module))))
    for cls, count in changed.items():
        source = read_block(cls)
        activations = {call.attribute: call.activation for call in source.calls}
        for method in source.methods.values():
            for place, attribute in method.places.items():
                where = f"{Path(method.function.__code__.co_filename).name}:{place[0]}, {format_count(count, 'module')}"
                found.append(f"{activations[attribute]} in {cls.__name__} ({where})")
    return found


_read: WeakKeyDictionary[type, dict[tuple[str, ...], BlockSource]] = WeakKeyDictionary()


def _read_block(cls: type, children: tuple[str, ...]) -> BlockSource:
    scans = []
    unreachable: list[UnreachableCall] = []
    kept: set[str] = set()  # children that are called where nothing can be rewritten
    obstacle = _find_class_obstacle(cls)
    groups: dict[FunctionType, str] = {}
    for name, function, reason in _iterate_methods(cls):
        if not (_names_activation(function) or set(children) & _list_names(function)):
            continue
        tree = _parse(function)
        if tree is None:
            continue
        scan = _Scan(name, groups.setdefault(function, _get_group(name)), function, tree, children)
        scan.run()
        if reason := obstacle or reason or scan.find_obstacle():
            unreachable += [_describe_unreachable(call, reason) for call in scan.calls if call.activation]
            kept |= {call.child for call in scan.calls}
        else:
            unreachable += [
                _describe_unreachable(call, call.problem) for call in scan.calls if call.activation and call.problem
            ]
            scans.append(scan)
    return _join_scans(cls, scans, unreachable, kept)


def _find_class_obstacle(cls: type) -> str:
    """Return why a class cannot be given a subclass with further children, "" if it can."""
    if issubclass(cls, _CONTAINERS):
        return "it runs all its children"
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "rtdetr_act.")) or base in (object, Generic):
            continue
        if "__init_subclass__" in vars(base):
            return "its subclasses are registered"
        functions = (value for value in vars(base).values() if isinstance(value, FunctionType))
        if any(_CHILD_READERS & _list_names(function) for function in functions):
            return "it goes through its children"
    return "" if type(cls) in (type, ABCMeta) else "its subclasses are registered"


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHILD_READERS = {"children", "named_children", "_modules"}


def _describe_unreachable(call: _Call, reason: str) -> UnreachableCall:
    return UnreachableCall(call.activation, call.file, call.line, reason)


def _iterate_methods(cls: type) -> Iterator[tuple[str, FunctionType, str]]:
    """Yield (name, function, reason why it cannot be rewritten) for the methods of a class that may run."""
    hiding: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "rtdetr_act.")) or base is object:
            continue
        for name, value in vars(base).items():
            reason = ""
            function = value
            if isinstance(value, (staticmethod, classmethod)):
                function, reason = value.__func__, "its method has no self"
            if isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
                function, reason = inspect.unwrap(function), "its method is decorated"
            if not isinstance(function, FunctionType) or (name.startswith("__") and name != "__call__"):
                continue
            if function in FUNCTIONS:  # staticmethod(F.relu)
                continue
            if name in hiding:
                if "super" not in hiding[name].__code__.co_names:
                    continue
                reason = "a method of the same name calls it by super()"
            hiding[name] = function
            yield name, function, reason


def _summarise_class(cls: type) -> tuple[bool, list[str]]:
    """Return whether methods of a class name an activation, and the attributes that one of them reads several times.

    Their bytecode excludes most classes: parsing the source of every block would take 0.8 s for rtdetr-l.
    """
    if cls not in _summaries:
        methods = [function for _, function, _ in _iterate_methods(cls)]
        repeated = {name for function in methods for name in _list_repeated(function)}
        _summaries[cls] = any(map(_names_activation, methods)), sorted(repeated)
    return _summaries[cls]


_summaries: WeakKeyDictionary[type, tuple[bool, list[str]]] = WeakKeyDictionary()


def _names_activation(function: FunctionType) -> bool:
    """Return whether the bytecode of a function names an activation."""
    for name in _list_names(function):
        if name.rstrip("_") in _NAMES or id(function.__globals__.get(name)) in _IDS:
            return True
    return any(id(_get_cell(cell)) in _IDS for cell in function.__closure__ or ())


def _iterate_codes(function: FunctionType) -> Iterator[CodeType]:
    """Yield the code of a function, and of those inside it."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        yield code


def _list_names(function: FunctionType) -> set[str]:
    """Return the global names and the attributes that the bytecode of a function names."""
    return {name for code in _iterate_codes(function) for name in code.co_names}


def _list_repeated(function: FunctionType) -> list[str]:
    """Return the attributes that the bytecode of a function reads more than once."""
    steps = dis.get_instructions(function.__code__)
    reads = Counter(str(step.argval) for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD"))
    return [name for name, count in reads.items() if count > 1]


def _get_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _parse(function: FunctionType) -> ast.FunctionDef | None:
    """Return the source code of a function, with the line numbers of its file, or None if it cannot be read."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    try:
        source = "".join(inspect.getblock(lines[code.co_firstlineno - 1 :]))
        # Dedenting would change strings of several lines.
        body = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else f"\n{source}").body
        body = body[0].body if source[:1].isspace() and isinstance(body[0], ast.If) else body
    except (SyntaxError, IndexError, EOFError):
        return None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        return None
    ast.increment_lineno(body[0], code.co_firstlineno - 2)
    return body[0]


def wrap_method(function: FunctionType, tree: ast.FunctionDef) -> tuple[ast.Module, list[str]]:
    """Return a module in which a function is compiled as it was, and the names of the scopes around it.

    The class gives names with two leading underscores their prefix; the outer function makes its arguments the free
    variables.
    """
    parent = "".join(function.__qualname__.split(".")[-2:-1])
    body: ast.stmt = tree
    scopes = ["outer"]
    if parent.isidentifier():  # not "<locals>", or nothing
        body, scopes = ast.ClassDef(parent, [], [], [tree], []), ["outer", parent]
    freevars = [ast.arg(name) for name in function.__code__.co_freevars]
    outer = ast.FunctionDef("outer", ast.arguments([], freevars, None, [], [], None, []), [body], [])
    return ast.fix_missing_locations(ast.Module([outer], [])), scopes


def compile_method(source: str | ast.Module, file: str, function: FunctionType, scopes: Sequence[str]) -> CodeType:
    """Compile what `wrap_method` returns, or its text, and return the code of the method."""
    flags = function.__code__.co_flags & _FUTURE_FLAGS
    code: CodeType = compile(source, file, "exec", flags, dont_inherit=True)
    for name in (*scopes, function.__code__.co_name):
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name)
    return code


def _is_what_runs(function: FunctionType, tree: ast.FunctionDef) -> bool:
    """Return whether source code compiles to the bytecode of a function.

    It does not if the file was edited since its import, or if something rewrites what is imported.
    """
    try:
        wrapped, scopes = wrap_method(function, tree)
        return _describe_code(compile_method(wrapped, "", function, scopes)) == _describe_code(function.__code__)
    except (SyntaxError, ValueError, StopIteration):
        return False


def _describe_code(code: CodeType) -> tuple[Any, ...]:
    """Return what a code object does, wherever it was compiled."""
    steps = []
    for step in dis.get_instructions(code):
        if step.opname in ("NOP", "PUSH_NULL", "EXTENDED_ARG", "CACHE"):
            continue
        value = None if step.opcode in _JUMPS else step.argval
        if isinstance(value, CodeType):
            value = _describe_code(value)
        elif isinstance(value, str):
            value = value.rpartition(".<locals>.")[2]  # the qualified name of an inner function, in Python 3.10
        # A method of what the file imports is loaded as an attribute (3.11), and locals are borrowed (3.14).
        name = step.opname.replace("METHOD", "ATTR").replace("CALL_ATTR", "CALL_FUNCTION").replace("_BORROW", "")
        steps.append((name, value))
    return code.co_name, code.co_varnames, code.co_freevars, code.co_cellvars, tuple(steps)


_JUMPS = {*dis.hasjrel, *dis.hasjabs}


@dataclass(frozen=True)
class _Call:
    """A call in the source code of a method.

    Attributes:
        activation: Name of the function; "" for a child.
        arguments: Keyword arguments of the function.
        child: Name of the child; "" for a function.
        producer: As in `HiddenCall`.
        number: How many calls of the same function or child come before it on its path through the method. Calls in
            branches of which only one runs may have the same number.
        place: Line and column of its start and end in the tree.
        file: Path of the file.
        problem: Why a module cannot replace it; "" if it can.
    """

    activation: str
    arguments: tuple[tuple[str, Any], ...]
    child: str
    producer: str
    number: int
    place: tuple[int, ...]
    file: str
    problem: str = ""

    @property
    def line(self) -> int:
        """Line of the file."""
        return self.place[0]


class _Scan:
    """Follows the statements of a method, and collects the calls of activations and of children."""

    def __init__(
        self, name: str, group: str, function: FunctionType, tree: ast.FunctionDef, children: tuple[str, ...]
    ) -> None:
        self.name, self.group, self.function, self.tree, self._children = name, group, function, tree, children
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.me = arguments[0].arg if arguments else ""
        self.calls: list[_Call] = []
        self.other_uses: set[str] = set()  # attributes that are read, but not only called
        self._numbers: Counter[Any] = Counter()
        self._producers: dict[str, str] = {}
        self._gates: set[int] = set()
        self._called: set[int] = set()
        self._dropped: set[int] = set()
        _, *inner = _iterate_codes(function)
        self._inner = {name for code in inner for name in (*code.co_varnames, *code.co_cellvars)}

    def run(self) -> None:
        """Collect the calls."""
        self._visit_block(self.tree.body)

    def find_obstacle(self) -> str:
        """Return why the method cannot be rewritten, "" if it can."""
        if self.tree.decorator_list:
            return "its method is decorated"
        names = (node for node in ast.walk(self.tree) if isinstance(node, ast.Name))
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        if not self.me or self.me in stored | self._inner:
            return "its method has no self, or several"
        return "" if _is_what_runs(self.function, self.tree) else "its source code is not what runs"

    def _visit_block(self, statements: Sequence[ast.AST]) -> bool:
        """Visit statements; return whether the path ends in them."""
        return any(self._visit(statement) for statement in statements)  # up to the first that ends it

    def _visit(self, node: ast.AST) -> bool:
        """Visit a node in the order of evaluation; return whether the path ends there."""
        if isinstance(node, ast.If):
            self._visit(node.test)
            return self._visit_branches([node.body, node.orelse])
        if isinstance(node, ast.IfExp):
            self._visit(node.test)
            self._visit_branches([[node.body], [node.orelse]])
            return False
        if isinstance(node, ast.Match):
            self._visit(node.subject)
            return self._visit_branches([*(case.body for case in node.cases), []])
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            self._visit_assignment(node)
            return False
        if isinstance(node, (ast.For, ast.While)):
            self._forget_producers(*node.body)  # the second time round, they are those of the first
        if isinstance(node, ast.Expr):
            self._dropped.add(id(node.value))
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.MatMult)):
            for side, other in ((node.left, node.right), (node.right, node.left)):
                if self._may_be_features(other):
                    self._mark_gate(side)
        if isinstance(node, ast.Call):
            self._called.add(id(node.func))
        for child in ast.iter_child_nodes(node):
            self._visit(child)
        if isinstance(node, ast.Call):
            self._visit_call(node)
        elif isinstance(node, ast.Attribute) and self._is_me(node.value) and id(node) not in self._called:
            self.other_uses.add(node.attr)
        return isinstance(node, (ast.Return, ast.Raise, ast.Continue, ast.Break))

    def _mark_gate(self, node: ast.expr) -> None:
        """Mark an expression as a factor, and the functions in it that are applied one after the other."""
        self._gates.add(id(node))
        if isinstance(node, ast.BinOp):
            self._mark_gate(node.left)
            self._mark_gate(node.right)
        elif isinstance(node, ast.Call) and self._find_tensor_method(node):
            self._mark_gate(node.func.value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Call) and id(self._resolve(node.func)) in _IDS:
            for argument in node.args[:1]:
                self._mark_gate(argument)

    def _visit_branches(self, branches: Sequence[Sequence[ast.AST]]) -> bool:
        """Visit branches of which one runs; return whether the path ends in every one."""
        numbers, producers = Counter(self._numbers), dict(self._producers)
        ends = []
        for branch in branches:
            self._numbers, self._producers = Counter(numbers), dict(producers)
            ended = self._visit_block(branch)
            ends.append((ended, self._numbers, self._producers))
        going_on = [each for each in ends if not each[0]] or ends
        self._numbers = Counter()
        for _, after, _ in going_on:
            self._numbers |= after
        known = [each[2] for each in going_on]
        self._producers = {key: value for key, value in known[0].items() if all(k.get(key) == value for k in known)}
        return all(ended for ended, _, _ in ends)

    def _visit_assignment(self, node: ast.Assign | ast.AnnAssign | ast.NamedExpr) -> None:
        if node.value is None:
            return
        self._visit(node.value)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            self._visit(target)
            self._forget_producers(target)
            if isinstance(target, ast.Name) and (producer := self._find_producer(node.value)):
                self._producers[target.id] = producer

    def _forget_producers(self, *nodes: ast.AST) -> None:
        """Forget what the names that are assigned in some nodes hold."""
        for name in (each for node in nodes for each in ast.walk(node)):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                self._producers.pop(name.id, None)

    def _visit_call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and self._is_me(function.value):
            if function.attr not in self._children:
                return
            argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
            problem = "" if argument is not None and id(node) not in self._dropped else "other arguments"
            self._add(node, "", (), function.attr, argument, problem)
            return
        if (name := self._find_tensor_method(node)) and isinstance(function, ast.Attribute):
            inplace = (("inplace", True),) if function.attr == "relu_" else ()
            self._add(node, name, inplace, "", function.value, self._find_problem(node))
            return
        value = self._resolve(function)
        if id(value) not in _IDS:
            return
        name, given = describe_function(value)
        argument, arguments = _bind(name, node)
        problem = self._find_problem(node) if argument is not None else "its arguments are not constants"
        self._add(node, name, tuple({**given, **arguments}.items()), "", argument, problem)

    def _find_problem(self, node: ast.Call) -> str:
        return "only its effect in place is used" if id(node) in self._dropped else ""

    def _find_tensor_method(self, node: ast.Call) -> str:
        """Return the activation of a call such as `x.relu()`, "" for others."""
        function = node.func
        if not isinstance(function, ast.Attribute) or node.args or node.keywords:
            return ""
        root: ast.expr = function.value
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        # `self.relu()` is a method of the block, `self.weight.relu()` maps a parameter, and `layers.relu()` makes one.
        if self._is_me(root) or self._resolve(root) is not None:
            return ""
        if isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super":
            return ""
        return _TENSOR_METHODS.get(function.attr, "")

    def _add(
        self,
        node: ast.Call,
        activation: str,
        arguments: tuple[tuple[str, Any], ...],
        child: str,
        argument: ast.expr | None,
        problem: str,
    ) -> None:
        if activation and id(node) in self._gates:  # its result gates another tensor: it is not an activation
            return
        key = (activation, arguments, child)
        self._numbers[key] += 1
        producer = self._find_producer(argument) if argument is not None else ""
        place = get_place(node)
        file = self.function.__code__.co_filename
        self.calls.append(_Call(activation, arguments, child, producer, self._numbers[key], place, file, problem))

    def _is_me(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.me != ""

    def _may_be_features(self, node: ast.expr) -> bool:
        """Return whether an operand may be a tensor computed from the input: not a constant or attribute."""
        if isinstance(node, ast.UnaryOp):
            return self._may_be_features(node.operand)
        if isinstance(node, ast.BinOp):
            return self._may_be_features(node.left) or self._may_be_features(node.right)
        if isinstance(node, ast.Attribute):
            return False
        return isinstance(node, (ast.Name, ast.Call, ast.Subscript, ast.IfExp))

    def _find_producer(self, node: ast.expr) -> str:
        """Return the qualified name of the child whose result an expression has the channels of, or ""."""
        if isinstance(node, ast.Name):
            return self._producers.get(node.id, "")
        if isinstance(node, ast.BinOp):
            return self._find_producer(node.left) or self._find_producer(node.right)
        if isinstance(node, ast.NamedExpr):
            return self._find_producer(node.value)
        if not isinstance(node, ast.Call):
            return ""
        path, function = [], node.func
        while isinstance(function, ast.Attribute):
            path.append(function.attr)
            function = function.value
        if self._is_me(function):
            return ".".join(reversed(path))
        if self._find_tensor_method(node) and isinstance(node.func, ast.Attribute):
            return self._find_producer(node.func.value)
        if id(self._resolve(node.func)) in _IDS and node.args:
            return self._find_producer(node.args[0])
        return ""

    def _resolve(self, node: ast.expr) -> Any:
        """Return the object that a name, or an attribute of an imported module, stands for, else None."""
        if isinstance(node, ast.Attribute):
            base = self._resolve(node.value)
            return getattr(base, node.attr, None) if isinstance(base, ModuleType) else None
        if not isinstance(node, ast.Name):
            return None
        code = self.function.__code__
        if node.id in code.co_varnames or node.id in code.co_cellvars or node.id in self._inner:
            return None
        if node.id in code.co_freevars and self.function.__closure__:
            return _get_cell(self.function.__closure__[code.co_freevars.index(node.id)])
        return self.function.__globals__.get(node.id)


def _bind(activation: str, node: ast.Call) -> tuple[ast.expr | None, dict[str, Any]]:
    """Return the input of a call and its other arguments; the input is None if these are not constants."""
    positional = list(node.args)
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    given = named.pop("input", None) if not positional else positional.pop(0)
    if given is None or isinstance(given, ast.Starred) or None in named:
        return None, {}
    try:
        values = [ast.literal_eval(value) for value in positional]
        keywords = {str(name): ast.literal_eval(value) for name, value in named.items()}
        bound = inspect.signature(get_entry(activation).factory).bind(*values, **keywords).arguments
    except (ValueError, TypeError):  # not a constant, or not arguments of the module
        return None, {}
    return (None, {}) if any(isinstance(value, (tuple, dict)) for value in bound.values()) else (given, dict(bound))


def get_place(node: ast.expr) -> tuple[int, ...]:
    """Return line and column of the start and the end of an expression."""
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def _join_scans(
    cls: type, scans: Sequence[_Scan], unreachable: Sequence[UnreachableCall], kept: set[str]
) -> BlockSource:
    """Return the hidden calls of all methods; calls of which only one runs become one.

    Their modules are `act`, or `act1`, `act2`, … for several.
    """
    users: defaultdict[str, set[str]] = defaultdict(set)  # of a child: the methods that call it
    unusable = set(kept)  # and children that are not only called, or with other arguments
    for scan in scans:
        for call in scan.calls:
            users[call.child].add(scan.group)
            if call.problem:
                unusable.add(call.child)
        unusable |= scan.other_uses
    several = {call.child for scan in scans for call in scan.calls if call.child and call.number > 1}
    several = {child for child in several - unusable if len(users[child]) == 1}
    chosen: dict[tuple[Any, ...], HiddenCall] = {}
    found: dict[_Scan, dict[tuple[int, ...], tuple[Any, ...]]] = {}
    for scan in scans:
        places = {}
        for call in scan.calls:
            if not call.problem and (call.activation or call.child in several):
                key = (scan.group, call.activation, call.arguments, call.child, call.number)
                chosen.setdefault(key, HiddenCall(call.activation, call.arguments, call.child, call.producer))
                places[call.place] = key
        if places:
            found[scan] = places
    names = dict(zip(chosen, _list_free_names(cls, len(chosen)), strict=True))
    calls = tuple(replace(call, attribute=names[key]) for key, call in chosen.items())
    methods = {
        scan.name: Method(scan.function, scan.tree, {place: names[key] for place, key in places.items()})
        for scan, places in found.items()
    }
    return BlockSource(calls, tuple(unreachable), methods)


def _get_group(method: str) -> str:
    """Return what is common to methods of which a block calls one or the other: `forward` and `forward_fuse`."""
    return "forward" if "forward" in method and "fuse" in method else method


def _list_free_names(cls: type, count: int) -> list[str]:
    """Return names for attributes that the source code of a class does not use."""
    taken = set(dir(cls))
    for base in cls.__mro__:
        for value in vars(base).values():
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
            if isinstance(function, FunctionType):
                # Constants too: setattr(self, "act", …)
                constants = (each for code in _iterate_codes(function) for each in code.co_consts)
                taken |= _list_names(function) | {each for each in constants if isinstance(each, str)}
    stem = "act"
    while taken & {stem, *(f"{stem}{i}" for i in range(1, count + 1))}:
        stem += "_"
    return [stem] if count == 1 else [f"{stem}{i}" for i in range(1, count + 1)]
