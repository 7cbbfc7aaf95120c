"""Tiling of feature maps for the Triton kernels: tiles of channels by positions, contiguous or channels_last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rtdetr_act.kernels.backend import constexpr, tl, triton

# Elements per tile: 16 for each of the 128 threads of four warps, two 16-byte loads of a half type.
TILE = 2048
WARPS = 4


@dataclass(frozen=True)
class Tiling:
    """The tiles of dense (B, C, H, W) maps.

    Attributes:
        images: B.
        channels: C.
        positions: H * W.
        channel_stride: Stride between channels, in elements.
        position_stride: Stride between positions, in elements; one of the two strides is 1.
        block_c: Channels per tile, a power of two.
        block_s: Positions per tile, a power of two.
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
        """Number of tiles along the positions of one image."""
        return -(-self.positions // self.block_s)

    @property
    def along_channels(self) -> int:
        """Number of tiles along the channels."""
        return -(-self.channels // self.block_c)

    @property
    def grid(self) -> tuple[int, int]:
        """Launch grid: (images * position tiles, channel tiles), since the second dimension is limited to 65535."""
        return self.images * self.along_positions, self.along_channels

    @property
    def arguments(self) -> tuple[int, ...]:
        """Arguments of every kernel after its pointers: B, C, H * W and the two strides."""
        return self.images, self.channels, self.positions, self.channel_stride, self.position_stride

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of every kernel; WIDE selects 64-bit offsets."""
        wide = self.channels * self.positions >= 2**31  # 32-bit offsets would overflow
        return {"BLOCK_C": self.block_c, "BLOCK_S": self.block_s, "WIDE": wide, "num_warps": WARPS}


def tile(x: Tensor) -> Tiling:
    """Return a tiling of dense (B, C, H, W) maps in which neighbouring threads read neighbouring elements.

    >>> import torch
    >>> tile(torch.empty(2, 64, 80, 80)).grid, tile(torch.empty(2, 64, 7, 7)).grid
    ((8, 64), (2, 2))
    """
    images, channels, height, width = x.shape
    positions = height * width
    if x.is_contiguous():
        block_s = min(TILE, _next_power_of_2(positions))
        block_c = min(TILE // block_s, _next_power_of_2(channels))
        return Tiling(images, channels, positions, positions, 1, block_c, block_s)
    block_c = min(128, _next_power_of_2(channels))
    return Tiling(images, channels, positions, 1, channels, block_c, min(TILE // block_c, _next_power_of_2(positions)))


def _next_power_of_2(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


if triton is not None:

    @triton.jit
    def locate_tile(  # type: ignore[no-untyped-def]
        channels, positions, channel_stride, position_stride, BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr
    ):
        """Return the indices of this program's tile in dense (B, C, H, W) maps.

        Args:
            channels: C, and the following ones as in `Tiling`.
            positions: H * W.
            channel_stride: In elements.
            position_stride: In elements.
            BLOCK_C: Channels per tile.
            BLOCK_S: Positions per tile.
            WIDE: Whether offsets need 64 bits.

        Returns:
            The image, the index of the tile along its positions, the channels (BLOCK_C,), the positions (BLOCK_S,), the
            offsets of the elements (BLOCK_C, BLOCK_S), and the mask of those inside the map.
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
    locate_tile = None
