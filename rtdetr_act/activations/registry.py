"""The registry of activations: look them up, build them, and register new ones.

Installed packages can add activations through the entry-point group `rtdetr_act.activations`. The name of the entry
point is the name of the activation; its object is a class, a factory or an `Entry`. It may also be a mapping of names
to such objects, whatever the name of the entry point.

A name that a user registers wins over one of this package, whose entry then only describes the modules of its classes,
such as those in earlier checkpoints. The names of `torch.nn` are an exception: folding, model YAMLs and functional
calls mean torch's classes by them.
"""

from __future__ import annotations

import inspect
import keyword
import os
import pkgutil
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import rtdetr_act.activations as folder
from rtdetr_act.activations.checks import check_dims
from rtdetr_act.activations.protocol import LAYOUTS, SITE_PARAMETERS, Answers, Entry, Layout, Replaces
from rtdetr_act.errors import RtdetrActError, SelectionError, SpecError, quote, reason, suggest, warn
from rtdetr_act.spec import ActSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

GROUP = "rtdetr_act.activations"
NOTIFIED = "RTDETR_ACT_OVERRIDDEN"  # environment variable: overridden names, inherited by data loaders, DDP and studies
_MOST_VARIANTS = 4  # names offered for one that several begin with


def names() -> list[str]:
    """Return the names of all activations in alphabetical order, including registered ones and those of plugins.

    >>> "arelu" in names() and "mish" in names()
    True
    """
    return list_names("activation")


def list_names(replaces: Replaces) -> list[str]:
    """Return the names of all entries that replace an "activation" or a "convolution", in alphabetical order."""
    _load_entries()
    return sorted(name for name, item in _entries.items() if item.replaces == replaces)


def get_entry(name: str) -> Entry:
    """Return the entry with a name or alias, ignoring case, spaces, `_`, `-` and a leading `nn.`, `torch.nn.` or `F.`.

    Raises:
        SpecError: No entry has this name.

    >>> get_entry("nn.SiLU").name, get_entry("h_swish").name, get_entry("DyReLU-B").name
    ('silu', 'hardswish', 'dyrelu_b')
    """
    found = _look_up(name) if isinstance(name, str) else None
    if found is None:
        raise SpecError(f"there is no activation {quote(name)} in the zoo{_suggest_names(name)}")
    return found


def is_known(name: str) -> bool:
    """Return whether an entry has a name or alias, as `get_entry` looks it up.

    >>> is_known("nn.SiLU"), is_known("resnet")
    (True, False)
    """
    return _look_up(name) is not None


def _suggest_names(name: object) -> str:
    """Return the end of an error message: the variants of an activation, or else the most similar name."""
    key = _normalise_name(name) if isinstance(name, str) else ""
    variants = sorted({full for known, full in _names_by_key.items() if known.startswith(key)}) if len(key) > 2 else []
    if 1 < len(variants) <= _MOST_VARIANTS:
        *others, last = map(repr, variants)
        return f"; did you mean {', '.join(others)} or {last}?"
    return suggest(name, [*_entries, *(alias for item in _entries.values() for alias in item.aliases)])


def resolve(spec: str | ActSpec, replaces: Replaces = "activation") -> ActSpec:
    """Return a spec with its registered name, after validating its arguments.

    Arguments are validated by building an instance with 8 channels; the random state is not changed.

    Args:
        spec: A name, a string with literal arguments, or an `ActSpec`.
        replaces: What it must replace: an "activation" (default) or a "convolution".

    Raises:
        SpecError: The name is unknown, it replaces something else, or its arguments are invalid.

    >>> str(resolve("nn.LeakyReLU(0.1)"))
    'leaky_relu(0.1)'
    >>> resolve("threshold")
    Traceback (most recent call last):
    rtdetr_act.errors.SpecError: 'threshold' is wrong: missing a required argument: 'threshold'; it takes \
(threshold, value, inplace=False)
    """
    spec = _parse_spec(spec)
    if not isinstance(spec, ActSpec):
        raise SpecError(f"an activation is a name such as 'arelu' or an ActSpec, not {quote(spec)}")
    found = get_entry(spec.name)
    if found.replaces != replaces:
        raise SpecError(f"'{found.name}' replaces a {found.replaces}: it is not an {replaces}")
    spec = ActSpec(found.name, tuple(spec.args), tuple(spec.kwargs))
    _validate_arguments(found, spec)
    if replaces == "convolution":  # by keyword, since the arguments of a finished schedule are removed by name
        given = _get_signature(found).bind(*spec.args, **dict(spec.kwargs)).arguments
        spec = ActSpec(found.name, (), tuple(given.items()))
    return spec


