"""List the activations of the zoo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from rtdetr_act.activations.protocol import Entry
from rtdetr_act.activations.registry import count_parameters, create, get_entry, is_built_in, names
from rtdetr_act.analysis.measured import COLUMNS, Measured, read_measured
from rtdetr_act.analysis.start import describe_start
from rtdetr_act.deploy.targets import get_native_support, get_target
from rtdetr_act.errors import InputError, RtdetrActError, quote
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult

Folds = Literal["always", "sometimes", "never"]

# How many convolutional sites of rtdetr-l have how many channels, so that parameters are counted without the model.
RTDETR_L_SITES = {16: 1, 32: 3, 48: 7, 64: 1, 96: 6, 128: 1, 192: 18, 256: 25, 384: 6, 512: 4, 1024: 4, 2048: 1}


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
        start: What its initial parameters make it, such as "silu exactly", "slopes 1.88 and 0.90", or "fixed" for one
            without parameters; "" if nothing is known.
        parameters_rtdetr_l: Number of parameters at all convolutional sites of rtdetr-l together; None if it has
            arguments without defaults.
        folds: Whether it is replaced by an activation of torch when a model is folded or exported: "always",
            "sometimes", where its parameters or arguments happen to make it one, or "never".
        folds_to: Name of the activation that it always folds to; "" otherwise.
        measured: What it costs and which formats hold it; None if that was not measured.
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
    start: str = ""
    parameters_rtdetr_l: int | None = None
    folds: Folds = "never"
    folds_to: str = ""
    measured: Measured | None = None

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
        """Return a row per activation, with its measurements in columns of their own."""
        own = [field.name for field in fields(ListedActivation) if field.name != "measured"]
        measured = [column for column in COLUMNS if column != "activation"]
        rows = (
            [getattr(each, column) for column in own] + [getattr(each.measured, column, None) for column in measured]
            for each in self.activations
        )
        return [*own, *measured], rows


def list_activations(
    target: str | None = None,
    *,
    learnable: bool | None = None,
    maps: bool | None = None,
    search: str | None = None,
) -> ActivationListing:
    """List the activations of the zoo: what each starts as, what it costs, and what it becomes when it is deployed.

    The filters are combined: an activation is listed if it passes all of them.

    Args:
        target: Deployment target: "rknn", "hailo", "edgetpu", "vitis-dpu", "openvino", "qualcomm-htp", "ti-tidl" or
            "axelera". All activations are listed, with whether it runs them natively. Default: None.
        learnable: True for those with parameters, False for those without. Default: None, both.
        maps: True for those that stand on feature maps only, False for those that can stand at transformer sites too.
            Default: None, both.
        search: Words that must all be in the name, an alias, the formula, the source or the description of an
            activation, in upper or lower case. Default: None.

    Raises:
        InputError: There is no such target, or `search` has no word.

    >>> [each.name for each in list_activations("edgetpu").activations if each.native]
    ['prelu', 'relu', 'relu6', 'sigmoid', 'silu', 'tanh']
    >>> [each.name for each in list_activations(learnable=True, search="dy-relu").activations]
    ['dyrelu_a', 'dyrelu_b', 'dyrelu_c']
    """
    if target is not None:
        get_target(target)
    if search is not None and not search.split():
        raise InputError(f"search needs a word to look for, not {quote(search)}")
    measured = read_measured()
    found = [
        _describe(entry, target, measured.get(entry.name) if is_built_in(entry.name) else None)
        for entry in map(get_entry, names())
        if _passes(entry, learnable, maps, search)
    ]
    return ActivationListing(found, target)


def _passes(entry: Entry, learnable: bool | None, maps: bool | None, search: str | None) -> bool:
    """Return whether an activation passes all filters."""
    if maps is not None and maps == entry.tokens:
        return False
    if search is not None:
        text = " ".join(_iterate_text(entry)).lower()
        if not all(word in text for word in search.lower().split()):
            return False
    return learnable is None or learnable == bool(_count_parameters(entry.name, 8))


def _iterate_text(entry: Entry) -> Iterator[str]:
    """Yield what `search` looks through."""
    yield from (entry.name, *entry.aliases, entry.title)
    yield from (entry.formula, entry.paper, entry.use_when, entry.note)


def _describe(entry: Entry, target: str | None, measured: Measured | None) -> ListedActivation:
    """Return the entry of an activation in the listing."""
    native = get_native_support(entry.name, target) if target is not None else None
    folds, folds_to = _describe_fold(entry)
    return ListedActivation(
        name=entry.name,
        formula=entry.formula,
        tokens=entry.tokens,
        parameters_64=_count_parameters(entry.name, 64),
        parameters_256=_count_parameters(entry.name, 256),
        paper=entry.paper,
        note=entry.note,
        native=None if target is None else native is not None,
        native_condition=native.note if native else "",
        native_source=native.source if native else "",
        start=describe_start(entry.name),
        parameters_rtdetr_l=_count_in_rtdetr_l(entry.name),
        folds=folds,
        folds_to=folds_to,
        measured=measured,
    )


def _count_parameters(name: str, channels: int) -> int | None:
    """Return the number of parameters of an activation, None if it has arguments without defaults."""
    try:
        return count_parameters(name, channels)
    except RtdetrActError:
        return None


def _count_in_rtdetr_l(name: str) -> int | None:
    """Return the number of parameters of an activation at all convolutional sites of rtdetr-l, None if unknown."""
    total = 0
    for channels, sites in RTDETR_L_SITES.items():
        count = _count_parameters(name, channels)
        if count is None:
            return None
        total += sites * count
    return total


def _describe_fold(entry: Entry) -> tuple[Folds, str]:
    """Return whether an activation folds with any parameters, and to which activation.

    That is what its entry makes of a module with parameters away from their start.
    """
    if entry.fold is None:
        return "never", ""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module = create(entry.name, 8).eval()
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
            folded = entry.fold(module)
    except Exception:  # a registered factory or fold may raise anything
        folded = None
    return ("sometimes", "") if folded is None else ("always", folded.activation.name)
