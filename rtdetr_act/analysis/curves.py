"""Draw activations and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rtdetr_act.activations import registry
from rtdetr_act.analysis.figures import COLOURS, check_figure_path, write_figure
from rtdetr_act.surgery.tracing import embed

_CHANNELS, _SIZE, _CONTEXTS = 16, 5, 64


def plot_activations(specs: Sequence[str], output: Path | str, *, limit: float = 4.0) -> Path:
    """Draw functions (left) and gradients (right) of activations over [-limit, limit].

    Learnable ones are drawn at their initial parameters. What depends on more than the one value (dynamic
    coefficients, neighbours, other channels, parameters drawn at random) is drawn as its median with a band from the
    5th to the 95th percentile over 64 random inputs with unlike channel means; a generator that starts at zero, as
    DY-ReLU's, gets torch's default weights for that, or there would be no band to see.

    Args:
        specs: Names or specs of the zoo, such as "arelu" or "leaky_relu(0.1)".
        output: PNG, SVG or PDF file to write.
        limit: Half the width of the axis.

    Returns:
        The path written.

    Raises:
        SpecError: An activation is unknown.
        InputError: The file's ending or folder is wrong, or it cannot be written.
    """
    path = check_figure_path(output)
    names = [str(registry.resolve(spec)) for spec in specs]

    x = torch.linspace(-limit, limit, 401)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for index, name in enumerate(names):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3]}
        for axis, values in zip(axes, sample_activation(name, x), strict=True):
            low, middle, high = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95]), dim=0)
            axis.plot(x, middle, label=name, linewidth=1.8, **style)
            if float((high - low).max()) > 1e-4:
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("f(x)", "f′(x)"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("x")
        axis.grid(alpha=0.25)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.axvline(0, color="0.4", linewidth=0.8)
    axes[0].legend(frameon=False)
    return write_figure(figure, path, dpi=150)


def sample_activation(spec: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(x) and f'(x) of an activation inside random inputs.

    Args:
        spec: Name or spec of the zoo.
        x: Values, (N,).

    Returns:
        Values and gradients, each (64, N): one row per random input, in which one position of one channel holds x.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = registry.create(spec, _CHANNELS).eval()
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)) and not part.weight.any():
                part.reset_parameters()
        inputs, place = embed(x, _CHANNELS, _CONTEXTS, _SIZE)
    inputs.requires_grad_()
    values = module(inputs.clone())[place]  # a copy, which an activation in place may overwrite
    (gradient,) = torch.autograd.grad(values.sum(), inputs)
    return values.detach().view(_CONTEXTS, -1), gradient[place].view(_CONTEXTS, -1)
