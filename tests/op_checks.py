"""The ops and their formulas, each in one line, and what holds one against the other, on any device.

Needs nothing but torch and the package: `scripts/check_gpu.py` uses it on machines that have no more. A check returns
its largest error in units of what it allows, and raises AssertionError where that is above 1.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rtdetr_act.activations.acon import acon
from rtdetr_act.activations.aglu import aglu
from rtdetr_act.activations.arelu import arelu
from rtdetr_act.activations.dyrelu import dyrelu
from rtdetr_act.activations.frelu import maximum
from rtdetr_act.activations.golu import golu
from rtdetr_act.activations.hard_mish import hard_mish
from rtdetr_act.activations.prelu import prelu
from rtdetr_act.activations.pwlu import pwlu
from rtdetr_act.activations.rational import NUMERATOR, rational
from rtdetr_act.activations.repact import repact
from rtdetr_act.activations.smu import smu, smu1
from rtdetr_act.activations.squared_relu import squared_relu
from rtdetr_act.activations.squareplus import squareplus
from rtdetr_act.activations.star_relu import star_relu
from rtdetr_act.activations.swish_beta import swish_beta
from rtdetr_act.activations.telu import telu
from rtdetr_act.kernels.logits import compute_logits
from rtdetr_act.kernels.pool import global_avg_pool

Inputs = list[Tensor]
HALF = (torch.float16, torch.bfloat16)
# Of values that are rounded to a type once: four units in the last place. What float32 keeps of a sum of thousands is
# 2e-5 of the sum of their magnitudes.
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Whether BatchNorm's result is computed again to the last bit: see `normalise_batch` in kernels/aten.py.
BATCH_NORM_IS_EXACT = sys.platform == "linux" and platform.machine() == "x86_64"


# ---------------------------------------------------------------- the formulas, each in one line, and their inputs


def scalar(low: float, high: float) -> Tensor:
    return torch.empty(1).uniform_(low, high)


def per_image(x: Tensor, count: int) -> Inputs:
    return [torch.randn(*x.shape[:2], 1, 1) for _ in range(count)]


def channelwise(x: Tensor, count: int) -> Inputs:
    return [torch.randn(x.shape[1]) for _ in range(count)]


def over_map(t: Tensor) -> Tensor:
    return t[..., None, None]


def dyrelu_formula(x: Tensor, *coefs: Tensor) -> Tensor:
    return dyrelu_terms(x, *coefs).amax(0)


def dyrelu_terms(x: Tensor, *coefs: Tensor) -> Tensor:
    k = len(coefs) // 2
    return torch.stack([x * a + b for a, b in zip(coefs[:k], coefs[k:], strict=True)])


def acon_formula(x: Tensor, p1: Tensor, p2: Tensor, beta: Tensor) -> Tensor:
    p1, p2, beta = over_map(p1), over_map(p2), over_map(beta)
    return (p1 - p2) * x * torch.sigmoid(beta * (p1 - p2) * x) + p2 * x


def arelu_formula(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.where(x < 0, alpha.clamp(0.01, 0.99) * x, (1 + torch.sigmoid(beta)) * x)


def aglu_formula(x: Tensor, lambd: Tensor, kappa: Tensor) -> Tensor:
    return x * (1 + lambd * torch.exp(-kappa * x)) ** (-1 / lambd)


def prelu_formula(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, (weight if len(weight) == 1 else over_map(weight)) * x)


def repact_formula(x: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
    branches = x, F.relu(x), torch.where(x > 0, x, slope * x), F.hardswish(x)
    return sum((w * branch for w, branch in zip(weights, branches, strict=True)), torch.zeros_like(x))


def pwlu_formula(x: Tensor, values: Tensor, slopes: Tensor, bounds: Tensor) -> Tensor:
    """Sum a hinge for each change of slope, of which none is at a number that a half type can hold."""
    step = (bounds[1] - bounds[0]) / (len(values) - 1)
    slope = torch.cat([slopes[:1], values.diff() / step, slopes[1:]])
    hinges = [(x - bounds[0] - step * at).relu() * change for at, change in enumerate(slope.diff())]
    return values[0] + slopes[0] * (x - bounds[0]) + torch.stack(hinges).sum(0)


def rational_formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return sum(c * x**k for k, c in enumerate(a)) / (1 + abs(sum(c * x**k for k, c in enumerate(b, 1))))


def swish_beta_formula(x: Tensor, beta: Tensor) -> Tensor:
    return x * torch.sigmoid((beta if len(beta) == 1 else over_map(beta)) * x)


def smu_formula(x: Tensor, mu: Tensor) -> Tensor:
    return (1.25 * x + 0.75 * x * torch.erf(mu * 0.75 * x)) / 2


def smu1_formula(x: Tensor, mu: Tensor) -> Tensor:
    return (1.25 * x + torch.sqrt(0.5625 * x * x + mu * mu)) / 2


# name: the op, its formula, and its other inputs for an x
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[Tensor], Inputs]]] = {
    "arelu": (arelu, arelu_formula, lambda x: [scalar(0.2, 0.8), scalar(-2, 2)]),
    "arelu-clamped": (arelu, arelu_formula, lambda x: [scalar(1, 2), scalar(-2, 2)]),
    "arelu-equal": (arelu, arelu_formula, lambda x: [scalar(0.98, 0.99), scalar(-6, -5)]),
    "arelu-inplace": (
        lambda x, *more: arelu(x * 1, *more, True),
        arelu_formula,
        lambda x: [scalar(0.2, 0.8), scalar(-2, 2)],
    ),
    "aglu": (aglu, aglu_formula, lambda x: [scalar(0.2, 2), scalar(-1, 2)]),
    "prelu": (prelu, prelu_formula, lambda x: [scalar(-0.5, 0.8)]),
    "prelu-equal": (prelu, prelu_formula, lambda x: [scalar(0.95, 1.05)]),
    "prelu-channels": (prelu, prelu_formula, lambda x: channelwise(x, 1)),
    "repact": (repact, repact_formula, lambda x: [torch.randn(4), scalar(0.1, 0.8)]),
    "repact-even": (repact, repact_formula, lambda x: [torch.tensor([0.8, 0.1, -0.1, 0.2]), scalar(0.9, 1)]),
    "repact-zero": (repact, repact_formula, lambda x: [torch.tensor([0.0, 0.5, -0.5, 1.0]), torch.zeros(1)]),
    "pwlu": (
        pwlu,
        pwlu_formula,
        lambda x: [torch.randn(9), torch.randn(2), torch.tensor([-3.0123, 2.9771])],
    ),
    "rational": (
        rational,
        rational_formula,
        lambda x: [torch.tensor(NUMERATOR) + torch.rand(6) / 5, torch.tensor([0.1, 4, 0.1, 0.3]) + torch.rand(4) / 5],
    ),
    "dyrelu-1": (lambda x, *c: dyrelu(x, c[:1], c[1:]), dyrelu_formula, lambda x: per_image(x, 2)),
    "dyrelu-2": (lambda x, *c: dyrelu(x, c[:2], c[2:]), dyrelu_formula, lambda x: per_image(x, 4)),
    "dyrelu-4": (lambda x, *c: dyrelu(x, c[:4], c[4:]), dyrelu_formula, lambda x: per_image(x, 8)),
    "dyrelu-a": (
        lambda x, *c: dyrelu(x, c[:2], c[2:]),
        dyrelu_formula,
        lambda x: [torch.randn(x.shape[0], 1, 1, 1) for _ in range(4)],
    ),
    "dyrelu-c": (
        lambda x, pi, *c: dyrelu(x, c[:2], c[2:], pi),
        lambda x, pi, *c: pi * dyrelu_formula(x, *c),
        lambda x: [torch.rand(x.shape[0], 1, *x.shape[2:]), *per_image(x, 4)],
    ),
    "acon": (acon, acon_formula, lambda x: channelwise(x, 3)),
    "acon-meta": (acon, acon_formula, lambda x: [*channelwise(x, 2), torch.rand(x.shape[:2])]),
    "maximum": (maximum, lambda x, t: torch.where(t > x, t, x), lambda x: [torch.randn_like(x)]),
    "swish_beta": (swish_beta, swish_beta_formula, lambda x: [scalar(-2, 3)]),
    "swish_beta-channels": (swish_beta, swish_beta_formula, lambda x: channelwise(x, 1)),
    "hard_mish": (hard_mish, lambda x: x * F.hardtanh(x + 2, 0.0, 2.0) / 2, lambda x: []),
    "smu": (smu, smu_formula, lambda x: [scalar(-1, 3)]),
    "smu1": (smu1, smu1_formula, lambda x: [scalar(0.1, 2)]),
    "squared_relu": (squared_relu, lambda x: x.clamp(min=0) ** 2, lambda x: []),
    "star_relu": (
        star_relu,
        lambda x, scale, bias: scale * x.clamp(min=0) ** 2 + bias,
        lambda x: [scalar(0.5, 1), scalar(-1, 1)],
    ),
    "golu": (golu, lambda x: x * torch.exp(-torch.exp(-x)), lambda x: []),
    "telu": (telu, lambda x: x * torch.tanh(torch.exp(x)), lambda x: []),
    "squareplus": (squareplus, lambda x: (x + torch.sqrt(x * x + 4)) / 2, lambda x: []),
    "logits": (
        lambda x, w, b: compute_logits(x, w, b).expand_as(x).to(x.dtype),
        lambda x, w, b: F.conv2d(x, w, b).expand_as(x),
        lambda x: [torch.randn(1, x.shape[1], 1, 1) / 4, torch.randn(1)],
    ),
    "mean": (
        lambda x: x * global_avg_pool(x, x.dtype)[..., None, None],
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: [],
    ),
}  # fmt: skip


def draw_map(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = (2 * torch.randn(shape)).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")


def draw_pair(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return a map and a gradient of a shape; with "expanded" the gradient is one number seen everywhere."""
    x, grad = (draw_map(shape, dtype, layout == "channels_last").to(device) for _ in range(2))
    if layout == "sliced":
        x = torch.cat([x, x], 1)[:, : shape[1]]
    elif layout == "expanded":
        grad = grad[:, :1, :1, :1].expand(shape)
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return x, grad


