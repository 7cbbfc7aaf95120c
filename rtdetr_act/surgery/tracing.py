"""Sample the curve of an activation: its output for single input values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Layout
from rtdetr_act.errors import ModelError
from rtdetr_act.surgery.modules import evaluation_mode

_SHAPE_ERRORS = (IndexError, RuntimeError, ValueError)  # raised by torch for an input of a wrong shape
_CONTEXTS, _SIZE = 8, 3  # 51 sites of DY-ReLU-B take 0.6 s


@torch.no_grad()
def sample_curve(
    activation: Callable[[Tensor], Tensor], x: Tensor, channels: int | None, layout: Layout = "map"
) -> Tensor:
    """Return f(x) of an activation in evaluation mode, without changing the random state.

    If the activation depends on more than one input element, the result is the median over eight fixed random inputs in
    which the values are embedded.

    Args:
        activation: A module or function.
        x: Input values, (N,).
        channels: Number of channels of the inputs. None: the number that the activation was built for, else 1.
        layout: "map" (default) or "tokens".

    Returns:
        f(x), (N,), in float32.

    Raises:
        ModelError: The activation does not accept inputs of this layout.

    >>> sample_curve(nn.ReLU(), torch.tensor([-1.0, 2.0]), 4)
    tensor([0., 2.])
    """
    width = channels or get_built_channels(activation)
    if not (isinstance(activation, nn.Module) and any(True for _ in activation.parameters())):
        # With eight inputs (C, 3, 3) per value, the 77 sites of rtdetr-l would take 10 s and 2 GB.
        few = slice(None, None, max(len(x) // 2, 1))
        alone = _evaluate_separately(activation, x, layout)
        embedded = _evaluate_embedded(activation, x[few], width, layout)
        if alone is not None and torch.allclose(alone[few], embedded, rtol=1e-6, atol=1e-7):
            return alone
    return _evaluate_embedded(activation, x, width, layout)


def get_built_channels(activation: object) -> int:
    """Return the number of channels that an activation was built for, or 1 if it accepts any."""
    return getattr(activation, "num_parameters", getattr(activation, "channels", 1))


def _evaluate_separately(activation: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor | None:
    """Return f(x) with each value as a separate input, or None if the activation does not accept such inputs."""
    try:
        values = _call(activation, x.view(-1, *[1] * (3 if layout == "map" else 2)).clone()).flatten()
    except _SHAPE_ERRORS:
        return None
    return values if len(values) == len(x) else None


def _evaluate_embedded(activation: Callable[[Tensor], Tensor], x: Tensor, channels: int, layout: Layout) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        maps, place = embed_values(x, channels, _CONTEXTS, _SIZE)
    rows, channel, row, column = place
    position, lines = row * _SIZE + column, maps.flatten(2)
    if layout == "map":
        shapes = {
            "(B, C, H, W)": (maps, place),
            "(B, C, L)": (lines, (rows, channel, position)),
            "(B, C, D, H, W)": (maps.unsqueeze(2), (rows, channel, 0, row, column)),
        }
    else:
        # (B, C) is tried first: torch's PReLU has its channels in dimension 1, which in (B, N, C) are the positions.
        tokens = lines.transpose(1, 2)
        shapes = {"(B, C)": (tokens[:, position], (rows, channel)), "(B, N, C)": (tokens, (rows, position, channel))}
    values = _call_first_accepted(activation, shapes, channels)
    return values.float().cpu().view(_CONTEXTS, -1).median(0).values


def _call_first_accepted(activation: Callable[[Tensor], Tensor], shapes: dict[str, Any], channels: int) -> Tensor:
    """Return the output, at the given index, for the first of several inputs that an activation accepts."""
    for inputs, index in shapes.values():
        try:
            values: Tensor = _call(activation, inputs)[index]
        except _SHAPE_ERRORS as error:
            last_error = error
        else:
            return values
    kind = getattr(activation, "__name__", type(activation).__name__)
    raise ModelError(
        f"the {kind} here takes neither {' nor '.join(shapes)} inputs with C = {channels}, so its curve is unknown and "
        "nothing can be fitted to it: exclude this site, or omit init='match'"
    ) from last_error


def _call(activation: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if not isinstance(activation, nn.Module):
        return activation(inputs)
    first = next(activation.parameters(), None)
    with evaluation_mode(activation):
        return activation(inputs.to(first.device, first.dtype) if first is not None else inputs)


def embed_values(x: Tensor, channels: int, contexts: int, side: int) -> tuple[Tensor, tuple[Tensor, Tensor, int, int]]:
    """Embed values into random inputs with different channel means, for activations that read several elements.

    Args:
        x: Values, (N,).
        channels: Channels of the inputs; consecutive values are placed in consecutive channels.
        contexts: Number of random inputs per value.
        side: Height and width of the inputs; the value is in the centre.

    Returns:
        The inputs, (contexts * N, channels, side, side), and the index of the values in them.
    """
    means = torch.randn(contexts, channels, 1, 1)
    inputs = (torch.randn(contexts, channels, side, side) + means).repeat_interleave(len(x), dim=0)
    rows = torch.arange(len(inputs))
    place = (rows, (rows // len(x)) % channels, side // 2, side // 2)
    inputs[place] = x.repeat(contexts)
    return inputs, place