def create(
    spec: str | ActSpec, channels: int | None = None, layout: Layout = "map", dims: int = 2, **kwargs: Any
) -> nn.Module:
    """Build an activation by name: an instance of torch's class where torch has one, or of a subclass (PReLU).

    Args:
        spec: A name, a string with literal arguments such as `leaky_relu(negative_slope=0.1)`, or an `ActSpec`.
        channels: Number of channels C. Required by dynamic and per-channel activations, such as `dyrelu_b` and
            `prelu(per_channel=True)`. Default: None.
        layout: "map" (default) for inputs (B, C, H, W), (B, C, L) or (B, C, D, H, W), or "tokens" for (B, N, C) and
            (B, C).
        dims: Number of spatial dimensions of a map: 2 (default), 1 for (B, C, L) or 3 for (B, C, D, H, W). Only
            `frelu`, whose kernel depends on it, needs to know; the others take all three.
        **kwargs: Arguments of the activation, which override those in `spec`.

    Returns:
        A new module in training mode.

    Raises:
        SpecError: The name, an argument, `channels`, `layout` or `dims` is invalid or missing.
        SelectionError: The activation does not support this layout or number of channels.

    >>> create("mish"), create("leaky_relu(negative_slope=0.1)", negative_slope=0.2)
    (Mish(), LeakyReLU(negative_slope=0.2))
    >>> create("prelu", channels=64, per_channel=True)
    PReLU(num_parameters=64)
    """
    if kwargs:
        spec = _override_arguments(spec, kwargs)
    return build(resolve(spec), channels, layout, dims=dims)


def build(spec: ActSpec, channels: int | None, layout: Layout, replaced: Any = None, dims: int = 2) -> nn.Module:
    """Build a module from a resolved spec, without validating its arguments again.

    Args:
        spec: As returned by `resolve`.
        channels: Number of channels C, None if unknown.
        layout: "map" or "tokens".
        replaced: What it replaces, which an entry that replaces convolutions is built from. Default: None.
        dims: Number of spatial dimensions of a map. Default: 2.

    Raises:
        SpecError: `channels`, `layout` or `dims` is invalid or missing, or the factory fails.
        SelectionError: The activation does not support this layout or number of channels.
    """
    found = get_entry(spec.name)
    if layout not in LAYOUTS:
        raise SpecError(f"layout is 'map' or 'tokens', not {quote(layout)}")
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise SpecError(f"channels is an integer of at least 1, not {quote(channels)}")
    try:
        check_dims(dims)
    except ValueError as error:
        raise SpecError(str(error)) from None
    if found.needs_channels and channels is None:
        raise SpecError(f"'{found.name}' needs the number of channels: create('{found.name}', channels=64)")
    if layout == "tokens" and not found.tokens:
        reason = f": {found.maps_only_because}" if found.maps_only_because else ""
        raise SelectionError(f"'{found.name}' supports feature maps only, such as (B, C, H, W), not tokens{reason}")
    return _build_module(found, spec, channels, layout, replaced, dims)


def find_entry(module: object) -> Entry | None:
    """Return the entry that describes a module, by its class, or None if its class is not registered.

    A subclass has the entry of its parent unless it overrides `forward`.

    >>> find_entry(nn.LeakyReLU(0.1)).name
    'leaky_relu'
    """
    _load_entries()
    for cls in type(module).__mro__:
        found = _by_class.get(_qualified_name(cls))
        if found is not None and getattr(type(module), "forward", None) is getattr(cls, "forward", None):
            return found
    return None


