"""Memory of a training step: its peak, what is kept for the backward pass, and the batch that fits a device."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from rtdetr_act.timing import is_cuda

OUTSIDE = "outside the layers"
_LAYER_DEPTH = 2  # "model.9" of a task model of Ultralytics, "layer1.0" of torchvision's ResNets
_ALLOCATING = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step in bytes, beyond what is allocated before it.

    Attributes:
        peak: Most memory at one time in forward and backward. On CUDA this is the peak of the caching allocator;
            elsewhere the sum of all operator results alive at one time.
        kept: Memory kept for backward.
        by_operator: `kept` by the operators that computed it, such as "convolution", the largest first.
        by_layer: `kept` by the layers that ran these operators, such as "model.9 (AIFI)", the largest first.
    """

    peak: int
    kept: int
    by_operator: Mapping[str, int]
    by_layer: Mapping[str, int]


def measure_step_memory(
    forward: Callable[[], Tensor], model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> StepMemory:
    """Measure the memory of a forward and backward pass, and what is kept between the two, in one run.

    Kept is every result of an operator of the forward pass whose storage is still alive after it, when nothing but the
    graph of the result is held. Each storage counts once and as a whole. Parameters, buffers and inputs are not results
    of operators, and a result of `forward` counts only if the backward pass needs it. Tensors that a model's own
    `saved_tensors_hooks` replaces do not count, those that it holds instead do. So does what a first call leaves in a
    cache: call `forward` once before.

    An operator is named by its ATen name without the overload. What an operator overwrites stays with the operator
    that allocated it: with an activation in place, the map is listed as BatchNorm's. A layer is a module of `model`,
    named to a depth of two; operators of its submodules belong to it.

    Args:
        forward: Function that returns a tensor, which must need gradients. The sum of its elements is differentiated,
            so that gradients are added to those of the parameters.
        model: Model whose layers are told apart. Default: None, everything belongs to `OUTSIDE`.
        device: Device on which it computes. Default: "cpu".

    >>> x = torch.zeros(1000, requires_grad=True)
    >>> memory = measure_step_memory(lambda: x.exp().sin())
    >>> memory.kept, memory.by_operator  # the result of exp, which its own backward reads and that of sin
    (4000, {'exp': 4000})
    """
    gc.collect()  # so that no garbage of before is freed in between
    tracker = _AllocationTracker(torch.device(device).type)
    before = 0
    if on_cuda := is_cuda(device):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with _track_layers(model) as tracker.layers, tracker:
        total = forward().sum()  # of which the backward needs no value, so that the result is no longer held
        gc.collect()
        kept = tracker.list_alive(without=total)
    # Under a dispatch mode, autograd adds gradients to new memory: with CUDA's own statistics there is no need for one.
    with nullcontext() if on_cuda else tracker:
        total.backward()
    peak = int(torch.cuda.max_memory_allocated(device)) - before if on_cuda else tracker.peak
    return StepMemory(
        peak,
        sum(each.size for each in kept),
        _sum_sizes(kept, lambda each: each.operator),
        _sum_sizes(kept, lambda each: each.layer),
    )


@dataclass
class _Allocation:
    """Storage that an operator allocated.

    Attributes:
        size: Bytes.
        operator: Name of the operator.
        layer: Name of the layer that ran it.
        reference: Weak reference to the storage, which calls back when it is freed.
    """

    size: int
    operator: str
    layer: str
    reference: weakref.ref[torch.UntypedStorage]


def _sum_sizes(allocations: list[_Allocation], group: Callable[[_Allocation], str]) -> dict[str, int]:
    """Return the bytes of allocations by group, the largest first."""
    sizes: Counter[str] = Counter()
    for each in allocations:
        sizes[group(each)] += each.size
    return dict(sizes.most_common())


class _AllocationTracker(TorchDispatchMode):
    """Tracks the storages of operator results that are alive on one type of device.

    A weak reference to each storage calls back when it is freed, which takes the same time however many there are: a
    storage keeps its Python object as long as it lives, so that the two die together.

    Attributes:
        layers: Stack of the names of the layers that run, the innermost last.
        peak: Most bytes alive at one time so far.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.layers = [OUTSIDE]
        self.peak = 0
        self._total = 0
        self._device_type = device_type
        self._alive: dict[int, _Allocation] = {}

    def list_alive(self, without: Tensor) -> list[_Allocation]:
        """Return what is alive except the storage of a tensor."""
        left_out = without.untyped_storage()._cdata
        return [each for key, each in list(self._alive.items()) if key != left_out]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in _iterate_tensors(out):
            if tensor.device.type != self._device_type or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._alive:
                self._update(storage, func)
            elif all(storage._cdata != key for key in _iterate_keys((args, kwargs))):  # no view of a parameter or input
                self._add(storage, func.overloadpacket.__name__)
        return out

    def _add(self, storage: torch.UntypedStorage, operator: str) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, partial(self._remove, key))
        self._alive[key] = _Allocation(0, operator, self.layers[-1], reference)
        self._resize(key, storage.nbytes())

    def _update(self, storage: torch.UntypedStorage, func: Any) -> None:
        """Note what an operator did to a storage that is tracked.

        Memory from `torch.empty` gets the name of the first operator that writes to it, and the size that `out=` gives.
        """
        allocation = self._alive[storage._cdata]
        name = func.overloadpacket.__name__
        if allocation.operator in _ALLOCATING and func._schema.is_mutable:
            allocation.operator = name.removesuffix("_")
        self._resize(storage._cdata, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        self._total += size - self._alive[key].size
        self._alive[key].size = size
        self.peak = max(self.peak, self._total)

    def _remove(self, key: int, _: object) -> None:
        self._total -= self._alive.pop(key).size


def _iterate_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from _iterate_tensors(each)
    elif isinstance(values, dict):
        yield from _iterate_tensors(list(values.values()))


def _iterate_keys(values: Any) -> Iterator[int]:
    """Yield the addresses of the storages of tensors."""
    for tensor in _iterate_tensors(values):
        if tensor.layout == torch.strided:
            yield tensor.untyped_storage()._cdata


@contextmanager
def _track_layers(model: nn.Module | None) -> Iterator[list[str]]:
    """Yield the stack of the names of the layers that run, the innermost last.

    torch's ModuleTracker names modules in full and registers hooks on gradients, too, of which nothing is needed here.
    """
    names = _name_layers(model) if model is not None else {}
    running = [OUTSIDE]

    def enter(module: nn.Module, _: Any) -> None:
        own = names.get(id(module), [])
        # A module of several layers, such as Ultralytics' one SiLU, and one of the loss belong to what calls them.
        running.append(own[0] if len(own) == 1 or (own and running[-1] == OUTSIDE) else running[-1])

    def leave(*_: Any) -> None:
        running.pop()

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),  # after an exception, too, which a model may catch
    )
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def _name_layers(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the layers that a submodule is in, such as "model.9 (AIFI)", by the id of the submodule."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for path, module in modules.items():
        layer = ".".join(path.split(".")[:_LAYER_DEPTH])
        name = f"{layer} ({type(modules[layer]).__name__})"
        own = names.setdefault(id(module), [])
        if path and name not in own:
            own.append(name)
    return names


def count_state_bytes(model: nn.Module) -> int:
    """Return the bytes that training holds between steps: weights, gradients and the states of AdamW and the EMA.

    These are the parameters and buffers, their copy in the exponential moving average, and for each parameter that
    trains a gradient and two moments.

    Args:
        model: Model, of which only parameters that require gradients are trained.

    >>> count_state_bytes(nn.Linear(10, 10, bias=False))  # five times 100 numbers of four bytes
    2000
    """
    parameters = list(model.parameters())
    state = sum(t.nbytes for t in [*parameters, *model.buffers()])
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return 2 * state + 3 * trained


@dataclass(frozen=True)
class BatchEstimate:
    """Largest batch whose training step fits into the memory of a device: an estimate.

    The memory of a step is taken as `state_bytes + step_bytes + batch * image_bytes`.

    Attributes:
        gib: Memory of the device in GiB.
        batch: Images of the largest batch; 0 if not even one image fits.
        state_bytes: Memory held between steps, as `count_state_bytes` returns it.
        step_bytes: Memory of a step that does not depend on the batch.
        image_bytes: Memory that each image adds.
    """

    gib: float
    batch: int
    state_bytes: int
    step_bytes: int
    image_bytes: int


def estimate_batch(peaks: Mapping[int, int], state_bytes: int, gib: float) -> BatchEstimate:
    """Estimate the largest batch that fits, from the peaks of steps with two batches.

    Args:
        peaks: Peak memory of a step in bytes, beyond the state, by the number of images.
        state_bytes: Memory held between steps.
        gib: Memory of the device in GiB.

    >>> estimate_batch({2: 300 * 2**20, 4: 500 * 2**20}, 124 * 2**20, gib=1).batch  # 124 + 100 + 8 * 100 = 1024
    8
    """
    (small, at_small), (large, at_large) = sorted(peaks.items())
    per_image = max(1, round((at_large - at_small) / (large - small)))
    step = at_small - small * per_image
    batch = int((gib * 2**30 - state_bytes - step) // per_image)
    return BatchEstimate(gib, max(0, batch), state_bytes, step, per_image)
