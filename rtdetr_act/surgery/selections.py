"""Let a network select the same positions as another one, where it takes the largest of several values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Selections:
    """The indices that a network takes by `topk`, such as those of RT-DETR's queries.

    A small change of the scores changes their order. All that is behind is then computed for other positions, so that
    two networks could not be compared there.
    """

    def __init__(self) -> None:
        self._indices: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the selections of a network that runs inside the block."""
        with _Record(self._indices):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Let a network that runs inside the block select what was recorded, in the same order of calls."""
        with _Replay(iter(self._indices)):
            yield


class _Record(TorchFunctionMode):
    def __init__(self, indices: list[Tensor]) -> None:
        super().__init__()
        self._indices = indices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TOPK:
            self._indices.append(result[1])
        return result


class _Replay(TorchFunctionMode):
    def __init__(self, indices: Iterator[Tensor]) -> None:
        super().__init__()
        self._indices = indices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        indices = next(self._indices, None) if func in _TOPK else None
        if indices is None or indices.shape != result[1].shape:
            return result
        values = args[0] if args else kwargs["input"]
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        return torch.return_types.topk((values.gather(dim, indices), indices))


_TOPK = (torch.topk, Tensor.topk)
