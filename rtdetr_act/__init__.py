"""Swap the activation functions of Ultralytics RT-DETR and YOLO, for real.

Importing this package loads neither torch nor Ultralytics; both are loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rtdetr_act.integrations.ultralytics import hooks
from rtdetr_act.version import __version__

if TYPE_CHECKING:
    from rtdetr_act.activations.dynamic_conv import DynamicConv2d as DynamicConv2d
    from rtdetr_act.activations.registry import create as create
    from rtdetr_act.activations.registry import names as names
    from rtdetr_act.activations.registry import register as register
    from rtdetr_act.analysis.diagnosis import Diagnosis as Diagnosis
    from rtdetr_act.deploy.fold import FoldReport as FoldReport
    from rtdetr_act.deploy.fold import fold_activations as fold_activations
    from rtdetr_act.integrations.ultralytics.hooks.tasks import default_act as default_act
    from rtdetr_act.integrations.ultralytics.shapes import shapes as shapes
    from rtdetr_act.surgery.calibrate import calibrate as calibrate
    from rtdetr_act.surgery.epochs import set_epoch as set_epoch
    from rtdetr_act.surgery.patcher import PatchReport as PatchReport
    from rtdetr_act.surgery.patcher import patch_convs as patch_convs
    from rtdetr_act.surgery.patcher import patch_model as patch_model
    from rtdetr_act.surgery.patcher import unpatch_model as unpatch_model
    from rtdetr_act.surgery.plan import Plan as Plan
    from rtdetr_act.surgery.refit import refit as refit
    from rtdetr_act.surgery.sites import Site as Site
    from rtdetr_act.surgery.sites import find_sites as find_sites
    from rtdetr_act.workflows.diagnose import diagnose as diagnose

_MODULES = {
    "create": "activations.registry",
    "names": "activations.registry",
    "register": "activations.registry",
    "DynamicConv2d": "activations.dynamic_conv",
    "Diagnosis": "analysis.diagnosis",
    "diagnose": "workflows.diagnose",
    "FoldReport": "deploy.fold",
    "fold_activations": "deploy.fold",
    "default_act": "integrations.ultralytics.hooks.tasks",
    "shapes": "integrations.ultralytics.shapes",
    "calibrate": "surgery.calibrate",
    "set_epoch": "surgery.epochs",
    "PatchReport": "surgery.patcher",
    "patch_convs": "surgery.patcher",
    "patch_model": "surgery.patcher",
    "unpatch_model": "surgery.patcher",
    "Plan": "surgery.plan",
    "refit": "surgery.refit",
    "Site": "surgery.sites",
    "find_sites": "surgery.sites",
}
__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    """Load a public name from its module when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rtdetr_act' has no attribute '{name}'")
    return getattr(import_module(f"rtdetr_act.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


hooks.install()
