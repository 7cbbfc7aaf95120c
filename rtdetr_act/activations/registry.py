"""The zoo by name: `create`, `resolve`, `entry`, `names`, and `register` for users' own.

Users' own also come from installed packages, through the entry-point group `rtdetr_act.activations`: the name of the
entry point is the name in the zoo, its object a class, a factory or an `Entry`.
"""

from __future__ import annotations

import inspect
import keyword
import pkgutil
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import rtdetr_act.activations as folder
from rtdetr_act.activations.protocol import LAYOUTS, Answers, Entry, Layout, Replaces
from rtdetr_act.errors import RtdetrActError, SelectionError, SpecError, quote, reason, suggest
from rtdetr_act.spec import ActSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

GROUP = "rtdetr_act.activations"


def names() -> list[str]:
    """Return the names of the activations in alphabetical order, users' own and those of installed packages included.

    >>> "arelu" in names() and "mish" in names()
    True
    """
    return names_of("activation")


def names_of(replaces: Replaces) -> list[str]:
    """Return the names of all that takes the place of an "activation" or of a "convolution"."""
    _load()
    return sorted(name for name, item in _entries.items() if item.replaces == replaces)


def entry(name: str) -> Entry:
    """Return the entry of a name or alias; case, `_`, `-` and a leading `nn.` or `torch.nn.` do not matter.

    Raises:
        SpecError: There is no such activation.

    >>> entry("nn.SiLU").name, entry("h_swish").name, entry("DyReLU-B").name
    ('silu', 'hardswish', 'dyrelu_b')
    """
    _load()
    found = _lookup.get(_normalise(name)) if isinstance(name, str) else None
    if found is None:
        known = [*_entries, *(alias for item in _entries.values() for alias in item.aliases)]
        raise SpecError(f"there is no activation {quote(name)} in the zoo{suggest(name, known)}")
    return _entries[found]


def resolve(spec: str | ActSpec, replaces: Replaces = "activation") -> ActSpec:
    """Return the spec under its zoo name, its arguments checked.

    Arguments are tried on a tiny instance with 8 channels, without touching the random state.

    Args:
        spec: A name, a text with literal arguments, or an `ActSpec`.
        replaces: What it is to take the place of: an "activation" (default) or a "convolution".

    Raises:
        SpecError: The name is unknown, or an argument is unknown, missing, too many or has a wrong value.

    >>> str(resolve("nn.LeakyReLU(0.1)"))
    'leaky_relu(0.1)'
    >>> resolve("threshold")
    Traceback (most recent call last):
    rtdetr_act.errors.SpecError: 'threshold' is wrong: missing a required argument: 'threshold'; it takes \
(threshold, value, inplace=False)
    """
    spec = _read(spec)
    if not isinstance(spec, ActSpec):
        raise SpecError(f"an activation is a name such as 'arelu' or an ActSpec, not {quote(spec)}")
    found = entry(spec.name)
    if found.replaces != replaces:
        raise SpecError(f"'{found.name}' takes the place of a {found.replaces}: it is not an {replaces}")
    spec = ActSpec(found.name, tuple(spec.args), tuple(spec.kwargs))
    _try_arguments(found, spec)
    if replaces == "convolution":  # its arguments by name, since a schedule that is over is taken out of them
        given = _signature_of(found).bind(*spec.args, **dict(spec.kwargs)).arguments
        spec = ActSpec(found.name, (), tuple(given.items()))
    return spec


def create(spec: str | ActSpec, channels: int | None = None, layout: Layout = "map", **kwargs: Any) -> nn.Module:
    """Build an activation of the zoo; torch's own module class wherever torch has one, or a subclass (PReLU).

    Args:
        spec: A name, a text with literal arguments such as `leaky_relu(negative_slope=0.1)`, or an `ActSpec`.
        channels: C at the site. Needed where `entry(name).needs_channels`, and by `prelu(per_channel=True)`.
        layout: "map" for (B, C, H, W), the default, or "tokens" for (B, N, C) and (B, C).
        **kwargs: Arguments of the activation; they win over those of the text.

    Raises:
        SpecError: The name, an argument, `channels` or `layout` is wrong or missing.
        SelectionError: The activation cannot stand on this layout or with this number of channels.

    >>> create("mish"), create("leaky_relu(negative_slope=0.1)", negative_slope=0.2)
    (Mish(), LeakyReLU(negative_slope=0.2))
    >>> create("prelu", channels=64, per_channel=True)
    PReLU(num_parameters=64)
    """
    if kwargs:
        spec = _override(spec, kwargs)
    return build(resolve(spec), channels, layout)


