"""SMU and SMU-1, smooth forms of LeakyReLU with a learned smoothness (Biswas et al., CVPR 2022, arXiv:2111.04682)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import check_finite
from rtdetr_act.activations.exporting import Lambda
from rtdetr_act.activations.fitting import fit_curve, fit_slopes, relative_error
from rtdetr_act.activations.protocol import GRID, Entry, Folded
from rtdetr_act.activations.squareplus import LARGEST, smooth_abs
from rtdetr_act.activations.torch_native import leaky_relu_spec
from rtdetr_act.kernels.backend import compute_dtype, needs_plain_ops
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

PAPER = "Biswas et al., CVPR 2022, arXiv:2111.04682"
ALPHA = 0.25
MU_SMU, MU_SMU1 = 1_000_000.0, 4.352665993287951e-9  # initial values
# Where exp underflows, torch's takes 300 times as long on a CPU with MKL, and for the initial mu it would everywhere.
# Its values are set to 0 before, where they are below the rounding errors of float64.
LEAST_EXPONENT, NEGLIGIBLE = -50.0, 1e-21
TINY = 1e-30  # added to mu² / 4 in SMU-1, since the derivative of a root at 0 is infinite


class _SMU(nn.Module):
    """A LeakyReLU of constant slope `alpha` with a learned smoothness `mu`."""

    def __init__(self, alpha: float, mu: float) -> None:
        super().__init__()
        self.alpha = check_finite("alpha", alpha)
        self.mu = nn.Parameter(torch.tensor([check_finite("mu", mu)]))

    def extra_repr(self) -> str:
        """Return the constant."""
        return f"alpha={self.alpha:g}"


class SMU(_SMU):
    """Take a smooth maximum of x and alpha x: `((1 + alpha) x + (1 - alpha) x erf(mu (1 - alpha) x)) / 2`.

    With alpha = 0 and mu = 1 / sqrt(2) it is GELU; as mu grows it approaches LeakyReLU.

    The default is that of the first version of the paper. With it the activation is LeakyReLU with a slope of 0.25 up
    to 1.2e-7, and only inputs closer to 0 than about 1e-6 have a gradient with respect to mu. Since CVPR, published
    code starts from alpha = 0.01 and mu = 2.5, which learns.

    Shapes: any to the same. `mu` is (1,), shared by all channels and positions.

    Args:
        alpha: Slope towards minus infinity, a constant. Default: 0.25.
        mu: Initial mu. Default: 1,000,000.

    Raises:
        ValueError: `alpha` or `mu` is not a finite number.

    Paper: Biswas et al., CVPR 2022, arXiv:2111.04682.

    >>> x = torch.randn(100)
    >>> torch.allclose(SMU(0.0, 0.5**0.5)(x), nn.functional.gelu(x), atol=1e-6)
    True
    """

    def __init__(self, alpha: float = ALPHA, mu: float = MU_SMU) -> None:
        super().__init__(alpha, mu)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return smu(x, self.mu, self.alpha)


class SMU1(_SMU):
    """Take a smooth maximum of x and alpha x from above: `((1 + alpha) x + sqrt((1 - alpha)² x² + mu²)) / 2`.

    With alpha = 0 and mu = 2 it is squareplus; as mu approaches 0 it approaches LeakyReLU.

    The default is that of the first version of the paper. With it the activation is LeakyReLU with a slope of 0.25 up
    to 2.2e-9. Since CVPR, published code starts from alpha = 0.01 and mu = 4.3325e-9.

    Shapes: any to the same. `mu` is (1,), shared by all channels and positions.

    Args:
        alpha: Slope towards minus infinity, a constant. Default: 0.25.
        mu: Initial mu. Default: 4.3527e-9.

    Raises:
        ValueError: `alpha` or `mu` is not a finite number.

    Paper: Biswas et al., CVPR 2022, arXiv:2111.04682.

    >>> SMU1(0.0, 2.0)(torch.tensor([-1.5, 0.0, 1.5])).detach()
    tensor([0.5000, 1.0000, 2.0000])
    """

    def __init__(self, alpha: float = ALPHA, mu: float = MU_SMU1) -> None:
        super().__init__(alpha, mu)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return smu1(x, self.mu, self.alpha)


# ---------------------------------------------------------------- callbacks of the entries

_LEAST_ALPHA, _LARGEST_ALPHA = -0.9, 0.9  # of a fit
_LARGEST_MU = 100.0  # of a fit; SMU is LeakyReLU up to 0.0012 there
_GELU = 0.0, 0.5**0.5
# From these on, the exported form is LeakyReLU, which every target runs. The largest difference is 0.1202 / mu for SMU,
# at |x| = 0.53 / (mu (1 - alpha)), here 1.9e-6, and mu / 2 for SMU-1, at 0. Checkpoints are saved in float16, which
# holds no number above 65504; SMU in float16 would overflow.
_SHARP_SMU, _SHARP_SMU1 = 65_504.0, 1e-6


def _evaluate_smu_on_grid(alpha: Tensor, mu: Tensor) -> Tensor:
    """Return SMU on `GRID`, (1201,), for scalar parameters."""
    return _compute_smu(GRID, mu * (1 - alpha), alpha)


def _evaluate_smu1_on_grid(alpha: Tensor, mu: Tensor) -> Tensor:
    """Return SMU-1 on `GRID`, (1201,), for scalar parameters."""
    return _compute_smu1(GRID, mu * mu / 4, alpha)


def _fit_smu(module: SMU, target: Tensor) -> Tensor:
    """Implement `Entry.fit` for SMU."""
    return _fit(module, _evaluate_smu_on_grid, target, MU_SMU, _GELU)


def _fit_smu1(module: SMU1, target: Tensor) -> Tensor:
    """Implement `Entry.fit` for SMU-1."""
    return _fit(module, _evaluate_smu1_on_grid, target, MU_SMU1, (0.0, 1.0))


@torch.no_grad()
def _fit(
    module: _SMU, curve: Callable[..., Tensor], target: Tensor, sharp: float, start: tuple[float, float]
) -> Tensor:
    """Fit alpha and mu of a module in place to a target curve on `GRID`, and return the fitted curve.

    Args:
        module: SMU or SMU-1.
        curve: Maps alpha and mu to the values of the module on `GRID`, (1201,).
        target: (1201,) in float64.
        sharp: The mu with which the activation is LeakyReLU, which is kept where the target is one.
        start: Initial alpha and mu elsewhere.
    """
    alpha, mu = fit_slopes(target)[1], sharp
    found = curve(torch.tensor(alpha).double(), torch.tensor(mu).double())
    if relative_error(found, target) > 1e-6:
        low, high = (_LEAST_ALPHA, 0.0), (_LARGEST_ALPHA, _LARGEST_MU)
        (alpha, mu), found = fit_curve(curve, target, start, low, high)
    module.alpha = alpha
    module.mu.fill_(mu)
    return found


def _fold_smu1(module: SMU1) -> Folded | None:
    """Implement `Entry.fold` for SMU-1: it is LeakyReLU where mu is 0, as in a checkpoint in float16 of the default."""
    return Folded(leaky_relu_spec(module.alpha)) if module.mu.item() == 0 and module.alpha <= 1 else None


def _export_smu(module: SMU) -> nn.Module:
    """Implement `Entry.exportable` for SMU."""
    mu = module.mu.detach().double().clamp(-MU_SMU, MU_SMU).item()
    if mu >= _SHARP_SMU and module.alpha <= 1:
        return nn.LeakyReLU(module.alpha)
    middle, half, rate = (1 + module.alpha) / 2, (1 - module.alpha) / 2, mu * (1 - module.alpha)
    return Lambda(lambda x: x * (torch.erf(x * rate) * half + middle))


def _export_smu1(module: SMU1) -> nn.Module:
    """Implement `Entry.exportable` for SMU-1, without an overflow in float16, whose largest square is that of 255."""
    mu = module.mu.detach().double().item()
    if abs(mu) <= _SHARP_SMU1 and module.alpha <= 1:
        return nn.LeakyReLU(module.alpha)
    middle, half, quarter = (1 + module.alpha) / 2, (1 - module.alpha) / 2, mu * mu / 4

    def compute(x: Tensor) -> Tensor:
        ramp = (x * half).abs()
        return x * middle + ramp + quarter / (torch.sqrt(ramp * ramp + quarter) + ramp)

    return Lambda(compute)


# ---------------------------------------------------------------- ops


@recomputable
def smu(x: Tensor, mu: Tensor, alpha: float = ALPHA) -> Tensor:
    """Return the SMU of x, in the dtype and memory format of x.

    Args:
        x: Any shape.
        mu: (1,), mu before it is clamped to at most 1,000,000 in magnitude, since it may be infinite in float16.
        alpha: Slope towards minus infinity. Default: 0.25.

    Paper: Biswas et al., CVPR 2022, arXiv:2111.04682.

    >>> smu(torch.tensor([-1.0, 1.0]), torch.tensor([1e6]))
    tensor([-0.2500,  1.0000])
    """
    rate = mu.to(compute_dtype(x.dtype)).clamp(-MU_SMU, MU_SMU) * (1 - alpha)
    return _apply(_compute_smu, _smu_forward, _smu_backward, x, rate, alpha)


@recomputable
def smu1(x: Tensor, mu: Tensor, alpha: float = ALPHA) -> Tensor:
    """Return the SMU-1 of x, in the dtype and memory format of x.

    Args:
        x: Any shape.
        mu: (1,).
        alpha: Slope towards minus infinity. Default: 0.25.

    Paper: Biswas et al., CVPR 2022, arXiv:2111.04682.

    >>> smu1(torch.tensor([1.5]), torch.tensor([2.0]), 0.0)
    tensor([2.])
    """
    quarter = mu.to(compute_dtype(x.dtype)).square() / 4 + TINY
    return _apply(_compute_smu1, _smu1_forward, _smu1_backward, x, quarter, alpha)


def _apply(
    plain: Callable[..., Tensor],
    forward: Callable[..., None],
    backward: Callable[..., list[Tensor]],
    x: Tensor,
    parameter: Tensor,
    alpha: float,
) -> Tensor:
    """Return the function of x, of a parameter in the dtype to compute in, and of a constant."""
    if needs_plain_ops(x):
        return plain(x.to(parameter.dtype), parameter, alpha).to(x.dtype)
    function = Elementwise(
        partial(plain, alpha=alpha), partial(forward, alpha=alpha), partial(backward, alpha=alpha), buffers=8
    )
    return apply_elementwise(function, x, parameter)


def _compute_smu(x: Tensor, rate: Tensor, alpha: float | Tensor) -> Tensor:
    """Compute SMU in torch's own differentiable operators, for rate = mu (1 - alpha)."""
    return x * ((1 + alpha) / 2 + (1 - alpha) / 2 * torch.erf(rate * x))


