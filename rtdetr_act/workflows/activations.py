"""List the activations of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from rtdetr_act.activations.registry import count_parameters, get_entry, names
from rtdetr_act.deploy.targets import get_native_support, get_target
from rtdetr_act.errors import SpecError
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult


@dataclass(frozen=True, repr=False)
class ListedActivation(Result):
    """An activation of the zoo.

    Attributes:
        name: Its registered name.
        formula: What it computes.
        tokens: Whether it can stand at transformer sites too, not only on feature maps.
        parameters_64: Number of parameters at a site of 64 channels; None if it has arguments without defaults.
        parameters_256: The same at 256 channels.
        paper: Its source.
        note: What it is not meant for; "" for most.
        native: Whether the target runs it natively; None without a target.
        native_condition: Condition or deviation of that; "" for none.
        native_source: Where that is documented; "" if it is not native.
    """

    name: str
    formula: str
    tokens: bool
    parameters_64: int | None
    parameters_256: int | None
    paper: str
    note: str
    native: bool | None = None
    native_condition: str = ""
    native_source: str = ""

    def _summarise(self) -> str:
        """Return name and formula."""
        return f"{self.name}, {self.formula}"


@dataclass(frozen=True, repr=False)
class ActivationListing(TableResult):
    """The activations of the zoo, registered ones included.

    Attributes:
        activations: One entry per activation, sorted by name.
        target: Deployment target that `native` is about; None without one.
    """

    activations: Sequence[ListedActivation]
    target: str | None = None

    def _summarise(self) -> str:
        """Return the number of activations, and of native ones."""
        native = sum(bool(each.native) for each in self.activations)
        count = format_count(len(self.activations), "activation")
        return count if self.target is None else f"{count}, {native} native on {self.target}"

    def _make_table(self) -> Table:
        """Return a row per activation."""
        columns = [field.name for field in fields(ListedActivation)]
        return columns, ([getattr(each, column) for column in columns] for each in self.activations)


def list_activations(target: str | None = None) -> ActivationListing:
    """List the activations of the zoo and, with a target, which of them it runs natively.

    Args:
        target: Deployment target: "rknn", "hailo", "edgetpu", "vitis-dpu" or "openvino". Default: None.

    Raises:
        InputError: There is no such target.

    >>> [each.name for each in list_activations("edgetpu").activations if each.native]
    ['prelu', 'relu', 'relu6', 'sigmoid', 'tanh']
    """
    if target is not None:
        get_target(target)
    return ActivationListing([_describe(name, target) for name in names()], target)


def _describe(name: str, target: str | None) -> ListedActivation:
    """Return the entry of an activation in the listing."""
    entry = get_entry(name)
    native = get_native_support(name, target) if target is not None else None
    return ListedActivation(
        name=name,
        formula=entry.formula,
        tokens=entry.tokens,
        parameters_64=_count_parameters(name, 64),
        parameters_256=_count_parameters(name, 256),
        paper=entry.paper,
        note=entry.note,
        native=None if target is None else native is not None,
        native_condition=native.note if native else "",
        native_source=native.source if native else "",
    )


def _count_parameters(name: str, channels: int) -> int | None:
    """Return the number of parameters of an activation, None if it has arguments without defaults."""
    try:
        return count_parameters(name, channels)
    except SpecError:
        return None
