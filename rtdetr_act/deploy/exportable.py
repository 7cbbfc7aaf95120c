"""Replace activations that some exporter rejects or computes wrongly by equivalents in basic operators."""

from __future__ import annotations

from typing import Any

from torch import nn

from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.modules import set_child
from rtdetr_act.surgery.sites import find_sites


def replace_for_export(model: nn.Module) -> int:
    """Replace the activations of a model that have an exportable form by that form, in place.

    The exportable form is the same for all export formats; `scripts/parity.py` compares the results. All activations
    are set to work out of place, since in-place operators have no benefit in a graph, and PNNX crashes on an in-place
    ELU.

    Args:
        model: A copy of the model to export.

    Returns:
        The number of replaced activations.
    """
    count = 0
    for site in find_sites(model):
        if hasattr(site.module, "inplace"):
            site.module.inplace = False
        entry = find_entry(site.module)
        if entry and entry.exportable:
            set_child(site.owner, site.attribute, _match_state(entry.exportable(site.module), site.module))
            count += 1
    return count


def _match_state(module: nn.Module, other: Any) -> nn.Module:
    """Move a module to the training mode, device and dtype of another one, and return it."""
    parameter = next(other.parameters(), None)
    return module.train(other.training) if parameter is None else module.train(other.training).to(parameter)
