"""Keep less memory for the backward pass: what is cheap to compute again is computed again instead of being kept.

A block `act(bn(conv(x)))` keeps three maps: BatchNorm its input, the activation its input or its result, and the next
convolution the result. The second and the third follow from the first by a pass over memory each, with BatchNorm's
statistics, which are kept anyway. So one map of three is enough, for any activation.

`torch.autograd.graph.saved_tensors_hooks` ask what to keep in place of a tensor, and a `TorchFunctionMode` sees which
function computed it from what. Nothing is approximated, and no module, name, buffer or random state changes. On a CPU
gradients are the same to the last bit, elsewhere they differ by rounding alone.

In-place activated BatchNorm (Rota Bulò et al., arXiv:1712.02616) keeps the result instead and computes BatchNorm's
input back from it. That needs an invertible activation and divides by gamma: with a gamma of 1e-4, nothing is left of
the input in float16.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from rtdetr_act.kernels.aten import (
    get_batch_statistics,
    get_storage_address,
    has_saved_tensor_hooks,
    is_functorch_active,
    is_tracing,
    normalise_batch,
)
from rtdetr_act.kernels.backend import PLAIN_TENSORS
from rtdetr_act.kernels.recomputable import is_recomputable, saves_copy_in_place, split_inplace

# Smaller results are kept: their calls would cost more than their memory is worth.
SMALL_BYTES = 1 << 16
# A result is kept if more calls in a row than this would compute it. A concatenation of activated blocks takes three;
# in a chain of residual connections every sum needs the one before it, so that all would be held at one time.
MAX_DEPTH = 10
_CALLS_BETWEEN_LOOKS = 500  # of torch's functions; a look takes about 5 µs
_BATCH_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
# A third of the calls in yolo11n: BatchNorm looks at its input and counts its batches.
_SAVE_NOTHING = {Tensor.dim, Tensor.add_}
_thread = threading.local()


class Recomputation:
    """A context manager in which autograd keeps recipes in place of results that are cheap to compute again.

    It does nothing where autograd itself records no graph: under `torch.no_grad`, in `torch.compile` (which plans
    memory by itself), under tracing and `torch.func`. Nor does it inside of saved tensor hooks of others, such as those
    of a checkpoint, or inside another one.

    Args:
        frame: The frame inside of which it ends, for a caller that Ctrl-C may keep from ending it. Default: None.
    """

    def __init__(self, frame: FrameType | None = None) -> None:
        self.frame = frame
        self._recorder: _Recorder | None = None

    def __enter__(self) -> None:
        if _records_graph() and not getattr(_thread, "active", False):
            self._recorder = _Recorder(self.frame)
            self._recorder.__enter__()
            _thread.active = True

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            _thread.active = False
            self._recorder.__exit__(None, None, None)
            self._recorder.forget()  # what autograd saves refers to it
            self._recorder = None


def _records_graph() -> bool:
    """Return whether autograd itself records a graph now, and keeps what it saves."""
    skipped = torch.compiler.is_compiling() or is_tracing() or is_functorch_active() or has_saved_tensor_hooks()
    return torch.is_grad_enabled() and not skipped


# ---------------------------------------------------------------- what is kept, and what is computed again


class _Kept:
    """A tensor that is kept, with autograd's check that nobody has written over it."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor, self.version = tensor, version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class _Computed:
    """The result of a call that is computed again when the backward needs it.

    The first use in the backward computes it, and it is held until the last one: that of the convolution which reads
    the result of an activation, and then that of the activation itself.

    Args:
        function: Called with the arguments, in which tensors are `_Kept` or `_View`.
        args: Positional arguments, without `inplace`.
        kwargs: Keyword arguments, without `inplace`.
        inplace: Whether the call wrote over its first argument.
        result: What it returned.
        depth: Number of calls in a row that compute it, this one included.
    """

    __slots__ = ("_args", "_autocast", "_function", "_inplace", "_kwargs", "_result", "_strides", "depth", "uses")

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inplace: bool,
        result: Tensor,
        depth: int,
    ) -> None:
        self._function, self._args, self._kwargs, self._inplace = function, args, kwargs, inplace
        self._autocast = _read_autocast(result.device.type)
        self._strides = result.stride()
        self._result: Tensor | None = None
        self.depth = depth
        self.uses = 0  # that are still to come

    def get(self) -> Tensor:
        if self._result is not None:
            return self._result
        result = self._compute()
        if self.uses > 0:
            self._result = result
        return result

    def finish_use(self) -> None:
        """Count one use; after the last one, let go of the result."""
        self.uses -= 1
        if self.uses <= 0:
            self._result = None

    @property
    def is_shared(self) -> bool:
        """Whether others use the tensor that `get` returns, too."""
        return self._result is not None or self.uses > 0

    def _compute(self) -> Tensor:
        if torch.is_grad_enabled():  # in the backward of gradients that have gradients
            with torch.no_grad():
                return self._compute()
        overwrites = self._inplace and isinstance(self._args[0], _View) and not self._args[0].source.is_shared
        extra = {"inplace": True} if overwrites else {}
        with _autocast_as(self._autocast):
            kwargs = {key: _get_all(value) for key, value in self._kwargs.items()}
            result: Tensor = self._function(*_get_all(self._args), **kwargs, **extra)
        if result.stride() == self._strides:
            return result
        shaped = torch.empty_strided(result.shape, self._strides, dtype=result.dtype, device=result.device)
        return shaped.copy_(result)


