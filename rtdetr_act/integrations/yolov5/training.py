"""Training: the optimizer, the schedules of temperatures, and what was learned."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.analysis.learned import Quantity, read_quantities
from rtdetr_act.errors import TrainingError
from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.ultralytics.optimizer import separate_activation_parameters
from rtdetr_act.integrations.yolov5.messages import say
from rtdetr_act.integrations.yolov5.trained import Trained, count_activations, measure_movements
from rtdetr_act.surgery.epochs import find_scheduled_modules, set_epoch
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.optimizer import get_held_ids
from rtdetr_act.surgery.sites import iterate_placed_activations


class TrainingWatch:
    """Complete the optimizers of patched models, and observe their steps."""

    def __init__(self) -> None:
        self.built: list[weakref.ref[nn.Module]] = []
        self.model: Any = None  # the patched model whose optimizer stepped last
        self.optimizer: Optimizer | None = None
        self.scheduler: LambdaLR | None = None
        self.start: list[Quantity] = []
        self.steps = 0

    def add(self, model: nn.Module) -> None:
        """Add a model that was built."""
        self.built.append(weakref.ref(model))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Hook torch inside the block.

        YOLOv7 builds the optimizer in the middle of a function of the script. The scheduler is built from it right
        after that: before the state of a resumed optimizer is loaded, which must find the same groups, and when it is
        not too late for a new group to get an initial learning rate.
        """
        original = LambdaLR.__init__

        @wraps(original)
        def init(scheduler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            self.complete(optimizer)
            original(scheduler, optimizer, *args, **kwargs)
            self.scheduler = scheduler

        LambdaLR.__init__ = init  # type: ignore
        handle = register_optimizer_step_pre_hook(self.observe_step)
        try:
            yield
        finally:
            LambdaLR.__init__ = original  # type: ignore[method-assign]
            handle.remove()

    def complete(self, optimizer: Optimizer) -> None:
        """Put the parameters of a patched model's activations into its optimizer, the slopes without weight decay."""
        model = self._find_model(optimizer)
        if model is None:
            return
        missing = _find_missing(model, optimizer)
        optimizer.param_groups[-1]["params"].extend(missing)
        act_lr = read_plan(model).act_lr
        if count := separate_activation_parameters(optimizer, model, act_lr):
            rate = "" if act_lr == 1.0 else f", their learning rate times {act_lr:g}"
            say(f"{format_count(count, 'activation parameter')} in the optimizer, without weight decay{rate}")

    def observe_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Count a step, before it is taken, and set the temperatures of its epoch."""
        if optimizer is not self.optimizer and not self._begin(optimizer):
            return
        self.steps += 1
        self._set_epoch(self.model)

    def _begin(self, optimizer: Optimizer) -> bool:
        """Record where a training starts; return whether the optimizer is that of a patched model."""
        model = self._find_model(optimizer)
        if model is None:
            return False
        if missing := [p for p in _find_missing(model, optimizer) if p.requires_grad]:
            raise TrainingError(
                f"{format_count(len(missing), 'activation parameter')} would not train: the script builds its "
                "optimizer without LambdaLR, in a way that rtdetr-act does not know"
            )
        self.model, self.optimizer, self.steps = model, optimizer, 0
        self.start = read_quantities(model)
        return True

    def _set_epoch(self, model: nn.Module) -> None:
        if self.scheduler is not None and find_scheduled_modules(model):
            # Both set last_epoch to one less than the epoch before they begin.
            set_epoch(model, self.scheduler.last_epoch + 1)

    def hook_average(self, torch_utils: ModuleType) -> None:
        """Let the averaged model that is validated and saved have the temperatures of the trained one.

        Args:
            torch_utils: The module `utils.torch_utils` of a checkout.
        """
        average = getattr(torch_utils, "ModelEMA", None)
        original = getattr(average, "update", None)
        if average is None or original is None:
            return

        @wraps(original)
        def update(ema: Any, *args: Any, **kwargs: Any) -> None:
            original(ema, *args, **kwargs)
            self._set_epoch(ema.ema)

        average.update = update

    def _find_model(self, optimizer: Optimizer) -> nn.Module | None:
        """Return the patched model that an optimizer trains, or None."""
        held = get_held_ids(optimizer)
        for reference in reversed(self.built):
            model = reference()
            if model is not None and any(id(parameter) in held for parameter in model.parameters()):
                return model if any(True for _ in iterate_placed_activations(model)) else None
        return None

    def summarise(self) -> Trained | None:
        """Return what the last training learned, or None if no step of a patched model was taken."""
        if self.model is None:
            return None
        placed = [module for _, module in iterate_placed_activations(self.model)]
        specs = [record.spec for module in placed if (record := get_placement(module))]
        parameters = sum(parameter.numel() for module in placed for parameter in module.parameters())
        movements = measure_movements(self.start, read_quantities(self.model))
        return Trained(count_activations(specs), parameters, self.steps, movements)


def _find_missing(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of placed activations that no group of an optimizer has."""
    held = get_held_ids(optimizer)
    placed = (parameter for _, module in iterate_placed_activations(model) for parameter in module.parameters())
    return [parameter for parameter in placed if id(parameter) not in held]


def hook_loggers(loggers: ModuleType) -> None:
    """Let YOLOv5's table of results take the learning rates that it has columns for, the first three.

    `act_lr` adds a group of parameters, and thus a fourth rate, on which its row fails.

    Args:
        loggers: The module `utils.loggers` of a checkout.
    """
    cls = getattr(loggers, "Loggers", None)
    original = getattr(cls, "on_fit_epoch_end", None)
    if cls is None or original is None:
        return

    @wraps(original)
    def on_fit_epoch_end(self: Any, vals: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, vals[: len(self.keys)], *args, **kwargs)

    cls.on_fit_epoch_end = on_fit_epoch_end
