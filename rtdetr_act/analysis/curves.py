"""Curves of activations and of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rtdetr_act.activations import registry
from rtdetr_act.analysis.figures import TWO_COLUMNS, check_figure_path, figure_style, write_figure
from rtdetr_act.spec import as_list
from rtdetr_act.surgery.tracing import embed_values

_CHANNELS, _SIZE, _CONTEXTS = 16, 5, 64


@figure_style()
def plot_activations(specs: str | Sequence[str], output: Path | str, *, limit: float = 4.0) -> Path:
    """Plot activations (left) and their gradients (right) over [-limit, limit], and return the path of the figure.

    Learnable activations are drawn at their initial parameters. An activation whose output depends on more than the
    element itself (dynamic coefficients, neighbours, other channels, random parameters) is drawn as its median with a
    band from the 5th to the 95th percentile over 64 random inputs with different channel means. For that, a generator
    initialised to zero, such as that of DY-ReLU, is reset to torch's default initialisation.

    Args:
        specs: One or several names or specs of the zoo, such as "arelu" or "leaky_relu(0.1)".
        output: PNG, SVG or PDF file to write.
        limit: Half the width of the x axis.

    Returns:
        `output` as a path.

    Raises:
        SpecError: An activation is unknown.
        InputError: The suffix is not supported, or the file cannot be written.
    """
    path = check_figure_path(output)
    names = [str(registry.resolve(spec)) for spec in as_list(specs)]

    x = torch.linspace(-limit, limit, 401)
    figure = Figure(figsize=(TWO_COLUMNS, 2.9))
    axes = figure.subplots(1, 2)
    for name in names:
        for axis, values in zip(axes, sample_activation(name, x), strict=True):
            low, middle, high = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95]), dim=0)
            (line,) = axis.plot(x, middle, label=registry.get_title(name))
            if float((high - low).max()) > 1e-4:
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("f(x)", "f′(x)"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("x")
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.axvline(0, color="0.4", linewidth=0.8)
    axes[0].legend()
    return write_figure(figure, path)


def sample_activation(spec: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an activation and its gradient at given values, each in the context of 64 random inputs.

    Args:
        spec: Name or spec of the zoo.
        x: Input values, of shape (N,).

    Returns:
        f(x) and f'(x), each of shape (64, N): one row per random input, in which one element of one channel is x.

    Raises:
        SpecError: The activation is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = registry.create(spec, _CHANNELS).eval()
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)) and not part.weight.any():
                part.reset_parameters()
        inputs, index = embed_values(x, _CHANNELS, _CONTEXTS, _SIZE)
    inputs.requires_grad_()
    values = module(inputs.clone())[index]  # cloned, since an in-place activation overwrites its input
    (gradient,) = torch.autograd.grad(values.sum(), inputs)
    return values.detach().view(_CONTEXTS, -1), gradient[index].view(_CONTEXTS, -1)
