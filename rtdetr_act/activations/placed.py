"""The record that a swap stores on the module it inserts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rtdetr_act.activations.protocol import Replaces
from rtdetr_act.errors import ModelError

_ATTRIBUTE = "_rtdetr_act"


@dataclass(frozen=True)
class Placement:
    """What a swap inserted at a site, and what it replaced.

    It is stored on the inserted module as a plain dictionary, which deepcopy and pickle keep and state dicts leave out.
    A checkpoint with activations of torch alone therefore loads without this package, and torch does not register the
    original as a submodule.

    Attributes:
        spec: The spec of the inserted module, such as "leaky_relu(0.1)".
        original: The module, or function such as `F.relu`, that it replaced; None for a convolution that was copied or
            loaded, which is rebuilt from its kernels.
        replaces: "activation" (default) or "convolution".
        folded: Whether a factor or a BatchNorm was folded into weights, so that the original can no longer be restored.
        replaced: The activation of an earlier swap that this one replaced, with what it had learned, until the network
            is fitted to what it was; None (default) for a first swap.
    """

    spec: str
    original: Any
    replaces: Replaces = "activation"
    folded: bool = False
    replaced: nn.Module | None = None


def get_placement(module: object) -> Placement | None:
    """Return the record stored on a module by `set_placement`, or None for a module that no swap inserted.

    Raises:
        ModelError: The module was patched by a version of this package that was never released.

    >>> get_placement(nn.ReLU()) is None
    True
    """
    stored = getattr(module, _ATTRIBUTE, None)
    if not stored:
        return None
    if "spec" not in stored:
        raise ModelError("the model was patched by rtdetr-act before 0.1.0, whose checkpoints no later one reads")
    return Placement(**stored)


def set_placement(module: nn.Module, placed: Placement) -> None:
    """Store the record of a swap on the module that it inserted."""
    setattr(module, _ATTRIBUTE, dict(vars(placed)))


def drop_original(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a module's `__dict__` whose placement record has no original."""
    stored = state.get(_ATTRIBUTE)
    return {**state, _ATTRIBUTE: {**stored, "original": None}} if stored else dict(state)
