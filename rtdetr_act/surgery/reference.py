"""The network before a swap with `init="match"`, which the swapped one is fitted to."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from rtdetr_act.activations.placed import get_placement, set_placement
from rtdetr_act.surgery.model_plan import mark_fitted, read_plan
from rtdetr_act.surgery.patcher import apply_plan, unpatch_model
from rtdetr_act.surgery.sites import iterate_placed_activations


def build_reference(model: nn.Module) -> nn.Module | None:
    """Return a copy of a network as it was before the last swap with `init="match"`, or else before all swaps.

    Args:
        model: The patched network, unwrapped.

    Returns:
        The copy; None if activations that it had then learned, and what they learned is not known any more.
    """
    plan, reference = read_plan(model).reference, copy.deepcopy(model)
    unpatch_model(reference)
    if not plan:
        return reference
    apply_plan(reference, plan)
    now = dict(iterate_placed_activations(model))
    for name, module in iterate_placed_activations(reference):
        if not any(True for _ in module.parameters()):
            continue
        placed = get_placement(now[name]) if name in now else None
        # A site that the last swap left alone still has its activation.
        learned = (placed.replaced or now[name]) if placed else None
        if type(learned) is not type(module):
            return None
        module.load_state_dict(learned.state_dict())
    return reference


def carry_replaced(source: nn.Module, model: nn.Module) -> None:
    """Let a network know what the activations had learned that its last swap replaced.

    Args:
        source: The network that its weights are from: before that swap, or after it.
        model: The network, patched by the same plan as `source`, or by one more swap.
    """
    theirs = dict(iterate_placed_activations(source))
    for name, module in iterate_placed_activations(model):
        placed, other = get_placement(module), theirs.get(name)
        if placed is None or placed.replaced is None or other is None:
            continue
        known = get_placement(other)
        learned = known.replaced if known is not None and known.replaced is not None else other
        same = type(learned) is type(placed.replaced)
        set_placement(module, replace(placed, replaced=copy.deepcopy(learned) if same else None))


def finish_fit(model: nn.Module) -> None:
    """Record that a network is fitted after its last swap, and forget what that replaced."""
    for _, module in iterate_placed_activations(model):
        placed = get_placement(module)
        if placed is not None and placed.replaced is not None:
            set_placement(module, replace(placed, replaced=None))
    mark_fitted(model)
