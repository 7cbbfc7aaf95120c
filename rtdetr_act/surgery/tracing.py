"""Activations as curves: what an activation inside a network makes of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Layout
from rtdetr_act.errors import ModelError
from rtdetr_act.surgery.modules import evaluating

_WRONG_SHAPE = (IndexError, RuntimeError, ValueError)  # what torch raises for an input of a wrong shape
_CONTEXTS, _SIDE = 8, 3  # 51 sites of DY-ReLU-B take 0.6 s


@torch.no_grad()
def trace(activation: Callable[[Tensor], Tensor], x: Tensor, channels: int | None, layout: Layout = "map") -> Tensor:
    """Return f(x) of an activation, in evaluation mode; the random state stays as it is.

    What depends on more than the one value is the median over eight random inputs, the same each time.

    Args:
        activation: A module or function.
        x: Values, (N,).
        channels: C at its site; None where unknown: then the C that the activation was built for, if for any.
        layout: "map" or "tokens".

    Returns:
        f(x), (N,), in float32.

    Raises:
        ModelError: It takes no inputs of such a layout.

    >>> trace(nn.ReLU(), torch.tensor([-1.0, 2.0]), 4)
    tensor([0., 2.])
    """
    width = channels or _own_width(activation)
    if not (isinstance(activation, nn.Module) and any(True for _ in activation.parameters())):
        # Of eight inputs for each value, (C, 3, 3), 77 sites of rtdetr-l take 10 s and 2 GB.
        few = slice(None, None, max(len(x) // 2, 1))
        alone = _trace_alone(activation, x, layout)
        embedded = _trace_embedded(activation, x[few], width, layout)
        if alone is not None and torch.allclose(alone[few], embedded, rtol=1e-6, atol=1e-7):
            return alone
    return _trace_embedded(activation, x, width, layout)


def _own_width(activation: object) -> int:
    """Return for how many channels an activation was built, 1 for one that takes any: where its site does not say."""
    return getattr(activation, "num_parameters", getattr(activation, "channels", 1))


def _trace_alone(activation: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor | None:
    """Return f(x) with each value an input of its own, None where that is not what the activation takes."""
    try:
        found = _call(activation, x.view(-1, *[1] * (3 if layout == "map" else 2)).clone()).flatten()
    except _WRONG_SHAPE:
        return None
    return found if len(found) == len(x) else None


def _trace_embedded(activation: Callable[[Tensor], Tensor], x: Tensor, channels: int, layout: Layout) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        maps, place = embed(x, channels, _CONTEXTS, _SIDE)
    rows, channel, row, column = place
    position, lines = row * _SIDE + column, maps.flatten(2)
    if layout == "map":
        shapes = {"(B, C, H, W)": (maps, place), "(B, C, L)": (lines, (rows, channel, position))}
    else:
        # Rows come first: torch's own PReLU has its channels at dimension 1, which on (B, N, C) would be the positions.
        tokens = lines.transpose(1, 2)
        shapes = {"(B, C)": (tokens[:, position], (rows, channel)), "(B, N, C)": (tokens, (rows, position, channel))}
    values = _call_on_one(activation, shapes, channels)
    return values.float().cpu().view(_CONTEXTS, -1).median(0).values


def _call_on_one(activation: Callable[[Tensor], Tensor], shapes: dict[str, Any], channels: int) -> Tensor:
    """Return what an activation makes of the first inputs that it takes, at the index given with them."""
    for inputs, index in shapes.values():
        try:
            found: Tensor = _call(activation, inputs)[index]
        except _WRONG_SHAPE as error:
            refusal = error
        else:
            return found
    kind = getattr(activation, "__name__", type(activation).__name__)
    raise ModelError(
        f"the {kind} here takes neither {' nor '.join(shapes)} inputs with C = {channels}, so its curve is unknown and "
        "nothing can be fitted to it: leave this site out, or do without init='match'"
    ) from refusal


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
