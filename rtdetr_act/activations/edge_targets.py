"""Vendor documentation of the activations that edge targets run natively."""

from __future__ import annotations

from dataclasses import dataclass

RKNN = "github.com/airockchip/rknn-toolkit2, doc/05_RKNN_Compiler_Support_Operator_List_V2.3.2.pdf"
HAILO = "transcript of the operator tables of Dataflow Compiler 5.3.0: github.com/weftspun/rf-detr-cpp, hailo_ops.usda"
HAILO_STAFF = "community.hailo.ai/t/supported-operators/5046"
CORAL = (
    "coral.ai/docs/edgetpu/models-intro/#supported-operations (as copied in github.com/dgist-datalab/Datalab_Intern)"
)
AXIS = "developer.axis.com/computer-vision/on-device/system-on-chip/artpec-7/supported-ops"
UG1414 = "docs.amd.com/r/en-US/ug1414-vitis-ai/Currently-Supported-Operators (3.5, DPUCZDX8G)"
PG338 = "docs.amd.com/r/en-US/pg338-dpu/ReLU-Type (4.1)"
OPENVINO = "github.com/openvinotoolkit/openvino, src/plugins/intel_cpu/src/cpu_types.cpp"
OPENVINO_FUSED = "github.com/openvinotoolkit/openvino, src/plugins/intel_cpu/src/dnnl_extension_utils.cpp"


@dataclass(frozen=True)
class Native:
    """Native support of an activation on an edge target.

    Attributes:
        source: The documentation that states it.
        note: A condition or deviation, "" (default) if there is none.
    """

    source: str
    note: str = ""
