"""Fit the convolutions of a patched network to their outputs before the swap, on images, without training."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.errors import InputError
from rtdetr_act.surgery.calibrate import estimate_statistics, move_to_model
from rtdetr_act.surgery.model_plan import mark_fitted
from rtdetr_act.surgery.modules import find_frozen, unwrap
from rtdetr_act.surgery.patcher import unpatch_model
from rtdetr_act.surgery.rescale import rescale
from rtdetr_act.surgery.sites import iterate_placed_activations

_MAX_SAMPLES = 16_384  # output positions, over all images, used to fit a convolution
# Ridge penalty on the change of the weights, relative to the mean square of the inputs: directions that the images do
# not determine keep their weights.
_RIDGE = 1e-3

Hook = tuple[nn.Module, Callable[..., Any]]


@torch.no_grad()
def refit(model: Any, images: Tensor, original: Any = None) -> int:
    """Fit the weights of each convolution to its outputs before the swap, in place.

    A new activation changes the inputs of every convolution that follows. In the order in which they run, each one gets
    the weights whose output on its new input is closest to its original output, by linear least squares, as He et al.
    reconstruct feature maps after channel pruning (ICCV 2017, arXiv:1707.06168). Before that, the inputs and outputs of
    activations without parameters are scaled where that makes them more similar to the originals: hardswish(2 x) / 2 is
    closer to ReLU than hardswish(x), and GELU(0.6 x) / 0.6 is closer to SiLU. The statistics of BatchNorm are
    re-estimated, as by `calibrate`. Linear layers and convolutions that are frozen, dynamic or run more than once are
    not changed. A later training with Ultralytics does not fit again.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images; patched and not trained since.
        images: (B, C, H, W); for Ultralytics models RGB in 0..1. Use 128 images of 320 x 320, or as many pixels. They
            are processed as one batch, which must fit into memory.
        original: The network before the swap. Default: None, a copy of `model` with its activations unpatched.

    Returns:
        The number of fitted convolutions.

    Raises:
        InputError: There are no images, or nothing is swapped and `original` is None.
        ModelError: The model is exported, wrapped or compiled, or its activations are folded.

    Source: He et al., ICCV 2017, arXiv:1707.06168.

    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    >>> report = patch_model(net, "relu")
    >>> refit(net, torch.randn(16, 3, 16, 16))
    2
    """
    root = unwrap(model)
    if not len(images):
        raise InputError("refit got no images: give at least one")
    if original is None:
        before = copy.deepcopy(root)
        if not unpatch_model(before):
            raise InputError("nothing is swapped in the model: give original=, the network as it was")
    else:
        before = copy.deepcopy(unwrap(original))
    rescale(root, before, move_to_model(root, images[:2]))
    targets = _record_outputs(before, images, [name for name, _ in _find_convolutions(root)])
    count = 0

    def fit(conv: nn.Conv2d, name: str, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += fit_convolution(conv, inputs[0], *targets.pop(name))  # frees the memory of the target

    hooks: list[Hook] = []
    for name, conv in _find_convolutions(root):
        if name in targets:
            hooks.append((conv, lambda conv, inputs, name=name: fit(conv, name, inputs)))
    with _forward_hooks(pre=hooks):
        estimate_statistics(root, [images])
    mark_fitted(root)
    return count


def _find_convolutions(root: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Yield (qualified name, convolution) for each convolution that may be fitted."""
    placed = {id(part) for _, module in iterate_placed_activations(root) for part in module.modules()}
    found = [
        (f"{path}.{name}" if path else name, child)
        for path, owner in root.named_modules()
        if type(owner).__name__ != "DFL"  # whose weights are the constants 0, 1, 2, …
        for name, child in owner.named_children()
        if type(child) is nn.Conv2d and id(child) not in placed  # a subclass computes something else
    ]
    frozen = find_frozen(conv.weight for _, conv in found)
    yield from (item for item in found if id(item[1].weight) not in frozen)


