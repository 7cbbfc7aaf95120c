"""Return the plan of a patched model, or of the network that a state dict is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rtdetr_act.errors import InputError, ModelError
from rtdetr_act.surgery.model_plan import METADATA_KEY, read_plan
from rtdetr_act.surgery.modules import unwrap_parallel
from rtdetr_act.surgery.plan import Plan


def plan_of(source: Any) -> Plan:
    """Return the whole plan of a patched model, or of the network that a state dict is of.

    To rebuild a patched network, apply the plan to a stock one before loading the weights:
    `patch_model(model, plan_of(state_dict))`.

    Args:
        source: A model as `patch_model` takes it, which may be compiled or wrapped in DistributedDataParallel; or a
            state dict of a model that is not from Ultralytics, as `state_dict()` and `torch.load` return it.

    Returns:
        The plan, which is empty for a stock model.

    Raises:
        ModelError: Only parts of the model were given to `patch_model`, or it is exported or not a module.
        InputError: The state dict has no metadata, as after copying it into a plain dictionary or from safetensors.

    >>> from torch import nn
    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> _ = patch_model(net, "arelu"), patch_model(net, "mish", include="3")
    >>> str(plan_of(net)), plan_of(net.state_dict()) == plan_of(net)
    ('arelu, mish include=3', True)
    """
    if isinstance(source, Mapping):
        return _read_metadata(source)
    root = unwrap_parallel(source)
    plan = read_plan(root)
    if not plan:
        for name, module in root.named_modules():
            if name and read_plan(module):
                raise ModelError(f"only parts of the model were patched: ask for the plan of each, '{name}' first")
    return plan


def _read_metadata(state_dict: Mapping[str, Any]) -> Plan:
    """Return the plan of the outermost module in the metadata of a state dict that has one."""
    metadata = getattr(state_dict, "_metadata", None)
    if not metadata:
        raise InputError(
            "the mapping is not a state dict with metadata, as model.state_dict() returns it: give the one inside a "
            "checkpoint, or save the plan beside the weights by Plan.save"
        )
    stored = [path for path, entry in metadata.items() if METADATA_KEY in entry]
    if not stored:
        return Plan()
    outermost = min(stored, key=lambda path: path.count(".") + bool(path))
    return Plan.from_yaml(metadata[outermost][METADATA_KEY]["plan"])
