"""Which activations an edge target runs natively, as its maker documents it, each with its source.

Native means: on the accelerator, as an operator of its own or fused into the convolution before it. What is not listed
may still run there in several operators, on the CPU beside it, or not at all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rtdetr_act.activations.edge_targets import HAILO_STAFF, OPENVINO, Native
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.errors import InputError, SpecError, suggest
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.sites import find_sites


@dataclass(frozen=True)
class Target:
    """An edge target.

    Attributes:
        title: What it is, and the release that its lists are of.
        otherwise: What becomes of activations that are not native, with the source.
        caveat: Why the list may be wrong, if it is not the maker's own.
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
        "hardswish (issues/272) are said not to run: prelu does what leaky_relu does",
    ),
    "vitis-dpu": Target(
        "AMD Vitis AI, DPUCZDX8G",
        "others run on the CPU (docs.amd.com/r/en-US/ug1414-vitis-ai/Supported-Operators-and-DPU-Limitations)",
    ),
    "openvino": Target(
        "OpenVINO's CPU plugin, 2025.4", f"others run in the plugin too, as several operators ({OPENVINO})"
    ),
}


def find_target(name: str) -> Target:
    """Return a target by name.

    Raises:
        InputError: There is no such target.

    >>> find_target("edgetpu").title
    'Google Coral Edge TPU'
    """
    if name not in TARGETS:
        raise InputError(f"there is no target '{name}'{suggest(name, TARGETS) or ': ' + ', '.join(TARGETS)}")
    return TARGETS[name]


def native_form(name: str, target: str) -> Native | None:
    """Return what a target says of an activation of the zoo, folded as it is exported; None if it is not native.

    Args:
        name: The activation.
        target: The target.

    >>> native_form("arelu", "vitis-dpu").note
    'the slope becomes 26/256 = 0.1016, whatever was trained'
    """
    found = get_entry(name)
    return (get_entry(found.folds_to) if found.folds_to else found).targets.get(target)


def warnings_for(model: Any, name: str) -> list[str]:
    """Return a sentence for each activation in a model that a target does not run natively, or under a condition.

    Raises:
        InputError: There is no such target.
        ModelError: The model is exported, wrapped or compiled.
    """
    target = find_target(name)
    counts = Counter(_name_of(site.module) for site in find_sites(model))
    found = []
    for activation, count in counts.items():
        native, sites = _native(activation, name), f"{count} site{'s' if count > 1 else ''}"
        if native is None:
            found.append(f"{activation} ({sites}) is not native on {name}: {target.otherwise}")
        elif native.note:
            found.append(f"{activation} ({sites}) on {name}: {native.note} ({native.source})")
    return [f"{sentence}; {target.caveat}" if target.caveat else sentence for sentence in found]


def _native(activation: str, target: str) -> Native | None:
    try:
        return native_form(activation, target)
    except SpecError:  # a class or function that the zoo does not know
        return None


def _name_of(activation: Any) -> str:
    """Return the zoo's name of what stands at a site, else the name of its class or function."""
    placed = get_placement(activation)
    own = ActSpec.parse(placed.spec).name if placed else getattr(activation, "__name__", type(activation).__name__)
    try:
        return get_entry(own).name
    except SpecError:
        return own
