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
HTP_GUIDE = "docs.qualcomm.com/doc/80-63442-10/topic/htp_guidelines_activation_functions.html"
QNN_EP = "github.com/onnxruntime/onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md"
TIDL = "github.com/TexasInstruments/edgeai-tidl-tools, docs/operators.md"
AXELERA = "github.com/axelera-ai-hub/voyager-sdk, docs/reference/compiler/onnx-opset17-support.md"
# Date or release of each. Those that tell neither are undated.
DATES = {
    RKNN: "2.3.2, 2025-03-31",
    HAILO: "5.3.0",
    HAILO_STAFF: "undated",
    CORAL: "undated",
    AXIS: "undated",
    UG1414: "3.5, 2023-09-28",
    PG338: "4.1",
    OPENVINO: "commit 005040e6 of 2026",
    OPENVINO_FUSED: "2025.4",
    HTP_GUIDE: "2026-08-06",
    QNN_EP: "QNN EP 2.3.0, commit 0131740f",
    TIDL: "commit 238cb8b0",
    AXELERA: "commit 366a1df5",
}


@dataclass(frozen=True)
class Native:
    """Native support of an activation on an edge target.

    Attributes:
        source: The documentation that states it.
        note: A condition or deviation, "" (default) if there is none.
    """

    source: str
    note: str = ""

    @property
    def date(self) -> str:
        """Date or release of the documentation; "" if it is not among those named here."""
        return DATES.get(self.source, "")
