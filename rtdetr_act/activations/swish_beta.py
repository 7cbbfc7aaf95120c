"""Swish with a learned steepness (Ramachandran et al., arXiv:1710.05941)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import channel_dim, check_count, check_finite
from rtdetr_act.activations.fitting import fit_curve
from rtdetr_act.activations.protocol import GRID, Entry, Folded, Layout
from rtdetr_act.activations.torch_native import SILU
from rtdetr_act.errors import SpecError
from rtdetr_act.kernels.aten import sigmoid_backward_
from rtdetr_act.kernels.backend import needs_plain_ops
from rtdetr_act.kernels.blocks import as_map, from_map, scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable


class SwishBeta(nn.Module):
    """Multiply x by a sigmoid of learned steepness: `x * sigmoid(beta * x)`.

    With beta = 1, the default, it is SiLU; with beta = 0 it is x / 2, and as beta grows it approaches ReLU. Swish with
    a constant beta of 1 is `silu`. The paper names no initial value; published implementations start at 1.

    Shapes: any to the same with one beta; (B, C, ...), or (..., C) with layout "tokens", with one per channel. `beta`
    is (1,) or (C,).

    Args:
        beta: Initial beta. Default: 1.0.
        per_channel: Learn one beta for each of `channels`. Default: False.
        channels: C, None (default) if unknown.
        layout: "map" (default) or "tokens".

    Raises:
        ValueError: `beta` is not a finite number, `channels` is below 1, or `layout` is unknown.
        SpecError: `per_channel` is set, but the number of channels is unknown.

    Paper: Ramachandran et al., arXiv:1710.05941.

    >>> x = torch.randn(100)
    >>> torch.allclose(SwishBeta()(x), nn.functional.silu(x), atol=1e-6)
    True
    """

    def __init__(
        self, beta: float = 1.0, per_channel: bool = False, channels: int | None = None, *, layout: Layout = "map"
    ) -> None:
        super().__init__()
        if per_channel and channels is None:
            raise SpecError("'swish_beta(per_channel=True)' needs the number of channels: give channels=, such as 64")
        count = check_count("channels", channels) if per_channel and channels is not None else 1
        channel_dim(layout)
        self.layout = layout
        self.beta = nn.Parameter(torch.full((count,), check_finite("beta", beta)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return swish_beta(x, self.beta, self.layout)

    def extra_repr(self) -> str:
        """Return the number of betas, if there are several."""
        return f"{len(self.beta)}, layout={self.layout!r}" if len(self.beta) > 1 else ""


# ---------------------------------------------------------------- callbacks of the entry

_LARGEST_BETA = 10.0  # at which it is ReLU up to 0.028 everywhere


def _evaluate_on_grid(beta: Tensor) -> Tensor:
    """Return the activation on `GRID`, (1201,), for a scalar beta."""
    return GRID * torch.sigmoid(beta * GRID)


@torch.no_grad()
def _fit(module: SwishBeta, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit beta to a target curve on `GRID`, and return the fitted curve."""
    (beta,), curve = fit_curve(_evaluate_on_grid, target, (1.0,), (-_LARGEST_BETA,), (_LARGEST_BETA,))
    module.beta.fill_(beta)
    return curve


def _fold(module: SwishBeta) -> Folded | None:
    """Implement `Entry.fold`: return the equivalent in evaluation mode, None if torch has none."""
    return Folded(SILU) if bool((module.beta == 1).all()) else None


# ---------------------------------------------------------------- op


@recomputable
def swish_beta(x: Tensor, beta: Tensor, layout: Layout = "map") -> Tensor:
    """Return `x * sigmoid(beta * x)`, in the dtype and memory format of x.

    Args:
        x: (B, C, ...), or (..., C) with layout "tokens"; any shape with one beta.
        beta: (C,), or (1,) for a beta shared by all channels.
        layout: "map" (default) or "tokens".

    Raises:
        RuntimeError: The number of betas is neither 1 nor C (raised by torch).

    Paper: Ramachandran et al., arXiv:1710.05941.

    >>> swish_beta(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 0.0]))
    tensor([[0.7311, 0.5000]])
    """
    if beta.numel() == 1:
        return apply_elementwise(_FUNCTION, x, beta)
    if needs_plain_ops(x):
        over_x = beta if layout == "tokens" else beta.reshape(-1, *(1,) * (x.ndim - 2))
        return apply_elementwise(_FUNCTION, x, over_x)
    y = apply_elementwise(_FUNCTION, as_map(x, layout), beta[:, None, None])
    return from_map(y, x.shape, layout)


def _compute_plain(x: Tensor, beta: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return x * torch.sigmoid(beta * x)


def _forward(x: Tensor, beta: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    torch.mul(_compute_gate(x, beta), x, out=out)


def _backward(grad: Tensor, x: Tensor, beta: Tensor, out: Tensor, reduce: Reduce) -> list[Tensor]:
    """Compute a block of the gradient of x, and return that of beta."""
    gate = _compute_gate(x, beta)
    product = sigmoid_backward_(torch.mul(grad, x, out=scratch_like(x, 1)), gate)
    for_beta = reduce(product, x)
    torch.add(gate.mul_(grad), product.mul_(beta), out=out)
    return [for_beta]


def _compute_gate(x: Tensor, beta: Tensor) -> Tensor:
    """Return sigmoid(beta * x) in a scratch buffer."""
    return torch.mul(x, beta, out=scratch_like(x)).sigmoid_()


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "swish_beta",
        SwishBeta,
        "x·σ(β·x)",
        "Ramachandran et al., arXiv:1710.05941",
        aliases=("beta_swish", "parametric_swish"),
        fit=_fit,
        fold=_fold,
        use_when=(
            "To learn how steep silu is, with one parameter per site, or one per channel with per_channel=True. It "
            "starts as silu exactly."
        ),
        title="Swish-β",
    ),
)
