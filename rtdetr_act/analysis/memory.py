"""The memory of a call: what autograd keeps for the backward, and the peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rtdetr_act.timing import is_cuda


def measure_saved_bytes(forward: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Return the bytes that autograd keeps for the backward of a call, each memory once, weights left out.

    >>> x = torch.zeros(1000, requires_grad=True)
    >>> measure_saved_bytes(lambda: x.exp()), measure_saved_bytes(lambda: x.exp().exp())
    (4000, 8000)
    """
    weights = {t.untyped_storage().data_ptr() for t in (model.parameters() if model is not None else ())}
    kept: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is given twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = forward()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result
    return total


class _PeakMemory(TorchDispatchMode):
    """Adds up the memory of all living results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._living = {key: (ref, size) for key, (ref, size) in self._living.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return out


def measure_peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the peak of the memory that a call takes on a device beyond what is there before it.

    On CUDA by the allocator; elsewhere by the results of all operators that live at the same time.
    """
    if is_cuda(device):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _PeakMemory() as memory:
        step()
    return memory.peak
