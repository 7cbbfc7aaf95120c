"""RepAct: a learned sum of identity, ReLU, PReLU and Hardswish (Wu, Tao & Wang, arXiv:2407.00131)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.exporting import Lambda
from rtdetr_act.activations.fitting import ROOT_WEIGHTS
from rtdetr_act.activations.protocol import GRID, Entry, Folded
from rtdetr_act.activations.torch_native import leaky_relu_spec
from rtdetr_act.kernels import leaky
from rtdetr_act.kernels.aten import hardswish_backward, hardswish_into, scale_by_sign
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable
from rtdetr_act.spec import ActSpec

BRANCHES = ("identity", "relu", "prelu", "hardswish")


class RepAct(nn.Module):
    """Sum four activations with learned weights: `w0 x + w1 relu(x) + w2 prelu(x) + w3 hardswish(x)`.

    The sum is one function of three coefficients: x times one of two slopes, and a share of Hardswish. It is computed
    as such in training too, so that the branches cost nothing, and exported as such.

    Of the forms in the paper, `softmax=False` is RepAct-I and `softmax=True` RepAct-II. RepAct-III, which normalises
    the sum by the mean and variance of all its values, is left out: it would mix the images of a batch and, in a
    decoder, denoising queries, which hold ground truth, with the others.

    Shapes: any to the same. `weights` is (4,) in the order above and `slope`, that of PReLU, (1,); both are shared by
    all channels and positions.

    Args:
        softmax: Weight the branches by the softmax of `weights`, so that their sum is 1. Default: False.

    Paper: Wu, Tao & Wang, arXiv:2407.00131; the initial values, 1/4 for each weight and a slope of 1/4, are those of
    the authors' code.

    >>> RepAct()(torch.tensor([-4.0, 4.0])).detach()
    tensor([-1.2500,  4.0000])
    """

    def __init__(self, softmax: bool = False) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((4,), 0.25))
        self.slope = nn.Parameter(torch.tensor([0.25]))
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return repact(x, self.branch_weights(), self.slope)

    def branch_weights(self) -> Tensor:
        """Return the weights of identity, ReLU, PReLU and Hardswish, (4,).

        >>> RepAct(softmax=True).branch_weights().detach()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        return torch.softmax(self.weights, 0) if self.softmax else self.weights

    def extra_repr(self) -> str:
        """Return the arguments of the constructor that are not defaults."""
        return "softmax=True" if self.softmax else ""


# ---------------------------------------------------------------- callbacks of the entry

# Bounds of the share of Hardswish in a fit of the softmax, beyond which its gradient would vanish.
_LEAST_SHARE, _LARGEST_SHARE = 0.01, 0.99
_ABOVE, _BELOW, _HARDSWISH = GRID.clamp(min=0), GRID.clamp(max=0), F.hardswish(GRID)


