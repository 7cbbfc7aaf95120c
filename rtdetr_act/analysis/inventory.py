"""Take stock of the activations in a network: which stands where, what a rebuild would change, and what has learned."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rtdetr_act.activations import registry
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import RtdetrActError
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.plan import Rule
from rtdetr_act.surgery.sites import Site

_ROUNDING = 2**-10  # relative; checkpoints are stored in half precision, which rounds to half of that

_MOST_VARIANTS = 3  # of the arguments of one activation that are listed


@dataclass(frozen=True)
class Holding:
    """An activation and the number of sites that hold it.

    Attributes:
        activation: The spec of a swap, such as "arelu", else the class or function, such as "SiLU".
        convolutional: Number of convolutional sites (feature maps).
        transformer: Number of transformer sites (tokens).
        hidden: How many of both are functional calls in the forward of a block.
    """

    activation: str
    convolutional: int
    transformer: int
    hidden: int


@dataclass(frozen=True)
class Difference:
    """A site at which a network does not hold what its `model.yaml` builds.

    Attributes:
        site: Qualified name of the site.
        held: What the network holds there.
        built: What `model.yaml` builds there.
    """

    site: str
    held: str
    built: str


@dataclass(frozen=True)
class Learnable:
    """The learnable parameters of the activations in a network.

    Attributes:
        parameters: Number of scalars; those that several sites share are counted once.
        moved: Names of the sites at which a parameter differs from its initial value.
        unmoved: Names of the sites at which all parameters have their initial values.
        unknown: Names of the sites whose initial values were random and are not recorded.
        shared: Groups of sites that use the same parameter, by name.
    """

    parameters: int = 0
    moved: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()

    @property
    def sites(self) -> int:
        """Number of sites with learnable parameters."""
        return len(self.moved) + len(self.unmoved) + len(self.unknown)


def count_activations(sites: Sequence[Site]) -> tuple[Holding, ...]:
    """Return how many sites hold which activation, the most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for site, label in zip(sites, label_activations(sites), strict=True):
        counts.setdefault(label, Counter()).update({site.layout: 1, "hidden": int(site.hidden)})
    found = [Holding(name, each["map"], each["tokens"], each["hidden"]) for name, each in counts.items()]
    return tuple(sorted(found, key=lambda each: -each.convolutional - each.transformer))


def label_activations(sites: Sequence[Site]) -> list[str]:
    """Return what each site holds, as text; specs that differ in many arguments, as folding leaves them, become one."""
    variants: dict[str, set[str]] = {}
    for site in sites:
        variants.setdefault(site.current.partition("(")[0], set()).add(site.current)
    names = [site.current.partition("(")[0] for site in sites]
    return [
        f"{name}(…)" if len(variants[name]) > _MOST_VARIANTS else site.current
        for site, name in zip(sites, names, strict=True)
    ]


def compare_sites(
    network: nn.Module, sites: Sequence[Site], built: nn.Module, built_sites: Sequence[Site]
) -> tuple[Difference, ...]:
    """Return the sites at which a network does not hold what its `model.yaml` builds.

    Activations are compared by their specs where a swap inserted both, else by their class and arguments; whether they
    work in place does not matter. Convolutions differ if only one of them is dynamic.

    Args:
        network: The network.
        sites: Its sites, of activations and of convolutions.
        built: The network that was built.
        built_sites: The sites of that.
    """
    held, expected = ({site.name: site.module for site in each} for each in (sites, built_sites))
    kinds = {site.name: site.replaces for site in (*built_sites, *sites)}
    found = []
    for name, kind in kinds.items():
        if name not in held and _find_module(network, name.rpartition(".")[0]) is None:
            continue  # fusing has removed the layer, such as the branch of a head that only training uses
        here = held[name] if name in held else _find_module(network, name)
        there = expected[name] if name in expected else _find_module(built, name)
        if kind == "convolution" and not (get_placement(here) or get_placement(there)):
            continue
        if _make_key(here, there) != _make_key(there, here):
            found.append(Difference(name, *_describe_pair(here, there)))
    return tuple(found)


