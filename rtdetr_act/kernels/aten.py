"""Every use of undocumented ATen behaviour: operators called for a side use, and private state of torch.

`tests/test_aten.py` tests each assumption made here; `make test-oldest` runs it with the oldest supported torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.aten
_elu_backward = _ops.elu_backward.default
_elu_backward_out = _ops.elu_backward.grad_input
_threshold_backward_out = _ops.threshold_backward.grad_input
_hardtanh_backward_out = _ops.hardtanh_backward.grad_input
_sigmoid_backward_out = _ops.sigmoid_backward.grad_input
_tanh_backward_out = _ops.tanh_backward.grad_input
_softplus_out = _ops.softplus.out
_hardswish_out = _ops.hardswish.out
# The constant alpha * scale in `scale_by_sign`, by compute dtype.
ELU_OFFSET = {torch.float32: 2.0**60, torch.float64: 2.0**500}


def is_tracing() -> bool:
    """Return whether `torch.jit.trace` is recording, as in Ultralytics' ONNX and TorchScript export."""
    return torch._C._get_tracing_state() is not None


def is_functorch_active() -> bool:
    """Return whether a `torch.func` transform is active, by the same test as `autograd.Function` uses."""
    return torch._C._are_functorch_transforms_active()


def has_modes() -> bool:
    """Return whether a dispatch or function mode of torch is active, which sees every call: a counter or a tracer."""
    return torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() > 0


def scale_by_sign(x: Tensor, sign: Tensor, above: float, below: float, out: Tensor | None = None) -> Tensor:
    """Multiply x by `above` where sign > 0 and by `below` elsewhere, in one pass over memory.

    torch has no kernel with two slopes, but the backward of ELU with `is_result=True` computes one: grad * scale where
    the result is positive, and grad * input_scale * (result + alpha * scale) elsewhere. With alpha * scale = 2 ** 60
    the bracket is constant up to |sign| = 2 ** 36 = 7e10 in float32, beyond which the product loses digits (and its
    sign from 1e18 on); values below 1e-20 keep an absolute error below 1e-26. Compared with leaky_relu and a product,
    AReLU on 2x128x160x160 takes 4.2 ms instead of 5.9 ms, forward and backward, with two threads; SiLU takes 4.4 ms.

    Args:
        x: Any shape, float32 or float64.
        sign: Same shape and dtype as x.
        above: Factor where `sign` is positive; must be positive, since torch refuses an ELU with a negative alpha.
        below: Factor elsewhere; must not be 0.
        out: Output tensor, which may alias x or `sign`; None (default) allocates a new one.

    Returns:
        The product, in the shape and dtype of x.

    Raises:
        KeyError: x has another dtype than float32 and float64.

    >>> scale_by_sign(torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0]), 2.0, 0.5)
    tensor([0.5000, 2.0000])
    """
    straight = ELU_OFFSET[x.dtype]
    if out is None:
        return _elu_backward(x, straight / above, above, below / straight, True, sign)
    return _elu_backward_out(x, straight / above, above, below / straight, True, sign, grad_input=out)


def zero_unless_positive(x: Tensor, sign: Tensor, out: Tensor) -> Tensor:
    """Return x where sign > 0 and 0 elsewhere, written to `out`: `zero_unless_above` with a threshold of 0."""
    return zero_unless_above(x, sign, 0, out)


def zero_unless_above(x: Tensor, other: Tensor, threshold: float, out: Tensor) -> Tensor:
    """Return x where other > threshold and 0 elsewhere, written to `out`.

    Args:
        x: Any shape.
        other: Same shape and dtype as x.
        threshold: A number of this dtype.
        out: Output tensor of the same shape and dtype, which may alias x or `other`.

    >>> other = torch.tensor([-1.0, 2.0])
    >>> zero_unless_above(torch.tensor([5.0, 6.0]), other, -1.0, other)
    tensor([0., 6.])
    """
    return _threshold_backward_out(x, other, threshold, grad_input=out)


def zero_outside(x: Tensor, position: Tensor, limit: float, out: Tensor) -> Tensor:
    """Return x where |position| < limit and 0 elsewhere, written to `out`, in one pass over memory.

    Args:
        x: Any shape.
        position: Same shape and dtype as x.
        limit: A positive number.
        out: Output tensor of the same shape, which may alias x, and may have another dtype.

    >>> x = torch.tensor([5.0, 6.0])
    >>> zero_outside(x, torch.tensor([-3.0, 1.0]), 2.0, x)
    tensor([0., 6.])
    """
    return _hardtanh_backward_out(x, position, -limit, limit, grad_input=out)


