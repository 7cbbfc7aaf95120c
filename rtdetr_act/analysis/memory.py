"""Memory of a call: tensors saved for the backward pass, and the peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rtdetr_act.timing import is_cuda


def measure_saved_bytes(forward: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Return the bytes that autograd saves for the backward pass of a call.

    Each storage counts once; the parameters of the model do not count.

    Args:
        forward: Function to call; its result must need gradients.
        model: Model whose parameters are left out.

    >>> x = torch.zeros(1000, requires_grad=True)
    >>> measure_saved_bytes(lambda: x.exp()), measure_saved_bytes(lambda: x.exp().exp())
    (4000, 8000)
    """
    weights = {t.untyped_storage().data_ptr() for t in (model.parameters() if model is not None else ())}
    saved: dict[int, Tensor] = {}

    def save(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t  # referenced, so that no address is reused
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        result = forward()
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    del result
    return total


class _PeakMemory(TorchDispatchMode):
    """Tracks the memory of all operator results that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def measure_peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the peak memory of a call beyond what is allocated before it, in bytes.

    On CUDA this is the peak of the caching allocator; elsewhere the sum of all operator results alive at one time.

    Args:
        step: Function to call.
        device: Device on which it computes.
    """
    if is_cuda(device):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _PeakMemory() as memory:
        step()
    return memory.peak