def _smu_forward(x: Tensor, rate: Tensor, out: Tensor, alpha: float) -> None:
    """Compute a block of SMU."""
    step = torch.mul(x, rate, out=scratch_like(x)).erf_()
    torch.mul(_add_middle(step, alpha), x, out=out)


def _smu_backward(grad: Tensor, x: Tensor, rate: Tensor, out: Tensor, reduce: Reduce, alpha: float) -> list[Tensor]:
    """Compute a block of the gradient of x, and return that of rate."""
    scaled = torch.mul(x, rate, out=scratch_like(x))
    step = torch.erf(scaled, out=scratch_like(x, 1))
    exponent = torch.addcmul(torch.zeros_like(rate), scaled, scaled, value=-1, out=scaled)
    bell = torch.threshold_(exponent.clamp_min_(LEAST_EXPONENT).exp_(), NEGLIGIBLE, 0.0)
    product = bell.mul_(x).mul_(grad)
    factor = (1 - alpha) / math.sqrt(math.pi)  # half of the derivative of erf
    for_rate = reduce(product, x) * factor
    torch.addcmul(_add_middle(step, alpha).mul_(grad), product, rate * factor, out=out)
    return [for_rate]


def _add_middle(step: Tensor, alpha: float) -> Tensor:
    """Map -1..1 in place to alpha..1: the slope of the line through x and 0 for a step."""
    middle = step.new_full((1,), (1 + alpha) / 2)
    return torch.add(middle, step, alpha=(1 - alpha) / 2, out=step)