def sigmoid_backward_(grad: Tensor, gate: Tensor) -> Tensor:
    """Multiply `grad` in place by the derivative of the sigmoid, gate * (1 - gate), and return it.

    Args:
        grad: Gradient with respect to the sigmoid's output; any shape.
        gate: Output of the sigmoid, in the same shape and dtype.

    >>> sigmoid_backward_(torch.tensor([1.0]), torch.tensor([0.5]))
    tensor([0.2500])
    """
    return _sigmoid_backward_out(grad, gate, grad_input=grad)


def tanh_backward_(grad: Tensor, result: Tensor) -> Tensor:
    """Multiply `grad` in place by the derivative of tanh, 1 - result², and return it.

    Args:
        grad: Gradient with respect to the output of tanh; any shape.
        result: Output of tanh, in the same shape and dtype.

    >>> tanh_backward_(torch.tensor([1.0]), torch.tensor([0.5]))
    tensor([0.7500])
    """
    return _tanh_backward_out(grad, result, grad_input=grad)


def softplus_(x: Tensor) -> Tensor:
    """Replace x in place by softplus(x) = ln(1 + exp(x)), and return it.

    >>> softplus_(torch.zeros(1))
    tensor([0.6931])
    """
    return _softplus_out(x, out=x)


def hardswish_into(x: Tensor, out: Tensor) -> Tensor:
    """Write x * clamp(x / 6 + 1/2, 0, 1) to `out`, and return it.

    >>> hardswish_into(torch.tensor([-4.0, 0.0, 3.0]), torch.empty(3))
    tensor([-0., 0., 3.])
    """
    return _hardswish_out(x, out=out)


def hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad times the derivative of `hardswish_into`: x / 3 + 1/2 where -3 < x < 3, 0 below and 1 above.

    >>> hardswish_backward(torch.ones(3), torch.tensor([-4.0, 0.0, 4.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return _ops.hardswish_backward.default(grad, x)


def sum_per_channel(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of grad * x and of grad over height and width, for contiguous maps on a CPU.

    The backward of a BatchNorm in evaluation mode with mean 0 and variance 1 computes both in one pass without writing
    a map: 75 µs on 8x16x56x56, where a product and two sums take 130 µs.

    Args:
        grad: (B, C, H, W), contiguous.
        x: Same shape and dtype, contiguous.

    Returns:
        The sums of grad * x and of grad, each (B, C).
    """
    images, channels, height, width = x.shape
    rows = (1, images * channels, height, width)
    mean, variance = x.new_zeros(rows[1]), x.new_ones(rows[1])
    _, products, totals = _ops.native_batch_norm_backward(
        grad.view(rows), x.view(rows), None, mean, variance, None, None, False, 0.0, [False, True, True]
    )
    return products.view(images, channels), totals.view(images, channels)


def has_saved_tensor_hooks() -> bool:
    """Return whether hooks of others are asked for each tensor that autograd saves, as inside `checkpoint`.

    False where torch does not tell: 2.4, for one.
    """
    get_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return get_hooks is not None and get_hooks(False) is not None


def get_storage_address(x: Tensor) -> int:
    """Return a number that identifies the memory of a tensor as long as it lives; 0 for a tensor without memory."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper
        return 0


def get_batch_statistics(result: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the inverse standard deviation that a BatchNorm in training has normalised by.

    Args:
        result: What `F.batch_norm` returned.

    Returns:
        Both (C,), as autograd has saved them; None if another kind of node computed the result.
    """
    node = result.grad_fn
    mean, deviation = (getattr(node, f"_saved_result{number}", None) for number in (1, 2))
    return None if mean is None or deviation is None else (mean.detach(), deviation.detach())


def normalise_batch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_deviation: Tensor
) -> Tensor:
    """Return `(input - mean) * inverse_deviation * weight + bias` per channel, as BatchNorm computes it in training.

    On a CPU the result is the same to the last bit, unless in float64. There, training and evaluation share a kernel
    that computes `input * scale + shift`. It is called with a scale and a shift in place of weight and bias, a mean of
    0 and a deviation of 1, since no variance gives the inverse deviation back exactly. The kernel's shift is
    `bias - mean * scale` in one rounding where the compiler fuses the two, as it does for Linux on x86-64.

    Args:
        input: (B, C, ...).
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        mean: (C,).
        inverse_deviation: (C,), 1 / sqrt(variance + eps).
    """
    if not input.is_cpu:
        variance = inverse_deviation.pow(-2)
        return torch.native_batch_norm(input, weight, bias, mean, variance, False, 0.0, 0.0)[0]
    scale = inverse_deviation if weight is None else inverse_deviation * weight
    product = mean.double() * scale.double()
    shift = (-product if bias is None else bias.double() - product).to(scale.dtype)
    zeros = torch.zeros_like(mean)
    return torch.native_batch_norm(input, scale, shift, zeros, zeros, False, 0.0, 1.0)[0]
