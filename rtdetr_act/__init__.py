"""Swap the activation functions of Ultralytics RT-DETR and YOLO, for real.

Importing this package loads neither torch nor Ultralytics; both are loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rtdetr_act import ultralytics_hooks

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rtdetr_act.activations.registry import create as create
    from rtdetr_act.activations.registry import names as names
    from rtdetr_act.activations.registry import register as register
    from rtdetr_act.convolutions.dynamic import DynamicConv2d as DynamicConv2d
    from rtdetr_act.convolutions.patching import ConvReport as ConvReport
    from rtdetr_act.convolutions.patching import patch_convs as patch_convs
    from rtdetr_act.data import shapes as shapes
    from rtdetr_act.deploy.fold import FoldReport as FoldReport
    from rtdetr_act.deploy.fold import fold_activations as fold_activations
    from rtdetr_act.diagnosis import Diagnosis as Diagnosis
    from rtdetr_act.diagnosis import diagnose as diagnose
    from rtdetr_act.patcher import PatchReport as PatchReport
    from rtdetr_act.patcher import patch_model as patch_model
    from rtdetr_act.patcher import unpatch_model as unpatch_model
    from rtdetr_act.plan import Plan as Plan
    from rtdetr_act.schedules import set_epoch as set_epoch
    from rtdetr_act.sites import Site as Site
    from rtdetr_act.sites import find_sites as find_sites
    from rtdetr_act.ultralytics_hooks import default_act as default_act
    from rtdetr_act.warmstart.calibrate import calibrate as calibrate
    from rtdetr_act.warmstart.refit import refit as refit

_ROOMS = {
    "create": "activations.registry",
    "names": "activations.registry",
    "register": "activations.registry",
    "DynamicConv2d": "convolutions.dynamic",
    "ConvReport": "convolutions.patching",
    "patch_convs": "convolutions.patching",
    "shapes": "data",
    "FoldReport": "deploy.fold",
    "fold_activations": "deploy.fold",
    "Diagnosis": "diagnosis",
    "diagnose": "diagnosis",
    "PatchReport": "patcher",
    "patch_model": "patcher",
    "unpatch_model": "patcher",
    "Plan": "plan",
    "set_epoch": "schedules",
    "Site": "sites",
    "find_sites": "sites",
    "default_act": "ultralytics_hooks",
    "calibrate": "warmstart.calibrate",
    "refit": "warmstart.refit",
}
__all__ = ["__version__", *sorted(_ROOMS)]


def __getattr__(name: str) -> Any:
    """Load a public name from its room when it is first used."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'rtdetr_act' has no attribute '{name}'")
    return getattr(import_module(f"rtdetr_act.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


ultralytics_hooks.install()
