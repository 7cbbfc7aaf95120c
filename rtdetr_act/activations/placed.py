"""What a swap leaves on a module that it places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rtdetr_act.activations.protocol import Replaces
from rtdetr_act.errors import ModelError

_ATTRIBUTE = "_rtdetr_act"


@dataclass(frozen=True)
class Placed:
    """How a module came to its place.

    It lies on the module itself as a plain dictionary, which survives deepcopy and pickle and which no state dict
    shows: a checkpoint with torch's own activations alone loads without this package. torch takes nothing inside of it
    for a child of the module.

    Attributes:
        spec: What was placed, such as "leaky_relu(0.1)".
        original: What stood there before: a module, or a function such as `F.relu`; None for a convolution in a copy
            or a checkpoint, whose kernels are enough to make it again.
        replaces: What it took the place of.
        folded: Whether factors or a BatchNorm were folded into weights, so that the original fits no longer.
    """

    spec: str
    original: Any
    replaces: Replaces = "activation"
    folded: bool = False


def placed_on(module: object) -> Placed | None:
    """Return what a swap left on a module, None for one that no swap placed.

    Raises:
        ModelError: A version of this package that was never released left something else.

    >>> placed_on(nn.ReLU()) is None
    True
    """
    found = getattr(module, _ATTRIBUTE, None)
    if not found:
        return None
    if "spec" not in found:
        raise ModelError("the model was patched by rtdetr-act before 0.1.0, whose checkpoints no later one reads")
    return Placed(**found)


def leave_placed(module: nn.Module, placed: Placed) -> None:
    """Leave on a module how it came to its place."""
    setattr(module, _ATTRIBUTE, dict(vars(placed)))


def without_original(state: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module, as `vars` gives them, without the original that it took the place of."""
    found = state.get(_ATTRIBUTE)
    return {**state, _ATTRIBUTE: {**found, "original": None}} if found else dict(state)
