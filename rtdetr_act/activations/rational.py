"""Rational: a quotient of two learned polynomials, the safe Padé activation unit (Molina et al., arXiv:1907.06732)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtdetr_act.activations.exporting import Lambda
from rtdetr_act.activations.fitting import fit_curve
from rtdetr_act.activations.protocol import GRID, Entry
from rtdetr_act.kernels.aten import zero_outside
from rtdetr_act.kernels.backend import compute_dtype
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

PAPER = "Molina et al., ICLR 2020, arXiv:1907.06732"
# Leaky ReLU with a slope of 0.01, up to 0.034 on -3..3: the start of the authors' code (github.com/ml-research/pau).
# The coefficients in the paper's table belong to the denominator 1 + sum(|b_k * x ** k|), which their code has: there
# they are 0.030 off, here 0.066, with a kink at -0.28. Those below, of even denominators, suit both forms.
NUMERATOR = (3.35583603e-02, 5.05000375e-01, 1.65343934e00, 2.01001052e00, 9.31901999e-01, 1.52424124e-01)
DENOMINATOR = (3.30847488e-06, 3.98021568e00, 5.12471206e-07, 3.01830109e-01)
# Inputs are clamped to it, since the fifth power of 3e7 is beyond float32.
LARGEST_INPUT = 1e6


class Rational(nn.Module):
    """Divide one learned polynomial by another.

    `f(x) = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1 x + ... + b_4 x^4|)`. It starts close to a Leaky ReLU with the
    slope 0.01 where |x| < 3; beyond, it approaches lines with half the slope of x. x is clamped to -10^6..10^6.

    Shapes: any to the same. `numerator` is (6,) and `denominator` (4,), in ascending order of powers, shared by all
    channels and positions.

    Paper: Molina et al., ICLR 2020, arXiv:1907.06732.

    >>> Rational()(torch.tensor([-2.0, 0.0, 2.0])).detach()
    tensor([-0.0188,  0.0336,  2.0012])
    """

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(NUMERATOR))
        self.denominator = nn.Parameter(torch.tensor(DENOMINATOR))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return rational(x, self.numerator, self.denominator)


# ---------------------------------------------------------------- callbacks of the entry

# Bounds of a fit. Those of SiLU, GELU, Mish and ReLU are within 6.
_LARGEST_COEFFICIENT = 100.0


def _evaluate_on_grid(*coefficients: Tensor) -> Tensor:
    """Return the function on `GRID`, (1201,), for the six coefficients of the numerator and four of the denominator."""
    return _compute_plain(GRID, torch.stack(coefficients[:6]).double(), torch.stack(coefficients[6:]).double())


@torch.no_grad()
def _fit(module: Rational, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit the parameters to a target curve on `GRID`, and return the fitted curve."""
    high = (_LARGEST_COEFFICIENT,) * 10
    low = tuple(-bound for bound in high)
    found, curve = fit_curve(_evaluate_on_grid, target, NUMERATOR + DENOMINATOR, low, high)
    module.numerator.copy_(torch.tensor(found[:6]))
    module.denominator.copy_(torch.tensor(found[6:]))
    return curve


def _exportable(module: Rational) -> nn.Module:
    """Implement `Entry.exportable`: no power exceeds the input, so that runtimes can compute it in float16.

    There x^5 would overflow for |x| > 9. Numerator and denominator are multiplied by s^4, with s = 1 / max(|x|, 1), and
    are polynomials of s and of y = s x, both of which are between -1 and 1.
    """
    a, b = module.numerator.tolist(), module.denominator.tolist()

    def compute(x: Tensor) -> Tensor:
        s = 1 / x.abs().clamp(min=1.0)
        y = x * s
        s2, y2 = s * s, y * y
        s3, s4 = s2 * s, s2 * s2
        above = (((y * a[4] + s * a[3]) * y + s2 * a[2]) * y + s3 * a[1]) * y + s4 * a[0] + y2 * y2 * x * a[5]
        below = s4 + ((((y * b[3] + s * b[2]) * y + s2 * b[1]) * y + s3 * b[0]) * y).abs()
        return above / below

    return Lambda(compute)


def _learned(module: Rational) -> dict[str, Tensor]:
    """Return the values of the function at -2, 0 and 2, which the coefficients do not tell."""
    values = _compute_plain(torch.tensor([-2.0, 0.0, 2.0]).to(module.numerator), module.numerator, module.denominator)
    return dict(zip(("at_minus_2", "at_0", "at_2"), values, strict=True))


# ---------------------------------------------------------------- op


