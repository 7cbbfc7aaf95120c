"""Walk over feature maps in blocks that stay in the cache, so that the passes of an op after the first cost little."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.aten import sums_per_channel

# Elements of one block per thread. AReLU, forward and backward, in units of SiLU, two threads and 32 MB of L3 cache:
#                        2 ** 16  2 ** 17  2 ** 18  2 ** 19  no blocks
#     4x64x80x80            1.67     1.36     1.22     1.12       1.02    (fits the cache as a whole)
#     2x128x160x160         1.88     1.68     1.66     1.72       1.84
# Smaller ones pay for calls, 5 µs each, with what they save on memory.
PER_THREAD = 1 << 19

# Below this, in elements, calls cost more than memory: torch's own graph is then faster than an autograd function in
# Python (DY-ReLU-B on 1x64x13x13 takes 0.52 against 0.63 ms, ACON-C 0.21 against 0.42), and malloc is than scratch.
SMALL = 1 << 15
_memory = threading.local()

Block = tuple[slice, slice, slice]
WHOLE: Block = (slice(None), slice(None), slice(None))


def is_small(x: Tensor) -> bool:
    """Say whether a tensor on a CPU is so small that calls cost more than memory.

    >>> is_small(torch.zeros(1, 64, 13, 13)), is_small(torch.zeros(1, 64, 40, 40))
    (True, False)
    """
    return x.is_cpu and x.numel() < SMALL


def block_size() -> int:
    """Return the number of elements of one block, by the threads that share it; 32 MiB in float32 at most.

    >>> block_size() % PER_THREAD
    0
    """
    return PER_THREAD * min(torch.get_num_threads(), 16)


def dense(x: Tensor) -> Tensor:
    """Return x without gaps or overlaps in memory, itself if it is contiguous or channels_last.

    >>> x = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> dense(x) is x, dense(x[:, :2]).is_contiguous(memory_format=torch.channels_last)
    (True, True)
    """
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    channels_last = x.ndim == 4 and x.stride(1) == 1 and x.shape[1] > 1
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return x in the dense layout of `other`, itself if it has it; a gradient may come in another one."""
    if x.stride() == other.stride():
        return x
    return (empty_like(other) if x.dtype == other.dtype else torch.empty_like(other, dtype=x.dtype)).copy_(x)


def empty_like(x: Tensor) -> Tensor:
    """Return memory like that of x, every element of which the caller writes.

    With deterministic algorithms on, as in Ultralytics' training, torch fills new memory with NaN: one more pass.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty_like(x)
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        return torch.empty_like(x)
    finally:
        settings.fill_uninitialized_memory = before


def scratch(shape: Tensor, slot: int = 0) -> Tensor:
    """Return memory of the shape and layout of a dense tensor for the time of one block, the same each time.

    New memory costs more than what is done in it: the system hands out pages of 4 KiB on the first touch, and takes
    them back when they are freed: the first product of DY-ReLU-B on half of 4x64x80x80 takes 0.65 ms in new memory,
    the second one 0.06 ms in this.

    Args:
        shape: A tensor to be like.
        slot: Which of the memories of this thread; one for each that is needed at the same time.
    """
    count = shape.numel()
    if not shape.is_cpu or not SMALL <= count <= block_size():
        return torch.empty_like(shape)
    kept: dict[Any, Tensor] = _memory.__dict__.setdefault("kept", {})
    found = kept.get((shape.dtype, slot))
    if found is None or found.numel() < count:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            found = kept[shape.dtype, slot] = torch.empty(block_size(), dtype=shape.dtype)
    return found.as_strided(shape.shape, shape.stride())


def flat(x: Tensor) -> Tensor:
    """Return dense memory as one dimension, as a view."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def blocks(x: Tensor) -> list[Block]:
    """Return slices of (images, channels, rows) that cover dense (B, C, H, W) maps in blocks of about `block_size`.

    Several images where they are small; else channels of one image, or rows of one channel. A channels_last map is one
    block: torch sums a part of one image in a single thread, which costs more than the cache gives (DY-ReLU-B on
    4x256x40x40 took 6.2 times a SiLU in blocks, 4.2 without).

    >>> blocks(torch.zeros(8, 16, 4, 4)) == [WHOLE]
    True
    """
    size = block_size()
    if x.numel() <= size or not x.is_contiguous():
        return [WHOLE]
    images, channels, height, width = x.shape
    image = channels * height * width
    if image <= size:
        return [(part, slice(None), slice(None)) for part in _parts(images, size // image)]
    channel_step, row_step = max(size // (height * width), 1), max(size // width, 1)
    return list(product(_parts(images, 1), _parts(channels, channel_step), _parts(height, row_step)))


def in_blocks(source: Tensor, computed: torch.dtype, run: Callable[[Block, Tensor | None], Tensor]) -> Tensor:
    """Return a map like dense `source`, written block by block.

    Args:
        source: (B, C, H, W).
        computed: The type that `run` computes in.
        run: Called with a block and the memory to write it to; with None where that has another type than `computed`,
            and what it returns is then rounded.
    """
    written = empty_like(source)
    for part in blocks(source):
        if computed == source.dtype:
            run(part, written[part])
        else:
            written[part] = run(part, None)
    return written


def _parts(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def row_sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over positions of grad * x and of grad, each (B, C), for a block of (B, C, H, W) maps."""
    if x.is_cpu and x.is_contiguous() and grad.is_contiguous() and x.numel():
        return sums_per_channel(grad, x)
    return (grad * x).sum((2, 3)), grad.sum((2, 3))


def as_map(x: Tensor, layout: str) -> Tensor:
    """View a tensor as (B, C, H, W) maps: (B, C, ...) as they are, (..., C) tokens as one channels_last map.

    >>> as_map(torch.zeros(2, 8, 5), "map").shape, as_map(torch.zeros(2, 5, 8), "tokens").shape
    (torch.Size([2, 8, 5, 1]), torch.Size([1, 8, 10, 1]))
    """
    if layout == "tokens":
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(-1)
    if x.ndim == 4:
        return x
    return x[..., None, None] if x.ndim == 2 else x.flatten(2).unsqueeze(-1)


def from_map(y: Tensor, shape: torch.Size, layout: str) -> Tensor:
    """Undo `as_map` for the shape that it was given.

    >>> from_map(as_map(torch.zeros(2, 5, 8), "tokens"), torch.Size([2, 5, 8]), "tokens").shape
    torch.Size([2, 5, 8])
    """
    if layout == "tokens":
        return y.squeeze(-1).transpose(1, 2).reshape(shape)
    return y if y.ndim == len(shape) else y.reshape(shape)