def get_replaced_kind(name: str) -> Replaces:
    """Return what the entry with a name or alias replaces; "activation" for an unknown name.

    >>> get_replaced_kind("arelu"), get_replaced_kind("dynamic_conv")
    ('activation', 'convolution')
    """
    found = _look_up(name)
    return found.replaces if found else "activation"


def get_registered_name(name: str) -> str:
    """Return the registered name for a name or alias, or an unknown name as it is.

    >>> get_registered_name("nn.SiLU"), get_registered_name("unknown")
    ('silu', 'unknown')
    """
    found = _look_up(name)
    return found.name if found else name


def get_default_arguments(name: str) -> dict[str, Any]:
    """Return the default arguments of the entry with a name or alias; empty for an unknown name.

    >>> get_default_arguments("leaky_relu")
    {'negative_slope': 0.01, 'inplace': False}
    """
    found = _look_up(name)
    parameters = _get_signature(found).parameters.values() if found else ()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def get_title(spec: str | ActSpec) -> str:
    """Return an activation as papers name it, with the arguments of its spec, if any.

    Args:
        spec: As in `create`.

    Raises:
        SpecError: The name is unknown, or the text is not a spec.

    >>> get_title("dyrelu_b"), get_title("prelu(init=0.1)"), get_title("nn.LeakyReLU(0.1)")
    ('DY-ReLU-B', 'PReLU (init=0.1)', 'Leaky ReLU (0.1)')
    """
    spec = _parse_spec(spec)
    found = get_entry(spec.name)
    arguments = str(spec)[len(spec.name) :]
    return f"{found.title} {arguments}" if arguments else found.title


def is_built_in(name: str) -> bool:
    """Return whether the entry with a name is one of this package, not a user's or a plugin's.

    >>> is_built_in("arelu"), is_built_in("unknown")
    (True, False)
    """
    _load_entries()
    return name in _built_in


def list_own_classes() -> list[type]:
    """Return the registered module classes that torch does not define, which checkpoints may contain.

    >>> from rtdetr_act.activations.arelu import AReLU
    >>> AReLU in list_own_classes()
    True
    """
    _load_entries()
    # Those whose name a user has registered are found by class only.
    classes = (cls for item in (*_entries.values(), *_by_class.values()) for cls in _get_classes(item))
    own = (cls for cls in classes if isinstance(cls, type) and not cls.__module__.startswith("torch.nn."))
    return list(dict.fromkeys(own))


def count_parameters(spec: str | ActSpec, channels: int) -> int:
    """Return the number of parameters of an activation for a number of channels; the random state is not changed.

    Args:
        spec: As in `create`.
        channels: Number of channels C.

    Raises:
        SpecError: The name or an argument is invalid or missing.
        SelectionError: The activation does not support this number of channels.

    >>> count_parameters("arelu", 64), count_parameters("prelu(per_channel=True)", 64)
    (2, 64)
    """
    with torch.random.fork_rng(devices=[]):  # not on the meta device, which loads sympy: half a second
        return sum(parameter.numel() for parameter in create(spec, channels).parameters())