class _View:
    """A tensor in the memory of a computed result.

    Args:
        source: The result.
        like: A tensor with the same size, strides and offset.
    """

    __slots__ = ("_geometry", "source")

    def __init__(self, source: _Computed, like: Tensor) -> None:
        self.source = source
        self._geometry = like.size(), like.stride(), like.storage_offset()

    def get(self) -> Tensor:
        return self.source.get().as_strided(*self._geometry)


class _Saved:
    """What autograd holds in place of a tensor that an operator saved for its backward."""

    __slots__ = ("source",)

    def __init__(self, source: _Kept | _View) -> None:
        self.source = source

    def unpack(self) -> Tensor:
        """Return the tensor."""
        tensor = self.source.get()
        if isinstance(self.source, _View):
            self.source.source.finish_use()
        return tensor


def _get_all(value: Any) -> Any:
    """Return an argument of a call with tensors for what stands for them."""
    if isinstance(value, (_Kept, _View)):
        return value.get()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_get_all, value))
    return value


def _read_autocast(device: str) -> tuple[str, bool, torch.dtype]:
    """Return the state of autocast on a type of device, some of which have none."""
    if not torch.amp.is_autocast_available(device):
        return device, False, torch.float32
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _autocast_as(state: tuple[str, bool, torch.dtype]) -> AbstractContextManager[Any]:
    """Return a context with a state of autocast, which is off while a backward runs."""
    device, enabled, dtype = state
    return nullcontext() if _read_autocast(device) == state else torch.autocast(device, dtype, enabled)


# ---------------------------------------------------------------- what computed which tensor


class _Origin:
    """Where the contents of a storage come from: a call that can be repeated, or autograd keeps them in any case.

    Args:
        tensor: A tensor in the storage: the result of the call, or what autograd keeps.
        computed: The call; None (default) for what autograd keeps.
    """

    __slots__ = ("_tensor", "_version", "computed")

    def __init__(self, tensor: Tensor, computed: _Computed | None = None) -> None:
        self._tensor = TensorWeakRef(tensor)
        self._version = tensor._version  # by which autograd counts writes in place
        self.computed = computed

    def is_current(self) -> bool:
        """Return whether the contents are still there; the address of a storage that is freed is used again."""
        tensor: Any = self._tensor()
        return tensor is not None and tensor._version == self._version


class _Part(NamedTuple):
    """What stands for an argument of a call.

    Attributes:
        value: A `_Kept` or `_View`, a list of them, or the argument itself if it is not a tensor.
        depth: Number of calls in a row that compute it.
    """

    value: Any
    depth: int = 0


