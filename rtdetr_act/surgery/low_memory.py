"""Let the forward passes of a model keep less memory for the backward, where its plan says `memory=low`.

An Ultralytics task model carries its plan in `model.yaml`, for which a hook of its class asks. Any other model gets two
forward hooks, which deepcopy and pickle keep.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rtdetr_act.surgery.model_plan import is_task_model, read_plan
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.recomputation import Recomputation, is_running

_thread = threading.local()


def uses_low_memory(model: Any) -> bool:
    """Return whether the plan in the `yaml` of a task model says `memory=low`; quick enough for every forward pass."""
    model_yaml = getattr(model, "yaml", None)
    value = model_yaml.get("activation") if isinstance(model_yaml, dict) else None
    return isinstance(value, str) and _says_low(value)


def predict_in_low_memory(predict: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the forward pass of a task model, which keeps less for the backward where its plan says `memory=low`."""
    # A compiler is asked first, which would have to trace the rest.
    if torch.compiler.is_compiling() or not uses_low_memory(model):
        return predict(model, *args, **kwargs)
    with Recomputation():
        return predict(model, *args, **kwargs)


@functools.lru_cache(maxsize=256)
def _says_low(text: str) -> bool:
    return "memory" in text and Plan.from_yaml(text).memory == "low"


def set_low_memory_hooks(root: nn.Module) -> None:
    """Give a model that is not a task model the hooks that its plan asks for, or take them away."""
    remove_low_memory_hooks(root)
    if not is_task_model(root) and read_plan(root).memory == "low":
        root.register_forward_pre_hook(start_low_memory)
        root.register_forward_hook(stop_low_memory, always_call=True)


def remove_low_memory_hooks(module: nn.Module) -> None:
    """Remove the hooks of `set_low_memory_hooks` from a module that has them; another module stays as it is."""
    for hooks, own in ((module._forward_pre_hooks, start_low_memory), (module._forward_hooks, stop_low_memory)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def start_low_memory(module: nn.Module, args: Any) -> None:
    """Begin to keep less before a forward pass; a hook that pickles of models name."""
    if torch.compiler.is_compiling():
        return
    running: list[Recomputation] = _thread.__dict__.setdefault("running", [])
    while running and running[-1].frame is not None and not is_running(running[-1].frame):
        running.pop().__exit__()  # Ctrl-C has ended its forward pass, without a hook
    running.append(Recomputation(sys._getframe(1)))
    running[-1].__enter__()


def stop_low_memory(module: nn.Module, args: Any, result: Any) -> None:
    """End it after a forward pass, also one that has failed; a hook that pickles of models name."""
    if not torch.compiler.is_compiling() and _thread.running:
        _thread.running.pop().__exit__()
