"""The activations of `torch.nn`: its classes, with the callbacks and documentation that this package adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import channel_dim, check_map
from rtdetr_act.activations.edge_targets import (
    AXELERA,
    CORAL,
    HAILO,
    HAILO_STAFF,
    HTP_GUIDE,
    OPENVINO,
    OPENVINO_FUSED,
    PG338,
    QNN_EP,
    RKNN,
    TIDL,
    UG1414,
    Native,
)
from rtdetr_act.activations.exporting import make_exportable
from rtdetr_act.activations.fitting import fit_slopes
from rtdetr_act.activations.protocol import GRID, Entry, Folded, Layout
from rtdetr_act.spec import ActSpec

RELU, RELU6, SILU, ELU = ActSpec("relu"), ActSpec("relu6"), ActSpec("silu"), ActSpec("elu")
_ALONE = "on its own, not fused into the convolution"
_RECOGNISED = "in the form that the compiler recognises"
_PREVIEW = f"a preview, {_RECOGNISED}"
_SIXTHS = "slope 1/6, offset 1/2"
_AS_PRODUCT = "as two operators, Sigmoid and Mul"
_ON_CPU = "on the CPU on RK3566 and RK3568"
_SHRINKS = "starves inputs around 0 of gradient, where BatchNorm puts most of them"
_COMPETES = "makes the channels share a sum of 1, so the signal shrinks by about 1/C at every site"
_SATURATES = "saturates on both sides, so gradients vanish through many layers"


def leaky_relu_spec(slope: float) -> ActSpec:
    """Return the spec of a LeakyReLU with a negative slope, or that of ReLU if the slope is 0.

    >>> str(leaky_relu_spec(0.1)), str(leaky_relu_spec(0.0))
    ('leaky_relu(negative_slope=0.1)', 'relu')
    """
    return ActSpec("leaky_relu", kwargs=(("negative_slope", slope),)) if slope else RELU


# ---------------------------------------------------------------- softmaxes over the channels


def softmax(dim: int | None = None, *, layout: Layout = "map") -> nn.Softmax:
    """Build a softmax over the channels (dimension 1 of maps, the last one of tokens) or over `dim` where given.

    >>> softmax(), softmax(layout="tokens")
    (Softmax(dim=1), Softmax(dim=-1))
    """
    return nn.Softmax(dim=channel_dim(layout) if dim is None else dim)


def softmin(dim: int | None = None, *, layout: Layout = "map") -> nn.Softmin:
    """Build a softmin over the channels (dimension 1 of maps, the last one of tokens) or over `dim` where given.

    >>> softmin()
    Softmin(dim=1)
    """
    return nn.Softmin(dim=channel_dim(layout) if dim is None else dim)


def log_softmax(dim: int | None = None, *, layout: Layout = "map") -> nn.LogSoftmax:
    """Build a log-softmax over the channels (dimension 1 of maps, the last one of tokens) or over `dim` where given.

    >>> log_softmax(layout="tokens")
    LogSoftmax(dim=-1)
    """
    return nn.LogSoftmax(dim=channel_dim(layout) if dim is None else dim)


class Softmax2d(nn.Softmax2d):
    """A `torch.nn.Softmax2d` whose input always has a batch dimension.

    torch's takes three dimensions as (C, H, W) and so normalises (B, C, L) over the batch.

    Shapes: (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same, with a sum of 1 over the channels.

    >>> Softmax2d()(torch.zeros(2, 4, 5))[0, :, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the softmax over the channels; raises ShapeError if x is not a feature map."""
        check_map(x)
        return torch.softmax(x, 1)


# ---------------------------------------------------------------- callbacks of the entry


@torch.no_grad()
def _fit_leaky_relu(module: nn.LeakyReLU, target: Tensor) -> Tensor:
    _, negative = fit_slopes(target)
    module.negative_slope = negative
    return torch.where(GRID > 0, GRID, negative * GRID)


def _fold_leaky_relu(module: nn.LeakyReLU) -> Folded | None:
    return Folded(RELU) if module.negative_slope == 0 else None


def _fold_rrelu(module: nn.RReLU) -> Folded:
    return Folded(leaky_relu_spec((module.lower + module.upper) / 2))


def _fold_threshold(module: nn.Threshold) -> Folded | None:
    return Folded(RELU) if module.threshold == module.value == 0 else None


def _fold_hardtanh(module: nn.Hardtanh) -> Folded | None:
    return Folded(RELU6) if (module.min_val, module.max_val) == (0, 6) else None


def _fold_celu(module: nn.CELU) -> Folded | None:
    return Folded(ELU) if module.alpha == 1 else None


def _exportable_threshold(module: Any, x: Tensor) -> Tensor:
    above = torch.clamp(torch.sign(x - module.threshold), min=0)  # instead of a comparison, which NCNN lacks
    return x * above + (1 - above) * module.value


def _exportable_hardshrink(module: Any, x: Tensor) -> Tensor:
    return x * torch.clamp(torch.sign(x.abs() - module.lambd), min=0)


# ---------------------------------------------------------------- entries


def _entry(name: str, factory: Any, formula: str, note: str = "", **answers: Any) -> Entry:
    return Entry(name, factory, formula, "torch.nn", note, **answers)


# Activations have an exportable form where some exporter rejects them or computes them wrongly. PNNX, which converts to
# NCNN, recognises x / (1 + |x|), x - tanh(x) and softmax(-x) as Softsign, Tanhshrink and Softmin, for which NCNN has no
# layer, so these are written differently. `scripts/parity.py` compares the results.
ENTRIES = (
    _entry(
        "relu",
        nn.ReLU,
        "max(x, 0)",
        homogeneous=True,
        targets={
            "rknn": Native(RKNN),
            "hailo": Native(HAILO),
            "edgetpu": Native(CORAL),
            "vitis-dpu": Native(UG1414),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(HTP_GUIDE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        use_when=(
            "For NPUs and INT8: every target listed runs it natively, and cross-layer equalisation is possible. In a "
            "network trained with another activation, start it with init=match."
        ),
    ),
    _entry(
        "leaky_relu",
        nn.LeakyReLU,
        "x for x ≥ 0, 0.01·x for x < 0",
        aliases=("lrelu",),
        fit=_fit_leaky_relu,
        fold=_fold_leaky_relu,
        homogeneous=True,
        # With a negative slope below 0, the output does not have the sign of the input.
        backward_reads_result=lambda module: module.negative_slope > 0,
        targets={
            "rknn": Native(RKNN),
            "hailo": Native(HAILO),
            "vitis-dpu": Native(PG338, "the slope becomes 26/256 = 0.1016, whatever was trained"),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(HTP_GUIDE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        use_when=(
            "As relu, where no unit should stop learning: its gradient is nowhere 0. Cross-layer equalisation is "
            "possible."
        ),
        title="Leaky ReLU",
    ),
    _entry(
        "rrelu",
        nn.RReLU,
        "x for x ≥ 0, a·x for x < 0, a ~ U(1/8, 1/3) in training, 11/48 else",
        fold=_fold_rrelu,
        homogeneous=True,
        folds_to="leaky_relu",
        use_when=(
            "As a regulariser: the negative slope is random in training, and 11/48 in evaluation, where it folds to "
            "leaky_relu."
        ),
    ),
    _entry(
        "hardtanh",
        nn.Hardtanh,
        "clamp(x, −1, 1)",
        _SATURATES,
        fold=_fold_hardtanh,
        targets={
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(HTP_GUIDE, "as ReLUMinMax"),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        title="HardTanh",
    ),
    _entry(
        "relu6",
        nn.ReLU6,
        "min(max(x, 0), 6)",
        targets={
            "rknn": Native(RKNN, "clipping to 0..6"),
            "hailo": Native(HAILO),
            "edgetpu": Native(CORAL),
            "vitis-dpu": Native(UG1414),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(HTP_GUIDE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        use_when="For fixed-point targets that want a bounded range, else relu.",
    ),
    _entry(
        "sigmoid",
        nn.Sigmoid,
        "1 / (1 + e⁻ˣ)",
        _SATURATES,
        targets={
            "rknn": Native(RKNN),
            "hailo": Native(HAILO),
            "edgetpu": Native(CORAL),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(QNN_EP, _ALONE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        title="sigmoid",
    ),
    _entry(
        "hardsigmoid",
        nn.Hardsigmoid,
        "clamp(x/6 + 1/2, 0, 1)",
        _SATURATES,
        aliases=("hsigmoid",),
        targets={
            "rknn": Native(RKNN, _SIXTHS),
            "hailo": Native(HAILO),
            "vitis-dpu": Native(UG1414),
            "openvino": Native(OPENVINO, _ALONE),
            "qualcomm-htp": Native(QNN_EP, _ALONE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA, _SIXTHS),
        },
        title="h-sigmoid",
    ),
    _entry(
        "tanh",
        nn.Tanh,
        "tanh(x)",
        _SATURATES,
        targets={
            "rknn": Native(RKNN),
            "hailo": Native(HAILO),
            "edgetpu": Native(CORAL),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(QNN_EP, _ALONE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        title="tanh",
    ),
    _entry(
        "silu",
        nn.SiLU,
        "x·σ(x)",
        aliases=("swish",),
        targets={
            "rknn": Native(RKNN),
            "hailo": Native(HAILO_STAFF),
            "openvino": Native(OPENVINO_FUSED),
            "edgetpu": Native(CORAL, _AS_PRODUCT),
            "qualcomm-htp": Native(QNN_EP, _AS_PRODUCT),
            "ti-tidl": Native(TIDL, _AS_PRODUCT),
            "axelera": Native(AXELERA, _AS_PRODUCT),
        },
        use_when="The activation of most Ultralytics networks, and so the baseline for the others.",
    ),
    _entry(
        "mish",
        nn.Mish,
        "x·tanh(ln(1 + eˣ))",
        targets={
            "rknn": Native(RKNN),
            "hailo": Native(HAILO_STAFF),
            "openvino": Native(OPENVINO_FUSED),
            "ti-tidl": Native(TIDL),
        },
        use_when="As a smooth alternative to silu without parameters; checkpoints with it need no plugin.",
    ),
    _entry(
        "hardswish",
        nn.Hardswish,
        "x·clamp(x/6 + 1/2, 0, 1)",
        aliases=("hswish", "hardsilu"),
        targets={
            "rknn": Native(RKNN, _SIXTHS),
            "hailo": Native(HAILO_STAFF, _PREVIEW),
            "vitis-dpu": Native(UG1414, "some were seen on the CPU: github.com/Xilinx/Vitis-AI/issues/1245"),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(HTP_GUIDE),
            "ti-tidl": Native(TIDL),
            "axelera": Native(AXELERA),
        },
        use_when="To approximate silu without an exponential, on targets that run it natively.",
        title="h-swish",
    ),
    _entry(
        "elu",
        nn.ELU,
        "x for x > 0, α·(eˣ − 1) for x ≤ 0, α = 1",
        targets={
            "rknn": Native(RKNN, "alpha = 1 only"),
            "hailo": Native(HAILO),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(QNN_EP, _ALONE),
            "ti-tidl": Native(TIDL),
        },
        use_when="Where the output should have a mean near 0; unusual in detectors, whose BatchNorm sees to that.",
    ),
    _entry(
        "celu",
        nn.CELU,
        "max(x, 0) + min(0, α·(e^(x/α) − 1)), α = 1",
        fold=_fold_celu,
        use_when="As elu, where alpha is not 1: the gradient does not jump at 0.",
    ),
    _entry(
        "selu",
        nn.SELU,
        "1.0507·(x for x > 0, 1.6733·(eˣ − 1) for x ≤ 0)",
        targets={
            "openvino": Native(OPENVINO, _ALONE),
            "axelera": Native(AXELERA),
        },
        use_when="In networks without BatchNorm, for which it was designed; unusual in detectors.",
    ),
    _entry(
        "gelu",
        nn.GELU,
        "x·Φ(x), Φ the normal distribution function",
        targets={
            "rknn": Native(RKNN, _ALONE),
            "hailo": Native(HAILO_STAFF, _PREVIEW),
            "openvino": Native(OPENVINO_FUSED),
            "qualcomm-htp": Native(QNN_EP, _ALONE),
            "ti-tidl": Native(TIDL, _RECOGNISED),
        },
        use_when="In transformer layers, where it is usual (AIFI has one); in convolutional ones it is close to silu.",
    ),
    _entry(
        "hardshrink",
        nn.Hardshrink,
        "x for |x| > λ, 0 else, λ = 0.5",
        _SHRINKS,
        exportable=make_exportable(_exportable_hardshrink),  # unknown to OpenVINO
        title="hard shrinkage",
    ),
    _entry(
        "softshrink",
        nn.Softshrink,
        "sign(x)·max(|x| − λ, 0), λ = 0.5",
        _SHRINKS,
        exportable=make_exportable(lambda m, x: x - x.clamp(-m.lambd, m.lambd)),  # unknown to OpenVINO
        title="soft shrinkage",
    ),
    _entry(
        "logsigmoid",
        nn.LogSigmoid,
        "ln σ(x)",
        "is negative everywhere and flat where x > 0, so the signal vanishes",
        exportable=make_exportable(lambda _, x: F.softplus(x * -1) * -1),  # log(sigmoid(x)) in ONNX, -inf from -104 on
        title="log-sigmoid",
    ),
    _entry(
        "softplus",
        nn.Softplus,
        "ln(1 + e^(βx)) / β, β = 1",
        targets={
            "rknn": Native(RKNN),
            "openvino": Native(OPENVINO, _ALONE),
            "qualcomm-htp": Native(QNN_EP, _ALONE),
        },
        use_when="As a smooth relu that is positive everywhere; unusual in detectors.",
        title="softplus",
    ),
    _entry(
        "softsign",
        nn.Softsign,
        "x / (1 + |x|)",
        _SATURATES,
        exportable=make_exportable(lambda _, x: x * (x.abs() + 1).reciprocal()),  # unknown to NCNN
        targets={"openvino": Native(OPENVINO, _ALONE)},
        title="softsign",
    ),
    _entry(
        "tanhshrink",
        nn.Tanhshrink,
        "x − tanh(x)",
        _SHRINKS,
        exportable=make_exportable(lambda _, x: (torch.tanh(x) - x) * -1),  # unknown to NCNN
        title="tanh shrinkage",
    ),
    _entry(
        "softmin",
        softmin,
        "e⁻ˣ / Σ e⁻ˣ over the channels",
        _COMPETES,
        classes=(nn.Softmin,),
        exportable=make_exportable(lambda m, x: torch.softmax(x * -1, m.dim)),  # unknown to NCNN
        title="softmin",
    ),
    _entry(
        "softmax",
        softmax,
        "eˣ / Σ eˣ over the channels",
        _COMPETES,
        classes=(nn.Softmax,),
        targets={"rknn": Native(RKNN, _ON_CPU), "openvino": Native(OPENVINO, _ALONE)},
        title="softmax",
    ),
    _entry(
        "softmax2d",
        Softmax2d,
        "eˣ / Σ eˣ over the channels of a map",
        _COMPETES,
        tokens=False,
        maps_only_because="softmax takes both",
        classes=(Softmax2d, nn.Softmax2d),
        targets={"rknn": Native(RKNN, _ON_CPU), "openvino": Native(OPENVINO, _ALONE)},
        title="softmax (2D)",
    ),
    _entry(
        "log_softmax",
        log_softmax,
        "x − ln Σ eˣ over the channels",
        "is negative everywhere and ties every channel to all others",
        classes=(nn.LogSoftmax,),
        targets={"openvino": Native(OPENVINO, _ALONE)},
        title="log-softmax",
    ),
    _entry(
        "threshold",
        nn.Threshold,
        "x for x > threshold, value else (both must be given)",
        "passes no gradient below its threshold and may jump there",
        fold=_fold_threshold,
        # In ONNX with a threshold of 0 only, unknown to OpenVINO and NCNN.
        exportable=make_exportable(_exportable_threshold),
        title="threshold",
    ),
)
