"""Let the state dicts of a patched model carry its plan, and warn where one of another network is loaded.

The plan rides in the `_metadata` of the state dict, which `torch.save` and `torch.load` keep; keys and tensors stay as
they are. Ultralytics task models carry their plan in `model.yaml` and get no hooks, since a pickle names the functions
of its hooks: their checkpoints must load without this package where all activations are torch's own.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

from torch import nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import warn
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.model_plan import METADATA_KEY, read_plain_plan, read_plan
from rtdetr_act.surgery.plan import Plan, Rule


def add_state_dict_hooks(root: nn.Module) -> None:
    """Let a patched model write its plan into state dicts, and read it from those that are loaded."""
    if record_plan not in root._state_dict_hooks.values():
        root._register_state_dict_hook(record_plan)
        root._register_load_state_dict_pre_hook(compare_plans, with_module=True)


def remove_state_dict_hooks(module: nn.Module) -> None:
    """Remove the hooks of `add_state_dict_hooks` from a module that has them; another module stays as it is."""
    for hooks, own in ((module._state_dict_hooks, record_plan), (module._load_state_dict_pre_hooks, compare_plans)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is own]:
            del hooks[key]


def record_plan(root: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Write the plan of a model into the metadata of its state dict; a hook that pickles of models name."""
    local_metadata[METADATA_KEY] = {"plan": read_plain_plan(root), "swaps": _sum_swaps(root)}


def compare_plans(root: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
    """Warn if a state dict is of a network with other swaps; a hook that pickles of models name.

    A state dict without metadata, such as one that was copied into a plain dictionary, says nothing about its network.
    """
    if "version" not in local_metadata:
        return
    stored = local_metadata.get(METADATA_KEY)
    if stored is not None and stored["swaps"] == _sum_swaps(root):
        return
    theirs = str(Plan.from_yaml(stored["plan"])) if stored is not None else ""
    source = f"with '{theirs}'" if theirs else "without a swap"
    message = (
        f"these weights are of a network {source}, and are loaded into one with '{read_plan(root)}': where that is not "
        "what you want, build it by rtdetr_act.patch_model(model, rtdetr_act.plan_of(state_dict)) first"
    )
    warn(message)


def _sum_swaps(root: nn.Module) -> int:
    """Return a checksum of the names and activations of all swapped sites of a model."""
    lines = [
        f"{name} {_normalise(placed.spec)}"
        for name, module in root.named_modules()
        if (placed := get_placement(module))
    ]
    return zlib.crc32("\n".join(sorted(lines)).encode())


@functools.lru_cache(maxsize=1024)
def _normalise(spec: str) -> str:
    """Return a spec without a schedule, which plans drop once it has finished."""
    return str(Rule(ActSpec.parse(spec)).without_finished_schedules(float("inf")).activation)
