"""Specs of activations, a name with literal arguments, as plain data (no torch, nothing executed)."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from os import PathLike
from typing import Any

from rtdetr_act.errors import SpecError, quote

LONGEST_PLAN, LONGEST_RULE = 20_000, 2_000  # characters
PREFIX = "rtdetr_act."  # which lets stock Ultralytics, where it evaluates a name, name what is missing


@dataclass(frozen=True)
class ActSpec:
    """The name of an activation and its literal arguments, as in `leaky_relu(negative_slope=0.1)`.

    The name is kept as typed; `rtdetr_act.activations.registry.resolve` replaces aliases by registered names.

    Attributes:
        name: The name.
        args: Positional arguments.
        kwargs: Keyword arguments, as (name, value) pairs.

    >>> ActSpec.parse("leaky_relu(negative_slope=0.1)")
    ActSpec(name='leaky_relu', args=(), kwargs=(('negative_slope', 0.1),))
    >>> str(ActSpec.parse(" nn.SiLU ")), str(ActSpec.parse("rtdetr_act.arelu"))
    ('nn.SiLU', 'arelu')
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ActSpec:
        """Parse `name` or `name(literal, key=literal)`, with or without `rtdetr_act.` before it; evaluate nothing.

        Raises:
            SpecError: The text is not a name, or an argument is not a Python literal.
        """
        if not isinstance(text, str) or not text.strip():
            raise SpecError(f"an activation is a name such as 'arelu' or 'leaky_relu(0.1)', not {quote(text)}")
        text = text.strip().removeprefix(PREFIX)
        if len(text) <= LONGEST_RULE and re.fullmatch(r"[A-Za-z_][\w.-]*", text):
            return cls(text)  # also with hyphens, which ast would parse as a subtraction: DyReLU-B
        wrong = f"{quote(text)} is not an activation: write a name, with literal arguments only, like 'leaky_relu(0.1)'"
        if len(text) > LONGEST_RULE:
            raise SpecError(wrong)
        try:
            node = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise SpecError(wrong) from None
        call = node if isinstance(node, ast.Call) else None
        name = _get_dotted_name(call.func if call else node)
        if name is None:
            raise SpecError(wrong)
        if call is None:
            return cls(name)
        if any(keyword.arg is None for keyword in call.keywords):
            raise SpecError(wrong)
        try:
            args = tuple(ast.literal_eval(arg) for arg in call.args)
            kwargs = tuple((str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in call.keywords)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise SpecError(wrong) from None
        for value in (*args, *(value for _, value in kwargs)):
            _check_literal(value, text)
        return cls(name, args, kwargs)

    def __str__(self) -> str:
        """Return the text form, which `parse` accepts."""
        parts = [_format_literal(arg) for arg in self.args] + [
            f"{key}={_format_literal(value)}" for key, value in self.kwargs
        ]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


def as_list(values: Any) -> list[Any]:
    """Return one text, path or None as a list of it, and several as a list of them.

    >>> as_list("arelu"), as_list(["stock", None]), as_list(None)
    (['arelu'], ['stock', None], [None])
    """
    return [values] if values is None or isinstance(values, (str, PathLike)) else list(values)


def split_at_commas(text: str) -> list[str]:
    """Split a text at the commas outside brackets and quotes, and strip the parts.

    >>> split_at_commas("leaky_relu(0.1, True), silu@22-27")
    ['leaky_relu(0.1, True)', 'silu@22-27']
    """
    parts, depth, mark, start = [], 0, "", 0
    for index, char in enumerate(text):
        if mark:
            mark = "" if char == mark else mark
        elif char in "'\"":
            mark = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]]]


def _format_literal(value: object) -> str:
    """Return a literal as text that `parse` accepts."""
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(_format_literal, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)  # `inf` is no literal


def _get_dotted_name(node: ast.AST) -> str | None:
    """Return the dotted name that an expression spells, None for any other expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed([*names, node.id])) if isinstance(node, ast.Name) else None


def _check_literal(value: object, text: str, depth: int = 0) -> None:
    """Raise SpecError for arguments that no activation takes: complex, bytes, sets, and integers beyond any float."""
    if isinstance(value, (list, tuple)) and depth < 3:
        for item in value:
            _check_literal(item, text, depth + 1)
        return
    if isinstance(value, int) and value.bit_length() > 1000:
        wrong = True
    else:
        wrong = not (value is None or isinstance(value, (int, float, str)))
    if wrong:
        raise SpecError(
            f"{quote(text.strip())} has an argument that is not a number, a text, True, False or None: {quote(value)}"
        )