def build(spec: ActSpec, channels: int | None, layout: Layout) -> nn.Module:
    """Do the work of `create` for a spec already resolved, whose arguments need no second trial at each site."""
    found = entry(spec.name)
    if layout not in LAYOUTS:
        raise SpecError(f"layout is 'map' or 'tokens', not {quote(layout)}")
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise SpecError(f"channels is an integer of at least 1, not {quote(channels)}")
    if found.needs_channels and channels is None:
        raise SpecError(f"'{found.name}' needs the number of channels: create('{found.name}', channels=64)")
    if layout == "tokens" and not found.tokens:
        reason = f": {found.maps_only_because}" if found.maps_only_because else ""
        raise SelectionError(f"'{found.name}' stands on (B, C, H, W) feature maps only, not on tokens{reason}")
    return _build(found, spec, channels, layout)


def entry_of(module: object) -> Entry | None:
    """Return the entry that answers for a module, by its class; None for a class that the zoo does not know.

    A subclass counts as its parent unless it has a forward of its own.

    >>> entry_of(nn.LeakyReLU(0.1)).name
    'leaky_relu'
    """
    _load()
    for cls in type(module).__mro__:
        found = _by_class.get(_qualified(cls))
        if found is not None and getattr(type(module), "forward", None) is getattr(cls, "forward", None):
            return found
    return None


def replaced_by(name: str) -> Replaces:
    """Return what the activation of that name takes the place of; an "activation" for a name that is unknown.

    >>> replaced_by("arelu"), replaced_by("dynamic_conv")
    ('activation', 'convolution')
    """
    _load()
    found = _lookup.get(_normalise(name))
    return _entries[found].replaces if found else "activation"


def defaults_of(name: str) -> dict[str, Any]:
    """Return the defaults of the arguments of an activation by name; empty for a name that is unknown.

    >>> defaults_of("leaky_relu")
    {'negative_slope': 0.01, 'inplace': False}
    """
    _load()
    found = _lookup.get(_normalise(name))
    parameters = _signature_of(_entries[found]).parameters.values() if found else ()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def own_classes() -> list[type]:
    """Return the classes of the zoo that torch does not define: what a checkpoint may hold because of this package.

    >>> from rtdetr_act.activations.arelu import AReLU
    >>> AReLU in own_classes()
    True
    """
    _load()
    classes = (cls for item in _entries.values() for cls in _classes_of(item))
    return [cls for cls in classes if isinstance(cls, type) and not cls.__module__.startswith("torch.nn.")]