@torch.no_grad()
def _fit(module: RepAct, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit the parameters to a target curve on `GRID`, and return the fitted curve."""
    if module.softmax:
        return _fit_shares(module, target)
    above, below, share = _solve((_ABOVE, _BELOW, _HARDSWISH), target)
    # Identity, ReLU and PReLU make up two slopes: of all weights that do, those closest to the initial ones.
    slopes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, module.slope.item()]], dtype=torch.float64)
    weights = torch.full((3,), 0.25, dtype=torch.float64)
    weights += torch.linalg.pinv(slopes) @ (torch.tensor([above, below], dtype=torch.float64) - slopes @ weights)
    module.weights.copy_(torch.cat([weights, torch.tensor([share])]))
    return above * _ABOVE + below * _BELOW + share * _HARDSWISH


def _fit_shares(module: RepAct, target: Tensor) -> Tensor:
    """Fit the share of Hardswish and the slope, where the slope for positive inputs is the rest of the share."""
    _, share = _solve((_BELOW, _HARDSWISH - _ABOVE), target - _ABOVE)
    share = min(max(share, _LEAST_SHARE), _LARGEST_SHARE)
    positive = (1 - share) * _ABOVE + share * _HARDSWISH
    (below,) = _solve((_BELOW,), target - positive)
    each = (1 - share) / 3
    module.weights.copy_(torch.tensor([each, each, each, share]).log())
    module.slope.fill_(below / each - 1)
    return positive + below * _BELOW


def _solve(curves: Sequence[Tensor], target: Tensor) -> list[float]:
    """Return the factors of curves on `GRID` whose sum is closest to a target."""
    matrix = torch.stack(list(curves), 1) * ROOT_WEIGHTS[:, None]
    found: list[float] = torch.linalg.lstsq(matrix, (target * ROOT_WEIGHTS)[:, None]).solution[:, 0].tolist()
    return found


def _fold(module: RepAct) -> Folded | None:
    """Implement `Entry.fold`: LeakyReLU without a share of Hardswish, Hardswish if it is nothing else."""
    above, below, share = _read_coefficients(module)
    if share == 0 and above > 0:
        return Folded(leaky_relu_spec(below / above), above)
    return Folded(ActSpec("hardswish")) if (above, below, share) == (0, 0, 1) else None


def _exportable(module: RepAct) -> nn.Module:
    """Implement `Entry.exportable`: LeakyReLU with a factor, the larger one of the slopes, and a share of Hardswish."""
    above, below, share = _read_coefficients(module)
    if abs(above) >= abs(below):
        ratio = below / above if above else 0.0
        return Lambda(lambda x: F.leaky_relu(x, ratio) * above + F.hardswish(x) * share)
    ratio = above / below
    return Lambda(lambda x: F.leaky_relu(x * -1, ratio) * -below + F.hardswish(x) * share)


@torch.no_grad()
def _read_coefficients(module: RepAct) -> tuple[float, float, float]:
    """Return the slopes for positive and for negative inputs, and the share of Hardswish."""
    above, below, share = collapse(module.branch_weights().double(), module.slope.double())
    return above.item(), below.item(), share.item()


def _learned(module: RepAct) -> dict[str, Tensor]:
    """Return the weights of the branches, and the slope of PReLU."""
    return {**dict(zip(BRANCHES, module.branch_weights().unbind(), strict=True)), "slope": module.slope}


# ---------------------------------------------------------------- op


@recomputable
def repact(x: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
    """Return the RepAct of x, in the dtype and memory format of x.

    Args:
        x: Any shape.
        weights: (4,), those of identity, ReLU, PReLU and Hardswish.
        slope: (1,), that of PReLU for negative inputs.

    Paper: Wu, Tao & Wang, arXiv:2407.00131.

    >>> repact(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([0.1]))  # PReLU
    tensor([-0.1000,  1.0000])
    """
    return apply_elementwise(_FUNCTION, x, *collapse(weights, slope))


def collapse(weights: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficients of the sum: its slopes for positive and for negative inputs, and its share of Hardswish.

    Args:
        weights: (4,), those of identity, ReLU, PReLU and Hardswish.
        slope: (1,), that of PReLU for negative inputs.

    Returns:
        Three tensors (1,).

    >>> [t.item() for t in collapse(torch.full((4,), 0.25), torch.tensor([0.25]))]
    [0.75, 0.3125, 0.25]
    """
    identity, relu, prelu, hardswish = weights.split(1)
    return identity + relu + prelu, torch.addcmul(identity, prelu, slope), hardswish


def _compute_plain(x: Tensor, above: Tensor, below: Tensor, share: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return above * x.clamp(min=0) + below * x.clamp(max=0) + share * F.hardswish(x)


def _forward(x: Tensor, above: Tensor, below: Tensor, share: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    if not x.is_cpu:
        out.copy_(_compute_plain(x, above, below, share))
        return
    signed, slopes = _flip(x, above, below)
    lines = scale_by_sign(signed, x, *slopes, _find_buffer(x, out))
    torch.add(lines, hardswish_into(x, scratch_like(x, 1)), alpha=share.item(), out=out)


def _backward(
    grad: Tensor, x: Tensor, above: Tensor, below: Tensor, share: Tensor, out: Tensor, reduce: Reduce
) -> list[Tensor]:
    """Compute a block of the gradient of x, and return those of the coefficients."""
    for_share = reduce(grad, hardswish_into(x, scratch_like(x, 1)))
    if not x.is_cpu:
        lines = grad * torch.where(x > 0, above, below)
        torch.addcmul(lines, hardswish_backward(grad, x), share, out=out)
        return [reduce(grad, x.clamp(min=0)), reduce(grad, x.clamp(max=0)), for_share]
    signed, slopes = _flip(grad, above, below)
    lines, *sums = leaky.backward_block(signed, x, *slopes, _find_buffer(x, out))
    torch.add(lines, hardswish_backward(grad, x), alpha=share.item(), out=out)
    return [*above.new_tensor(sums if signed is grad else [-each for each in sums]).split(1), for_share]


def _flip(values: Tensor, above: Tensor, below: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Return values and slopes for `scale_by_sign`, both negated where the slope for positive inputs is negative.

    One close to 0 is not allowed either; what takes its place is lost in rounding.
    """
    positive, negative = (t.item() if abs(t.item()) > _NEARLY_0 else _NEARLY_0 for t in (above, below))
    return (values, (positive, negative)) if positive > 0 else (values.neg(), (-positive, -negative))


def _find_buffer(x: Tensor, out: Tensor) -> Tensor:
    """Return where to write what is added to: the output, unless it has another dtype."""
    return out if out.dtype == x.dtype else scratch_like(x)


_NEARLY_0 = 2.0**-60
# On a thread, 4x64x80x80 takes 1.6 + 3.3 ns an element forward and backward; with sums over two more maps written in
# the cache, 2.1 + 4.7 ns; SiLU 0.8 + 1.0 ns.
_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "repact",
        RepAct,
        "w₀·x + w₁·relu(x) + w₂·prelu(x) + w₃·hardswish(x), wᵢ = 1/4",
        "Wu, Tao & Wang, arXiv:2407.00131",
        fit=_fit,
        fold=_fold,
        exportable=_exportable,
        learned=_learned,
        use_when=(
            "To learn which of identity, relu, prelu and hardswish a site needs, with five parameters; softmax=True "
            "keeps the sum of their weights at 1 (RepAct-II). The four are computed and exported as one function."
        ),
        start="the mean of identity, relu, prelu with a slope of 1/4, and hardswish",
    ),
)
