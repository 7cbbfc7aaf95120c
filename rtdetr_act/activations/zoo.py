"""The table of all activations that come with the package; one row holds everything known of one."""

from __future__ import annotations

from typing import Any

from rtdetr_act.activations.entry import Adapter, Entry

_POOLS = (
    "it pools over positions, and pooling over decoder queries would mix the denoising ones, which hold ground truth, "
    "with the others"
)
_SHRINKS = "starves inputs around 0 of gradient, where BatchNorm puts most of them"
_COMPETES = "makes the channels share a sum of 1, so the signal shrinks by about 1/C at every site"
_SATURATES = "saturates on both sides, so gradients vanish through many layers"


def _ours(name: str, source: str, formula: str, parameters: str, paper: str, **more: Any) -> Entry:
    return Entry(name, Adapter(f"rtdetr_act.activations.{source}"), formula, parameters, True, paper=paper, **more)


def _torchs(name: str, source: str, formula: str, note: str = "", **more: Any) -> Entry:
    source = source if ":" in source else f"torch.nn:{source}"
    paper = more.pop("paper", "torch.nn")
    return Entry(name, Adapter(source), formula, "0", False, paper=paper, note=note, **more)


_DYRELU = "Chen et al., ECCV 2020, arXiv:2003.10027"
_ACON = "Ma et al., CVPR 2021, arXiv:2009.04759"
_APA = "Alexandridis et al., ECCV 2024, arXiv:2407.08567"
_HW = "it needs height and width"
_SITE = {"needs_channels": True}
_MAPS_POOLED = {**_SITE, "tokens": False, "maps_only_because": _POOLS}
_OWN = "rtdetr_act.activations.channels"

