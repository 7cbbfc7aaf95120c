"""Move from one activation to another in the course of a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.schedules import Scheduled


class Blend(Scheduled):
    """Mix the activation that stood at a site with the one that is to stand there: `(1 - t) * old(x) + t * new(x)`.

    `t` is the share of `epochs` that have passed, 0 before the first step and 1 at their end, when `set_epoch` leaves
    `new` alone at the site. It is a buffer, so that a compiled model is not compiled again for every value, but not
    part of the state dict: the epoch of the training says what it is, in the averaged model too.

    Shapes: those of the two activations.

    Args:
        old: What stood there: a module, or a function such as `F.relu`.
        new: What is to stand there.
        epochs: How long the way is.

    >>> x = torch.tensor([-1.0, 1.0])
    >>> blend = Blend(nn.ReLU(), nn.Tanh(), epochs=4)
    >>> blend(x)
    tensor([0., 1.])
    >>> blend.set_epoch(1)
    >>> blend(x)
    tensor([-0.1904,  0.9404])
    """

    def __init__(self, old: Any, new: nn.Module, epochs: float) -> None:
        super().__init__()
        self.old = old
        self.new = new
        self.epochs = epochs
        # Each needs its input whole, for the other; the new one may write over it again once it stands alone.
        self.inplace_alone = bool(getattr(new, "inplace", False))
        if self.inplace_alone:
            new.inplace = False  # type: ignore[assignment]
        self.register_buffer("t", torch.zeros(()), persistent=False)
        self.t: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture for x, in the type of x."""
        return (1 - self.t) * _keep_input(self.old, x) + self.t * _keep_input(self.new, x)

    def set_epoch(self, epoch: float) -> None:
        """Set t for that many epochs of training, whole or in part."""
        self.t.fill_(min(epoch / self.epochs, 1.0))

    def is_over(self, epoch: float) -> bool:
        """Say whether only the new activation counts after that many epochs."""
        return epoch >= self.epochs

    def extra_repr(self) -> str:
        """Return the length and the state."""
        return f"epochs={self.epochs:g}, t={float(self.t):.3g}"


def arriving(activation: Any) -> Any:
    """Return the activation that a site will hold: of a blend the new one, else what is there.

    >>> arriving(Blend(nn.ReLU(), nn.Mish(), epochs=4)), arriving(nn.ReLU())
    (Mish(), ReLU())
    """
    return activation.new if isinstance(activation, Blend) else activation


def _keep_input(activation: Any, x: Tensor) -> Tensor:
    # Building a model sets inplace=True on ReLU, SiLU and others wherever they are, so it is asked here, each time.
    return activation(x.clone() if getattr(activation, "inplace", False) else x)
