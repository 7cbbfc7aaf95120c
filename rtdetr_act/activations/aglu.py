"""AGLU: the input times an adaptive gate of two parameters (Alexandridis et al., ECCV 2024, arXiv:2407.08567)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import check_finite, check_positive
from rtdetr_act.activations.exporting import Lambda
from rtdetr_act.activations.fitting import fit_curve
from rtdetr_act.activations.protocol import GRID, Entry, Folded
from rtdetr_act.activations.torch_native import SILU
from rtdetr_act.kernels.aten import softplus_
from rtdetr_act.kernels.backend import compute_dtype
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

PAPER = "Alexandridis et al., ECCV 2024, arXiv:2407.08567"
LAMBDA_MIN = 0.0001  # as in the authors' code, since the gate divides by lambda


class AGLU(nn.Module):
    """Multiply x by a gate with learned steepness and asymmetry.

    `f(x) = x * sigmoid(kappa * x - ln(lambd)) ** (1 / lambd)`, or `x / (1 + lambd * exp(-kappa * x)) ** (1 / lambd)`.
    With the defaults lambd = kappa = 1 it is SiLU; as lambd approaches 0 the gate becomes the Gumbel distribution
    function, and as kappa grows f approaches ReLU. The authors' code instead draws both from uniform distributions
    (lambd from 0..1, kappa from 0.8..1.2 or 1..1.3).

    lambd is clamped to at least 0.0001, below which its gradient is 0, as in the authors' code.

    Shapes: any to the same. `lambd` and `kappa` are (1,), shared by all channels and positions.

    Args:
        lambd: Initial lambda. Default: 1.0.
        kappa: Initial kappa. Default: 1.0.

    Raises:
        ValueError: `lambd` is not a positive or `kappa` not a finite number.

    Paper: Alexandridis et al., ECCV 2024, arXiv:2407.08567.

    >>> x = torch.randn(100)
    >>> torch.allclose(AGLU()(x), F.silu(x), atol=1e-6)
    True
    """

    def __init__(self, lambd: float = 1.0, kappa: float = 1.0) -> None:
        super().__init__()
        self.lambd = nn.Parameter(torch.tensor([check_positive("lambd", lambd)]))
        self.kappa = nn.Parameter(torch.tensor([check_finite("kappa", kappa)]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return aglu(x, self.lambd, self.kappa)


# ---------------------------------------------------------------- callbacks of the entry

# Bounds of a fit, well above the clamp of lambda; with the largest kappa the function is ReLU up to 0.04 everywhere.
LEAST_LAMBDA, LARGEST_LAMBDA, LARGEST_KAPPA = 1e-3, 10.0, 10.0


def gate_curve(lambd: Tensor, kappa: Tensor) -> Tensor:
    """Return the gate on `GRID`, (1201,), for scalar parameters."""
    return torch.sigmoid(kappa * GRID - torch.log(lambd)) ** (1 / lambd)


def _evaluate_on_grid(lambd: Tensor, kappa: Tensor) -> Tensor:
    """Return the AGLU on `GRID`, (1201,), for scalar parameters."""
    return GRID * gate_curve(lambd, kappa)


@torch.no_grad()
def fit_gate(module: Any, curve: Callable[..., Tensor], target: Tensor, start: tuple[float, float]) -> Tensor:
    """Fit `lambd` and `kappa` of a module in place so that its curve is closest to a target, and return that curve.

    Args:
        module: A module with the parameters `lambd` and `kappa`.
        curve: Maps lambda and kappa to the values of the module on `GRID`, (1201,).
        target: (1201,) in float64.
        start: Initial lambda and kappa.
    """
    low, high = (LEAST_LAMBDA, -LARGEST_KAPPA), (LARGEST_LAMBDA, LARGEST_KAPPA)
    (lambd, kappa), found = fit_curve(curve, target, start, low, high)
    module.lambd.fill_(lambd)
    module.kappa.fill_(kappa)
    return found


def _fit(module: AGLU, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit the parameters to a target curve on `GRID`, and return the fitted curve."""
    return fit_gate(module, _evaluate_on_grid, target, (1.0, 1.0))  # SiLU


