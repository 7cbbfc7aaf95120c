"""APA: the gate of AGLU alone, which Ultralytics calls AGLU (Alexandridis et al., arXiv:2407.08567)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rtdetr_act.activations.aglu import PAPER, fit_gate, gate_curve, make_gate
from rtdetr_act.activations.exporting import Lambda
from rtdetr_act.activations.protocol import Entry
from rtdetr_act.errors import SpecError


def apa(device: Any = None, dtype: Any = None) -> nn.Module:
    """Build Ultralytics' `AGLU`, the gate `sigmoid(kappa * x - ln(lambd)) ** (1 / lambd)`.

    Shapes: any to the same. `lambd` and `kappa` are (1,), initialised uniformly in 0..1.

    Args:
        device: Device of the parameters. Default: None, torch's default device.
        dtype: Dtype of the parameters. Default: None, torch's default dtype.

    Raises:
        SpecError: Ultralytics is not installed, or its version has no AGLU.

    Paper: Alexandridis et al., ECCV 2024, arXiv:2407.08567.
    """
    try:
        from ultralytics.nn.modules.activation import AGLU  # takes 3 s to import
    except ImportError:
        raise SpecError(
            "'apa' needs AGLU from ultralytics.nn.modules.activation, which is not installed here"
        ) from None
    module: nn.Module = AGLU(device, dtype)
    return module


def _fit(module: Any, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit the parameters to a target curve on `GRID`, and return the fitted curve."""
    return fit_gate(module, gate_curve, target, (0.5, 0.5))


def _exportable(module: Any) -> nn.Module:
    """Implement `Entry.exportable`."""
    return Lambda(make_gate(module))


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
        title="APA",
        start="λ and κ from U(0, 1)",
    ),
)