def draw_inputs(name: str, x: Tensor) -> Inputs:
    """Return the inputs of an op, x the first of them."""
    return [x, *(t.to(x.device) for t in OPS[name][2](x))]


def run(function: Callable[..., Tensor], inputs: Inputs, grad: Tensor) -> Inputs:
    """Return the result and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exactly(tensors: Inputs) -> Inputs:
    """Return tensors in float64 on the CPU, so that the reference shares neither kernels nor precision."""
    return [t.detach().cpu().double() for t in tensors]


# ---------------------------------------------------------------- checks


def excess(got: Tensor, want: Tensor, relative: float, absolute: float) -> float:
    """Return the largest difference of two tensors in units of what is allowed; infinity for a NaN or a wrong shape."""
    if got.shape != want.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    share = (got.detach().cpu().double() - want).abs() / (absolute + relative * want.abs())
    return float(share.nan_to_num(nan=float("inf")).max())


def assert_right(name: str, x: Tensor, grad: Tensor) -> float:
    """Hold an op, its result and all its gradients, against its formula in float64."""
    op, formula, _ = OPS[name]
    inputs = draw_inputs(name, x)
    grad = without_ties(name, inputs, grad)
    got, want = run(op, inputs, grad), run(formula, exactly(inputs), exactly([grad])[0])
    assert got[0].dtype == got[1].dtype == x.dtype
    assert all(t.device == x.device for t in got)
    # One rounding to the type of x, also of the result, from which AReLU and the attention of DY-ReLU-C find back; the
    # other sums keep what float32 has.
    coarse, fine = ROUNDING[x.dtype], ROUNDING[torch.float32]
    magnitude = (x.double() * grad.double()).abs().sum().item()
    worst = 0.0
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        is_map = g.shape == x.shape
        scale = 1.0 if is_map else max(1.0, magnitude / max(w.numel(), 1))
        reads_result = name == "arelu-inplace" or (x.dtype in HALF and ("arelu" in name or name == "dyrelu-c"))
        tolerance = coarse if is_map or reads_result else fine
        error = excess(g, w, tolerance, tolerance * scale)
        of = f"gradient {number} of " if number else ""
        assert error <= 1, f"{of}{name} on {tuple(x.shape)} is off by {error:.3g} times what is allowed"
        worst = max(worst, error)
    return worst


def without_ties(name: str, inputs: Inputs, grad: Tensor) -> Tensor:
    """Return a gradient that is 0 where `clear_of_ties` says no."""
    return torch.where(clear_of_ties(name, exactly(inputs)).to(grad.device), grad, 0)


def clear_of_ties(name: str, inputs: Inputs) -> Tensor:
    """Return where rounding cannot change which term is the largest, nor on which side of a kink the input is."""
    x, *coefs = inputs
    if name == "maximum":
        return x != coefs[0]
    if name.startswith("repact"):
        return (x != 0) & (x.abs() != 3)  # where Hardswish has kinks
    if not name.startswith("dyrelu") or name == "dyrelu-1":
        return x != 0  # where AReLU and PReLU have either slope; torch 2.4 draws zeros in bfloat16
    first, second = dyrelu_terms(x, *(coefs[1:] if name == "dyrelu-c" else coefs)).topk(2, 0).values
    return first - second > 1e-5 * (1 + first.abs())


def check_layout(name: str, channels_last: bool, device: torch.device | str = "cpu") -> float:
    """Hold the layout of an op's result and gradient against that of its input."""
    x = draw_map((2, 6, 5, 4), channels_last=channels_last).to(device)
    y, grad_x, *_ = run(OPS[name][0], draw_inputs(name, x), torch.ones(2, 6, 5, 4, device=device))
    assert y.stride() == grad_x.stride() == x.stride()
    return 0.0