def count_parameters(spec: str | ActSpec, channels: int) -> int:
    """Return how many parameters an activation has at a site of that many channels.

    >>> count_parameters("arelu", 64), count_parameters("prelu(per_channel=True)", 64)
    (2, 64)
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create(spec, channels).parameters())


def register(name: str, factory: Any = None, **answers: Unpack[Answers]) -> Any:
    """Add an activation of your own to the zoo, as a call or as a decorator; returns the class or callable.

    `channels` (the number of channels at the site) and `layout` ("map" or "tokens") are passed to a class or callable
    that has a parameter of that name, and to no other; a `channels` without default makes them needed. Literal
    arguments behind the name, as in `my_act(0.3)`, fill the other parameters in order.

    A class must be importable by its module's name wherever a checkpoint that holds it is loaded.

    Args:
        name: Its name in the zoo, an identifier.
        factory: A module class, or a callable that returns a module.
        **answers: What readers should know of it (`formula`, `paper`, `note`, `aliases`, `tokens`),
            and how it is fitted, folded, exported, recorded and so on, as in `Entry`.

    Raises:
        SpecError: The name or an alias is taken or no identifier, or `factory` is not callable.

    >>> from torch import nn
    >>> @register("doctest_cube", formula="x³")
    ... class Cube(nn.Module):
    ...     def forward(self, x):
    ...         return x**3
    >>> create("doctest_cube")
    Cube()
    """
    if factory is None:
        return lambda decorated: register(name, decorated, **answers)
    if not callable(factory):
        raise SpecError(f"{quote(name)} needs a module class or a callable that returns a module, not {quote(factory)}")
    aliases = answers.get("aliases", ())
    settings: dict[str, Any] = {**answers, "aliases": (aliases,) if isinstance(aliases, str) else tuple(aliases)}
    _add(Entry(name, factory, **settings))
    return factory


def _add(new: Entry) -> None:
    for name in (new.name, *new.aliases):
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise SpecError(f"{quote(name)} cannot name an activation: use an identifier such as 'my_act'")
        taken = _lookup.get(_normalise(name))
        if taken is not None and not (taken == new.name and _entries[taken].factory == new.factory):
            raise SpecError(f"the name '{name}' is taken by the activation '{taken}': choose another")
    _entries[new.name] = new
    _lookup.update({_normalise(name): new.name for name in (new.name, *new.aliases)})
    for cls in _classes_of(new):
        path = cls if isinstance(cls, str) else _qualified(cls)
        if path not in _by_class or _by_class[path].name == new.name:  # another name for a class changes no answer
            _by_class[path] = new


def _classes_of(item: Entry) -> tuple[type | str, ...]:
    return item.classes or ((item.factory,) if isinstance(item.factory, type) else ())


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _read(spec: str | ActSpec) -> ActSpec:
    """Read a text; one without arguments is a name as it stands, which `entry` forgives more than a parser would."""
    if not isinstance(spec, str):
        return spec
    return ActSpec.parse(spec) if "(" in spec else ActSpec(spec.strip())


def _normalise(name: str) -> str:
    bare = re.sub(r"^(torch\.)?nn\.", "", name.strip().lower())
    return re.sub(r"[_\-\s]", "", bare)


def build_convolution(spec: ActSpec, conv: nn.Conv2d) -> nn.Module:
    """Build what takes the place of a convolution, of a spec already resolved."""
    return _call(entry(spec.name), spec, (conv,), {})


def _build(found: Entry, spec: ActSpec, channels: int | None, layout: Layout) -> nn.Module:
    if found.replaces == "convolution":
        return _call(found, spec, (nn.Conv2d(channels or 8, channels or 8, 1),), {})
    site = {name: value for name, value in (("channels", channels), ("layout", layout)) if value is not None}
    return _call(found, spec, (), site)


def _call(found: Entry, spec: ActSpec, site: tuple[Any, ...], named: dict[str, Any]) -> nn.Module:
    """Call a factory with what its site gives and what the user gave.

    Args:
        found: The entry.
        spec: The user's arguments.
        site: Its first arguments.
        named: What else the site knows, for parameters of these names.
    """
    try:
        parameters = found.parameters
        bound = _signature_of(found).bind(*spec.args, **dict(spec.kwargs))
        bound.arguments.update({name: value for name, value in named.items() if name in parameters})
        bound.arguments.update(zip(parameters, site, strict=False))
        call = inspect.BoundArguments(inspect.Signature(list(parameters.values())), bound.arguments)
        module = found.factory(*call.args, **call.kwargs)
    except RtdetrActError:
        raise
    except _WRONG_ARGUMENTS as error:
        raise _wrong_arguments(found, spec, error) from error
    except (Exception, SystemExit) as error:  # a stranger's factory raises, and exits with, whatever it likes
        if found.name in _built_in:
            raise
        raise SpecError(f"the factory of '{found.name}' failed: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise SpecError(f"the factory of '{found.name}' returned {type(module).__name__}, not a torch.nn.Module")
    _by_class.setdefault(_qualified(type(module)), found)
    return module


# What constructors raise on arguments that they cannot use: torch asserts some.
_WRONG_ARGUMENTS = (TypeError, ValueError, AssertionError, OverflowError, RuntimeError)
_LARGEST_COUNT = 100_000


def _try_arguments(found: Entry, spec: ActSpec) -> None:
    # A whole number is mostly a count of parameters, and building takes gigabytes for one that was mistyped.
    for value in (*spec.args, *dict(spec.kwargs).values()) if found.name in _built_in else ():
        if isinstance(value, int) and abs(value) > _LARGEST_COUNT:
            raise SpecError(
                f"{quote(str(spec))} is wrong: {quote(value)} is out of all range, whole numbers end at "
                f"{_LARGEST_COUNT:,}; write 1e6 where it is no count"
            )
    # The seed of a run must not depend on how often a plan was checked; a default device of the caller neither.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            module = _build(found, spec, 8, "map")
        except SelectionError:  # for another number of channels, which is a matter of the site
            module = _build(found, spec, None, "map")
            return
        if (spec.args or spec.kwargs) and found.name in _built_in:
            # torch's constructors take anything: LeakyReLU("x") fails in forward only.
            try:
                module.cpu().eval()(torch.ones(1, 8, 2, 2))
            except (*_WRONG_ARGUMENTS, IndexError) as error:
                raise _wrong_arguments(found, spec, error) from error


def _wrong_arguments(found: Entry, spec: ActSpec, error: Exception) -> SpecError:
    signature = _signature_of(found)
    takes = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in signature.parameters.values())
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    hint = suggest(unknown[1], signature.parameters) if unknown else ""
    why = reason(error).rstrip(".") if str(error) else "its arguments do not fit together"
    return SpecError(f"{quote(str(spec))} is wrong: {why}; it takes {f'({takes})' if takes else 'no arguments'}{hint}")


def _override(spec: str | ActSpec, kwargs: dict[str, Any]) -> ActSpec:
    """Return the spec with `kwargs` in place of its own arguments of those names, positional ones included."""
    spec = _read(spec)
    found = entry(spec.name)
    parameters = list(_signature_of(found).parameters.values())
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(spec.args) > len(positional):
        return ActSpec(spec.name, spec.args, tuple({**dict(spec.kwargs), **kwargs}.items()))
    given = dict(zip(positional, spec.args, strict=False))
    if twice := [name for name, _ in spec.kwargs if name in given]:
        raise SpecError(f"'{spec}' is wrong: multiple values for argument '{twice[0]}'")
    return ActSpec(spec.name, (), tuple({**given, **dict(spec.kwargs), **kwargs}.items()))


def _signature_of(found: Entry) -> inspect.Signature:
    """Return the signature of what a user may give: all but what the site gives."""
    parameters = list(found.parameters.values())
    if found.replaces == "convolution":
        return inspect.Signature(parameters[1:])
    return inspect.Signature([p for p in parameters if p.name not in ("channels", "layout")])


_entries: dict[str, Entry] = {}
_lookup: dict[str, str] = {}  # names and aliases, as `_normalise` gives them, to names
_by_class: dict[str, Entry] = {}
_built_in: set[str] = set()
_loaded = False


def _load() -> None:
    """Load the files of this folder and the installed packages that have activations, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True  # first, because a plugin may ask for names() while it is imported
    for file in pkgutil.iter_modules(folder.__path__):
        for item in _entries_in(file.name):
            _add(item)
            _built_in.add(item.name)
    _load_plugins()


def _entries_in(file: str) -> Iterator[Entry]:
    if f"{folder.__name__}.{file}" != __name__:
        yield from getattr(import_module(f"{folder.__name__}.{file}"), "ENTRIES", ())


def _load_plugins() -> None:
    for point in entry_points(group=GROUP):
        try:
            found = point.load()
            if isinstance(found, Entry):
                _add(found)
            else:
                register(point.name, found)
        except Exception as error:  # whatever a stranger's package raises must not end a training run
            warnings.warn(
                f"the activation plugin '{point.name}' ({point.value}) was left out: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
