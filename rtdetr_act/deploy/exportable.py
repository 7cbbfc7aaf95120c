"""Write the activations of a model in operators that exporters know, where one of them refuses one or gets it wrong."""

from __future__ import annotations

from typing import Any

from torch import nn

from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.modules import set_child
from rtdetr_act.surgery.sites import find_sites


def write_exportable(model: nn.Module) -> int:
    """Replace, in place, the activations of a model that some exporter has to be given in other operators.

    Each replacement computes the same, whatever the format, since all formats have the basic operators;
    `scripts/parity.py` compares the results. The other activations no longer work in place, which is of no use in a
    graph: PNNX crashes on an ELU that does.

    Args:
        model: A copy to export.

    Returns:
        The number of activations that were replaced.
    """
    count = 0
    for site in find_sites(model):
        if hasattr(site.module, "inplace"):
            site.module.inplace = False
        entry = find_entry(site.module)
        if entry and entry.exportable:
            set_child(site.owner, site.attribute, _like(entry.exportable(site.module), site.module))
            count += 1
    return count


def _like(module: nn.Module, other: Any) -> nn.Module:
    """Return a module in the mode, on the device and in the type of another one."""
    parameter = next(other.parameters(), None)
    return module.train(other.training) if parameter is None else module.train(other.training).to(parameter)