def check_derivatives(name: str, device: torch.device | str = "cpu") -> float:
    """Hold first and second derivatives in float64 against differences."""
    x = draw_map((2, 3, 3, 2)).double().to(device)
    inputs = [t.double().requires_grad_() for t in draw_inputs(name, x)]
    # cuBLAS may sum in another order the second time.
    between_runs = 1e-12 if x.is_cuda else 0.0
    assert torch.autograd.gradcheck(OPS[name][0], inputs, nondet_tol=between_runs)
    assert torch.autograd.gradgradcheck(OPS[name][0], inputs, nondet_tol=between_runs)
    return 0.0


def check_second_derivatives(name: str, x: Tensor, grad: Tensor) -> float:
    """Hold the gradient of a gradient against that of the formula in float64."""
    op, formula, _ = OPS[name]
    inputs = draw_inputs(name, x)
    grad = without_ties(name, inputs, grad)
    directions = [torch.randn(t.shape) for t in inputs]
    got = differentiate_twice(op, inputs, grad, directions)
    want = differentiate_twice(formula, exactly(inputs), exactly([grad])[0], directions)
    # Through torch's own operators, each of which rounds to the type of x: twice as much as for a first derivative, and
    # of the largest value, since terms of that size cancel.
    tolerance = 2 * ROUNDING[x.dtype]
    worst = 0.0
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        scale = max(w.abs().max().item(), 1.0 if g.shape == x.shape else x.numel() / w.numel())
        error = excess(g, w, tolerance, tolerance * scale)
        assert error <= 1, f"second derivative {number} of {name} is off by {error:.3g} times what is allowed"
        worst = max(worst, error)
    return worst


