"""Activations as curves: what an activation inside a network makes of one value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtdetr_act.sites import evaluating

_CONTEXTS, _SIDE = 8, 3  # 51 sites of DY-ReLU-B take 0.6 s


@torch.no_grad()
def trace(activation: Callable[[Tensor], Tensor], x: Tensor, channels: int | None, layout: str = "map") -> Tensor:
    """Return f(x) of an activation, in evaluation mode; the random state stays as it is.

    What depends on more than the one value is the median over eight random inputs, the same each time.

    Args:
        activation: A module or function.
        x: Values, (N,).
        channels: C at its site, None for one that takes any.
        layout: "map" or "tokens".

    Returns:
        f(x), (N,), in float32.

    >>> trace(nn.ReLU(), torch.tensor([-1.0, 2.0]), 4)
    tensor([0., 2.])
    """
    if not (isinstance(activation, nn.Module) and any(True for _ in activation.parameters())):
        # Of eight inputs for each value, (C, 3, 3), 77 sites of rtdetr-l take 10 s and 2 GB.
        few = slice(None, None, max(len(x) // 2, 1))
        alone = _call(activation, x.view(-1, *[1] * (3 if layout == "map" else 2)).clone()).flatten()
        if torch.allclose(alone[few], _trace_embedded(activation, x[few], channels, layout), rtol=1e-6, atol=1e-7):
            return alone
    return _trace_embedded(activation, x, channels, layout)


def _trace_embedded(activation: Callable[[Tensor], Tensor], x: Tensor, channels: int | None, layout: str) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, place = embed(x, channels or 1, _CONTEXTS, _SIDE)
    if layout != "map":
        inputs = inputs.flatten(2).transpose(1, 2)
        place = (place[0], place[2] * _SIDE + place[3], place[1])  # type: ignore[assignment]
    values = _call(activation, inputs)[place]
    return values.float().cpu().view(_CONTEXTS, -1).median(0).values


def _call(activation: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if not isinstance(activation, nn.Module):
        return activation(inputs)
    first = next(activation.parameters(), None)
    with evaluating(activation):
        return activation(inputs.to(first.device, first.dtype) if first is not None else inputs)


def embed(x: Tensor, channels: int, contexts: int, side: int) -> tuple[Tensor, tuple[Tensor, Tensor, int, int]]:
    """Put values into random inputs with unlike channel means, for activations that see more than one value.

    Args:
        x: Values, (N,).
        channels: Channels of the inputs; each input holds its value in another one.
        contexts: Random inputs that each value is put into.
        side: Height and width.

    Returns:
        Inputs, (contexts * N, channels, side, side), and the index of the values in them.
    """
    means = torch.randn(contexts, channels, 1, 1)
    inputs = (torch.randn(contexts, channels, side, side) + means).repeat_interleave(len(x), dim=0)
    rows = torch.arange(len(inputs))
    place = (rows, (rows // len(x)) % channels, side // 2, side // 2)
    inputs[place] = x.repeat(contexts)
    return inputs, place
