"""Ultralytics blocks that call `torch.nn.functional` in their forward (seen in 8.3.0 to 8.4.190)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from ultralytics.nn.modules import block

from rtdetr_act.surgery.rewired.hidden_call import HiddenCall


class ResNetBlock(block.ResNetBlock):
    """Residual block of RT-DETR-ResNet; its final `F.relu` accounts for 16 of the 73 sites of rtdetr-resnet50."""

    hidden_calls: ClassVar = {"act": HiddenCall(lambda _: nn.ReLU(), lambda self: self.cv3.conv.out_channels)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C1, H, W) to (B, C2, H', W')."""
        return self.act(self.cv3(self.cv2(self.cv1(x))) + self.shortcut(x))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {block.ResNetBlock: ResNetBlock}

if hasattr(block, "SwiGLUFFN"):  # added with YOLOE: 8.3.160 has it, 8.3.99 does not

    class SwiGLUFFN(block.SwiGLUFFN):
        """Feed-forward network of YOLOE's text head, gated by `F.silu`."""

        hidden_calls: ClassVar = {
            "act": HiddenCall(lambda _: nn.SiLU(), lambda self: self.w12.out_features // 2, "tokens")
        }

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Map (B, N, C) to (B, N, C')."""
            signal, gated = self.w12(x).chunk(2, dim=-1)
            return self.w3(self.act(signal) * gated)

    CLASSES[block.SwiGLUFFN] = SwiGLUFFN