def _record_outputs(original: nn.Module, images: Tensor, names: list[str]) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Record the outputs of the convolutions that run exactly once.

    Returns:
        By name: the sampled positions (P,), the outputs there (B, P, Cout), and whether a BatchNorm follows.
    """
    recorded: dict[str, tuple[Tensor, Tensor, bool]] = {}
    calls: Counter[str] = Counter()
    last: tuple[str, Tensor | None] = ("", None)

    def record_output(name: str, output: Tensor) -> None:
        nonlocal last
        calls[name] += 1
        last = (name, output)
        positions = _sample_positions(output.shape[-2] * output.shape[-1], len(output))
        recorded[name] = (positions, output.flatten(2)[:, :, positions.to(output.device)].transpose(1, 2), False)

    def record_norm(norm_input: Tensor) -> None:
        if norm_input is last[1]:
            recorded[last[0]] = (*recorded[last[0]][:2], True)

    modules = dict(original.named_modules())
    convolutions = {name: modules[name] for name in names if type(modules.get(name)) is nn.Conv2d}
    norms = [module for module in modules.values() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    after: list[Hook] = [
        (conv, lambda _, __, output, name=name: record_output(name, output)) for name, conv in convolutions.items()
    ]
    with _forward_hooks(pre=[(norm, lambda _, inputs: record_norm(inputs[0])) for norm in norms], after=after):
        estimate_statistics(original, [images])
    return {name: value for name, value in recorded.items() if calls[name] == 1}


def _sample_positions(positions: int, images: int) -> Tensor:
    """Return the indices of the positions used in a fit, a fixed random sample that is the same for every image."""
    chosen = torch.randperm(positions, generator=torch.Generator().manual_seed(positions))
    return chosen[: -(-_MAX_SAMPLES // images)].sort().values


def fit_convolution(conv: nn.Conv2d, x: Tensor, positions: Tensor, target: Tensor, normalised: bool) -> bool:
    """Fit the weight and bias of a convolution to target outputs by ridge regression, in place.

    Args:
        conv: The convolution.
        x: Its input, (B, C, H, W).
        positions: Indices of the output positions to fit, (P,).
        target: Target outputs at these positions, (B, P, Cout).
        normalised: Whether a BatchNorm follows, which makes a constant offset irrelevant.

    Returns:
        Whether a finite solution exists; otherwise the convolution is not changed.
    """
    groups, per_group = conv.groups, conv.out_channels // conv.groups
    inputs = _unfold(conv, x, positions)
    outputs = target.reshape(-1, groups, per_group).transpose(0, 1).float()
    centred = normalised or conv.bias is not None  # the bias or the BatchNorm absorbs a constant
    means = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
    if centred:
        inputs, outputs = inputs - means[0], outputs - means[1]
    # On the CPU, since some devices lack double precision.
    gram = (inputs.mT @ inputs).cpu().double()
    weight = conv.weight.reshape(groups, per_group, -1).mT.cpu().double()
    residual = (inputs.mT @ outputs).cpu().double() - gram @ weight
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:2])))
    fitted = weight + torch.cholesky_solve(residual, factor)
    if failed.any() or not fitted.isfinite().all():
        return False  # inputs that are all 0, or outputs that are not finite
    conv.weight.copy_(fitted.mT.reshape(conv.weight.shape))
    if conv.bias is not None:
        constant = means[1].cpu().double() - means[0].cpu().double() @ fitted
        conv.bias.copy_(constant.flatten())
    return True


def _unfold(conv: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Return the input patches of a convolution at some output positions, (groups, B * P, C / groups * kh * kw)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    (high, wide), (down, right), (step_y, step_x) = conv.kernel_size, conv.stride, conv.dilation
    across = (x.shape[-1] - step_x * (wide - 1) - 1) // right + 1
    rows, columns = (positions // across * down).to(x.device), (positions % across * right).to(x.device)
    taps = [x[:, :, rows + i * step_y, columns + j * step_x] for i in range(high) for j in range(wide)]
    stacked = torch.stack(taps, 2)  # (B, C, kh * kw, P)
    grouped = stacked.reshape(len(x), conv.groups, -1, len(positions))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2).float()


@contextmanager
def _forward_hooks(pre: list[Hook] | None = None, after: list[Hook] | None = None) -> Iterator[None]:
    """Register forward pre-hooks and forward hooks inside the block."""
    handles = [module.register_forward_pre_hook(call) for module, call in pre or ()]
    handles += [module.register_forward_hook(call) for module, call in after or ()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
