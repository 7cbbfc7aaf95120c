"""Fit the weights of a patched network to its outputs before the swap, on images, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.errors import InputError
from rtdetr_act.surgery.calibrate import move_to_model
from rtdetr_act.surgery.fit_parameters import fit_activations
from rtdetr_act.surgery.fitted_layers import FittedLayer, Hook, find_fitted_layers, forward_hooks
from rtdetr_act.surgery.least_squares import collect_inputs, collect_outputs
from rtdetr_act.surgery.modules import evaluation_mode, unwrap
from rtdetr_act.surgery.reference import build_reference, finish_fit
from rtdetr_act.surgery.rescale import rescale
from rtdetr_act.surgery.selections import Selections
from rtdetr_act.surgery.site_samples import sample_sites
from rtdetr_act.surgery.sites import iterate_placed_activations

_CHUNK_PIXELS = 640 * 640  # pixels that are run at once; rtdetr-l keeps 0.5 GB for as many
# Pixels of the second pass. On yolo11n with ReLU at 160 pixels, the scores differ from those before the swap by 0.071
# after the first pass, by 0.051 after a second one with this many, and by 0.047 with eight times as many.
_SECOND_PIXELS = 4 * 640 * 640
# Penalties on the change of the weights, relative to the mean square of the inputs.
_RIDGE, _SECOND_RIDGE = 1e-3, 1e-2


@torch.no_grad()
def refit(model: Any, images: Tensor | Sequence[Tensor], original: Any = None) -> int:
    """Fit the weights of each convolution and Linear layer to its outputs before the swap, in place.

    A new activation changes the inputs of every layer that follows. Each one gets the weights whose output on its new
    input is closest to its original output, by linear least squares, as He et al. reconstruct feature maps after
    channel pruning (ICCV 2017, arXiv:1707.06168). In a first pass over all images, the new input is computed from the
    original outputs of the layers before it. So all layers are fitted at once, from chunks of which only sums of
    products are kept, and the memory does not depend on the number of images. A second pass over some of the images
    fits the layers in the order in which they run, each on what the fitted ones before it really return.

    Before that, activations that `init="match"` fits are fitted to what the images really give at their sites. The
    inputs and outputs of activations without parameters are scaled where that makes them more similar to the originals:
    hardswish(2 x) / 2 is closer to ReLU than hardswish(x), and GELU(0.6 x) / 0.6 is closer to SiLU. Layers that are
    frozen, run more than once or compute something else than `Conv2d` and `Linear` are not changed; the statistics of
    BatchNorm remain, but for a constant of the layer before. A later training with Ultralytics does not fit again.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images; patched and not trained since.
        images: (B, C, H, W), or a sequence of such batches, which may have different sizes; for Ultralytics models RGB
            in 0..1. Use 128 images of 320 x 320, or as many pixels.
        original: The network before the swap. Default: None, that before the last swap with `init="match"`, else a copy
            of `model` with its activations unpatched.

    Returns:
        The number of fitted layers.

    Raises:
        InputError: There are no images; or `original` is None and nothing is swapped, or what the activations before
            the swap had learned is lost.
        ModelError: The model is exported, wrapped or compiled, or its activations are folded.

    Source: He et al., ICCV 2017, arXiv:1707.06168.

    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    >>> report = patch_model(net, "relu")
    >>> refit(net, torch.randn(16, 3, 16, 16))
    1
    """
    root = unwrap(model)
    batches = [images] if isinstance(images, Tensor) else images
    if not len(batches) or not len(batches[0]):
        raise InputError("refit got no images: give at least one")
    if original is None and next(iterate_placed_activations(root), None) is None:
        raise InputError("nothing is swapped in the model: give original=, the network as it was")
    before = build_reference(root) if original is None else unwrap(original)
    if before is None:
        raise InputError(
            "it is not known what the activations before the swap had learned: give original=, the network as it was"
        )
    with evaluation_mode(root), evaluation_mode(before):
        first = next(_iterate_chunks(root, batches))
        names = [name for name, _ in iterate_placed_activations(root)]
        samples = sample_sites(before, names, first)
        fit_activations(root, samples, first)
        rescaling = rescale(root, samples, first[:2])
        layers = find_fitted_layers(root, before, first, rescaling)
        total = len(batches[0]) * len(batches)
        for chunk in _iterate_chunks(root, batches):
            _add_chunk(root, before, layers, chunk, total)
        fitted = [layer for layer in layers if layer.fit(_RIDGE)]
        _fit_in_order(root, before, fitted, _take_images(root, batches, _SECOND_PIXELS))
    finish_fit(root)
    return len(fitted)


def _take_images(root: nn.Module, batches: Sequence[Tensor], pixels: int) -> Tensor:
    """Return evenly spaced images of the shape of the first one, with about a number of pixels, as one batch."""
    first = batches[0][0]
    count = max(pixels // first[0].numel(), 1)
    per_batch = -(-count // len(batches))
    chosen: list[Tensor] = []
    for index in range(0, len(batches), max(len(batches) // count, 1)):
        batch = batches[index]
        if batch.shape[1:] == first.shape:
            chosen += batch[:: max(len(batch) // per_batch, 1)][:per_batch]
    return move_to_model(root, torch.stack(chosen[:count]))


def _iterate_chunks(root: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield batches in chunks of `_CHUNK_PIXELS`, on the device and in the dtype of a model."""
    for batch in batches:
        size = max(_CHUNK_PIXELS // max(batch[0, 0].numel(), 1), 1)
        for chunk in batch.split(size):
            yield move_to_model(root, chunk)


def _add_chunk(root: nn.Module, original: nn.Module, layers: Sequence[FittedLayer], chunk: Tensor, images: int) -> None:
    """Run both networks on a chunk, and add the inputs and target outputs of the layers to their equations.

    In the patched network each layer returns its target, so that the next one gets what it will get after the fit.
    """
    targets: dict[str, Tensor] = {}
    selections = Selections()

    def record(layer: FittedLayer, output: Tensor) -> None:
        targets[layer.name] = output * layer.factor  # a copy, since an activation may work in place

    def substitute(layer: FittedLayer, x: Tensor) -> Tensor:
        target = targets.pop(layer.name)
        layer.add(x, target, images)
        return target

    modules = dict(original.named_modules())
    after: list[Hook] = [(modules[each.name], lambda _, __, y, each=each: record(each, y)) for each in layers]
    with forward_hooks(after=after), selections.recorded():
        original(chunk)
    with _substituted({each.module: partial(substitute, each) for each in layers}), selections.replayed():
        root(chunk)


def _fit_in_order(root: nn.Module, original: nn.Module, layers: Sequence[FittedLayer], images: Tensor) -> None:
    """Run both networks on images as one batch, and fit each layer just before it runs in the patched one."""
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    selections = Selections()

    def record(layer: FittedLayer, output: Tensor) -> None:
        positions = layer.sample_positions(output, len(images))
        targets[layer.name] = positions, collect_outputs(layer.module, output * layer.factor, positions)

    def fit(layer: FittedLayer, x: Tensor) -> None:
        positions, outputs = targets.pop(layer.name)
        layer.add_samples(collect_inputs(layer.module, x, positions), outputs)
        layer.fit(_SECOND_RIDGE)

    modules = dict(original.named_modules())
    after: list[Hook] = [(modules[each.name], lambda _, __, y, each=each: record(each, y)) for each in layers]
    with forward_hooks(after=after), selections.recorded():
        original(images)
    pre: list[Hook] = [(each.module, lambda _, inputs, each=each: fit(each, inputs[0])) for each in layers]
    with forward_hooks(pre=pre), selections.replayed():
        root(images)


@contextmanager
def _substituted(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of modules inside the block."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
