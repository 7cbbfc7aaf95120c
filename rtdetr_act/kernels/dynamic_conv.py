"""Dynamic convolution: one convolution for a whole batch, in which each image has a kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rtdetr_act.kernels.backend import is_tracing

_Padding = str | int | Sequence[int]
_Step = int | Sequence[int]
# Positions of a map up to which 1x1 kernels are not mixed. Forward and backward of 320 to 1280 channels, batch 8,
# on a CPU: 3.7 ms against 15 of the best form that mixes them for 1 position, 12 against 21 for 9. For 16, 960 to 160
# channels take 15 against 8.
_FEW = 9


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
        bias: (K, Cout), mixed like the kernels; None for none.
        stride: As in `torch.nn.functional.conv2d`, like the following ones.
        padding: With zeros.
        dilation: Step between the elements of a kernel.
        groups: Number of groups of channels.

    Paper: Chen et al., CVPR 2020, arXiv:1912.03458.

    >>> x, kernels = torch.ones(2, 1, 2, 2), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    >>> dynamic_conv(x, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), kernels)[:, 0, 0, 0]
    tensor([1., 2.])
    """
    if _is_exporting() or not len(x):
        return in_parallel(x, attention, weight, bias, stride, padding, dilation, groups)
    matrices = _is_matrix_product(weight, stride, padding, groups)
    if matrices and x.shape[2] * x.shape[3] <= _FEW:
        return _as_one_layer(x, attention, weight, bias)
    kernels = mix(attention, weight)
    biases = None if bias is None else mix(attention, bias)
    if matrices:
        return _as_matrix_product(x, kernels, biases)
    return _as_one_convolution(x, kernels, biases, stride, padding, dilation, groups)


def mix(attention: Tensor, parts: Tensor) -> Tensor:
    """Return `sum_k attention[b, k] * parts[k]`, (B, ...) of (B, K) and (K, ...).

    >>> mix(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[2., 3.]])
    """
    return (attention @ parts.flatten(1)).unflatten(1, parts.shape[1:])


def in_parallel(
    x: Tensor,
    attention: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Step,
    padding: _Padding,
    dilation: _Step,
    groups: int,
) -> Tensor:
    """Compute `dynamic_conv` as K convolutions and a weighted sum of their results.

    That is K times the work, but all its weights are constants and no number depends on the batch: what exporters and
    runtimes ask for. Without groups it is one convolution to K * Cout channels.
    """
    k = len(weight)
    if groups == 1:
        flat = None if bias is None else bias.flatten()
        # Not chunk, whose sizes an exporter would compute from the shape at run time.
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


def _as_one_convolution(
    x: Tensor,
    kernels: Tensor,
    biases: Tensor | None,
    stride: _Step,
    padding: _Padding,
    dilation: _Step,
    groups: int,
) -> Tensor:
    """Convolve with groups of each image: the batch becomes channels, B * groups groups of them."""
    batch = len(x)
    flat = None if biases is None else biases.flatten()
    wide = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(wide, kernels.flatten(0, 1), flat, stride, padding, dilation, batch * groups)
    y = y.view(batch, -1, *y.shape[2:])
    return y.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else y


def _is_matrix_product(weight: Tensor, stride: _Step, padding: _Padding, groups: int) -> bool:
    steps = (stride,) if isinstance(stride, int) else stride
    pads = () if isinstance(padding, str) else (padding,) if isinstance(padding, int) else padding
    return groups == 1 and weight.shape[3:] == (1, 1) and all(step == 1 for step in steps) and not any(pads)


def _as_matrix_product(x: Tensor, kernels: Tensor, biases: Tensor | None) -> Tensor:
    """Convolve with 1x1 kernels of stride 1 as a product of matrices for each image.

    Forward and backward take 0.8 to 1.0 of the grouped convolution's time on a CPU, 0.9 in the middle of seven layers
    of MobileNetV2 and rtdetr-n.
    """
    rows, matrices = x.flatten(2), kernels.flatten(2)
    if _is_channels_last(x):  # (B, HW, Cout), which is channels_last again
        rows, matrices = rows.transpose(1, 2), matrices.transpose(1, 2)
        y = torch.bmm(rows, matrices) if biases is None else torch.baddbmm(biases[:, None], rows, matrices)
        y = y.transpose(1, 2)
    else:
        y = torch.bmm(matrices, rows) if biases is None else torch.baddbmm(biases[:, :, None], matrices, rows)
    return y.unflatten(2, x.shape[2:])


def _as_one_layer(x: Tensor, attention: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with all K 1x1 kernels as one linear layer, and sum its results."""
    rows = x.flatten(2).transpose(1, 2)
    results = F.linear(rows, weight.flatten(0, 1).flatten(1), None if bias is None else bias.flatten())
    results = results.unflatten(2, weight.shape[:2]) * attention.to(results.dtype)[:, None, :, None]
    return results.sum(2).transpose(1, 2).unflatten(2, x.shape[2:])


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _is_exporting() -> bool:
    asks = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
    return is_tracing() or torch.onnx.is_in_onnx_export() or bool(asks and asks())
