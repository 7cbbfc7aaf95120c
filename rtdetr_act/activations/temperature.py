"""The temperature of an attention, which may fall in the course of a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import check_positive

# Dynamic convolution's paper lets the temperature fall from 30 over the first ten epochs.
TAU_START, TAU_EPOCHS = 30.0, 10


class Scheduled(nn.Module):
    """A module with a state that follows the epoch of the training, beside its weights."""

    def set_epoch(self, epoch: float) -> None:
        """Take the state for that many epochs of training, whole or in part, since the first step."""
        raise NotImplementedError


class Temperature(Scheduled):
    """The temperature of a softmax, which may fall in the course of a training.

    High at first, so that attention is near to uniform and all that it chooses from learns; then low, so that it
    chooses. Calling it gives the number to divide by: a constant, or a tensor while it changes, so that a compiled
    model is not compiled again for every value.

    Args:
        tau: Where it ends, and what it is without a start.
        tau_start: Before the first step; None for a constant.
        tau_epochs: Epochs from there to `tau`.

    Raises:
        ValueError: A number is not positive.

    >>> temperature = Temperature(1.0, tau_start=30.0, tau_epochs=10)
    >>> temperature.set_epoch(5)
    >>> temperature()
    tensor(15.5000)
    """

    now: Tensor

    def __init__(self, tau: float, tau_start: float | None = None, tau_epochs: float = TAU_EPOCHS) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        self.tau_start = None if tau_start is None else check_positive("tau_start", tau_start)
        self.tau_epochs = check_positive("tau_epochs", tau_epochs)
        if self.tau_start is not None:
            self.register_buffer("now", torch.tensor(self.tau_start), persistent=False)

    def forward(self) -> Tensor | float:
        """Return the temperature."""
        return self.tau if self.tau_start is None else self.now

    def set_epoch(self, epoch: float) -> None:
        """Take the temperature of that epoch, a constant from `tau_epochs` on."""
        if self.tau_start is None:
            return
        if epoch >= self.tau_epochs:
            self.tau_start = None
            del self.now
        else:
            self.now.fill_(self.tau_start + (self.tau - self.tau_start) * epoch / self.tau_epochs)

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        way = "" if self.tau_start is None else f", tau_start={self.tau_start:g}, tau_epochs={self.tau_epochs:g}"
        return f"tau={self.tau:g}{way}"
