"""Dynamic convolution (Chen et al., CVPR 2020, arXiv:1912.03458)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.channels import check_count
from rtdetr_act.activations.temperature import Temperature
from rtdetr_act.kernels.backend import wide
from rtdetr_act.kernels.dynamic_conv import dynamic_conv
from rtdetr_act.kernels.pool import mean_over_positions
from rtdetr_act.spec import TAU_EPOCHS, TAU_START

# What a swap leaves behind on a convolution: its spec, and the Conv2d that stood there before (see sites.MARK).
CONV_MARK = "_rtdetr_act_conv"
# Of the standard deviation of the weights. Kernels that were equal would get nearly equal gradients while tau is high,
# and never part. The attention starts within 0.01 of 1/K at tau = 30, so that what does not cancel of this noise is
# below 0.005 of the weights; even at tau = 1 it is below 0.05.
_NOISE = 0.1


class DynamicConv2d(nn.Module):
    """A 2-D convolution whose kernel and bias are mixtures of K, weighted by an attention that looks at the image.

    `pi = softmax(z / tau)`, z by global average pooling, Linear C -> max(C // reduction, 1), ReLU and Linear -> K.
    The temperature tau falls evenly from `tau_start` to `tau` over `tau_epochs` epochs, so that all kernels learn early
    on (`set_epoch(model, epoch)`; Ultralytics' training does it by itself).

    Shapes: (B, Cin, H, W) to (B, Cout, H', W') as `torch.nn.Conv2d`; `weight` is (K, Cout, Cin / groups, kh, kw) and
    `bias` (K, Cout) or None.

    Args:
        in_channels: Cin; this and the following ones as in `torch.nn.Conv2d`.
        out_channels: Cout.
        kernel_size: One number, or height and width.
        stride: Step between positions.
        padding: A number, a pair, "same" or "valid".
        dilation: Step between the elements of a kernel.
        groups: Number of groups of channels.
        bias: Whether there are biases.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        kernels: K, 4 by default.
        reduction: Of the channels inside the attention, 4 by default.
        tau: Last temperature, 1 by default.
        tau_start: First temperature, 30 by default; None for `tau` from the start.
        tau_epochs: Epochs from the first to the last, 10 by default.

    Raises:
        ValueError: A count or a temperature is too small, or an argument is wrong for `torch.nn.Conv2d` too.

    Paper: Chen et al., CVPR 2020, arXiv:1912.03458.

    >>> DynamicConv2d(8, 16, 3, padding=1)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        kernels: int = 4,
        reduction: int = 4,
        tau: float = 1.0,
        tau_start: float | None = TAU_START,
        tau_epochs: float = TAU_EPOCHS,
    ) -> None:
        super().__init__()
        self.kernels = check_count("kernels", kernels, at_least=2)
        self.reduction = check_count("reduction", reduction)
        self.temperature = Temperature(tau, tau_start, tau_epochs)
        convs = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
            for _ in range(kernels)
        ]
        # As Conv2d has them, since others read them there.
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = convs[0].kernel_size, convs[0].stride, convs[0].dilation
        self.padding, self.padding_mode, self.groups = convs[0].padding, padding_mode, groups
        self._pads = list(convs[0]._reversed_padding_repeated_twice)
        hidden = max(in_channels // reduction, 1)
        self.squeeze = nn.Linear(in_channels, hidden)
        self.expand = nn.Linear(hidden, kernels)
        self.weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
        self.bias = nn.Parameter(torch.stack([conv.bias.detach() for conv in convs])) if bias else None  # type: ignore[union-attr]

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        kernels: int = 4,
        reduction: int = 4,
        tau: float = 1.0,
        tau_start: float | None = TAU_START,
        tau_epochs: float = TAU_EPOCHS,
    ) -> DynamicConv2d:
        """Return a dynamic convolution that starts as `conv`, on its device, in its type and mode.

        All kernels start from its weight, with a noise that sums to 0 over them, and all biases from its bias: with
        equal attention it computes what `conv` does.

        >>> conv, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 5, 5)
        >>> bool((DynamicConv2d.from_conv(conv)(x) - conv(x)).abs().max() < 0.01)
        True
        """
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            kernels=kernels,
            reduction=reduction,
            tau=tau,
            tau_start=tau_start,
            tau_epochs=tau_epochs,
        )
        new.to(conv.weight.device, conv.weight.dtype)
        new.start_from(conv.weight, conv.bias)
        return new.requires_grad_(conv.weight.requires_grad).train(conv.training)

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Let every kernel start from one weight, (Cout, Cin / groups, kh, kw), and every bias from one, (Cout,)."""
        # Drawn on the CPU, whose random state alone a swap can put back.
        noise = torch.randn(self.weight.shape)
        noise = (noise - noise.mean(0)) * (_NOISE * weight.detach().float().std(correction=0).cpu())
        self.weight.copy_(weight.to(self.weight) + noise.to(self.weight))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.expand_as(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of each image of x with its own kernel."""
        pi = self.attention(x)
        padded = self.padding_mode != "zeros"
        x = F.pad(x, self._pads, mode=self.padding_mode) if padded else x
        padding = 0 if padded else self.padding
        return dynamic_conv(x, pi, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def attention(self, x: Tensor) -> Tensor:
        """Return pi, (B, K) of positive numbers that sum to 1, for (B, Cin, H, W)."""
        dtype = self.squeeze.weight.dtype
        z = self.expand(F.relu(self.squeeze(mean_over_positions(x, dtype))))
        return torch.softmax(z.to(wide(dtype)) / self.temperature(), dim=1).to(dtype)

    @torch.no_grad()
    def fold_norm(self, norm: nn.BatchNorm2d) -> None:
        """Fold the BatchNorm behind it into every kernel and bias: exact, because the attention sums to 1."""
        mean, var = norm.running_mean, norm.running_var
        if mean is None or var is None:
            raise ValueError("a BatchNorm without running statistics cannot be folded")
        scale = torch.rsqrt(var + norm.eps) * (1 if norm.weight is None else norm.weight)
        bias = -mean if self.bias is None else self.bias - mean
        bias = bias * scale + (0 if norm.bias is None else norm.bias)
        self.weight = nn.Parameter(self.weight * scale[:, None, None, None], self.weight.requires_grad)
        self.bias = nn.Parameter(bias.expand(self.kernels, -1).to(self.weight).clone(), self.weight.requires_grad)
        if mark := getattr(self, CONV_MARK, None):
            mark["folded"] = True

    def extra_repr(self) -> str:
        """Return the shape, and what else the constructor was given."""
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        rest = f", padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"
        return f"{size}{rest}, kernels={self.kernels}, reduction={self.reduction}"

    def __getstate__(self) -> dict[str, Any]:
        # What it replaced is as large as a kernel, and its weight is the mean of the kernels: no copy and no checkpoint
        # needs it.
        state = dict(vars(self))
        if mark := state.get(CONV_MARK):
            state[CONV_MARK] = {**mark, "original": [None]}
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicConv2d:
        # `.to(memory_format=torch.channels_last)` asks it of tensors with five dimensions too, which cannot have it.
        def apply(t: Tensor) -> Tensor:
            return fn(t) if t.ndim != 5 else fn(t.flatten(0, 1)).contiguous().unflatten(0, t.shape[:2])

        super()._apply(apply, recurse)
        return self


@torch.no_grad()
def original_of(conv: DynamicConv2d) -> nn.Conv2d:
    """Return the very convolution that a dynamic one replaced, or one like it where this is a copy or was loaded.

    Its weight is as it was, unless the kernels have been trained or loaded since: then it is their mean, what the
    dynamic convolution does with equal attention.
    """
    original: nn.Conv2d = getattr(conv, CONV_MARK)["original"][0] or nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
    original.to(conv.weight.device, conv.weight.dtype).train(conv.training)
    pairs = [(original.weight, conv.weight.mean(0))]
    if original.bias is not None and conv.bias is not None:
        pairs.append((original.bias, conv.bias.mean(0)))
    eps = torch.finfo(conv.weight.dtype).eps
    if not all(torch.allclose(then, now, 8 * eps, 8 * eps * float(then.abs().max())) for then, now in pairs):
        for then, now in pairs:
            then.copy_(now)
    return original
