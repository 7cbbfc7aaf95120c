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
    from rtdetr_act.analysis.curves import plot_activations as plot_activations
    from rtdetr_act.analysis.diagnosis import Diagnosis as Diagnosis
    from rtdetr_act.analysis.sensitivity import Sensitivity as Sensitivity
    from rtdetr_act.analysis.sensitivity import measure_sensitivity as measure_sensitivity
    from rtdetr_act.deploy.fold import FoldReport as FoldReport
    from rtdetr_act.deploy.fold import fold_activations as fold_activations
    from rtdetr_act.errors import FoldError as FoldError
    from rtdetr_act.errors import InputError as InputError
    from rtdetr_act.errors import Interrupted as Interrupted
    from rtdetr_act.errors import ModelError as ModelError
    from rtdetr_act.errors import RtdetrActError as RtdetrActError
    from rtdetr_act.errors import RtdetrActWarning as RtdetrActWarning
    from rtdetr_act.errors import SelectionError as SelectionError
    from rtdetr_act.errors import ShapeError as ShapeError
    from rtdetr_act.errors import SpecError as SpecError
    from rtdetr_act.errors import TrainingError as TrainingError
    from rtdetr_act.integrations.ultralytics.costs import Cost as Cost
    from rtdetr_act.integrations.ultralytics.hooks.tasks import default_act as default_act
    from rtdetr_act.integrations.ultralytics.latency import Latency as Latency
    from rtdetr_act.integrations.ultralytics.models import load_model as load_model
    from rtdetr_act.integrations.ultralytics.runs import Outcome as Outcome
    from rtdetr_act.integrations.ultralytics.shapes import shapes as shapes
    from rtdetr_act.integrations.yolov5.trained import Trained as Trained
    from rtdetr_act.kernels.recomputable import recomputable as recomputable
    from rtdetr_act.study.leaderboard import LeaderboardRow as LeaderboardRow
    from rtdetr_act.study.power import PowerPlan as PowerPlan
    from rtdetr_act.study.power import plan_seeds as plan_seeds
    from rtdetr_act.study.report import StudyReport as StudyReport
    from rtdetr_act.study.report import report_study as report_study
    from rtdetr_act.study.runner import SearchReport as SearchReport
    from rtdetr_act.study.runner import run_search as run_search
    from rtdetr_act.study.runner import run_study as run_study
    from rtdetr_act.surgery.calibrate import calibrate as calibrate
    from rtdetr_act.surgery.carried_plan import plan_of as plan_of
    from rtdetr_act.surgery.convert import convert as convert
    from rtdetr_act.surgery.coverage import Coverage as Coverage
    from rtdetr_act.surgery.epochs import set_epoch as set_epoch
    from rtdetr_act.surgery.optimizer import add_to_optimizer as add_to_optimizer
    from rtdetr_act.surgery.patcher import PatchReport as PatchReport
    from rtdetr_act.surgery.patcher import patch_convs as patch_convs
    from rtdetr_act.surgery.patcher import patch_model as patch_model
    from rtdetr_act.surgery.patcher import unpatch_model as unpatch_model
    from rtdetr_act.surgery.plan import Plan as Plan
    from rtdetr_act.surgery.refit import refit as refit
    from rtdetr_act.surgery.sites import Site as Site
    from rtdetr_act.surgery.sites import find_sites as find_sites
    from rtdetr_act.workflows.activations import ActivationListing as ActivationListing
    from rtdetr_act.workflows.activations import list_activations as list_activations
    from rtdetr_act.workflows.bench import bench_exports as bench_exports
    from rtdetr_act.workflows.bench import bench_training as bench_training
    from rtdetr_act.workflows.checks import collect_checks as collect_checks
    from rtdetr_act.workflows.compare import DetectorComparison as DetectorComparison
    from rtdetr_act.workflows.compare import compare_detectors as compare_detectors
    from rtdetr_act.workflows.conversion import Conversion as Conversion
    from rtdetr_act.workflows.convert import convert_checkpoint as convert_checkpoint
    from rtdetr_act.workflows.curves import plot_checkpoint as plot_checkpoint
    from rtdetr_act.workflows.diagnose import diagnose as diagnose
    from rtdetr_act.workflows.diagnose import diagnose_variants as diagnose_variants
    from rtdetr_act.workflows.doctor import examine as examine
    from rtdetr_act.workflows.examination import Examination as Examination
    from rtdetr_act.workflows.export import export_checkpoint as export_checkpoint
    from rtdetr_act.workflows.fold import fold_checkpoint as fold_checkpoint
    from rtdetr_act.workflows.learned import Learned as Learned
    from rtdetr_act.workflows.learned import read_learned as read_learned
    from rtdetr_act.workflows.learned import report_learned as report_learned
    from rtdetr_act.workflows.maps import FeatureMaps as FeatureMaps
    from rtdetr_act.workflows.maps import compare_feature_maps as compare_feature_maps
    from rtdetr_act.workflows.predict import predict_source as predict_source
    from rtdetr_act.workflows.script import run_script as run_script
    from rtdetr_act.workflows.sensitivity import measure_checkpoint_sensitivity as measure_checkpoint_sensitivity
    from rtdetr_act.workflows.sites import SiteListing as SiteListing
    from rtdetr_act.workflows.sites import list_sites as list_sites
    from rtdetr_act.workflows.train import resume_training as resume_training
    from rtdetr_act.workflows.train import train_variants as train_variants
    from rtdetr_act.workflows.validate import Validation as Validation
    from rtdetr_act.workflows.validate import ValidationTable as ValidationTable
    from rtdetr_act.workflows.validate import validate_checkpoints as validate_checkpoints
    from rtdetr_act.workflows.validate import validate_variants as validate_variants

