"""Blocks of Ultralytics in earlier checkpoints."""

from __future__ import annotations

from typing import ClassVar

import torch
from ultralytics.nn.modules import block

from rtdetr_act.surgery.functional_calls import HiddenCall
from rtdetr_act.surgery.rewired import make_alias

ResNetBlock = make_alias(__name__, "ResNetBlock", block.ResNetBlock)
CLASSES: list[type] = [ResNetBlock]

if hasattr(block, "SwiGLUFFN"):  # added with YOLOE: 8.3.160 has it, 8.3.99 does not

    class SwiGLUFFN(block.SwiGLUFFN):
        """Feed-forward network of YOLOE's text head, whose gate was a site."""

        rewired_from: ClassVar = block.SwiGLUFFN
        hidden_calls: ClassVar = (HiddenCall("silu", (), "", "w12", "act"),)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Map (B, N, C) to (B, N, C')."""
            signal, gated = self.w12(x).chunk(2, dim=-1)
            return self.w3(self.act(signal) * gated)

    CLASSES.append(SwiGLUFFN)
