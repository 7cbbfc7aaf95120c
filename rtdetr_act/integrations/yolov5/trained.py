"""What the activations of a model learned in the run of a script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rtdetr_act.analysis.learned import Quantity
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult


@dataclass(frozen=True, repr=False)
class Movement(Result):
    """How far a learned quantity of an activation moved, over all sites that have it.

    Attributes:
        activation: The activation, as the plan names it.
        quantity: Name of the quantity, such as "alpha".
        sites: Number of sites.
        start: Mean over the sites before the first step of the run.
        value: Mean over the sites after the last one.
        mean_change: Mean absolute difference of a site.
        max_change: Largest absolute difference of a site.
    """

    activation: str
    quantity: str
    sites: int
    start: float
    value: float
    mean_change: float
    max_change: float

    def _summarise(self) -> str:
        """Return the quantity, and where it moved."""
        return f"{self.activation} {self.quantity}, {self.start:.4g} -> {self.value:.4g}"

    def __str__(self) -> str:
        """Return the movement as a line."""
        if not self.max_change:
            return f"{self.activation}: {self.quantity} did not move from {self.start:.4g}"
        return (
            f"{self.activation}: {self.quantity} {self.start:.4g} -> {self.value:.4g}, moved by "
            f"{self.mean_change:.2g} on average and by {self.max_change:.2g} at most"
        )


@dataclass(frozen=True, repr=False)
class Trained(TableResult):
    """The activations that the run of a script trained.

    Attributes:
        activations: Number of sites by activation, as the plan names it.
        parameters: Number of parameters in them.
        steps: Number of optimizer steps.
        movements: How far each learned quantity moved; empty for activations that learn nothing.
    """

    activations: Mapping[str, int]
    parameters: int
    steps: int
    movements: tuple[Movement, ...]

    @property
    def sites(self) -> int:
        """Number of sites."""
        return sum(self.activations.values())

    def _summarise(self) -> str:
        """Return the numbers of sites and steps."""
        return f"{format_count(self.sites, 'site')}, {format_count(self.steps, 'step')}"

    def _make_table(self) -> Table:
        """Return a row per learned quantity."""
        columns = "activation quantity sites start value mean_change max_change".split()
        return columns, ([getattr(each, column) for column in columns] for each in self.movements)

    def __str__(self) -> str:
        """Return the sites and their activations, then a line per learned quantity."""
        counts = ", ".join(f"{name} at {format_count(count, 'site')}" for name, count in self.activations.items())
        steps = format_count(self.steps, "optimizer step")
        learning = "" if self.parameters else ", which have nothing to learn"
        return "\n".join([f"trained with {counts}{learning}, {steps}", *map(str, self.movements)])


def measure_movements(before: Iterable[Quantity], after: Iterable[Quantity]) -> tuple[Movement, ...]:
    """Return the movement of each quantity of each activation, in the order of the sites.

    Args:
        before: The quantities before the first step.
        after: Those of the same model after the last one.

    >>> measure_movements([Quantity("a", "prelu", "weight", 0.25)], [Quantity("a", "prelu", "weight", 0.5)])
    (<Movement: prelu weight, 0.25 -> 0.5>,)
    """
    start = {(each.site, each.name): each.value for each in before}
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in after:
        pairs.setdefault((each.activation, each.name), []).append((start[each.site, each.name], each.value))
    return tuple(_measure(activation, name, values) for (activation, name), values in pairs.items())


def _measure(activation: str, name: str, values: list[tuple[float, float]]) -> Movement:
    starts, ends = zip(*values, strict=True)
    changes = [abs(end - begin) for begin, end in values]
    count = len(values)
    return Movement(activation, name, count, sum(starts) / count, sum(ends) / count, sum(changes) / count, max(changes))


def count_activations(specs: Iterable[str]) -> dict[str, int]:
    """Return the number of sites by activation, the most frequent first."""
    return dict(Counter(specs).most_common())
