"""Mean weights of the last epochs: a checkpoint that is not chosen by its score, as best.pt is.

best.pt is the epoch with the highest score on the validation images, a maximum over noise. Which epochs are averaged is
settled before the training. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
arXiv 1803.05407, average what SGD leaves; here it is the EMA, which is what Ultralytics validates and saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.integrations.ultralytics.results import read_scores

# The weights of one epoch, and the number of optimizer steps up to then.
EpochWeights = tuple[int, dict[str, Tensor]]


class RecentWeights:
    """Callback that keeps the EMA weights of the last epochs of a training on one device.

    Args:
        last: Number of epochs to keep, 1 or more.
    """

    def __init__(self, last: int) -> None:
        # In half precision, as in Ultralytics' checkpoints.
        self.epochs: deque[EpochWeights] = deque(maxlen=last)

    def attach(self, model: Any) -> None:
        """Add the callback to an RTDETR or YOLO model, before those that save a snapshot."""
        model.add_callback("on_fit_epoch_end", self._keep)

    def _keep(self, trainer: Any) -> None:
        """Keep the weights after an epoch; the final validation triggers this event once more."""
        updates = trainer.ema.updates
        if not self.epochs or self.epochs[-1][0] != updates:
            state = trainer.ema.ema.state_dict()
            self.epochs.append((updates, {name: _to_half(value) for name, value in state.items()}))


def _to_half(value: Tensor) -> Tensor:
    """Return a copy on the CPU, of floating-point numbers in half precision."""
    return value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype, copy=True)


def average_weights(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means of some weights, in single precision; of integers, the last.

    Args:
        states: State dictionaries with equal keys, one or more.

    >>> average_weights([{"slope": torch.tensor(0.5)}, {"slope": torch.tensor(1.0)}])
    {'slope': tensor(0.7500)}
    """
    known = list(states)
    return {
        name: torch.stack([state[name].double() for state in known]).mean(0).float()
        if value.is_floating_point()
        else value
        for name, value in known[-1].items()
    }


def score_average(trainer: Any, recent: RecentWeights) -> dict[str, float]:
    """Write the mean weights of the last epochs to averaged.pt beside best.pt, and return its scores.

    It is validated as Ultralytics validates best.pt at the end of a training.

    Args:
        trainer: Ultralytics trainer after the training.
        recent: Weights of its last epochs.

    Returns:
        As `read_scores`.
    """
    best = Path(trainer.best)
    model = load_model(str(best))
    model.model.load_state_dict(average_weights(state for _, state in recent.epochs))
    path = best.with_name("averaged.pt")
    model.save(str(path))
    trainer.validator.args.plots = False
    return read_scores(trainer.validator(model=path))