def differentiate_twice(function: Callable[..., Tensor], inputs: Inputs, grad: Tensor, directions: Inputs) -> Inputs:
    """Return the gradients, of all inputs and of `grad`, of the first gradients' products with directions."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = grad.detach().requires_grad_()
    first = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
    along = sum((g * d.to(g)).sum().to(torch.float64) for g, d in zip(first, directions, strict=True))
    return list(torch.autograd.grad(along, [*leaves, grad], allow_unused=True, materialize_grads=True))


def check_repeats(name: str, device: torch.device | str = "cpu") -> float:
    """Run an op three times where only deterministic algorithms may run, and compare the results to the bit."""
    x, grad = draw_pair((2, 7, 30, 30), torch.float32, "contiguous", device)
    inputs = draw_inputs(name, x)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(OPS[name][0], inputs, grad) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    assert not any(t.isnan().any() for t in runs[0])
    return 0.0


def check_compiled(name: str, x: Tensor, grad: Tensor, backend: str = "inductor") -> float:
    """Compile an op as one graph, forward and backward, and hold it against its formula in float64."""
    op, formula, _ = OPS[name]
    inputs = draw_inputs(name, x)
    grad = without_ties(name, inputs, grad)
    torch._dynamo.reset()
    got = run(torch.compile(op, fullgraph=True, backend=backend), inputs, grad)
    want = run(formula, exactly(inputs), exactly([grad])[0])
    # A compiled AReLU has the slope of PReLU rounded to the type of x, and its products too.
    tolerance = 2 * ROUNDING[x.dtype]
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        scale = 1.0 if g.shape == x.shape else max(1.0, (x.double() * grad.double()).abs().sum().item() / w.numel())
        error = excess(g, w, tolerance, tolerance * scale)
        assert error <= 1, f"{name}, compiled, is off by {error:.3g} times what is allowed"
        worst = max(worst, error)
    return worst
