"""Fit the convolutions of a swapped network to what they gave before the swap, from images alone, without training."""

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
from rtdetr_act.surgery.calibrate import bring_to, estimate_statistics
from rtdetr_act.surgery.model_plan import mark_fitted
from rtdetr_act.surgery.modules import frozen_among, unwrap
from rtdetr_act.surgery.patcher import unpatch_model
from rtdetr_act.surgery.rescale import rescale
from rtdetr_act.surgery.sites import placed_activations

_ROWS = 16_384  # outputs of a convolution that its fit sees, each channel of them
# Pull of each weight to where it is, in units of the mean square of an input: what images do not tell stays.
_PULL = 1e-3

Hook = tuple[nn.Module, Callable[..., Any]]


@torch.no_grad()
def refit(model: Any, images: Tensor, original: Any = None) -> int:
    """Set the weights of each convolution to those with which it gives what it gave before the swap, in place.

    A new activation changes what every convolution behind it sees. In the order in which they run, each one gets the
    weights that bring it closest to its old output on its new input: linear least squares, as He et al. reconstruct
    maps after channel pruning (ICCV 2017, arXiv:1707.06168). Before that, what activations without parameters read and
    give is scaled, where it brings them closer to those they replace: hardswish(2 x) / 2 is nearer to ReLU than
    hardswish(x) is, and GELU(0.6 x) / 0.6 to SiLU. BatchNorm gets the statistics of the images, as by
    `calibrate`. Convolutions that are frozen, dynamic or run more than once stay, and so do linear layers. Ultralytics'
    training after it does not fit again.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images, swapped and not trained since.
        images: (B, C, H, W), for an Ultralytics model RGB in 0..1, 128 of 320 x 320 or as many pixels. They pass at
            once, so memory must do for that.
        original: The network as it was; by default this one with its activations unpatched.

    Returns:
        The number of convolutions that got new weights.

    Raises:
        InputError: There are no images, or no swap and no `original` either.
        ModelError: The model is exported, wrapped or compiled, or its activations are folded.

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
    rescale(root, before, bring_to(root, images[:2]))
    wanted = _outputs(before, images, [name for name, _ in _convolutions(root)])
    done = 0

    def meet(conv: nn.Conv2d, name: str, given: tuple[Tensor, ...]) -> None:
        nonlocal done
        # Each target is let go once it is met.
        done += fit(conv, given[0], *wanted.pop(name))

    hooks: list[Hook] = []
    for name, conv in _convolutions(root):
        if name in wanted:
            hooks.append((conv, lambda conv, given, name=name: meet(conv, name, given)))
    with _hooked(pre=hooks):
        estimate_statistics(root, [images])
    mark_fitted(root)
    return done


def _convolutions(root: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Yield (qualified name, convolution) of those that may get other weights."""
    placed = {id(part) for _, module in placed_activations(root) for part in module.modules()}
    found = [
        (f"{path}.{name}" if path else name, child)
        for path, owner in root.named_modules()
        if type(owner).__name__ != "DFL"  # its weights are numbers to count with
        for name, child in owner.named_children()
        if type(child) is nn.Conv2d and id(child) not in placed  # a subclass computes something else
    ]
    frozen = frozen_among(conv.weight for _, conv in found)
    yield from (item for item in found if id(item[1].weight) not in frozen)


def _outputs(original: nn.Module, images: Tensor, names: list[str]) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Return by name what convolutions give: positions (P), outputs there (B, P, O), whether a BatchNorm follows."""
    found: dict[str, tuple[Tensor, Tensor, bool]] = {}
    calls: Counter[str] = Counter()
    last: tuple[str, Tensor | None] = ("", None)

    def note(name: str, output: Tensor) -> None:
        nonlocal last
        calls[name] += 1
        last = (name, output)
        spots = _choose(output.shape[-2] * output.shape[-1], len(output))
        found[name] = (spots, output.flatten(2)[:, :, spots.to(output.device)].transpose(1, 2), False)

    def note_norm(given: Tensor) -> None:
        if given is last[1]:
            found[last[0]] = (*found[last[0]][:2], True)

    modules = dict(original.named_modules())
    convolutions = {name: modules[name] for name in names if type(modules.get(name)) is nn.Conv2d}
    norms = [module for module in modules.values() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    after: list[Hook] = [
        (conv, lambda _, __, output, name=name: note(name, output)) for name, conv in convolutions.items()
    ]
    with _hooked(pre=[(norm, lambda _, given: note_norm(given[0])) for norm in norms], after=after):
        estimate_statistics(original, [images])
    return {name: value for name, value in found.items() if calls[name] == 1}


def _choose(positions: int, images: int) -> Tensor:
    """Return the positions of a map that a fit sees, the same in every image."""
    chosen = torch.randperm(positions, generator=torch.Generator().manual_seed(positions))
    return chosen[: -(-_ROWS // images)].sort().values


def fit(conv: nn.Conv2d, x: Tensor, spots: Tensor, wanted: Tensor, normalised: bool) -> bool:
    """Give a convolution the weights that bring it from x (B, C, H, W) closest to what is wanted, if there are such."""
    groups, per_group = conv.groups, conv.out_channels // conv.groups
    inputs = _patches(conv, x, spots)
    outputs = wanted.reshape(-1, groups, per_group).transpose(0, 1).float()
    centred = normalised or conv.bias is not None  # either takes up a constant
    means = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
    if centred:
        inputs, outputs = inputs - means[0], outputs - means[1]
    # In double precision on the CPU, since there are devices without it.
    gram = (inputs.mT @ inputs).cpu().double()
    weight = conv.weight.reshape(groups, per_group, -1).mT.cpu().double()
    missing = (inputs.mT @ outputs).cpu().double() - gram @ weight
    pull = _PULL * gram.diagonal(dim1=1, dim2=2).mean(1)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(pull[:, None].expand(gram.shape[:2])))
    fitted = weight + torch.cholesky_solve(missing, factor)
    if failed.any() or not fitted.isfinite().all():
        return False  # a channel that is dead, or a network that gives no numbers
    conv.weight.copy_(fitted.mT.reshape(conv.weight.shape))
    if conv.bias is not None:
        constant = means[1].cpu().double() - means[0].cpu().double() @ fitted
        conv.bias.copy_(constant.flatten())
    return True


def _patches(conv: nn.Conv2d, x: Tensor, spots: Tensor) -> Tensor:
    """Return what the weights of each output at some positions meet, (groups, B * P, C / groups * kernel)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    (high, wide), (down, right), (step_y, step_x) = conv.kernel_size, conv.stride, conv.dilation
    across = (x.shape[-1] - step_x * (wide - 1) - 1) // right + 1
    rows, columns = (spots // across * down).to(x.device), (spots % across * right).to(x.device)
    taps = [x[:, :, rows + i * step_y, columns + j * step_x] for i in range(high) for j in range(wide)]
    stacked = torch.stack(taps, 2)  # B, C, kernel, P
    grouped = stacked.reshape(len(x), conv.groups, -1, len(spots))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2).float()


@contextmanager
def _hooked(pre: list[Hook] | None = None, after: list[Hook] | None = None) -> Iterator[None]:
    """Keep hooks before and after modules inside the block."""
    handles = [module.register_forward_pre_hook(call) for module, call in pre or ()]
    handles += [module.register_forward_hook(call) for module, call in after or ()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
