"""An activation call inside the forward of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rtdetr_act.activations.protocol import Layout


@dataclass(frozen=True)
class HiddenCall:
    """One activation call of a block: what it is, and the channels and layout it works on."""

    original: Callable[[Any], nn.Module]
    channels: Callable[[Any], int]
    layout: Layout = "map"
