"""Which activations an edge target runs natively, as its maker documents it, each with its source.

Native means: on the accelerator, as an operator of its own or fused into the convolution before it. What is not listed
may still run there in several operators, on the CPU beside it, or not at all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rtdetr_act.activations.registry import entry
from rtdetr_act.errors import InputError, SpecError, suggest
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.sites import MARK, find_sites

# Folded into these before they reach any target.
_FOLDED = {"arelu": "leaky_relu", "rrelu": "leaky_relu"}


@dataclass(frozen=True)
class Native:
    """That a target runs an activation natively: under which condition, and who says so."""

    note: str
    source: str


@dataclass(frozen=True)
class Target:
    """An edge target.

    Attributes:
        title: What it is, and the release that the lists are of.
        native: Its native activations, by zoo name.
        otherwise: What becomes of the others, with the source.
        caveat: Why the list may be wrong, if it is not the maker's own.
    """

    title: str
    native: dict[str, Native]
    otherwise: str
    caveat: str = ""


def _listed(source: str, plain: str, noted: dict[str, str] | None = None) -> dict[str, Native]:
    """Return natives of one source: names without a condition, and names with one."""
    notes = {**dict.fromkeys(plain.split(), ""), **(noted or {})}
    return {name: Native(note, source) for name, note in notes.items()}


_RKNN = "github.com/airockchip/rknn-toolkit2, doc/05_RKNN_Compiler_Support_Operator_List_V2.3.2.pdf"
_HAILO = "transcript of the operator tables of Dataflow Compiler 5.3.0: github.com/weftspun/rf-detr-cpp, hailo_ops.usda"
_HAILO_STAFF = "community.hailo.ai/t/supported-operators/5046"
_CORAL = (
    "coral.ai/docs/edgetpu/models-intro/#supported-operations (as copied in github.com/dgist-datalab/Datalab_Intern)"
)
_AXIS = "developer.axis.com/computer-vision/on-device/system-on-chip/artpec-7/supported-ops"
_UG1414 = "docs.amd.com/r/en-US/ug1414-vitis-ai/Currently-Supported-Operators (3.5, DPUCZDX8G)"
_PG338 = "docs.amd.com/r/en-US/pg338-dpu/ReLU-Type (4.1)"
_OPENVINO = "github.com/openvinotoolkit/openvino, src/plugins/intel_cpu/src/cpu_types.cpp"
_OPENVINO_FUSED = "github.com/openvinotoolkit/openvino, src/plugins/intel_cpu/src/dnnl_extension_utils.cpp"
_UNFUSED = "softplus softsign selu hardsigmoid softmax softmax2d log_softmax".split()
_PREVIEW = "a preview, in the form that the compiler recognises"

TARGETS = {
    "rknn": Target(
        "Rockchip NPUs, rknn-toolkit2 2.3.2",
        _listed(
            _RKNN,
            "relu leaky_relu sigmoid tanh softplus mish silu",
            {
                "relu6": "clipping to 0..6",
                "prelu": "one slope, or one per channel",
                "hardsigmoid": "slope 1/6, offset 1/2",
                "hardswish": "slope 1/6, offset 1/2",
                "elu": "alpha = 1 only",
                "gelu": "on its own, not fused into the convolution",
                "softmax": "on the CPU on RK3566 and RK3568",
                "softmax2d": "on the CPU on RK3566 and RK3568",
            },
        ),
        "others run on the CPU, which RK2118 and RV1103/1106 cannot: there they fail "
        "(github.com/airockchip/rknn-toolkit2/issues/217)",
    ),
    "hailo": Target(
        "Hailo-8, -10 and -15, Dataflow Compiler",
        {
            **_listed(_HAILO, "relu relu6 leaky_relu sigmoid tanh elu hardsigmoid"),
            **_listed(_HAILO_STAFF, "prelu silu mish", {"gelu": _PREVIEW, "hardswish": _PREVIEW}),
        },
        f"the compiler refuses what it does not know ({_HAILO_STAFF})",
        "Hailo's own guide needs a login, so this list is second-hand, and of a later compiler than that of Hailo-8",
    ),
    "edgetpu": Target(
        "Google Coral Edge TPU",
        {
            **_listed(_CORAL, "relu relu6 sigmoid tanh"),
            **_listed(_AXIS, "", {"prelu": "one slope, or one per channel"}),
        },
        "others and all behind them run on the CPU; leaky_relu (github.com/google-coral/edgetpu/issues/597) and "
        "hardswish (issues/272) are said not to run: prelu does what leaky_relu does",
    ),
    "vitis-dpu": Target(
        "AMD Vitis AI, DPUCZDX8G",
        {
            **_listed(
                _UG1414,
                "relu relu6 hardsigmoid",
                {"hardswish": "some were seen on the CPU: github.com/Xilinx/Vitis-AI/issues/1245"},
            ),
            **_listed(_PG338, "", {"leaky_relu": "the slope becomes 26/256 = 0.1016, whatever was trained"}),
        },
        "others run on the CPU (docs.amd.com/r/en-US/ug1414-vitis-ai/Supported-Operators-and-DPU-Limitations)",
    ),
    "openvino": Target(
        "OpenVINO's CPU plugin, 2025.4",
        {
            **_listed(
                _OPENVINO_FUSED, "relu relu6 hardtanh leaky_relu prelu elu sigmoid tanh gelu silu hardswish mish"
            ),
            **_listed(_OPENVINO, "", dict.fromkeys(_UNFUSED, "on its own, not fused into the convolution")),
        },
        f"others run in the plugin too, as several operators ({_OPENVINO})",
    ),
}


def find_target(name: str) -> Target:
    """Return a target by name.

    Raises:
        InputError: There is no such target.

    >>> sorted(find_target("edgetpu").native)
    ['prelu', 'relu', 'relu6', 'sigmoid', 'tanh']
    """
    if name not in TARGETS:
        raise InputError(f"there is no target '{name}'{suggest(name, TARGETS) or ': ' + ', '.join(TARGETS)}")
    return TARGETS[name]


def native_form(name: str, target: Target) -> Native | None:
    """Return what a target says of an activation of the zoo, folded as it is exported; None if it is not native.

    >>> native_form("arelu", TARGETS["vitis-dpu"]).note
    'the slope becomes 26/256 = 0.1016, whatever was trained'
    """
    return target.native.get(_FOLDED.get(name, name))


def warnings_for(model: Any, name: str) -> list[str]:
    """Return a sentence for each activation in a model that a target does not run natively, or under a condition.

    Raises:
        InputError: There is no such target.
        ModelError: The model is exported, wrapped or compiled.
    """
    target = find_target(name)
    counts = Counter(_name_of(site.activation) for site in find_sites(model))
    found = []
    for activation, count in counts.items():
        native, sites = native_form(activation, target), f"{count} site{'s' if count > 1 else ''}"
        if native is None:
            found.append(f"{activation} ({sites}) is not native on {name}: {target.otherwise}")
        elif native.note:
            found.append(f"{activation} ({sites}) on {name}: {native.note} ({native.source})")
    return [f"{sentence}; {target.caveat}" if target.caveat else sentence for sentence in found]


def _name_of(activation: Any) -> str:
    """Return the zoo's name of what stands at a site, else the name of its class or function."""
    mark = getattr(activation, MARK, None)
    own = ActSpec.parse(mark["activation"]).name if mark else getattr(activation, "__name__", type(activation).__name__)
    try:
        return entry(own).name
    except SpecError:
        return own
