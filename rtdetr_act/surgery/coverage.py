"""Count which of the activations that run in a model were swapped, and which were not."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import ModelError, reason
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.modules import preserve_attributes, set_child, unwrap
from rtdetr_act.surgery.operator_counter import Activation
from rtdetr_act.surgery.rewiring import is_rewired, unwire
from rtdetr_act.surgery.sites import ACTIVATIONS, Site, collect_sites, count_in_example


@dataclass(frozen=True, repr=False)
class UnreachedActivation(Result):
    """An activation that runs in a model and that no swap reaches.

    Attributes:
        operator: The operator, such as "relu" or "x*sigmoid(x)".
        file: Path of the file that calls it.
        line: Line of that file.
        owner: Class of the module whose method calls it, "" for a function.
        count: How many times it runs in a forward pass.
    """

    operator: str
    file: str
    line: int
    owner: str
    count: int

    def _summarise(self) -> str:
        """Return the operator, where it is called, and how often."""
        inside = f" in {self.owner}" if self.owner else ""
        return f"{self.operator}{inside} ({_shorten(self.file)}:{self.line}, {format_count(self.count, 'call')})"


@dataclass(frozen=True, repr=False)
class Coverage(TableResult):
    """The activations that run in one forward pass in evaluation mode, counted from the operators of the stock model.

    `running` is the sum of `swapped`, `left` and the counts of `unreached`. Gates and softmaxes are not counted.

    Attributes:
        running: Number of activations that run.
        swapped: How many of them a swap replaced.
        left: How many stand at sites that were not swapped, by layout.
        unreached: Those that are no sites.
        idle: Names of sites that did not run, such as branches that run in training only.
        differences: By how many activations two passes differ, of the stock model as it is and with its sites observed;
            0 unless the model does not run twice the same way.
    """

    running: int
    swapped: int
    left: dict[str, int]
    unreached: tuple[UnreachedActivation, ...]
    idle: tuple[str, ...] = ()
    differences: int = 0

    def _summarise(self) -> str:
        """Return the numbers."""
        missed = sum(each.count for each in self.unreached)
        numbers = f"{self.swapped} swapped, {sum(self.left.values())} left, {missed} not reached"
        return f"{format_count(self.running, 'activation')} in a forward pass: {numbers}"

    def _make_table(self) -> Table:
        """Return a row per unreached activation."""
        columns = "operator file line owner count".split()
        return columns, ([getattr(each, column) for column in columns] for each in self.unreached)

    def __str__(self) -> str:
        """Return the numbers, and a line for each activation that is not reached."""
        lines = [self._summarise()]
        if self.left:
            parts = [f"{count} on {_LAYOUTS[layout]}" for layout, count in self.left.items()]
            lines.append(f"left: {', '.join(parts)}")
        lines += [f"not reached: {each._summarise()}" for each in self.unreached]
        if self.idle:
            lines.append(f"{format_count(len(self.idle), 'site')} did not run ({self.idle[0]} first)")
        if self.differences:
            lines.append(f"the numbers may be off by {self.differences}: the model does not run twice the same way")
        return "\n".join(lines)


_LAYOUTS = {"map": "maps", "tokens": "tokens", "pooled": "pooled 1x1 maps"}


def measure_coverage(model: Any, example_input: Any = None) -> Coverage:
    """Count the activations that run in a model, and how many of them were swapped.

    The stock model runs twice in evaluation mode: as it is, and with its sites observed. Operators are counted, such as
    `aten::relu` and x * sigmoid(x), wherever they are called from.

    Args:
        model: A model as accepted by `patch_model`, patched or not.
        example_input: As in `find_sites`.

    Returns:
        The count.

    Raises:
        ModelError: The model cannot be called with the input.

    >>> from torch import nn
    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU())
    >>> report = patch_model(net, "arelu", include="1")
    >>> print(report.coverage)
    2 activations in a forward pass: 1 swapped, 1 left, 0 not reached
    left: 1 on maps
    """
    root = unwrap(model)
    treat_as = dict(read_plan(root).treat_as)
    sites = collect_sites(root, "", getattr(root, "yaml", None), ACTIVATIONS, example_input, treat_as)
    try:
        with preserve_attributes(root):
            observed = count_in_example(root, example_input, [_with_original(site) for site in sites])
            with _stock(sites):
                plain = count_in_example(root, example_input, ())
    except Exception as error:
        given = "the example input" if example_input is not None else "zeros of the shape of an image"
        raise ModelError(
            f"the model cannot be called with {given}, so nothing is counted ({type(error).__name__}: {reason(error)}):"
            " give example_input="
        ) from error
    if observed is None or plain is None:
        raise ModelError("counting what runs takes a forward pass, and this model takes no image: give example_input=")
    return _count(sites, observed.activations, plain.activations)


def _with_original(site: Site) -> Site:
    """Return a site as it is in the stock model."""
    placed = get_placement(site.module)
    return replace(site, module=placed.original) if placed else site


@contextmanager
def _stock(sites: Sequence[Site]) -> Iterator[None]:
    """Put what a swap replaced back at its sites, inside the block."""
    owners = {id(site.owner): site.owner for site in sites if get_placement(site.module)}
    before = [(owner, type(owner), dict(vars(owner)), dict(owner._modules)) for owner in owners.values()]
    try:
        for site in sites:
            if (placed := get_placement(site.module)) and not site.hidden:
                set_child(site.owner, site.attribute, placed.original)
        for owner in owners.values():
            if is_rewired(owner):
                unwire(owner)
        yield
    finally:
        for owner, cls, attributes, modules in before:
            owner.__class__ = cls
            vars(owner).clear()
            vars(owner).update(attributes)
            owner._modules.clear()
            owner._modules.update(modules)


def _count(sites: Sequence[Site], observed: Sequence[Activation], plain: Sequence[Activation]) -> Coverage:
    """Return the coverage from what ran with the sites observed, and without.

    Args:
        sites: The sites, swapped or not.
        observed: What ran in the first case.
        plain: What ran in the second, with the lines of the code as it is.
    """
    by_name = {site.name: site for site in sites}
    operators = [each for each in observed if each.operator]
    same = [each.operator for each in operators] == [each.operator for each in plain]
    places = dict(zip(map(id, operators), plain, strict=True)) if same else {}
    swapped = 0
    left: Counter[str] = Counter()
    unreached: Counter[tuple[str, str, int, str]] = Counter()
    for each in observed:
        if not each.counts:
            continue
        site = by_name.get(each.site)
        if site is None:
            found = places.get(id(each), each)
            unreached[found.operator, found.file, found.line, found.owner] += 1
        elif get_placement(site.module):
            swapped += 1
        else:
            left[site.layout] += 1
    ran = {each.site for each in observed}
    return Coverage(
        sum(each.counts for each in observed),
        swapped,
        dict(left),
        tuple(UnreachedActivation(*place, count) for place, count in unreached.items()),
        tuple(site.name for site in sites if site.name not in ran),
        abs(len(operators) - len(plain)) or int(not same),
    )


def _shorten(file: str) -> str:
    """Return the path of a file relative to the folder that its package is imported from, or to the working folder."""
    folders = [Path(folder).resolve() for folder in (*sys.path, ".")]
    inside = [folder for folder in folders if Path(file).is_relative_to(folder)]
    return str(Path(file).relative_to(max(inside, key=lambda folder: len(folder.parts)))) if inside else file