def _fold(module: AGLU) -> Folded | None:
    """Implement `Entry.fold`: return the equivalent in evaluation mode, None if torch has none."""
    return Folded(SILU) if module.lambd.item() == 1 == module.kappa.item() else None


def make_gate(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the gate of a module as a function of x, computed as exp of logarithms since its power may be 10,000."""
    rate = torch.clamp(module.lambd.detach().double(), min=LAMBDA_MIN)
    kappa, shift, power = (float(value) for value in (module.kappa.detach(), torch.log(rate), 1 / rate))
    return lambda x: torch.exp(F.softplus(shift - kappa * x) * -power)


def _exportable(module: AGLU) -> nn.Module:
    """Implement `Entry.exportable`."""
    gate = make_gate(module)
    return Lambda(lambda x: x * gate(x))


# ---------------------------------------------------------------- op


@recomputable
def aglu(x: Tensor, lambd: Tensor, kappa: Tensor) -> Tensor:
    """Return the AGLU of x, in the dtype and memory format of x.

    Args:
        x: Any shape.
        lambd: (1,), lambda before it is clamped to at least 0.0001; below, its gradient is 0.
        kappa: (1,), the steepness of the gate.

    Paper: Alexandridis et al., ECCV 2024, arXiv:2407.08567.

    >>> aglu(torch.tensor([1.0]), torch.ones(1), torch.ones(1))  # SiLU
    tensor([0.7311])
    """
    # In float32 for half types, in which rounding the exponent would cause errors of percents.
    rate = lambd.to(compute_dtype(x.dtype)).clamp(min=LAMBDA_MIN)
    return apply_elementwise(_FUNCTION, x, rate, kappa)


def _compute_plain(x: Tensor, rate: Tensor, kappa: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    t = torch.log(rate) - kappa * x
    return x * torch.exp(F.softplus(t) / -rate)


def _forward(x: Tensor, rate: Tensor, kappa: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    soft = softplus_(_compute_exponent(x, rate, kappa))
    torch.mul(soft.div_(-rate).exp_(), x, out=out)


def _backward(grad: Tensor, x: Tensor, rate: Tensor, kappa: Tensor, out: Tensor, reduce: Reduce) -> list[Tensor]:
    """Compute a block of the gradient of x, and return those of lambda after its clamp and of kappa."""
    t = _compute_exponent(x, rate, kappa)
    below = torch.sigmoid(t, out=scratch_like(t, 1))
    soft = softplus_(t)
    gated = torch.div(soft, -rate, out=scratch_like(t, 2)).exp_().mul_(grad)
    product = torch.mul(gated, x, out=scratch_like(t, 3))
    for_rate = reduce(product, soft.sub_(below)) / rate**2
    for_kappa = reduce(product.mul_(below), x) / rate
    torch.add(gated, product.mul_(kappa / rate), out=out)
    return [for_rate, for_kappa]


def _compute_exponent(x: Tensor, rate: Tensor, kappa: Tensor) -> Tensor:
    """Return t = ln(lambda) - kappa * x in a scratch buffer; the gate is exp(-softplus(t) / lambda)."""
    return torch.mul(x, -kappa, out=scratch_like(x)).add_(torch.log(rate))


# On two threads, 2x128x160x160 takes 19 + 28 ms forward and backward; in blocks four times as large, 23 + 36 ms;
# Ultralytics' gate takes 20 + 19 ms, SiLU 4 + 5 ms.
_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "aglu",
        AGLU,
        "x·σ(κ·x − ln λ)^(1/λ), λ ≥ 0.0001",
        PAPER,
        aliases=("adaptive_glu",),
        fit=_fit,
        fold=_fold,
        exportable=_exportable,
        use_when="To learn the shape of the gate with two parameters per site. It starts as silu exactly.",
    ),
)
