"""Native support of activations on edge targets, as documented by their vendors.

Native means on the accelerator, fused into the preceding convolution, as a separate operator, or as several where a
note says so. Activations that are not listed may run there as several operators, on the CPU, or not at all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rtdetr_act.activations.edge_targets import AXELERA, HAILO_STAFF, OPENVINO, QNN_EP, TIDL, Native
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.errors import InputError, SpecError, suggest
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.sites import find_sites


@dataclass(frozen=True)
class Target:
    """An edge target.

    Attributes:
        title: Name of the hardware or runtime, with the release that the lists are for.
        otherwise: What happens to activations that are not native, with the source.
        caveat: Why the list may be wrong, if it is not the vendor's; "" by default.
    """

    title: str
    otherwise: str
    caveat: str = ""


TARGETS = {
    "rknn": Target(
        "Rockchip NPUs, rknn-toolkit2 2.3.2",
        "others run on the CPU, which RK2118 and RV1103/1106 cannot: there they fail "
        "(github.com/airockchip/rknn-toolkit2/issues/217)",
    ),
    "hailo": Target(
        "Hailo-8, -10 and -15, Dataflow Compiler",
        f"the compiler refuses what it does not know ({HAILO_STAFF})",
        "Hailo's own guide needs a login, so this list is second-hand, and of a later compiler than that of Hailo-8",
    ),
    "edgetpu": Target(
        "Google Coral Edge TPU",
        "others and all behind them run on the CPU; leaky_relu (github.com/google-coral/edgetpu/issues/597) and "
        "hardswish (issues/272) are not supported: prelu does what leaky_relu does",
    ),
    "vitis-dpu": Target(
        "AMD Vitis AI, DPUCZDX8G",
        "others run on the CPU (docs.amd.com/r/en-US/ug1414-vitis-ai/Supported-Operators-and-DPU-Limitations)",
    ),
    "openvino": Target(
        "OpenVINO's CPU plugin, 2025.4", f"others run in the plugin too, as several operators ({OPENVINO})"
    ),
    "qualcomm-htp": Target(
        "Qualcomm's Hexagon HTP, through ONNX Runtime's QNN EP 2.3.0",
        f"others run there as several operators, or on the CPU ({QNN_EP})",
        "QNN EP has one list for all of its backends, and HTP may lack an operator for a data type",
    ),
    "ti-tidl": Target(
        "Texas Instruments' C7x and MMA, edgeai-tidl-tools",
        f"others run there as several operators, or on the Arm Cortex-A cores ({TIDL})",
    ),
    "axelera": Target(
        "Axelera's Metis AIPU, Voyager SDK",
        f"others run there as several operators, or on the host's CPU ({AXELERA})",
    ),
}


def get_target(name: str) -> Target:
    """Return the edge target with a name.

    Raises:
        InputError: No target has this name.

    >>> get_target("edgetpu").title
    'Google Coral Edge TPU'
    """
    if name not in TARGETS:
        raise InputError(f"there is no target '{name}'{suggest(name, TARGETS) or ': ' + ', '.join(TARGETS)}")
    return TARGETS[name]


def get_native_support(name: str, target: str) -> Native | None:
    """Return a target's native support of an activation, or None if it is not native.

    Activations are folded on export, so the result is for the activation that `name` folds to.

    Args:
        name: Name of a registered activation.
        target: Name of the target.

    Raises:
        SpecError: The activation is unknown.

    >>> get_native_support("arelu", "vitis-dpu").note
    'the slope becomes 26/256 = 0.1016, whatever was trained'
    """
    found = get_entry(name)
    return (get_entry(found.folds_to) if found.folds_to else found).targets.get(target)


def list_target_warnings(model: Any, name: str) -> list[str]:
    """Return a warning for each activation of a model that a target does not run natively, or only conditionally.

    Args:
        model: A model as accepted by `patch_model`.
        name: Name of the target.

    Raises:
        InputError: No target has this name.
        ModelError: The model is exported, wrapped or compiled.
    """
    target = get_target(name)
    counts = Counter(_get_name(site.module) for site in find_sites(model))
    found = []
    for activation, count in counts.items():
        native, sites = _find_native_support(activation, name), f"{count} site{'s' if count > 1 else ''}"
        if native is None:
            found.append(f"{activation} ({sites}) is not native on {name}: {target.otherwise}")
        elif native.note:
            found.append(f"{activation} ({sites}) on {name}: {native.note} ({native.source})")
    return [f"{sentence}; {target.caveat}" if target.caveat else sentence for sentence in found]


def _find_native_support(activation: str, target: str) -> Native | None:
    """Return a target's native support of an activation, None also if the activation is not registered."""
    try:
        return get_native_support(activation, target)
    except SpecError:  # a class or function that is not registered
        return None


def _get_name(activation: Any) -> str:
    """Return the registered name of an activation, or the name of its class or function."""
    placed = get_placement(activation)
    own = ActSpec.parse(placed.spec).name if placed else getattr(activation, "__name__", type(activation).__name__)
    try:
        return get_entry(own).name
    except SpecError:
        return own
