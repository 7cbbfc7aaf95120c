"""Sample an activation and its gradient over single input values, in float64, and exactly where they jump."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Layout
from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.parameters import list_scalar_and_channel_parameters

Function = Callable[[Tensor], Tensor]
# Returns f(x) and f'(x) of x (N,), each (contexts, channels, N), of all functions that an activation may be.
Family = Callable[[Tensor], tuple[Tensor, Tensor]]

_POINTS, _LOOPED_POINTS = 1001, 241  # a panel is 1000 pixels wide in print; where each point takes a call, fewer
_FEWEST_CONTEXTS = 8
_SIDE = 3  # of random maps: the neighbourhood that FReLU compares with
_LEAST_JUMP, _LEAST_LOOPED_JUMP = 0.005, 0.05  # of the range of a curve, and of quantiles of many
_HALVINGS = 30  # of the distance between two points, about 0.01, to 1e-11
_TOKENS = _SIDE * _SIDE
_CHANNEL_DIM: dict[Layout, int] = {"map": 1, "tokens": 2}


@dataclass(frozen=True)
class Curve:
    """An activation and its gradient over single input values.

    Attributes:
        x: The values in ascending order, (N,). There are two for each jump and kink, next to it on either side.
        values: f(x), (3, N): a lower quantile, the mean and an upper quantile of all functions that the activation may
            be at its place; three equal rows for one function.
        gradients: f'(x), likewise. The mean is the gradient of the mean, which a median would not be.
    """

    x: Tensor
    values: Tensor
    gradients: Tensor

    @property
    def varies(self) -> bool:
        """Whether there are several functions, that differ by more than rounding."""
        return any(bool((each[-1] - each[0]).max() > 1e-4) for each in (self.values, self.gradients))


def sample_curves(
    activation: Function,
    channels: int,
    limits: tuple[float, float],
    *,
    layout: Layout = "map",
    dims: int = 2,
    quantiles: tuple[float, float] = (0.05, 0.95),
    most_channels: int | None = None,
    functions: int = 4096,
    random: bool = False,
) -> list[Curve]:
    """Return the curve of an activation; of one that differs between channels, that of several.

    An elementwise activation is one function, or one per channel. One whose output depends on more than the element
    itself is a family of functions, one for each of some random inputs, which are standard normal with different
    channel means: what it computes from several elements (coefficients, neighbourhoods) is held constant if its entry
    says how, which is the limit of a large map; else the element is varied alone.

    Args:
        activation: A module or function. It is left as it is: a copy in float64 and evaluation mode is sampled.
        channels: Number of channels C of its input.
        limits: Lowest and highest input.
        layout: "map" (default) or "tokens".
        dims: Number of spatial dimensions of a map. Default: 2.
        quantiles: Lower and upper quantile. Default: 0.05 and 0.95.
        most_channels: Return one curve for each of this many channels at most, if channels differ by parameters of
            their own. Default: None, one curve with quantiles over the channels.
        functions: Number of functions in a family, about. Quantiles of few that jump each elsewhere are staircases.
            Default: 4096, which take up to a second.
        random: Sample in training mode an activation that is elementwise and random there, as RReLU is: one function
            for each of its random numbers. Default: False.
    """
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).cpu().double().train(random)
    contexts = _make_contexts(max(_FEWEST_CONTEXTS, functions // channels), channels, layout, dims)
    family, looped = _choose_family(activation, contexts, layout, random)
    x = torch.linspace(*limits, _LOOPED_POINTS if looped else _POINTS, dtype=torch.float64)
    sampled, least = family(x), _LEAST_LOOPED_JUMP if looped else _LEAST_JUMP
    chosen: Sequence[slice] = [slice(None)]
    if most_channels is not None and _differs_between_channels(activation, sampled[0]):
        chosen = [slice(index, index + 1) for index in range(min(most_channels, channels))]
    return [_summarise(family, x, sampled, part, quantiles, least) for part in chosen]


# ---------------------------------------------------------------- the functions that an activation may be


def _choose_family(activation: Function, contexts: Tensor, layout: Layout, random: bool) -> tuple[Family, bool]:
    """Return the functions that an activation may be, and whether each point takes a call.

    Args:
        activation: A module or function.
        contexts: Inputs, as `_make_contexts` returns them.
        layout: Their layout.
        random: Whether it is elementwise and random.
    """
    channels, dims = contexts.shape[_CHANNEL_DIM[layout]], contexts.ndim - 2
    centre = _index_centre(layout, dims)
    if random:
        return lambda x: _call_for_each(_repeat_noise(activation), contexts, centre, x), True
    elementwise = _make_elementwise(activation, channels, layout, dims)
    embedded = _embed(activation, contexts, channels, layout, dims)
    few = torch.tensor([-1.7, -0.4, 0.3, 1.9], dtype=torch.float64)
    alone, among_others = elementwise(few)[0][0], embedded(few)[0][:, 0]
    if torch.allclose(alone[torch.arange(len(contexts)) % channels], among_others, rtol=1e-6, atol=1e-7):
        return elementwise, False
    entry = find_entry(activation)
    if entry is None or entry.held_at is None:
        return embedded, True
    with torch.no_grad():
        held = entry.held_at(activation, contexts)
    return lambda x: _call_for_each(held, contexts, centre, x), True


def _make_contexts(count: int, channels: int, layout: Layout, dims: int) -> Tensor:
    """Return random inputs (count, C, 3, …) or (count, 9, C)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(count, channels, 1, generator=generator, dtype=torch.float64)
    positions = _TOKENS if layout == "tokens" else _SIDE**dims
    values = means + torch.randn(count, channels, positions, generator=generator, dtype=torch.float64)
    return values.transpose(1, 2) if layout == "tokens" else values.view(count, channels, *[_SIDE] * dims)


