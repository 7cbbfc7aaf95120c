"""The zoo by name: `create`, `resolve`, `entry`, `names`, and `register` for users' own (no torch before it is needed).

Users' own also come from installed packages, through the entry-point group `rtdetr_act.activations`: the name of the
entry point is the name in the zoo, its object a class, a factory or an `Entry`.
"""

from __future__ import annotations

import inspect
import keyword
import re
import warnings
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtdetr_act.activations.channels import PReLU
from rtdetr_act.activations.entry import LAYOUTS, Adapter, Details, Entry, parameters_of, without_site
from rtdetr_act.activations.zoo import ZOO
from rtdetr_act.errors import RtdetrActError, SelectionError, SpecError, quote, reason, suggest
from rtdetr_act.spec import ActSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

GROUP = "rtdetr_act.activations"


def names() -> list[str]:
    """Return the names of the zoo in alphabetical order, users' own and those of installed packages included.

    >>> "arelu" in names() and "mish" in names()
    True
    """
    _load_plugins()
    return sorted(_entries)


def entry(name: str) -> Entry:
    """Return the entry of a name or alias; case, `_`, `-` and a leading `nn.` or `torch.nn.` do not matter.

    Raises:
        SpecError: There is no such activation.

    >>> entry("nn.SiLU").name, entry("h_swish").name, entry("DyReLU-B").name
    ('silu', 'hardswish', 'dyrelu_b')
    """
    _load_plugins()
    found = _lookup.get(_normalise(name)) if isinstance(name, str) else None
    if found is None:
        known = [*_entries, *(alias for item in _entries.values() for alias in item.aliases)]
        raise SpecError(f"there is no activation {quote(name)} in the zoo{suggest(name, known)}")
    return _entries[found]


def resolve(spec: str | ActSpec) -> ActSpec:
    """Return the spec under its zoo name, its arguments checked.

    Arguments are tried on a tiny instance with 8 channels, without touching the random state.

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
    spec = ActSpec(found.name, tuple(spec.args), tuple(spec.kwargs))
    _try_arguments(found, spec)
    return spec


def create(spec: str | ActSpec, channels: int | None = None, layout: str = "map", **kwargs: Any) -> nn.Module:
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


def build(spec: ActSpec, channels: int | None, layout: str) -> nn.Module:
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


def own_classes() -> list[type]:
    """Return the classes of the zoo that torch does not define: what a checkpoint may hold because of this package.

    >>> from rtdetr_act.activations.arelu import AReLU
    >>> AReLU in own_classes()
    True
    """
    _load_plugins()
    found: list[type] = [PReLU]
    for item in _entries.values():
        target = item.factory.loaded() if isinstance(item.factory, Adapter) else item.factory
        if inspect.isclass(target) and not target.__module__.startswith("torch.nn."):
            found.append(target)
    return found


def register(name: str, factory: Any = None, **details: Unpack[Details]) -> Any:
    """Add an activation of your own to the zoo, as a call or as a decorator; returns the class or callable.

    `channels` (the number of channels at the site) and `layout` ("map" or "tokens") are passed to a class or callable
    that has a parameter of that name, and to no other; a `channels` without default makes them needed. Literal
    arguments behind the name, as in `my_act(0.3)`, fill the other parameters in order.

    A class must be importable by its module's name wherever a checkpoint that holds it is loaded.

    Args:
        name: Its name in the zoo, an identifier.
        factory: A module class, or a callable that returns a module.
        **details: Any of `aliases`, `formula`, `parameters`, `learnable`, `tokens`, `needs_channels`, `paper` and
            `note`, as in `Entry`.

    Raises:
        SpecError: The name or an alias is taken or no identifier, or `factory` is not callable.

    >>> from torch import nn
    >>> @register("doctest_cube", learnable=False, formula="x³")
    ... class Cube(nn.Module):
    ...     def forward(self, x):
    ...         return x**3
    >>> create("doctest_cube")
    Cube()
    """
    if factory is None:
        return lambda decorated: register(name, decorated, **details)
    if not callable(factory):
        raise SpecError(f"{quote(name)} needs a module class or a callable that returns a module, not {quote(factory)}")
    given = parameters_of(factory).get("channels")
    required = given is not None and given.default is inspect.Parameter.empty
    aliases = details.get("aliases", ())
    settings: dict[str, Any] = {**details, "aliases": (aliases,) if isinstance(aliases, str) else tuple(aliases)}
    settings["needs_channels"] = required or details.get("needs_channels", False)
    _add(Entry(name, Adapter(factory), **settings))
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


def _read(spec: str | ActSpec) -> ActSpec:
    """Read a text; one without arguments is a name as it stands, which `entry` forgives more than a parser would."""
    if not isinstance(spec, str):
        return spec
    return ActSpec.parse(spec) if "(" in spec else ActSpec(spec.strip())


def _normalise(name: str) -> str:
    bare = re.sub(r"^(torch\.)?nn\.", "", name.strip().lower())
    return re.sub(r"[_\-\s]", "", bare)


def _build(found: Entry, spec: ActSpec, channels: int | None, layout: str) -> nn.Module:
    try:
        module = found.factory(channels, layout, *spec.args, **dict(spec.kwargs))
    except RtdetrActError:
        raise
    except _WRONG_ARGUMENTS as error:
        raise _wrong_arguments(found, spec, error) from error
    except (Exception, SystemExit) as error:  # a stranger's factory raises, and exits with, whatever it likes
        if found.name in _BUILT_IN:
            raise
        raise SpecError(f"the factory of '{found.name}' failed: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise SpecError(f"the factory of '{found.name}' returned {type(module).__name__}, not a torch.nn.Module")
    return module


# What constructors raise on arguments that they cannot use: torch asserts some.
_WRONG_ARGUMENTS = (TypeError, ValueError, AssertionError, OverflowError, RuntimeError)


_LARGEST_COUNT = 100_000


def _try_arguments(found: Entry, spec: ActSpec) -> None:
    # A whole number is mostly a count of parameters, and building takes gigabytes for one that was mistyped.
    for value in (*spec.args, *dict(spec.kwargs).values()) if found.name in _BUILT_IN else ():
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
        if (spec.args or spec.kwargs) and found.name in _BUILT_IN:
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
    if isinstance(found.factory, Adapter):
        return without_site(parameters_of(found.factory.target()))
    return inspect.Signature(list(inspect.signature(found.factory).parameters.values())[2:])


_plugins_loaded = False


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True  # first, because a plugin may ask for names() while it is imported
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


_BUILT_IN = frozenset(item.name for item in ZOO)
_entries: dict[str, Entry] = {}
_lookup: dict[str, str] = {}
for _item in ZOO:
    _add(_item)
