"""How the Triton kernels cut feature maps: a grid of tiles of channels by positions, in either memory layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rtdetr_act.kernels.backend import constexpr, tl, triton

# Elements of a tile: 16 for each of the 128 threads of four warps, two 16-byte loads of a half type.
TILE = 2048
WARPS = 4


@dataclass(frozen=True)
class Tiling:
    """The tiles of dense (B, C, H, W) maps.

    Attributes:
        images: B.
        channels: C.
        positions: H * W.
        channel_stride: Elements from one channel to the next.
        position_stride: Elements from one position to the next; one of both strides is 1.
        block_c: Channels of a tile, a power of two.
        block_s: Positions of a tile, a power of two.
    """

    images: int
    channels: int
    positions: int
    channel_stride: int
    position_stride: int
    block_c: int
    block_s: int

    @property
    def along_positions(self) -> int:
        """Tiles along the positions of an image."""
        return -(-self.positions // self.block_s)

    @property
    def along_channels(self) -> int:
        """Tiles along the channels."""
        return -(-self.channels // self.block_c)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along images and positions, which may be more than the 65535 of a second dimension, and channels."""
        return self.images * self.along_positions, self.along_channels

    @property
    def arguments(self) -> tuple[int, ...]:
        """What every kernel takes after its pointers."""
        return self.images, self.channels, self.positions, self.channel_stride, self.position_stride

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of every kernel; offsets in 64 bits only where 32 do not reach."""
        wide = self.channels * self.positions >= 2**31
        return {"BLOCK_C": self.block_c, "BLOCK_S": self.block_s, "WIDE": wide, "num_warps": WARPS}


def tile(x: Tensor) -> Tiling:
    """Cut dense (B, C, H, W) maps so that neighbouring threads read neighbouring elements.

    >>> import torch
    >>> tile(torch.empty(2, 64, 80, 80)).grid, tile(torch.empty(2, 64, 7, 7)).grid
    ((8, 64), (2, 2))
    """
    images, channels, height, width = x.shape
    positions = height * width
    if x.is_contiguous():
        block_s = min(TILE, _power(positions))
        block_c = min(TILE // block_s, _power(channels))
        return Tiling(images, channels, positions, positions, 1, block_c, block_s)
    block_c = min(128, _power(channels))
    return Tiling(images, channels, positions, 1, channels, block_c, min(TILE // block_c, _power(positions)))


def _power(count: int) -> int:
    """Return the smallest power of two that is not below a count."""
    return 1 << max(count - 1, 0).bit_length()


if triton is not None:

    @triton.jit
    def place(  # type: ignore[no-untyped-def]
        channels, positions, channel_stride, position_stride, BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr
    ):
        """Return where this program's tile is.

        The image, the number of the tile along its positions, the channels, the positions, the offsets of the
        elements from the start of the map, and which of those are inside.
        """
        tiles = tl.cdiv(positions, BLOCK_S)
        image, part = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
        s = part * BLOCK_S + tl.arange(0, BLOCK_S)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        if WIDE:
            s, c = s.to(tl.int64), c.to(tl.int64)
        at = image * channels * positions + c[:, None] * channel_stride + s[None, :] * position_stride
        return image, part, c, s, at, (c < channels)[:, None] & (s < positions)[None, :]
else:
    place = None