def register(name: str, factory: Any = None, **answers: Unpack[Answers]) -> Any:
    """Register an activation under a name; usable as a decorator.

    A factory with a parameter named `channels` (the number of channels at the site), `layout` ("map" or "tokens") or
    `dims` (the number of spatial dimensions of a map: 1, 2 or 3) gets that argument; the number of channels is required
    if `channels` has no default. Literal arguments of a spec, as in `my_act(0.3)`, are bound to the remaining
    parameters.

    To load a checkpoint that contains the class, its module must be importable under the same name.

    A name or alias of this package is taken over with an RtdetrActWarning, printed once: the name, also in plans and
    checkpoints, then means the new activation, and other names of the old one are no longer known. The names of
    `torch.nn`, such as "relu", and of other registered activations cannot be taken over.

    Args:
        name: An identifier.
        factory: A module class, or a callable that returns a module. Default: None, which returns a decorator.
        **answers: Documentation (`formula`, `paper`, `note`, `aliases`, `title`), supported layouts (`tokens`), and
            callbacks that fit, fold, export and record it: the attributes of
            `rtdetr_act.activations.protocol.Entry`.

    Returns:
        The factory.

    Raises:
        SpecError: The name or an alias is one of `torch.nn` or of another registered activation or is not an
            identifier, or `factory` is not callable.

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
    _load_built_ins()
    aliases = answers.get("aliases", ())
    settings: dict[str, Any] = {**answers, "aliases": (aliases,) if isinstance(aliases, str) else tuple(aliases)}
    _add_entry(Entry(name, factory, **settings))
    return factory


def _add_entry(new: Entry) -> None:
    """Add an entry of a user in place of those of this package that have one of its names.

    Raises:
        SpecError: A name is invalid, or taken by torch or by another entry of a user.
    """
    keys: dict[str, str] = {}
    for name in (new.name, *new.aliases):
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise SpecError(f"{quote(name)} cannot name an activation: use an identifier such as 'my_act'")
        keys.setdefault(_normalise_name(name), name)
    overridden = {}
    for key, name in keys.items():
        old = _entries.get(_names_by_key.get(key, ""))
        if old is None or (old.name == new.name and old.factory == new.factory):
            continue
        if old.name not in _built_in or _is_fixed(old):
            raise SpecError(f"the name '{name}' is taken by the {old.replaces} '{old.name}': choose another")
        overridden[name] = old
    for name, old in overridden.items():
        _release_name(_normalise_name(name), old.name)
    _insert_entry(new)
    if overridden:
        _notify_once(list(overridden), new)


def _is_fixed(item: Entry) -> bool:
    """Return whether this package itself looks an entry up by its names: one of `torch.nn`, or a convolution.

    What `F.relu` or `activation: nn.ReLU()` stands for, and what activations fold to, must not change.
    """
    return item.replaces == "convolution" or _normalise_name(item.name) in _TORCH_NAMES


_TORCH_NAMES = {name.lower() for name in nn.modules.activation.__all__}


def _release_name(key: str, owner: str) -> None:
    """Take a name from the entry that has it; with its main name, the entry is removed."""
    item = _entries.get(owner)
    if item is None:  # its main name was released before
        return
    if key != _normalise_name(owner):
        _entries[owner] = replace(item, aliases=tuple(a for a in item.aliases if _normalise_name(a) != key))
        return
    del _entries[owner]
    _built_in.discard(owner)
    for each in [each for each, name in _names_by_key.items() if name == owner]:
        del _names_by_key[each]


def _notify_once(overridden: list[str], new: Entry) -> None:
    """Warn that names of this package are now a user's, unless this process or one that started it has done so."""
    told = os.environ.get(NOTIFIED, "").split(",")
    if untold := [name for name in overridden if name not in told]:
        os.environ[NOTIFIED] = ",".join(filter(None, [*told, *untold]))
        path = f"{new.factory.__module__}.{getattr(new.factory, '__qualname__', new.name)}"
        shown = " and ".join(map(repr, untold))
        warn(f"{path} is now used under {shown} in place of rtdetr_act's own activation")


def _insert_entry(new: Entry) -> None:
    """Add an entry, its aliases and its classes to the registry."""
    _entries[new.name] = new
    _names_by_key.update({_normalise_name(name): new.name for name in (new.name, *new.aliases)})
    for cls in _get_classes(new):
        path = cls if isinstance(cls, str) else _qualified_name(cls)
        if path not in _by_class or _by_class[path].name == new.name:  # the first entry of a class describes it
            _by_class[path] = new


def _get_classes(item: Entry) -> tuple[type | str, ...]:
    """Return the module classes that an entry describes."""
    return item.classes or ((item.factory,) if isinstance(item.factory, type) else ())


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _parse_spec(spec: str | ActSpec) -> ActSpec:
    """Parse a string; without arguments, keep it as a name, of which `get_entry` accepts more than the parser."""
    if not isinstance(spec, str):
        return spec
    return ActSpec.parse(spec) if "(" in spec else ActSpec(spec.strip())


