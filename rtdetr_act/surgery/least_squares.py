"""Linear least squares for the weights of convolutions and Linear layers, from statistics that add up over batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Linear = nn.Conv2d | nn.Linear


class NormalEquations:
    """The normal equations of a layer's weights for given inputs and target outputs.

    They hold sums of products of inputs and outputs, so that their size does not depend on the number of images.

    Args:
        layer: A convolution or a Linear layer; its present weights are where the ridge penalty pulls to.
        centred: Whether a constant difference to the target does not count, since a bias or a BatchNorm absorbs it.
    """

    def __init__(self, layer: Linear, *, centred: bool) -> None:
        self._layer, self._centred = layer, centred
        self._count = 0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add the products of some samples.

        Args:
            inputs: Inputs of the layer, as `collect_inputs` returns them.
            outputs: What it should return for them, as `collect_outputs` returns it.
        """
        if self._shifts is None:
            # Close to the means, so that little is lost when the products of the means are subtracted in the end.
            means = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
            self._shifts = means if self._centred else (torch.zeros_like(means[0]), torch.zeros_like(means[1]))
        inputs, outputs = inputs - self._shifts[0], outputs - self._shifts[1]
        self._count += inputs.shape[1]
        if not self._sums:
            self._sums = [
                inputs.mT @ inputs,
                inputs.mT @ outputs,
                inputs.sum(1, keepdim=True),
                outputs.sum(1, keepdim=True),
            ]
            return
        # In place: the first one has the square of a layer's inputs, and is added to once per chunk.
        self._sums[0].baddbmm_(inputs.mT, inputs)
        self._sums[1].baddbmm_(inputs.mT, outputs)
        self._sums[2] += inputs.sum(1, keepdim=True)
        self._sums[3] += outputs.sum(1, keepdim=True)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor] | None:
        """Return the best weight, and the best constant per output channel.

        Args:
            ridge: Penalty on the square of the change of the weights, relative to the mean square of the inputs:
                directions that the samples do not determine keep their weights.

        Returns:
            The weight in the layer's shape and the constant (Cout,), zeros if not centred, both in float64 on the CPU;
            None without a finite solution, as for inputs that are all 0.
        """
        if self._shifts is None:
            return None
        # On the CPU, since some devices lack double precision.
        gram, products, x_sum, y_sum = (value.cpu().double() / self._count for value in self._sums)
        if self._centred:
            gram -= x_sum.mT @ x_sum
            products -= x_sum.mT @ y_sum
        weight = self._grouped_weight().cpu().double()
        residual = products - gram @ weight
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += ridge * diagonal.mean(1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(gram)
        fitted = weight + torch.cholesky_solve(residual, factor)
        if failed.any() or not fitted.isfinite().all():
            return None
        constant = torch.zeros_like(y_sum)
        if self._centred:
            x_shift, y_shift = (shift.cpu().double() for shift in self._shifts)
            constant = y_sum + y_shift - (x_sum + x_shift) @ fitted
        return fitted.mT.reshape(self._layer.weight.shape), constant.flatten()

    def _grouped_weight(self) -> Tensor:
        """Return the layer's weight as (groups, inputs, outputs)."""
        groups = _count_groups(self._layer)
        return self._layer.weight.detach().reshape(groups, len(self._layer.weight) // groups, -1).mT


def _count_groups(layer: Linear) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def count_inputs(layer: Linear) -> int:
    """Return the number of inputs of one output of a layer, which is the number of unknowns of its fit."""
    return layer.weight[0].numel()


def count_positions(layer: Linear, output: Tensor) -> int:
    """Return the number of positions in a layer's output for one image: H * W of a convolution, N of (B, N, C)."""
    if isinstance(layer, nn.Conv2d):
        return output.shape[-2] * output.shape[-1]
    return output[0, ..., 0].numel()


def sample_positions(positions: int, count: int) -> Tensor:
    """Return the indices of up to `count` of a number of positions, a fixed random sample, in ascending order."""
    chosen = torch.randperm(positions, generator=torch.Generator().manual_seed(positions))
    return chosen[:count].sort().values


def collect_outputs(layer: Linear, output: Tensor, positions: Tensor) -> Tensor:
    """Return the outputs of a layer at some of its positions, (groups, B * P, Cout / groups)."""
    positions = positions.to(output.device)
    if isinstance(layer, nn.Conv2d):
        rows = output.flatten(2)[:, :, positions].transpose(1, 2)
    else:
        rows = output.reshape(len(output), -1, output.shape[-1])[:, positions]
    return rows.reshape(rows.shape[0] * rows.shape[1], _count_groups(layer), -1).transpose(0, 1).float()


def collect_inputs(layer: Linear, x: Tensor, positions: Tensor) -> Tensor:
    """Return the inputs that a layer reads for some of its output positions, (groups, B * P, inputs)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])[:, positions.to(x.device)].flatten(0, 1)[None].float()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    (high, wide), (down, right), (step_y, step_x) = layer.kernel_size, layer.stride, layer.dilation
    across = (x.shape[-1] - step_x * (wide - 1) - 1) // right + 1
    rows, columns = (positions // across * down).to(x.device), (positions % across * right).to(x.device)
    taps = [x[:, :, rows + i * step_y, columns + j * step_x] for i in range(high) for j in range(wide)]
    stacked = torch.stack(taps, 2)  # (B, C, kh * kw, P)
    grouped = stacked.reshape(len(x), layer.groups, -1, len(positions))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2).float()