_MODULES = {
    "DynamicConv2d": "activations.dynamic_conv",
    "create": "activations.registry",
    "names": "activations.registry",
    "register": "activations.registry",
    "plot_activations": "analysis.curves",
    "Diagnosis": "analysis.diagnosis",
    "Sensitivity": "analysis.sensitivity",
    "measure_sensitivity": "analysis.sensitivity",
    "FoldReport": "deploy.fold",
    "fold_activations": "deploy.fold",
    "FoldError": "errors",
    "InputError": "errors",
    "Interrupted": "errors",
    "ModelError": "errors",
    "RtdetrActError": "errors",
    "RtdetrActWarning": "errors",
    "SelectionError": "errors",
    "ShapeError": "errors",
    "SpecError": "errors",
    "TrainingError": "errors",
    "Cost": "integrations.ultralytics.costs",
    "default_act": "integrations.ultralytics.hooks.tasks",
    "Latency": "integrations.ultralytics.latency",
    "load_model": "integrations.ultralytics.models",
    "Outcome": "integrations.ultralytics.runs",
    "shapes": "integrations.ultralytics.shapes",
    "Trained": "integrations.yolov5.trained",
    "recomputable": "kernels.recomputable",
    "LeaderboardRow": "study.leaderboard",
    "PowerPlan": "study.power",
    "plan_seeds": "study.power",
    "StudyReport": "study.report",
    "report_study": "study.report",
    "SearchReport": "study.runner",
    "run_search": "study.runner",
    "run_study": "study.runner",
    "calibrate": "surgery.calibrate",
    "plan_of": "surgery.carried_plan",
    "convert": "surgery.convert",
    "Coverage": "surgery.coverage",
    "set_epoch": "surgery.epochs",
    "add_to_optimizer": "surgery.optimizer",
    "PatchReport": "surgery.patcher",
    "patch_convs": "surgery.patcher",
    "patch_model": "surgery.patcher",
    "unpatch_model": "surgery.patcher",
    "Plan": "surgery.plan",
    "refit": "surgery.refit",
    "Site": "surgery.sites",
    "find_sites": "surgery.sites",
    "ActivationListing": "workflows.activations",
    "list_activations": "workflows.activations",
    "bench_exports": "workflows.bench",
    "bench_training": "workflows.bench",
    "collect_checks": "workflows.checks",
    "DetectorComparison": "workflows.compare",
    "compare_detectors": "workflows.compare",
    "Conversion": "workflows.conversion",
    "convert_checkpoint": "workflows.convert",
    "plot_checkpoint": "workflows.curves",
    "diagnose": "workflows.diagnose",
    "diagnose_variants": "workflows.diagnose",
    "export_checkpoint": "workflows.export",
    "fold_checkpoint": "workflows.fold",
    "Learned": "workflows.learned",
    "read_learned": "workflows.learned",
    "report_learned": "workflows.learned",
    "FeatureMaps": "workflows.maps",
    "compare_feature_maps": "workflows.maps",
    "predict_source": "workflows.predict",
    "run_script": "workflows.script",
    "measure_checkpoint_sensitivity": "workflows.sensitivity",
    "SiteListing": "workflows.sites",
    "list_sites": "workflows.sites",
    "resume_training": "workflows.train",
    "train_variants": "workflows.train",
    "Validation": "workflows.validate",
    "ValidationTable": "workflows.validate",
    "validate_checkpoints": "workflows.validate",
    "validate_variants": "workflows.validate",
    "examine": "workflows.doctor",
    "Examination": "workflows.examination",
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
