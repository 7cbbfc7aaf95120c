"""Process feature maps in blocks that fit the CPU cache, so that only the first pass of an op reads main memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.aten import sum_per_channel

# Elements per block and thread. Time of AReLU forward and backward over that of SiLU, two threads, 32 MB of L3 cache:
#                        2 ** 16  2 ** 17  2 ** 18  2 ** 19  no blocks
#     4x64x80x80            1.67     1.36     1.22     1.12       1.02    (all of it fits the cache)
#     2x128x160x160         1.88     1.68     1.66     1.72       1.84
# Smaller blocks lose to calls, 5 µs each, what they save on memory traffic.
ELEMENTS_PER_THREAD = 1 << 19

# Tensors with fewer elements cost more in calls than in memory traffic. For them torch's own graph is faster than an
# autograd function in Python (DY-ReLU-B on 1x64x13x13: 0.52 against 0.63 ms, ACON-C: 0.21 against 0.42 ms), and malloc
# is faster than `scratch_like`.
SMALL_NUMEL = 1 << 15
_memory = threading.local()

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions

Block = tuple[slice, slice, slice]
WHOLE: Block = (slice(None), slice(None), slice(None))


def is_small(x: Tensor) -> bool:
    """Return whether x is on a CPU and has fewer than `SMALL_NUMEL` elements, so that calls cost more than memory.

    >>> is_small(torch.zeros(1, 64, 13, 13)), is_small(torch.zeros(1, 64, 40, 40))
    (True, False)
    """
    return x.is_cpu and x.numel() < SMALL_NUMEL


def block_size() -> int:
    """Return the number of elements per block for the current number of threads: at most 2 ** 23, 32 MiB in float32.

    >>> block_size() % ELEMENTS_PER_THREAD
    0
    """
    return ELEMENTS_PER_THREAD * min(torch.get_num_threads(), 16)


def make_dense(x: Tensor) -> Tensor:
    """Return x if it is contiguous, channels_last or channels_last_3d, else a copy without gaps or overlaps in memory.

    >>> x = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> make_dense(x) is x, make_dense(x[:, :2]).is_contiguous(memory_format=torch.channels_last)
    (True, True)
    """
    if x.is_contiguous():
        return x
    channels_last = _CHANNELS_LAST.get(x.ndim)
    if channels_last is None:
        return x.contiguous()
    if x.is_contiguous(memory_format=channels_last):
        return x
    return x.contiguous(memory_format=channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format)


def match_layout(x: Tensor, other: Tensor) -> Tensor:
    """Return x with the strides of `other`, a dense tensor of the same shape; x itself if it has them.

    An incoming gradient may have another memory format than the tensor it belongs to.
    """
    if x.stride() == other.stride():
        return x
    return (empty_like(other) if x.dtype == other.dtype else torch.empty_like(other, dtype=x.dtype)).copy_(x)


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like x, for a caller that writes every element.

    Unlike `torch.empty_like`, it does not fill the memory with NaN when deterministic algorithms are on, as they are in
    Ultralytics' training: that is an extra pass over memory.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty_like(x)
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        return torch.empty_like(x)
    finally:
        settings.fill_uninitialized_memory = before


def scratch_like(shape: Tensor, slot: int = 0) -> Tensor:
    """Return an uninitialised buffer with the shape, strides and dtype of a dense tensor, reused by later calls.

    Allocating costs more than the arithmetic: the system maps pages of 4 KiB on first touch and unmaps them when they
    are freed. The first product of DY-ReLU-B on half of 4x64x80x80 takes 0.65 ms in newly allocated memory and 0.06 ms
    in this buffer.

    Args:
        shape: The dense tensor to be like.
        slot: Index of the buffer. Each thread has one buffer per slot and dtype, so results that are needed at the same
            time need different slots.
    """
    count = shape.numel()
    if not shape.is_cpu or not SMALL_NUMEL <= count <= block_size():
        return torch.empty_like(shape)
    kept: dict[Any, Tensor] = _memory.__dict__.setdefault("kept", {})
    found = kept.get((shape.dtype, slot))
    if found is None or found.numel() < count:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            found = kept[shape.dtype, slot] = torch.empty(block_size(), dtype=shape.dtype)
    return found.as_strided(shape.shape, shape.stride())


def view_flat(x: Tensor) -> Tensor:
    """Return a one-dimensional view of a dense tensor, in memory order."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def split_blocks(x: Tensor, size: int | None = None) -> list[Block]:
    """Return slices over (B, C, H) that split dense (B, C, H, W) maps into blocks of about `size` elements.

    A block holds several small images, or channels of one image, or rows of one channel. A channels_last tensor is a
    single block: torch sums a part of one image in a single thread, which costs more than the cache saves (DY-ReLU-B on
    4x256x40x40 takes 6.2 times as long as SiLU in blocks, 4.2 times without).

    Args:
        x: The maps.
        size: Elements per block; None (default) for `block_size()`.

    >>> split_blocks(torch.zeros(8, 16, 4, 4)) == [WHOLE]
    True
    """
    size = block_size() if size is None else size
    if x.numel() <= size or not x.is_contiguous():
        return [WHOLE]
    images, channels, height, width = x.shape
    image = channels * height * width
    if image <= size:
        return [(part, slice(None), slice(None)) for part in _slices(images, size // image)]
    channel_step, row_step = max(size // (height * width), 1), max(size // width, 1)
    return list(product(_slices(images, 1), _slices(channels, channel_step), _slices(height, row_step)))


def map_blocks(source: Tensor, computed: torch.dtype, run: Callable[[Block, Tensor | None], Tensor]) -> Tensor:
    """Compute a tensor like `source` block by block, and return it.

    Args:
        source: (B, C, H, W), dense.
        computed: The dtype that `run` computes in.
        run: Called with a block and the part of the output to write its result to. Where the output has another dtype
            than `computed`, called with None instead, and the result is cast.
    """
    written = empty_like(source)
    for part in split_blocks(source):
        if computed == source.dtype:
            run(part, written[part])
        else:
            written[part] = run(part, None)
    return written


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def sum_over_positions(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of grad * x and of grad over height and width, each (B, C), for maps (B, C, H, W)."""
    if x.is_cpu and x.is_contiguous() and grad.is_contiguous() and x.numel():
        return sum_per_channel(grad, x)
    return (grad * x).sum((2, 3)), grad.sum((2, 3))


def as_map(x: Tensor, layout: str) -> Tensor:
    """Reshape any input of an activation to (B, C, H, W) maps.

    Args:
        x: (B, C, ...) with layout "map", which keep B and C, and channels_last_3d becomes channels_last; (..., C) with
            layout "tokens", which become one channels_last map (1, C, N, 1).
        layout: "map" or "tokens".

    >>> as_map(torch.zeros(2, 8, 5), "map").shape, as_map(torch.zeros(2, 5, 8), "tokens").shape
    (torch.Size([2, 8, 5, 1]), torch.Size([1, 8, 10, 1]))
    """
    if layout == "tokens":
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(-1)
    if x.ndim == 4:
        return x
    return x[..., None, None] if x.ndim == 2 else x.flatten(2).unsqueeze(-1)


def from_map(y: Tensor, shape: torch.Size, layout: str) -> Tensor:
    """Reshape the output of `as_map` back to the shape of its input.

    >>> from_map(as_map(torch.zeros(2, 5, 8), "tokens"), torch.Size([2, 5, 8]), "tokens").shape
    torch.Size([2, 5, 8])
    """
    if layout == "tokens":
        return y.squeeze(-1).transpose(1, 2).reshape(shape)
    return y if y.ndim == len(shape) else y.reshape(shape)