def _look_up(name: str) -> Entry | None:
    """Return the entry with a name or alias, or None."""
    _load_entries()
    # Resolved specs have the name as registered, and are looked up for every site of a model.
    return _entries.get(name) or _entries.get(_names_by_key.get(_normalise_name(name), ""))


def _normalise_name(name: str) -> str:
    """Return a name in lower case, without `nn.` or `F.` before it, `_`, `-` and spaces."""
    bare = re.sub(r"^((torch\.)?nn|f)\.", "", name.strip().lower())  # sites are listed as SiLU and as F.relu
    return re.sub(r"[_\-\s]", "", bare)


def _build_module(
    found: Entry, spec: ActSpec, channels: int | None, layout: Layout, replaced: Any = None, dims: int = 2
) -> nn.Module:
    """Build a module from a resolved spec and the properties of its site."""
    if found.replaces == "convolution":
        return _call_factory(found, spec, (replaced or nn.Conv2d(channels or 8, channels or 8, 1),), {})
    site = zip(SITE_PARAMETERS, (channels, layout, dims), strict=True)
    return _call_factory(found, spec, (), {name: value for name, value in site if value is not None})


def _call_factory(found: Entry, spec: ActSpec, site: tuple[Any, ...], named: dict[str, Any]) -> nn.Module:
    """Call the factory of an entry and check that it returns a module.

    Args:
        found: The entry.
        spec: The arguments given by the user.
        site: Positional arguments given by the site, which come first.
        named: Keyword arguments given by the site, passed only where the factory has such a parameter.
    """
    try:
        parameters = found.parameters
        bound = _get_signature(found).bind(*spec.args, **dict(spec.kwargs))
        bound.arguments.update({name: value for name, value in named.items() if name in parameters})
        bound.arguments.update(zip(parameters, site, strict=False))
        call = inspect.BoundArguments(inspect.Signature(list(parameters.values())), bound.arguments)
        module = found.factory(*call.args, **call.kwargs)
    except RtdetrActError:
        raise
    except _WRONG_ARGUMENTS as error:
        raise _argument_error(found, spec, error) from error
    except (Exception, SystemExit) as error:  # a registered factory may raise anything
        if found.name in _built_in:
            raise
        raise SpecError(f"the factory of '{found.name}' failed: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise SpecError(f"the factory of '{found.name}' returned {type(module).__name__}, not a torch.nn.Module")
    _by_class.setdefault(_qualified_name(type(module)), found)
    return module


# The exceptions that constructors raise for invalid arguments; torch uses assertions too.
_WRONG_ARGUMENTS = (TypeError, ValueError, AssertionError, OverflowError, RuntimeError)
_LARGEST_COUNT = 100_000


def _validate_arguments(found: Entry, spec: ActSpec) -> None:
    """Build an instance with 8 channels, and raise SpecError if the arguments of a spec are invalid."""
    # An integer is usually a number of parameters, for which a typing error could allocate gigabytes.
    for value in (*spec.args, *dict(spec.kwargs).values()) if found.name in _built_in else ():
        if isinstance(value, int) and abs(value) > _LARGEST_COUNT:
            raise SpecError(
                f"{quote(str(spec))} is wrong: {quote(value)} is out of range, integers are limited to "
                f"{_LARGEST_COUNT:,}; write a float such as 1e6 if it is not a count"
            )
    # Validation must change neither the random state of a run nor depend on the caller's default device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            module = _build_module(found, spec, 8, "map")
        except SelectionError:  # it needs another number of channels, which is checked at each site
            module = _build_module(found, spec, None, "map")
            return
        if (spec.args or spec.kwargs) and found.name in _built_in:
            # torch's constructors do not validate: LeakyReLU("x") fails only in its forward.
            try:
                module.cpu().eval()(torch.ones(1, 8, 2, 2))
            except (*_WRONG_ARGUMENTS, IndexError) as error:
                raise _argument_error(found, spec, error) from error


def _argument_error(found: Entry, spec: ActSpec, error: Exception) -> SpecError:
    """Return a SpecError that quotes an exception and the valid arguments."""
    signature = _get_signature(found)
    takes = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in signature.parameters.values())
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    hint = suggest(unknown[1], signature.parameters) if unknown else ""
    why = reason(error).rstrip(".") if str(error) else "its arguments are inconsistent"
    return SpecError(f"{quote(str(spec))} is wrong: {why}; it takes {f'({takes})' if takes else 'no arguments'}{hint}")


