"""Description of an activation call inside the forward of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rtdetr_act.activations.protocol import Layout


@dataclass(frozen=True)
class HiddenCall:
    """One activation call inside the forward of a block.

    Attributes:
        original: Returns the module that is equivalent to the call, for a block.
        channels: Returns the number of channels of the input, for a block.
        layout: Layout of the input, "map" (default) or "tokens".
    """

    original: Callable[[Any], nn.Module]
    channels: Callable[[Any], int]
    layout: Layout = "map"