def _find_module(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _make_key(module: Any, other: Any) -> tuple[Any, str]:
    """Return what a module or function is compared by with another one: its class, and its spec or arguments."""
    placed = get_placement(module)
    if placed and get_placement(other):
        # The arguments of a temperature's schedule are removed from the plan when it has finished.
        return type(module), str(Rule(ActSpec.parse(placed.spec)).without_finished_schedules(math.inf))
    return (type(module), _describe(module)) if isinstance(module, nn.Module) else (module, "")


def _describe(module: nn.Module) -> str:
    """Return the class and the arguments of a module, without `inplace`."""
    return re.sub(r"(, )?inplace=\w+", "", repr(module)).replace("()", "")


def _describe_pair(here: Any, there: Any) -> tuple[str, str]:
    """Return short descriptions of two modules or functions; with their arguments only if they have the same class."""
    classes = [_get_spec_or_class(each) for each in (here, there)]
    if classes[0] == classes[1] and isinstance(here, nn.Module) and isinstance(there, nn.Module):
        return _describe(here), _describe(there)
    return classes[0], classes[1]


def _get_spec_or_class(module: Any) -> str:
    if module is None:
        return "nothing"
    placed = get_placement(module)
    if placed:
        return placed.spec
    return type(module).__name__ if isinstance(module, nn.Module) else f"F.{module.__name__}"


def read_learnable(
    sites: Sequence[Site],
    starts: Mapping[str, nn.Module] | None = None,
    recorded: Collection[str] = (),
) -> Learnable:
    """Read the learnable parameters of the activations at some sites, and compare them with their initial values.

    Args:
        sites: The sites of activations.
        starts: Activations with initial values, by site. At other sites, and where the classes differ, those of the
            activation's default initialisation are taken. Default: None, no site.
        recorded: Names of the sites at which the record of the training shows that a parameter moved.
    """
    learning = [site for site in sites if has_parameters(site)]
    users: dict[int, tuple[int, list[str]]] = {}
    groups: dict[str, list[str]] = {"moved": [], "unmoved": [], "unknown": []}
    for site in learning:
        for parameter in site.module.parameters():
            users.setdefault(id(parameter), (parameter.numel(), []))[1].append(site.name)
        start = (starts or {}).get(site.name)
        moved = True if site.name in recorded else _has_moved(site, start)
        groups["unknown" if moved is None else "moved" if moved else "unmoved"].append(site.name)
    shared = dict.fromkeys(tuple(names) for _, names in users.values() if len(names) > 1)
    return Learnable(
        parameters=sum(size for size, _ in users.values()),
        moved=tuple(groups["moved"]),
        unmoved=tuple(groups["unmoved"]),
        unknown=tuple(groups["unknown"]),
        shared=tuple(shared),
    )


def has_parameters(site: Site) -> bool:
    """Return whether the activation of a site has learnable parameters."""
    return isinstance(site.module, nn.Module) and next(site.module.parameters(), None) is not None


@torch.no_grad()
def _has_moved(site: Site, start: nn.Module | None) -> bool | None:
    """Return whether a parameter of an activation differs from its initial value, None if that cannot be known."""
    fresh = _build_twice(site)
    if not isinstance(start, type(site.module)):
        start = fresh[0] if fresh else None
    if start is None:
        return None
    initial = dict(start.named_parameters())
    random = {
        name
        for name, value in (fresh[0].named_parameters() if fresh else ())
        if not torch.equal(value, fresh[1].get_parameter(name))
    }
    known = False
    for name, value in site.module.named_parameters():
        if name not in initial or (initial[name].shape != value.shape and initial[name].numel() > 1):
            return None
        if name in random:
            continue
        known = True
        now, then = value.float().cpu(), initial[name].float().cpu()
        if not torch.allclose(now, then.expand_as(now), rtol=_ROUNDING, atol=1e-6):
            return True
    return None if random or not known else False


def _build_twice(site: Site) -> list[nn.Module]:
    """Return two fresh activations like that of a site, which differ where their initial values are random; or none."""
    placed, entry = get_placement(site.module), registry.find_entry(site.module)
    spec = ActSpec.parse(placed.spec) if placed else ActSpec(entry.name) if entry else None
    if spec is None:
        return []
    with torch.random.fork_rng(devices=[]):
        try:
            return [registry.build(spec, site.channels, site.input_layout, dims=site.dims) for _ in range(2)]
        except RtdetrActError:  # it takes arguments that are not known here
            return []