class _Recorder(TorchFunctionMode):
    """Sees the calls of torch's functions, and decides what autograd keeps of the tensors that they save.

    Hooks are on for the calls alone that read a computed result or give one. All others, and autograd functions, save
    tensors as ever.
    """

    def __init__(self, frame: FrameType | None = None) -> None:
        super().__init__()
        self._frame, self._calls, self._over = frame, 0, False
        self._origins: dict[int, _Origin] = {}  # by the address of the storage
        self._saved: list[_Saved] = []  # by the present call
        self._hooks = saved_tensors_hooks(self._pack, _Saved.unpack)

    def forget(self) -> None:
        """Let go of all that it has recorded."""
        self._origins.clear()
        self._frame = None

    def _is_over(self) -> bool:
        """Return whether it was left active by mistake, which is looked for from time to time."""
        self._calls += 1
        if self._frame is not None and self._calls % _CALLS_BETWEEN_LOOKS == 0 and not is_running(self._frame):
            self._over = True
            self.forget()
        return self._over

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(_Kept(tensor, tensor._version))
        self._saved.append(saved)
        return saved

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAVE_NOTHING:
            return func(*args, **kwargs)
        # Inside an autograd function, in a checkpoint, and on the tensors of a compiler, there is nothing to decide.
        if not torch.is_grad_enabled() or has_saved_tensor_hooks() or not _are_plain(args) or self._is_over():
            return func(*args, **kwargs)
        if is_recomputable(func) and not all(map(_is_small, args)):
            return self._call_recomputable(func, args, kwargs)
        reads = any(self._is_computed(value) for value in (*args, *kwargs.values()))
        result = self._call(func, args, kwargs) if reads else func(*args, **kwargs)
        if func is F.batch_norm:
            self._record_batch_norm(result, {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **kwargs})
        return result

    def _is_computed(self, value: Any) -> bool:
        """Return whether a value is, or a list has, a tensor that is computed again."""
        if isinstance(value, Tensor):
            origin = self._find_origin(value)
            return origin is not None and origin.computed is not None
        return isinstance(value, (list, tuple)) and any(map(self._is_computed, value))

    def _find_origin(self, tensor: Tensor) -> _Origin | None:
        origin = self._origins.get(get_storage_address(tensor))
        return origin if origin is not None and origin.is_current() else None

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, and decide what to keep of what it saves."""
        with self._hooks:
            result = function(*args, **kwargs)
        written = _index_tensors(result)
        self._decide_results(self._decide_inputs(written, None), written)
        return result

    def _call_recomputable(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function whose result is cheap to compute again, record how, and decide what to keep."""
        others, named, inplace = split_inplace(function, args, kwargs)
        before = self._describe(args[0]) if inplace else None
        with self._hooks:
            result = function(*args, **kwargs)
        written = _index_tensors(result)
        if inplace:  # what was there is gone, also where a kernel has not counted its write
            for address in written:
                self._origins.pop(address, None)
        saved_results = self._decide_inputs(written, before if saves_copy_in_place(function) else None)
        if isinstance(result, Tensor) and not (inplace and before is None):
            first = [before] if inplace else []
            parts = [*first, *map(self._describe, others[len(first) :])]
            self._record(function, parts, {key: self._describe(value) for key, value in named.items()}, inplace, result)
        self._decide_results(saved_results, written)
        return result

    def _record_batch_norm(self, result: Tensor, arguments: dict[str, Any]) -> None:
        """Record how to compute the result of a BatchNorm, in training with the statistics of the batch, again."""
        if not result.requires_grad or _is_small(result):
            return
        source: Tensor = arguments["input"]
        if self._find_origin(source) is None:
            self._origins[get_storage_address(source)] = _Origin(source)  # which its backward reads
        function: Callable[..., Any] = F.batch_norm
        if arguments.get("training"):
            statistics = get_batch_statistics(result)
            if statistics is None:
                return
            if statistics[0].dtype in (torch.float16, torch.bfloat16):  # which are too coarse: they are computed again
                arguments = {**arguments, "running_mean": None, "running_var": None}
            else:
                function = normalise_batch
                arguments = {name: arguments.get(name) for name in ("input", "weight", "bias")}
                kept = [_Kept(each, each._version) for each in statistics]
                arguments |= dict(zip(("mean", "inverse_deviation"), kept, strict=True))
        self._record(function, [], {key: self._describe(value) for key, value in arguments.items()}, False, result)

    def _record(
        self,
        function: Callable[..., Any],
        args: Sequence[_Part | None],
        kwargs: Mapping[str, _Part | None],
        inplace: bool,
        result: Tensor,
    ) -> None:
        """Record how to compute a result again, if all that it takes is kept in any case."""
        if _is_small(result) or result.nbytes != result.untyped_storage().nbytes():  # or a part of another one
            return
        if self._find_origin(result) is not None:  # a view
            return
        parts = [part for part in (*args, *kwargs.values()) if part is not None]
        depth = 1 + max((part.depth for part in parts), default=0)
        if len(parts) < len(args) + len(kwargs) or depth > MAX_DEPTH:
            return
        positional = [part.value for part in args if part is not None]
        named = {key: part.value for key, part in kwargs.items() if part is not None}
        computed = _Computed(function, positional, named, inplace, result, depth)
        self._origins[get_storage_address(result)] = _Origin(result, computed)

    def _describe(self, value: Any) -> _Part | None:
        """Return what stands for an argument in a record; None if it would have to be kept for that alone."""
        if isinstance(value, Tensor):
            origin = self._find_origin(value)
            if origin is not None and origin.computed is not None:
                return _Part(_View(origin.computed, value), origin.computed.depth)
            if origin is not None:
                return _Part(_Kept(value.detach(), value._version))
            # Autograd need not keep it, so that it may be written over.
            return _Part(value.detach().clone()) if _is_small(value) else None
        if isinstance(value, (list, tuple)):
            parts = [part for part in map(self._describe, value) if part is not None]
            depth = max((part.depth for part in parts), default=0)
            return _Part([part.value for part in parts], depth) if len(parts) == len(value) else None
        return _Part(value)

    def _decide_inputs(self, written: Mapping[int, Tensor], before: _Part | None) -> list[_Saved]:
        """Decide what to keep of the inputs that the present call has saved.

        Args:
            written: The results of the call, by the addresses of their storages.
            before: The first argument of a call that wrote over it. If its backward reads the input, as that of SiLU,
                torch saves a copy, for which `before` stands.

        Returns:
            What it has saved of its results, still undecided.
        """
        saved_by_call, self._saved = self._saved, []
        results = []
        for saved in saved_by_call:
            kept: Any = saved.source
            address = get_storage_address(kept.tensor)
            if address in written:
                results.append(saved)
            elif before is not None and isinstance(before.value, _View) and self._is_copy(kept.tensor, written):
                saved.source = before.value
                before.value.source.uses += 1
            else:
                self._decide(saved, address, kept)
        return results

    def _is_copy(self, tensor: Tensor, written: Mapping[int, Tensor]) -> bool:
        """Return whether a tensor that a call in place has saved is the copy of its first argument."""
        return self._find_origin(tensor) is None and any(tensor.shape == each.shape for each in written.values())

    def _decide_results(self, saved_results: Sequence[_Saved], written: Mapping[int, Tensor]) -> None:
        """Decide what to keep of results. Autograd saves them without their version, so they are looked up."""
        for saved in saved_results:
            tensor: Tensor = saved.source.tensor  # type: ignore[union-attr]
            address = get_storage_address(tensor)
            result = written[address].detach()
            if (result.shape, result.stride()) != (tensor.shape, tensor.stride()):
                result = result.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            self._decide(saved, address, _Kept(result, result._version))

    def _decide(self, saved: _Saved, address: int, kept: _Kept) -> None:
        """Let the call stand for a saved tensor that it has computed, else keep the tensor."""
        origin = self._origins.get(address)
        if origin is None or not origin.is_current():
            saved.source = kept
            if not _is_small(kept.tensor):
                self._origins[address] = _Origin(kept.tensor)
        elif origin.computed is None:
            saved.source = kept
        else:
            saved.source = _View(origin.computed, kept.tensor)
            origin.computed.uses += 1


def is_running(frame: FrameType) -> bool:
    """Return whether a frame is on the stack of this thread."""
    found: FrameType | None = sys._getframe(1)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None


def _are_plain(args: Sequence[Any]) -> bool:
    return all(type(each) in PLAIN_TENSORS for each in args if isinstance(each, Tensor))


def _is_small(value: Any) -> bool:
    """Return whether an argument is a small tensor, several, or none."""
    if isinstance(value, Tensor):
        return value.nbytes < SMALL_BYTES
    return not isinstance(value, (list, tuple)) or all(map(_is_small, value))


def _index_tensors(value: Any) -> dict[int, Tensor]:
    """Return a tensor, or those in a list or tuple, by the addresses of their storages."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return {get_storage_address(each): each for each in values if isinstance(each, Tensor)}