@recomputable
def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient of two polynomials of x, in the dtype and memory format of x.

    Args:
        x: Any shape; clamped to -10^6..10^6, outside of which its gradient is 0.
        numerator: (6,), the coefficients of x^0 to x^5.
        denominator: (4,), the coefficients of x^1 to x^4 in 1 + |b_1 x + ... + b_4 x^4|.

    Paper: Molina et al., ICLR 2020, arXiv:1907.06732.

    >>> rational(torch.tensor([3.0]), torch.tensor([0.0, 1, 0, 0, 0, 0]), torch.tensor([-1.0, 0, 0, 0]))
    tensor([0.7500])
    """
    # In float32 for half types, in which x^5 overflows for |x| > 9.
    dtype = compute_dtype(x.dtype)
    return apply_elementwise(_FUNCTION, x, numerator.to(dtype), denominator.to(dtype))


def _compute_plain(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    x = x.clamp(-LARGEST_INPUT, LARGEST_INPUT)
    a, b = numerator.unbind(), denominator.unbind()
    above = ((((a[5] * x + a[4]) * x + a[3]) * x + a[2]) * x + a[1]) * x + a[0]
    return above / (1 + ((((b[3] * x + b[2]) * x + b[1]) * x + b[0]) * x).abs())


def _forward(x: Tensor, numerator: Tensor, denominator: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    x = torch.clamp(x, -LARGEST_INPUT, LARGEST_INPUT, out=scratch_like(x))
    below = _evaluate(denominator.unbind(), x, scratch_like(x, 1)).mul_(x).abs_().add_(1)
    torch.div(_evaluate(numerator.unbind(), x, scratch_like(x, 2)), below, out=out)


def _evaluate(coefficients: Sequence[Tensor], x: Tensor, out: Tensor) -> Tensor:
    """Return a polynomial of x, written to `out`, by Horner's rule."""
    *others, last = coefficients
    torch.mul(x, last, out=out).add_(others.pop())
    for coefficient in reversed(others):
        torch.addcmul(coefficient, out, x, out=out)
    return out


def _backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, out: Tensor, reduce: Reduce
) -> list[Tensor]:
    """Compute a block of the gradient of x, and return those of the coefficients."""
    given, x = x, torch.clamp(x, -LARGEST_INPUT, LARGEST_INPUT, out=scratch_like(x))
    inner = _evaluate(denominator.unbind(), x, scratch_like(x, 1)).mul_(x)
    below = torch.abs(inner, out=scratch_like(x, 2)).add_(1)
    for_above = torch.div(grad, below, out=scratch_like(x, 3))
    for_inner = _evaluate(numerator.unbind(), x, scratch_like(x, 4)).mul_(for_above).mul_(inner.sign_().div_(below))
    slope = _evaluate(_differentiate(numerator[1:]), x, below).mul_(for_above)
    slope.addcmul_(_evaluate(_differentiate(denominator), x, inner), for_inner, value=-1)
    zero_outside(slope, given, LARGEST_INPUT, out)
    square = torch.mul(x, x, out=inner)
    sums = [for_above.sum(), reduce(for_above, x), reduce(for_above, square)]
    for_above.mul_(square)
    sums += [reduce(for_above, x), reduce(for_above, square), reduce(for_above.mul_(x), square)]
    inner_sums = [reduce(for_inner, x), reduce(for_inner, square)]
    for_inner.mul_(square)
    inner_sums += [reduce(for_inner, x), reduce(for_inner, square)]
    return [torch.stack(sums), -torch.stack(inner_sums)]


def _differentiate(coefficients: Tensor) -> Sequence[Tensor]:
    """Return the coefficients of the derivative of a polynomial, from those of x^1 on."""
    return (coefficients * _ORDERS[: coefficients.numel()].to(coefficients)).unbind()


_ORDERS = torch.arange(1.0, 6.0)  # made once: what is made for each block takes as long as a pass over it


# Per element on one loaded core, in blocks of 64 K elements, where SiLU takes 1.0 + 1.6 ns: forward 4.0 ns, 5.2 if the
# polynomials are a product of a matrix of coefficients and one of the powers of x; backward, without `zero_outside`,
# 12.3 ns, 15.9 with products of matrices for the polynomials and for the sums, 14.2 with those for the sums alone.
_FUNCTION = Elementwise(_compute_plain, _forward, _backward, buffers=8)


ENTRIES = (
    Entry(
        "rational",
        Rational,
        "(a₀ + a₁·x + … + a₅·x⁵) / (1 + |b₁·x + … + b₄·x⁴|)",
        PAPER,
        aliases=("pau", "pade", "pade_activation_unit", "safe_pau"),
        fit=_fit,
        exportable=_exportable,
        learned=_learned,
        start="leaky_relu to 0.034 where |x| < 3",
        use_when=(
            "To learn a smooth function with ten parameters per site. It starts close to leaky_relu where |x| < 3, and "
            "with init=match close to the activation that it replaces."
        ),
    ),
)
