"""APA: AGLU's gate alone, as Ultralytics has it under the name of AGLU (Alexandridis et al., arXiv:2407.08567)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rtdetr_act.activations.aglu import PAPER, fit_gate, gate_curve, write_gate
from rtdetr_act.activations.exporting import Expression
from rtdetr_act.activations.protocol import Entry
from rtdetr_act.errors import SpecError


def apa(device: Any = None, dtype: Any = None) -> nn.Module:
    """Build Ultralytics' `AGLU`, the gate `sigmoid(kappa * x - ln(lambd)) ** (1 / lambd)`.

    Shapes: any to the same. `lambd` and `kappa` are (1,) and start anywhere in 0..1.

    Args:
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        SpecError: Ultralytics is not installed, or lacks it.
    """
    try:
        from ultralytics.nn.modules.activation import AGLU  # 3 s, which no other activation needs
    except ImportError:
        raise SpecError(
            "'apa' needs AGLU from ultralytics.nn.modules.activation, which is not installed here"
        ) from None
    module: nn.Module = AGLU(device, dtype)
    return module


def _fit(module: Any, target: Tensor) -> Tensor:
    return fit_gate(module, gate_curve, target, (0.5, 0.5))


def _exportable(module: Any) -> nn.Module:
    return Expression(write_gate(module))


ENTRIES = (
    Entry(
        "apa",
        apa,
        "σ(κ·x − ln λ)^(1/λ), λ ≥ 0.0001",
        f"{PAPER}; ultralytics.nn.modules.activation.AGLU",
        "is aglu's gate alone, between 0 and 1, and so saturates on both sides; λ and κ start anywhere in 0…1",
        aliases=("adaptive_parametric_activation",),
        classes=("ultralytics.nn.modules.activation.AGLU",),
        fit=_fit,
        # Its softplus has a negative beta: NaN in OpenVINO, unknown to NCNN.
        exportable=_exportable,
    ),
)