def _index_centre(layout: Layout, dims: int, channels: Any = slice(None), rows: Any = slice(None)) -> tuple[Any, ...]:
    """Return the index of the central position of inputs that `_make_contexts` returns."""
    return (rows, _TOKENS // 2, channels) if layout == "tokens" else (rows, channels, *[_SIDE // 2] * dims)


def _make_elementwise(activation: Function, channels: int, layout: Layout, dims: int) -> Family:
    """Return the function of each channel, (1, C, N), with one call for all values."""

    def sample(x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x[:, None].expand(-1, channels)  # tokens (B, C)
        if layout == "map":
            inputs = inputs.reshape(*inputs.shape, *[1] * dims)
        values, gradients = _differentiate(activation, inputs, ...)
        return values.flatten(1).T[None], gradients.flatten(1).T[None]

    return sample


def _embed(activation: Function, contexts: Tensor, channels: int, layout: Layout, dims: int) -> Family:
    """Return the functions of one element among others, (contexts, 1, N): of another channel in each context."""
    rows = torch.arange(len(contexts))
    index = _index_centre(layout, dims, rows % channels, rows)

    def sample(x: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [_differentiate(activation, _replace(contexts, index, value), index) for value in x]
        values, gradients = _stack(pairs)
        return values[:, None], gradients[:, None]

    return sample


def _replace(inputs: Tensor, index: tuple[Any, ...], value: Tensor) -> Tensor:
    """Return a copy of inputs with another value at an index."""
    inputs = inputs.clone()
    inputs[index] = value
    return inputs


def _call_for_each(function: Function, like: Tensor, index: tuple[Any, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate an elementwise function on inputs that are one value everywhere: (contexts, C, N)."""
    return _stack([_differentiate(function, torch.full_like(like, float(value)), index) for value in x])


def _stack(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack values and gradients along a new last dimension."""
    values, gradients = (torch.stack(each, -1) for each in zip(*pairs, strict=True))
    return values, gradients


def _repeat_noise(activation: Function) -> Function:
    """Return a random activation with the same random numbers in each call, so that each element is a function."""

    def call(inputs: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return activation(inputs)

    return call


def _differentiate(function: Function, inputs: Tensor, index: Any) -> tuple[Tensor, Tensor]:
    """Return a function at an index of its inputs, and its gradient there."""
    inputs = inputs.detach().requires_grad_()
    values = function(inputs.clone())[index]  # cloned, since an in-place activation overwrites its input
    (gradients,) = torch.autograd.grad(values.sum(), inputs)
    return values.detach().double(), gradients[index]


def _differs_between_channels(activation: Function, values: Tensor) -> bool:
    """Return whether channels have parameters of their own that differ, as ACON-C and Meta-ACON start."""
    if len(values) == 1:
        return bool((values.amax(1) - values.amin(1)).max() > 1e-6)
    # The coefficients of channels differ, but not their parameters: to a band, a channel is as good as any.
    own = list_scalar_and_channel_parameters(activation) if isinstance(activation, nn.Module) else []
    return values.shape[1] > 1 and any(bool((each != each.flatten()[0]).any()) for each in own)


# ---------------------------------------------------------------- mean, quantiles and jumps


def _summarise(
    family: Family,
    x: Tensor,
    sampled: tuple[Tensor, Tensor],
    channels: slice,
    quantiles: tuple[float, float],
    least: float,
) -> Curve:
    """Return mean and quantiles of the functions of some channels, at given points and at their jumps.

    Args:
        family: The functions.
        x: The points.
        sampled: What `family` returns there.
        channels: The channels.
        quantiles: The quantiles.
        least: The least jump, as a share of the range.
    """

    def reduce(sampled: tuple[Tensor, Tensor]) -> Tensor:
        """Return a quantile, the mean and a quantile of f, then those of f': (6, N)."""
        wanted = torch.tensor(quantiles, dtype=torch.float64)
        rows = []
        for part in (each[:, channels].flatten(0, 1) for each in sampled):
            low, high = torch.quantile(part, wanted, dim=0, interpolation="nearest")
            rows += [low, part.mean(0), high]
        return torch.stack(rows)

    rows = reduce(sampled)
    jumps = _find_jumps(lambda points: reduce(family(points)), x, rows, least)
    if len(jumps):
        x, rows = torch.cat([x, jumps]), torch.cat([rows, reduce(family(jumps))], 1)
        x, order = x.sort(stable=True)
        rows = rows[:, order]
    return Curve(x, rows[:3], rows[3:])


def _find_jumps(function: Function, x: Tensor, rows: Tensor, least: float) -> Tensor:
    """Return the points next to each jump of a function, on either side of it.

    Between two points, the half in which the function changes more is halved again and again. What is left of a change
    then is a jump. Of several jumps between two points, the largest is found.

    Args:
        function: Returns rows of values, (R, N), for points (N,).
        x: Points, (N,).
        rows: Its values there, (R, N).
        least: The least jump, as a share of the range of a row.
    """
    least_steps = least * (rows.amax(1) - rows.amin(1)).clamp(min=1e-6)
    row, place = (rows.diff().abs() > least_steps[:, None]).nonzero(as_tuple=True)
    left, right = x[place], x[place + 1]
    low, high = rows[row, place], rows[row, place + 1]
    for _ in range(_HALVINGS):
        if not len(row):
            break
        middle = (left + right) / 2
        between = function(middle)[row, torch.arange(len(row))]
        in_left = (between - low).abs() >= (high - between).abs()
        left, low = torch.where(in_left, left, middle), torch.where(in_left, low, between)
        right, high = torch.where(in_left, middle, right), torch.where(in_left, between, high)
        kept = (high - low).abs() > least_steps[row] / 2
        row, left, right, low, high = (each[kept] for each in (row, left, right, low, high))
    return torch.cat([left, right]).unique()
