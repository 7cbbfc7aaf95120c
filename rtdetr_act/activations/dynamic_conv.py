"""Dynamic convolution (Chen et al., CVPR 2020, arXiv:1912.03458)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import check_count
from rtdetr_act.activations.placed import drop_original, get_placement, set_placement
from rtdetr_act.activations.protocol import Entry
from rtdetr_act.activations.temperature import TAU_EPOCHS, TAU_START, Temperature
from rtdetr_act.kernels.backend import compute_dtype, is_exporting
from rtdetr_act.kernels.pool import global_avg_pool

# Noise added to the kernels, relative to the standard deviation of the weights. Equal kernels would get almost equal
# gradients while tau is high, and stay equal. Initially the attention is within 0.01 of 1/K at tau = 30, so noise that
# does not cancel is below 0.005 of the weights; even at tau = 1 it is below 0.05.
_NOISE_STD = 0.1


class DynamicConv2d(nn.Module):
    """Apply a 2-D convolution whose kernel and bias are mixtures of K, weighted by an attention over the input image.

    `pi = softmax(z / tau)`, where z is global average pooling, Linear C -> max(C // reduction, 1), ReLU, Linear -> K.
    The temperature tau is annealed linearly from `tau_start` to `tau` over `tau_epochs` epochs, so that all kernels are
    trained early on. Call `set_epoch(model, epoch)` for that; Ultralytics' training does it automatically.

    Shapes: (B, Cin, H, W) to (B, Cout, H', W') as in `torch.nn.Conv2d`. `weight` is (K, Cout, Cin / groups, kh, kw) and
    `bias` is (K, Cout) or None.

    Args:
        in_channels: Cin. This argument and the next eight are those of `torch.nn.Conv2d`.
        out_channels: Cout.
        kernel_size: One number, or height and width.
        stride: Default: 1.
        padding: A number, a pair, "same" or "valid". Default: 0.
        dilation: Default: 1.
        groups: Number of channel groups. Default: 1.
        bias: Whether to add a bias. Default: True.
        padding_mode: "zeros" (default), "reflect", "replicate" or "circular".
        kernels: Number K of kernels, at least 2. Default: 4.
        reduction: Reduction of the channels in the hidden layer of the attention. Default: 4.
        tau: Final temperature. Default: 1.
        tau_start: Initial temperature; None for a constant temperature `tau`. Default: 30.
        tau_epochs: Epochs of annealing. Default: 10.

    Raises:
        ValueError: A count or a temperature is too small, or `torch.nn.Conv2d` rejects an argument.

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
        # The attributes of Conv2d, which other code reads.
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
        """Build a dynamic convolution that is initially equal to `conv`, with its device, dtype and training mode.

        All kernels are its weight plus noise that sums to 0 over the kernels, and all biases are its bias, so that with
        uniform attention it computes the same as `conv`.

        Args:
            conv: The convolution.
            kernels: As in the constructor, like the following ones. Default: 4.
            reduction: Default: 4.
            tau: Default: 1.
            tau_start: Default: 30.
            tau_epochs: Default: 10.

        Raises:
            ValueError: A count or a temperature is too small.

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
        new.init_from(conv.weight, conv.bias)
        return new.requires_grad_(conv.weight.requires_grad).train(conv.training)

    @torch.no_grad()
    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Initialise all kernels and biases from those of a plain convolution, in place.

        Args:
            weight: (Cout, Cin / groups, kh, kw), to which noise is added for each kernel.
            bias: (Cout,), or None to keep the biases.
        """
        # Drawn on the CPU, since a swap restores only the CPU's random state.
        noise = torch.randn(self.weight.shape)
        noise = (noise - noise.mean(0)) * (_NOISE_STD * weight.detach().float().std(correction=0).cpu())
        self.weight.copy_(weight.to(self.weight) + noise.to(self.weight))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.expand_as(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each image of x, (B, Cin, H, W), with its own mixture of kernels."""
        pi = self.attention(x)
        padded = self.padding_mode != "zeros"
        x = F.pad(x, self._pads, mode=self.padding_mode) if padded else x
        padding = 0 if padded else self.padding
        return dynamic_conv(x, pi, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def attention(self, x: Tensor) -> Tensor:
        """Return the attention pi for x, (B, Cin, H, W): (B, K), positive numbers that sum to 1 over K."""
        dtype = self.squeeze.weight.dtype
        z = self.expand(F.relu(self.squeeze(global_avg_pool(x, dtype))))
        return torch.softmax(z.to(compute_dtype(dtype)) / self.temperature(), dim=1).to(dtype)

    @torch.no_grad()
    def fold_norm(self, norm: nn.BatchNorm2d) -> None:
        """Fold the following BatchNorm into all kernels and biases; this is exact, because the attention sums to 1.

        Args:
            norm: The BatchNorm, whose running statistics are used.

        Raises:
            ValueError: The BatchNorm has no running statistics.
        """
        mean, var = norm.running_mean, norm.running_var
        if mean is None or var is None:
            raise ValueError("a BatchNorm without running statistics cannot be folded")
        scale = torch.rsqrt(var + norm.eps) * (1 if norm.weight is None else norm.weight)
        bias = -mean if self.bias is None else self.bias - mean
        bias = bias * scale + (0 if norm.bias is None else norm.bias)
        self.weight = nn.Parameter(self.weight * scale[:, None, None, None], self.weight.requires_grad)
        self.bias = nn.Parameter(bias.expand(self.kernels, -1).to(self.weight).clone(), self.weight.requires_grad)
        if placed := get_placement(self):
            set_placement(self, replace(placed, folded=True))

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        rest = f", padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"
        return f"{size}{rest}, kernels={self.kernels}, reduction={self.reduction}"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and checkpoints omit the original convolution, which is as large as a kernel: its weight is the mean of
        # the kernels.
        return drop_original(vars(self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicConv2d:
        # `.to(memory_format=torch.channels_last)` converts five-dimensional tensors too, for which it is undefined.
        def apply(t: Tensor) -> Tensor:
            return fn(t) if t.ndim != 5 else fn(t.flatten(0, 1)).contiguous().unflatten(0, t.shape[:2])

        super()._apply(apply, recurse)
        return self


@torch.no_grad()
def restore_conv(conv: DynamicConv2d) -> nn.Conv2d:
    """Return the convolution that a dynamic convolution replaced, or an equal new one if this is a loaded copy.

    Its weight is unchanged unless the kernels have been trained or loaded since; then it becomes their mean, the
    kernel for uniform attention.
    """
    placed = get_placement(conv)
    original: nn.Conv2d = (placed and placed.original) or nn.utils.skip_init(
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


# ---------------------------------------------------------------- op

_Padding = str | int | Sequence[int]
_Step = int | Sequence[int]
# The largest number of positions for which the results of 1x1 kernels are mixed, instead of the kernels. Forward and
# backward of 320 to 1280 channels, batch 8, on a CPU: 3.7 ms against 15 ms of the best method that mixes kernels for 1
# position, 12 against 21 ms for 9. For 16 positions, 960 to 160 channels take 15 against 8 ms.
_MAX_UNMIXED_POSITIONS = 9


def dynamic_conv(
    x: Tensor,
    attention: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Step = 1,
    padding: _Padding = 0,
    dilation: _Step = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve each image of a batch with its own mixture of K kernels, `sum_k attention[b, k] * weight[k]`.

    Args:
        x: (B, Cin, H, W).
        attention: (B, K).
        weight: (K, Cout, Cin / groups, kh, kw).
        bias: (K, Cout), mixed like the kernels. Default: None.
        stride: As in `torch.nn.functional.conv2d`, like the following ones. Default: 1.
        padding: Zero padding. Default: 0.
        dilation: Default: 1.
        groups: Default: 1.

    Returns:
        (B, Cout, H', W').

    Paper: Chen et al., CVPR 2020, arXiv:1912.03458.

    >>> x, kernels = torch.ones(2, 1, 2, 2), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    >>> dynamic_conv(x, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), kernels)[:, 0, 0, 0]
    tensor([1., 2.])
    """
    if is_exporting() or not len(x):
        return dynamic_conv_parallel(x, attention, weight, bias, stride, padding, dilation, groups)
    matrices = _is_matrix_product(weight, stride, padding, groups)
    if matrices and x.shape[2] * x.shape[3] <= _MAX_UNMIXED_POSITIONS:
        return _convolve_then_mix(x, attention, weight, bias)
    kernels = mix(attention, weight)
    biases = None if bias is None else mix(attention, bias)
    if matrices:
        return _batched_matmul(x, kernels, biases)
    return _grouped_conv(x, kernels, biases, stride, padding, dilation, groups)


def mix(attention: Tensor, parts: Tensor) -> Tensor:
    """Return the mixtures `sum_k attention[b, k] * parts[k]`, (B, ...).

    Args:
        attention: (B, K).
        parts: (K, ...).

    >>> mix(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[2., 3.]])
    """
    return (attention @ parts.flatten(1)).unflatten(1, parts.shape[1:])


def dynamic_conv_parallel(
    x: Tensor,
    attention: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Step,
    padding: _Padding,
    dilation: _Step,
    groups: int,
) -> Tensor:
    """Compute `dynamic_conv` as K convolutions and a weighted sum of their outputs, for export.

    This is K times the work, but its weights are constants and its shapes do not depend on the batch size, as exporters
    and runtimes require. Without groups it is one convolution to K * Cout channels. The arguments are those of
    `dynamic_conv`.
    """
    k = len(weight)
    if groups == 1:
        flat = None if bias is None else bias.flatten()
        # Not chunk, since an exporter would compute its sizes from the shape at run time.
        results = F.conv2d(x, weight.flatten(0, 1), flat, stride, padding, dilation).split(weight.shape[1], 1)
    else:
        biases = [None] * k if bias is None else list(bias.unbind())
        pairs = zip(weight.unbind(), biases, strict=True)
        results = tuple(F.conv2d(x, w, b, stride, padding, dilation, groups) for w, b in pairs)
    shares = attention.to(results[0].dtype)[:, :, None, None].split(1, 1)
    y = results[0] * shares[0]
    for result, share in zip(results[1:], shares[1:], strict=True):
        y = y + result * share
    return y


def _grouped_conv(
    x: Tensor,
    kernels: Tensor,
    biases: Tensor | None,
    stride: _Step,
    padding: _Padding,
    dilation: _Step,
    groups: int,
) -> Tensor:
    """Compute one grouped convolution of a single image: the batch becomes channels, in B * groups groups."""
    batch = len(x)
    flat = None if biases is None else biases.flatten()
    grouped = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(grouped, kernels.flatten(0, 1), flat, stride, padding, dilation, batch * groups)
    y = y.view(batch, -1, *y.shape[2:])
    return y.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else y


def _is_matrix_product(weight: Tensor, stride: _Step, padding: _Padding, groups: int) -> bool:
    steps = (stride,) if isinstance(stride, int) else stride
    pads = () if isinstance(padding, str) else (padding,) if isinstance(padding, int) else padding
    return groups == 1 and weight.shape[3:] == (1, 1) and all(step == 1 for step in steps) and not any(pads)


def _batched_matmul(x: Tensor, kernels: Tensor, biases: Tensor | None) -> Tensor:
    """Compute a convolution with 1x1 kernels and stride 1 as a matrix product per image.

    Forward and backward take 0.8 to 1.0 times as long as the grouped convolution on a CPU, 0.9 times on average over
    seven layers of MobileNetV2 and rtdetr-n.
    """
    rows, matrices = x.flatten(2), kernels.flatten(2)
    if _is_channels_last(x):  # (B, HW, Cout), which is channels_last again
        rows, matrices = rows.transpose(1, 2), matrices.transpose(1, 2)
        y = torch.bmm(rows, matrices) if biases is None else torch.baddbmm(biases[:, None], rows, matrices)
        y = y.transpose(1, 2)
    else:
        y = torch.bmm(matrices, rows) if biases is None else torch.baddbmm(biases[:, :, None], matrices, rows)
    return y.unflatten(2, x.shape[2:])


def _convolve_then_mix(x: Tensor, attention: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply all K 1x1 kernels as one linear layer, and return the weighted sum of the outputs."""
    rows = x.flatten(2).transpose(1, 2)
    results = F.linear(rows, weight.flatten(0, 1).flatten(1), None if bias is None else bias.flatten())
    results = results.unflatten(2, weight.shape[:2]) * attention.to(results.dtype)[:, None, :, None]
    return results.sum(2).transpose(1, 2).unflatten(2, x.shape[2:])


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


ENTRIES = (
    Entry(
        "dynamic_conv",
        DynamicConv2d.from_conv,
        "Σ_k π_k(x)·(W_k∗x + b_k), π = softmax(z/τ)",
        "Chen et al., CVPR 2020, arXiv:1912.03458",
        replaces="convolution",
        tokens=False,
        classes=(DynamicConv2d,),
        title="Dynamic convolution",
    ),
)