def _override_arguments(spec: str | ActSpec, kwargs: dict[str, Any]) -> ActSpec:
    """Return the spec with arguments overridden by `kwargs`, positional arguments included."""
    spec = _parse_spec(spec)
    found = get_entry(spec.name)
    parameters = list(_get_signature(found).parameters.values())
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(spec.args) > len(positional):
        return ActSpec(spec.name, spec.args, tuple({**dict(spec.kwargs), **kwargs}.items()))
    given = dict(zip(positional, spec.args, strict=False))
    if twice := [name for name, _ in spec.kwargs if name in given]:
        raise SpecError(f"'{spec}' is wrong: multiple values for argument '{twice[0]}'")
    return ActSpec(spec.name, (), tuple({**given, **dict(spec.kwargs), **kwargs}.items()))


def _get_signature(found: Entry) -> inspect.Signature:
    """Return the signature of a factory without the parameters that the site provides."""
    parameters = list(found.parameters.values())
    if found.replaces == "convolution":
        return inspect.Signature(parameters[1:])
    return inspect.Signature([p for p in parameters if p.name not in SITE_PARAMETERS])


_entries: dict[str, Entry] = {}
_names_by_key: dict[str, str] = {}  # names and aliases, as `_normalise_name` gives them, to names
_by_class: dict[str, Entry] = {}
_built_in: set[str] = set()
_loaded: set[str] = set()  # "built-ins" and "plugins"


def _load_entries() -> None:
    """Register the activations of this folder and of installed plugins, on the first call only."""
    _load_built_ins()
    if "plugins" not in _loaded:
        _loaded.add("plugins")  # first, because a plugin may call names() while it is imported
        _load_plugins()


def _load_built_ins() -> None:
    """Register the activations of this folder, on the first call only.

    What a user registers comes after them. It does not wait for plugins, of which it may be one that is being imported.
    """
    if "built-ins" in _loaded:
        return
    _loaded.add("built-ins")
    for file in pkgutil.iter_modules(folder.__path__):
        for item in _read_entries(file.name):
            _add_entry(item)
    _built_in.update(_entries)  # last: none of ours overrides another


def _read_entries(file: str) -> Iterator[Entry]:
    if f"{folder.__name__}.{file}" != __name__:
        yield from getattr(import_module(f"{folder.__name__}.{file}"), "ENTRIES", ())


def list_plugins() -> dict[str, str]:
    """Return the entry points that installed packages add activations by: the package and its version, by name.

    One that cannot be loaded has the reason instead.
    """
    found = {}
    for point in entry_points(group=GROUP):
        try:
            point.load()
            found[point.name] = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        except Exception as error:
            found[point.name] = f"left out: {type(error).__name__}: {reason(error)}"
    return found


def _load_plugins() -> None:
    for point in entry_points(group=GROUP):
        with _leaving_out(point.name, point.value):
            found = point.load()
            for name, each in found.items() if isinstance(found, Mapping) else [(point.name, found)]:
                with _leaving_out(name, point.value):
                    if isinstance(each, Entry):
                        _add_entry(each)
                    else:
                        register(name, each)


@contextmanager
def _leaving_out(name: str, source: str) -> Iterator[None]:
    """Warn of an error inside the block, since a broken plugin must not stop a training run."""
    try:
        yield
    except Exception as error:
        message = f"the activation plugin '{name}' ({source}) was left out: {type(error).__name__}: {reason(error)}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)  # beyond contextlib
