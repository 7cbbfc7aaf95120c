"""Draw activations and their gradients."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rtdetr_act.activations import registry
from rtdetr_act.curves import embed
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import check_output, write_atomically, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
_CHANNELS, _SIDE, _CONTEXTS = 16, 5, 64
# Okabe-Ito without its yellow: told apart by colour-blind readers, and on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
    path = check_picture(output)
    names = [str(registry.resolve(spec)) for spec in specs]
    from matplotlib.figure import Figure

    x = torch.linspace(-limit, limit, 401)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for index, name in enumerate(names):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3]}
        for axis, values in zip(axes, sample(name, x), strict=True):
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
    return write_picture(figure, path, dpi=150)


def check_picture(output: Path | str) -> Path:
    """Return the path of a picture to write; InputError where its ending is wrong or it cannot be written."""
    path = Path(output)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"cannot draw {quote(str(path))}: the file's ending must be one of {', '.join(_FORMATS)}")
    check_output(path)
    return path


def render(figure: Figure, form: str = "png", *, dpi: int) -> bytes:
    """Return the bytes of a picture: png, svg or pdf.

    Figures are made without pyplot, so that the caller's backend and open figures stay as they are.
    """
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi)
    return content.getvalue()


def write_picture(figure: Figure, path: Path, *, dpi: int) -> Path:
    """Write a picture, whole or not at all, in the format of the file's ending, and return its path.

    Raises:
        InputError: The file cannot be written; the old one is then as it was.
    """
    content = render(figure, path.suffix[1:].lower(), dpi=dpi)
    with writing(path):
        write_atomically(path, content)
    return path


def sample(spec: str, x: Tensor) -> tuple[Tensor, Tensor]:
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
        inputs, place = embed(x, _CHANNELS, _CONTEXTS, _SIDE)
    inputs.requires_grad_()
    values = module(inputs.clone())[place]  # a copy, which an activation in place may overwrite
    (gradient,) = torch.autograd.grad(values.sum(), inputs)
    return values.detach().view(_CONTEXTS, -1), gradient[place].view(_CONTEXTS, -1)
