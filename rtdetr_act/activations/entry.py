"""What the zoo knows of an activation, and how it is built (no torch before it is needed)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypedDict

from rtdetr_act.errors import SpecError

if TYPE_CHECKING:
    from torch import nn


LAYOUTS = ("map", "tokens")


@dataclass(frozen=True)
class Entry:
    """One activation of the zoo.

    Attributes:
        name: What a user types.
        factory: Builds it: `factory(channels, layout, *args, **kwargs)`.
        formula: One readable line.
        parameters: Parameters per site with default arguments, in terms of C (and of h, where given behind a comma).
        learnable: Whether it has parameters.
        tokens: Whether it can stand on (B, N, C) tokens; False: on (B, C, H, W) maps only.
        needs_channels: Whether it cannot be built without the number of channels.
        paper: Paper or documentation.
        aliases: Other names; case, `_`, `-` and a leading `nn.` or `torch.nn.` never matter.
        note: Why it is not meant as a drop-in for training a detector, where that is so.
        maps_only_because: The reason for `tokens=False`.
    """

    name: str
    factory: Callable[..., nn.Module]
    formula: str = ""
    parameters: str = "?"
    learnable: bool = True
    tokens: bool = True
    needs_channels: bool = False
    paper: str = ""
    aliases: tuple[str, ...] = ()
    note: str = ""
    maps_only_because: str = ""


class Details(TypedDict, total=False):
    """What `register` takes beside a name and a factory; the meanings are those of `Entry`."""

    aliases: tuple[str, ...]
    formula: str
    parameters: str
    learnable: bool
    tokens: bool
    needs_channels: bool
    paper: str
    note: str


@dataclass(frozen=True)
class Adapter:
    """Make a class or callable answer `factory(channels, layout, *args, **kwargs)`; import a "module:name" late."""

    source: Callable[..., Any] | str

    def target(self) -> Callable[..., Any]:
        """Return the class or callable; SpecError if the installed package lacks it."""
        if not isinstance(self.source, str):
            return self.source
        module, _, name = self.source.partition(":")
        try:
            found: Callable[..., Any] = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            raise SpecError(
                f"'{name.lower()}' needs {name} from {module}, which the installed {module.partition('.')[0]} lacks"
            ) from None
        return found

    def loaded(self) -> Callable[..., Any] | None:
        """Return the target unless that would import a package for nothing: a class nobody imported has no instance."""
        if isinstance(self.source, str) and self.source.startswith("ultralytics"):
            module, _, name = self.source.partition(":")
            found: Callable[..., Any] | None = getattr(sys.modules.get(module), name, None)
            return found
        return self.target()

    def __call__(self, channels: int | None, layout: str, *args: Any, **kwargs: Any) -> nn.Module:
        """Build the module, `channels` and `layout` passed where the target has parameters of these names."""
        target = self.target()
        site = {"channels": channels, "layout": layout}
        parameters = parameters_of(target)
        own = {name: site[name] for name in parameters if name in site and site[name] is not None}
        bound = without_site(parameters).bind(*args, **kwargs)
        bound.arguments.update(own)
        call = inspect.BoundArguments(inspect.Signature(list(parameters.values())), bound.arguments)
        built: nn.Module = target(*call.args, **call.kwargs)
        return built


def without_site(parameters: dict[str, inspect.Parameter]) -> inspect.Signature:
    """Return a signature of what a user may give: all but `channels` and `layout`."""
    return inspect.Signature([p for name, p in parameters.items() if name not in ("channels", "layout")])


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or callable by name, none where Python cannot tell."""
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    # torch.nn.Module's own __init__(*args, **kwargs), as of Sigmoid, refuses whatever it is given.
    kinds = {p.kind for p in parameters.values()}
    bare = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {} if bare and inspect.isclass(target) and "__init__" not in _own_attributes(target) else parameters


def _own_attributes(cls: type) -> set[str]:
    return {name for base in cls.__mro__ if base.__module__ != "torch.nn.modules.module" for name in vars(base)} - set(
        vars(object)
    )