ZOO = (
    _ours(
        "arelu",
        "arelu:AReLU",
        "(1 + σ(β))·x for x ≥ 0, clamp(α, 0.01, 0.99)·x for x < 0",
        "2",
        "Chen et al., arXiv:2006.13858",
        aliases=("attention_relu",),
    ),
    _ours(
        "dyrelu_a",
        "dyrelu:DyReLUA",
        "max_k(aᵏ(x)·x + bᵏ(x)), a and b per image",
        "C·h + h + 4h + 4, h = max(C // 8, 1)",
        _DYRELU,
        aliases=("dynamic_relu_a",),
        **_MAPS_POOLED,
    ),
    _ours(
        "dyrelu_b",
        "dyrelu:DyReLUB",
        "max_k(aᵏ(x)·x + bᵏ(x)), a and b per image and channel",
        "5C·h + h + 4C, h = max(C // 8, 1)",
        _DYRELU,
        aliases=("dynamic_relu_b",),
        **_MAPS_POOLED,
    ),
    _ours(
        "dyrelu_c",
        "dyrelu:DyReLUC",
        "min(HW/3·softmax(z/τ), 1)·max_k(aᵏ(x)·x + bᵏ(x)), z a 1×1 convolution",
        "5C·h + h + 5C + 1, h = max(C // 8, 1)",
        _DYRELU,
        aliases=("dynamic_relu_c",),
        **_MAPS_POOLED,
    ),
    _ours(
        "prelu",
        "channels:prelu",
        "x for x ≥ 0, a·x for x < 0",
        "1",
        "He et al., arXiv:1502.01852",
        aliases=("parametric_relu",),
    ),
    _ours(
        "frelu",
        "frelu:FReLU",
        "max(x, BN(DWConv3×3(x)))",
        "11C",
        "Ma et al., ECCV 2020, arXiv:2007.11824",
        aliases=("funnel_relu",),
        tokens=False,
        maps_only_because=_HW,
        **_SITE,
    ),
    _ours(
        "aconc",
        "acon:AconC",
        "(p1 − p2)·x·σ(β·(p1 − p2)·x) + p2·x per channel",
        "3C",
        _ACON,
        aliases=("acon_c", "acon"),
        **_SITE,
    ),
    _ours(
        "meta_aconc",
        "acon:MetaAconC",
        "(p1 − p2)·x·σ(β(x)·(p1 − p2)·x) + p2·x, β(x) = σ(W₂·(W₁·mean(x)))",
        "2C·h + h + 3C, h = max(C // 16, 16)",
        _ACON,
        aliases=("meta_acon_c", "meta_acon"),
        **_MAPS_POOLED,
    ),
    _ours(
        "aglu",
        "aglu:AGLU",
        "x·σ(κ·x − ln λ)^(1/λ), λ ≥ 0.0001",
        "2",
        _APA,
        aliases=("adaptive_glu",),
    ),
    Entry(
        "apa",
        Adapter("ultralytics.nn.modules.activation:AGLU"),
        "σ(κ·x − ln λ)^(1/λ), λ ≥ 0.0001",
        "2",
        paper=f"{_APA}; ultralytics.nn.modules.activation.AGLU",
        aliases=("adaptive_parametric_activation",),
        note="is aglu's gate alone, between 0 and 1, and so saturates on both sides; λ and κ start anywhere in 0…1",
    ),
    _ours(
        "glu",
        "glu:GatedLinearUnit",
        "a·σ(b), (a, b) = W·x + c with W a 1×1 convolution C → 2C",
        "2C² + 2C",
        "Dauphin et al., arXiv:1612.08083; torch.nn.GLU",
        **_SITE,
    ),
    _torchs("relu", "ReLU", "max(x, 0)"),
    _torchs("rrelu", "RReLU", "x for x ≥ 0, a·x for x < 0, a ~ U(1/8, 1/3) in training, 11/48 else"),
    _torchs("hardtanh", "Hardtanh", "clamp(x, −1, 1)", _SATURATES),
    _torchs("relu6", "ReLU6", "min(max(x, 0), 6)"),
    _torchs("sigmoid", "Sigmoid", "1 / (1 + e⁻ˣ)", _SATURATES),
    _torchs("hardsigmoid", "Hardsigmoid", "clamp(x/6 + 1/2, 0, 1)", _SATURATES, aliases=("hsigmoid",)),
    _torchs("tanh", "Tanh", "tanh(x)", _SATURATES),
    _torchs("silu", "SiLU", "x·σ(x)", aliases=("swish",)),
    _torchs("mish", "Mish", "x·tanh(ln(1 + eˣ))"),
    _torchs("hardswish", "Hardswish", "x·clamp(x/6 + 1/2, 0, 1)", aliases=("hswish", "hardsilu")),
    _torchs("elu", "ELU", "x for x > 0, α·(eˣ − 1) for x ≤ 0, α = 1"),
    _torchs("celu", "CELU", "max(x, 0) + min(0, α·(e^(x/α) − 1)), α = 1"),
    _torchs("selu", "SELU", "1.0507·(x for x > 0, 1.6733·(eˣ − 1) for x ≤ 0)"),
    _torchs("gelu", "GELU", "x·Φ(x), Φ the normal distribution function"),
    _torchs("hardshrink", "Hardshrink", "x for |x| > λ, 0 else, λ = 0.5", _SHRINKS),
    _torchs("leaky_relu", "LeakyReLU", "x for x ≥ 0, 0.01·x for x < 0", aliases=("lrelu",)),
    _torchs(
        "logsigmoid", "LogSigmoid", "ln σ(x)", "is negative everywhere and flat where x > 0, so the signal vanishes"
    ),
    _torchs("softplus", "Softplus", "ln(1 + e^(βx)) / β, β = 1"),
    _torchs("softshrink", "Softshrink", "sign(x)·max(|x| − λ, 0), λ = 0.5", _SHRINKS),
    _torchs("softsign", "Softsign", "x / (1 + |x|)", _SATURATES),
    _torchs("tanhshrink", "Tanhshrink", "x − tanh(x)", _SHRINKS),
    _torchs("softmin", f"{_OWN}:softmin", "e⁻ˣ / Σ e⁻ˣ over the channels", _COMPETES),
    _torchs("softmax", f"{_OWN}:softmax", "eˣ / Σ eˣ over the channels", _COMPETES),
    _torchs(
        "softmax2d",
        "Softmax2d",
        "eˣ / Σ eˣ over the channels of a map",
        _COMPETES,
        tokens=False,
        maps_only_because=_HW,
    ),
    _torchs(
        "log_softmax",
        f"{_OWN}:log_softmax",
        "x − ln Σ eˣ over the channels",
        "is negative everywhere and ties every channel to all others",
    ),
    _torchs(
        "threshold",
        "Threshold",
        "x for x > threshold, value else (both must be given)",
        "passes no gradient below its threshold and may jump there",
    ),
)
