"""The temperature of a softmax attention, optionally annealed during training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import check_positive

# The paper on dynamic convolution anneals the temperature from 30 over the first ten epochs.
TAU_START, TAU_EPOCHS = 30.0, 10


class Scheduled(nn.Module):
    """Base class of modules whose state depends on the training epoch."""

    def set_epoch(self, epoch: float) -> None:
        """Update the state to an epoch.

        Args:
            epoch: Epochs since the first training step, fractional within an epoch.
        """
        raise NotImplementedError


class Temperature(Scheduled):
    """The temperature of a softmax, optionally annealed linearly during training.

    While it is high, attention is almost uniform, so that everything it weights is trained; while it is low, attention
    can be selective. Calling the module returns the divisor of the logits: a float, or a 0-d tensor while it is
    annealed, so that a compiled model is not recompiled for every value.

    Args:
        tau: Final temperature.
        tau_start: Temperature before the first step. Default: None, a constant temperature `tau`.
        tau_epochs: Epochs over which it is annealed from `tau_start` to `tau`. Default: 10.

    Raises:
        ValueError: An argument is not a positive number.

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
        """Return the current temperature."""
        return self.tau if self.tau_start is None else self.now

    def set_epoch(self, epoch: float) -> None:
        """Set the temperature of an epoch; from `tau_epochs` on, remove the buffer and return the constant `tau`."""
        if self.tau_start is None:
            return
        if epoch >= self.tau_epochs:
            self.tau_start = None
            del self.now
        else:
            self.now.fill_(self.tau_start + (self.tau - self.tau_start) * epoch / self.tau_epochs)

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        schedule = "" if self.tau_start is None else f", tau_start={self.tau_start:g}, tau_epochs={self.tau_epochs:g}"
        return f"tau={self.tau:g}{schedule}"
