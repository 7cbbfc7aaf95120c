"""Every activation of the zoo written a second time, in plain numpy and float64, from the papers' formulas.

Shares no code with the package. Each function takes x, the parameters by name (`p`), the channel axis and the
keyword arguments of the activation, and returns what the module must return in evaluation mode.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)


def along(v: Array, x: Array, axis: int) -> Array:
    """Spread a vector of channel values over the shape of x."""
    shape = [1] * x.ndim
    shape[axis] = v.size
    return np.broadcast_to(v.reshape(shape), x.shape)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def arelu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    alpha = min(max(float(p["alpha"][0]), 0.01), 0.99)
    return np.where(x < 0, alpha * x, (1 + sigmoid(p["beta"])) * x)


def dyrelu_deltas(x: Array, p: dict[str, Array]) -> Array:
    pooled = x.reshape(*x.shape[:2], -1).mean(axis=2)
    hidden = np.maximum(pooled @ p["squeeze.weight"].T + p["squeeze.bias"], 0)
    return 2 * sigmoid(hidden @ p["expand.weight"].T + p["expand.bias"]) - 1


def dyrelu_a(
    x: Array, p: dict[str, Array], axis: int, k: int = 2, lambda_a: float = 1.0, lambda_b: float = 0.5, **_: Any
) -> Array:
    deltas = dyrelu_deltas(x, p)
    y = np.empty_like(x)
    for image in range(x.shape[0]):
        branches = []
        for i in range(k):
            a = (1.0 if i == 0 else 0.0) + lambda_a * deltas[image, i]
            branches.append(a * x[image] + lambda_b * deltas[image, k + i])
        y[image] = np.stack(branches).max(axis=0)
    return y


def dyrelu_b(
    x: Array, p: dict[str, Array], axis: int, k: int = 2, lambda_a: float = 1.0, lambda_b: float = 0.5, **_: Any
) -> Array:
    channels = x.shape[1]
    deltas = dyrelu_deltas(x, p).reshape(x.shape[0], 2 * k, channels)
    y = np.empty_like(x)
    for image in range(x.shape[0]):
        for c in range(channels):
            branches = []
            for i in range(k):
                a = (1.0 if i == 0 else 0.0) + lambda_a * deltas[image, i, c]
                branches.append(a * x[image, c] + lambda_b * deltas[image, k + i, c])
            y[image, c] = np.stack(branches).max(axis=0)
    return y


def dyrelu_c(
    x: Array,
    p: dict[str, Array],
    axis: int,
    k: int = 2,
    lambda_a: float = 1.0,
    lambda_b: float = 0.5,
    tau: float = 10.0,
    **_: Any,
) -> Array:
    batch, channels, *sizes = x.shape
    deltas = dyrelu_deltas(x, p).reshape(batch, 2 * k, channels)
    y = np.empty_like(x)
    for image in range(batch):
        z = np.tensordot(p["spatial.weight"].reshape(channels), x[image], axes=1) + p["spatial.bias"][0]
        e = np.exp((z - z.max()) / tau)
        pi = np.minimum(math.prod(sizes) / 3 * e / e.sum(), 1)
        for c in range(channels):
            branches = []
            for i in range(k):
                a = (1.0 if i == 0 else 0.0) + lambda_a * deltas[image, i, c]
                branches.append(pi * (a * x[image, c] + lambda_b * deltas[image, k + i, c]))
            y[image, c] = np.stack(branches).max(axis=0)
    return y


def prelu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    slope = p["weight"] if p["weight"].size == 1 else along(p["weight"], x, axis)
    return np.where(x >= 0, x, slope * x)


def frelu_funnel(x: Array, p: dict[str, Array]) -> Array:
    sizes = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), *((1, 1) for _ in sizes)))
    funnel = np.zeros_like(x)
    for at in itertools.product(range(3), repeat=len(sizes)):
        moved = tuple(slice(i, i + size) for i, size in zip(at, sizes, strict=True))
        funnel += along(p["conv.weight"][(slice(None), 0, *at)], x, 1) * padded[(slice(None),) * 2 + moved]
    return funnel


def frelu(x: Array, p: dict[str, Array], axis: int, training: bool = False, **_: Any) -> Array:
    funnel = frelu_funnel(x, p)
    mean, var = p["bn.running_mean"], p["bn.running_var"]
    if training:
        others = (0, *range(2, x.ndim))
        mean, var = funnel.mean(axis=others), funnel.var(axis=others)
    normal = (funnel - along(mean, x, 1)) / np.sqrt(along(var, x, 1) + 1e-5)
    return np.maximum(x, normal * along(p["bn.weight"], x, 1) + along(p["bn.bias"], x, 1))


def aconc(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    p1, p2, beta = (along(p[name], x, axis) for name in ("p1", "p2", "beta"))
    return (p1 - p2) * x * sigmoid(beta * (p1 - p2) * x) + p2 * x


def meta_aconc(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    p1, p2 = along(p["p1"], x, 1), along(p["p2"], x, 1)
    hidden = x.reshape(*x.shape[:2], -1).mean(axis=2) @ p["squeeze.weight"].T + p["squeeze.bias"]
    beta = sigmoid(hidden @ p["expand.weight"].T + p["expand.bias"]).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return (p1 - p2) * x * sigmoid(beta * (p1 - p2) * x) + p2 * x


def apa(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    lam, kappa = max(float(p["lambd"][0]), 0.0001), float(p["kappa"][0])
    return (lam * np.exp(-kappa * x) + 1) ** (-1 / lam)


def aglu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x * apa(x, p, axis)


def repact(x: Array, p: dict[str, Array], axis: int, softmax: bool = False, **_: Any) -> Array:
    weights = np.exp(p["weights"]) / np.exp(p["weights"]).sum() if softmax else p["weights"]
    branches = x, np.maximum(x, 0), np.where(x < 0, float(p["slope"][0]) * x, x), hardswish(x, p, axis)
    return sum(weight * branch for weight, branch in zip(weights, branches, strict=True))


def pwlu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    values, (left, right), (low, high) = p["values"], p["slopes"], p["bounds"]
    inside = np.interp(x, np.linspace(low, high, len(values)), values)
    return inside + left * np.minimum(x - low, 0) + right * np.maximum(x - high, 0)


def rational(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    inner = np.polyval([*p["denominator"][::-1], 0], x)
    return np.polyval(p["numerator"][::-1], x) / (1 + np.abs(inner))


def glu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    last = np.moveaxis(x, axis, -1)
    both = last @ p["proj.weight"].reshape(-1, last.shape[-1]).T + p["proj.bias"]
    half = last.shape[-1]
    return np.moveaxis(both[..., :half] * sigmoid(both[..., half:]), -1, axis)


def relu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return np.where(x > 0, x, 0)


def rrelu(x: Array, p: dict[str, Array], axis: int, lower: float = 1 / 8, upper: float = 1 / 3, **_: Any) -> Array:
    return np.where(x >= 0, x, (lower + upper) / 2 * x)


def hardtanh(x: Array, p: dict[str, Array], axis: int, min_val: float = -1, max_val: float = 1, **_: Any) -> Array:
    return np.minimum(np.maximum(x, min_val), max_val)


def relu6(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return np.minimum(np.maximum(x, 0), 6)


def logistic(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return sigmoid(x)


def hardsigmoid(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return np.minimum(np.maximum(x + 3, 0), 6) / 6


def tanh(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return 1 - 2 / (np.exp(2 * x) + 1)


def silu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x * sigmoid(x)


def mish(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x * np.tanh(np.log(1 + np.exp(x)))


def hardswish(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x * np.minimum(np.maximum(x + 3, 0), 6) / 6


def elu(x: Array, p: dict[str, Array], axis: int, alpha: float = 1.0, **_: Any) -> Array:
    return np.where(x > 0, x, alpha * (np.exp(x) - 1))


def celu(x: Array, p: dict[str, Array], axis: int, alpha: float = 1.0, **_: Any) -> Array:
    return np.maximum(x, 0) + np.minimum(0, alpha * (np.exp(x / alpha) - 1))


def selu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * np.where(x > 0, x, alpha * (np.exp(x) - 1))


def gelu(x: Array, p: dict[str, Array], axis: int, approximate: str = "none", **_: Any) -> Array:
    if approximate == "tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + erf(x / math.sqrt(2)))


def hardshrink(x: Array, p: dict[str, Array], axis: int, lambd: float = 0.5, **_: Any) -> Array:
    return np.where(np.abs(x) > lambd, x, 0)


def leaky_relu(x: Array, p: dict[str, Array], axis: int, negative_slope: float = 0.01, **_: Any) -> Array:
    return np.where(x >= 0, x, negative_slope * x)


def logsigmoid(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return -np.log(1 + np.exp(-x))


def softplus(x: Array, p: dict[str, Array], axis: int, beta: float = 1.0, **_: Any) -> Array:
    return np.log(1 + np.exp(beta * x)) / beta


def softshrink(x: Array, p: dict[str, Array], axis: int, lambd: float = 0.5, **_: Any) -> Array:
    return np.sign(x) * np.maximum(np.abs(x) - lambd, 0)


def softsign(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x / (1 + np.abs(x))


def tanhshrink(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x - np.tanh(x)


def channel_softmin(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return softmax(-x, axis)


def channel_softmax(x: Array, p: dict[str, Array], axis: int, dim: int | None = None, **_: Any) -> Array:
    return softmax(x, axis if dim is None else dim)


def channel_log_softmax(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def threshold(x: Array, p: dict[str, Array], axis: int, threshold: float, value: float, **_: Any) -> Array:
    return np.where(x > threshold, x, value)


def swish_beta(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    beta = p["beta"] if p["beta"].size == 1 else along(p["beta"], x, axis)
    return x * sigmoid(beta * x)


def hard_mish(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x / 2 * np.minimum(np.maximum(x + 2, 0), 2)


def smu(x: Array, p: dict[str, Array], axis: int, alpha: float = 0.25, **_: Any) -> Array:
    return ((1 + alpha) * x + (1 - alpha) * x * erf(p["mu"] * (1 - alpha) * x)) / 2


def smu1(x: Array, p: dict[str, Array], axis: int, alpha: float = 0.25, **_: Any) -> Array:
    return ((1 + alpha) * x + np.sqrt((1 - alpha) ** 2 * x**2 + p["mu"] ** 2)) / 2


def squared_relu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return np.maximum(x, 0) ** 2


def star_relu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return p["scale"] * np.maximum(x, 0) ** 2 + p["bias"]


def golu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x * np.exp(-np.exp(-x))


def telu(x: Array, p: dict[str, Array], axis: int, **_: Any) -> Array:
    return x * np.tanh(np.exp(x))


def squareplus(x: Array, p: dict[str, Array], axis: int, b: float = 4.0, **_: Any) -> Array:
    return (x + np.sqrt(x**2 + b)) / 2


REFERENCE = {
    "arelu": arelu,
    "dyrelu_a": dyrelu_a,
    "dyrelu_b": dyrelu_b,
    "dyrelu_c": dyrelu_c,
    "prelu": prelu,
    "frelu": frelu,
    "aconc": aconc,
    "meta_aconc": meta_aconc,
    "aglu": aglu,
    "apa": apa,
    "repact": repact,
    "pwlu": pwlu,
    "rational": rational,
    "relu": relu,
    "rrelu": rrelu,
    "hardtanh": hardtanh,
    "relu6": relu6,
    "sigmoid": logistic,
    "hardsigmoid": hardsigmoid,
    "tanh": tanh,
    "silu": silu,
    "mish": mish,
    "hardswish": hardswish,
    "elu": elu,
    "celu": celu,
    "selu": selu,
    "gelu": gelu,
    "hardshrink": hardshrink,
    "leaky_relu": leaky_relu,
    "logsigmoid": logsigmoid,
    "softplus": softplus,
    "softshrink": softshrink,
    "softsign": softsign,
    "tanhshrink": tanhshrink,
    "softmin": channel_softmin,
    "softmax": channel_softmax,
    "softmax2d": channel_softmax,
    "log_softmax": channel_log_softmax,
    "glu": glu,
    "threshold": threshold,
    "swish_beta": swish_beta,
    "hard_mish": hard_mish,
    "smu": smu,
    "smu1": smu1,
    "squared_relu": squared_relu,
    "star_relu": star_relu,
    "golu": golu,
    "telu": telu,
    "squareplus": squareplus,
}