def _compute_smu1(x: Tensor, quarter: Tensor, alpha: float | Tensor) -> Tensor:
    """Compute SMU-1 in torch's own differentiable operators, for quarter = mu² / 4."""
    return x * ((1 + alpha) / 2) + smooth_abs(x * ((1 - alpha) / 2), quarter)


def _smu1_forward(x: Tensor, quarter: Tensor, out: Tensor, alpha: float) -> None:
    """Compute a block of SMU-1, with `|q| + mu² / 4 / (|q| + sqrt(q² + mu² / 4))` for the root, which is finite."""
    ramp = torch.mul(x, (1 - alpha) / 2, out=scratch_like(x)).abs_()
    root = torch.addcmul(quarter, ramp, ramp, out=scratch_like(x, 1)).sqrt_().add_(ramp)
    torch.addcdiv(ramp.add_(x, alpha=(1 + alpha) / 2), quarter, root, out=out)


def _smu1_backward(grad: Tensor, x: Tensor, quarter: Tensor, out: Tensor, reduce: Reduce, alpha: float) -> list[Tensor]:
    """Compute a block of the gradient of x, and return that of quarter."""
    ramp = torch.mul(x, (1 - alpha) / 2, out=scratch_like(x)).clamp_(-LARGEST, LARGEST)
    root = torch.addcmul(quarter, ramp, ramp, out=scratch_like(x, 1)).sqrt_()
    share = torch.div(grad, root, out=root)
    for_quarter = share.sum() / 2
    ramp.mul_(share)
    torch.add(torch.mul(grad, (1 + alpha) / 2, out=share), ramp, alpha=(1 - alpha) / 2, out=out)
    return [for_quarter]


def _entry(name: str, factory: type[_SMU], formula: str, use_when: str, **answers: Any) -> Entry:
    return Entry(name, factory, formula, PAPER, use_when=use_when, **answers)


ENTRIES = (
    _entry(
        "smu",
        SMU,
        "((1 + α)·x + (1 − α)·x·erf(µ·(1 − α)·x)) / 2, α = 0.25, from µ = 10⁶",
        "To learn how round the corner of leaky_relu is. It starts so sharp that µ hardly learns: to learn it, give a "
        "smaller one, as in smu(0.01, 2.5), or start it with init=match.",
        aliases=("smooth_maximum_unit",),
        fit=_fit_smu,
        exportable=_export_smu,
        start="slopes 1.00 and 0.25 up to 1e-7",
        title="SMU",
    ),
    _entry(
        "smu1",
        SMU1,
        "((1 + α)·x + √((1 − α)²·x² + µ²)) / 2, α = 0.25, from µ = 4.35·10⁻⁹",
        "As smu, with a root instead of erf, which is cheaper.",
        fit=_fit_smu1,
        fold=_fold_smu1,
        exportable=_export_smu1,
        title="SMU-1",
    ),
)
