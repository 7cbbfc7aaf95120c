"""ultralytics.engine.model: the RTDETR and YOLO objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtdetr_act.errors import ModelError
from rtdetr_act.integrations.ultralytics.hooks.replacing import replace
from rtdetr_act.integrations.ultralytics.hooks.tasks import load_model_yaml
from rtdetr_act.surgery.model_plan import read_plan, split_model_yaml


def hook_model(engine: Any) -> None:
    """Hook `ultralytics.engine.model`."""
    replace(engine, "yaml_model_load", load_model_yaml)  # imported there by name
    # Since 8.4.37 a model built from a YAML file is trained from that file, not from its in-memory model.yaml (as up to
    # 8.4.35).
    replace(engine.Model, "train", _train)
    # Tuning trains in subprocesses that do not import the plugin.
    replace(engine.Model, "tune", _tune)


def _train(original: Callable[..., Any], self: Any, trainer: Any = None, **kwargs: Any) -> Any:
    """Wrap `Model.train` to train a patched model from its in-memory `model.yaml` instead of its file."""
    if not _differs_from_file(self):
        return original(self, trainer=trainer, **kwargs)
    from ultralytics.utils import YAML, checks

    file = YAML.load(checks.check_yaml(kwargs["cfg"])) if kwargs.get("cfg") else {}
    given = {**self.overrides, **file, **kwargs}
    # A checkpoint given by its path is resumed from there; resume=True without one in memory starts from scratch. With
    # several data sets, train() starts each run from the model in memory.
    if isinstance(given.get("resume"), (str, Path)) or isinstance(given.get("data"), (list, tuple)):
        return original(self, trainer=trainer, **kwargs)
    # With a checkpoint set, train() builds the network from the in-memory model.yaml. With pretrained=False it does not
    # copy weights, so the network is initialised from the seed of the run, like any stock run.
    pretrained = given.get("pretrained", True)
    kwargs["pretrained"] = False if pretrained is True else pretrained
    self.ckpt = {"model": self.model}
    try:
        return original(self, trainer=trainer, **kwargs)
    finally:
        if self.ckpt.keys() == {"model"}:  # the run did not finish, so no checkpoint was loaded
            self.ckpt = {}


def _differs_from_file(model: Any) -> bool:
    """Return whether train() would read a YAML file with another plan than that of the model in memory."""
    from torch import nn

    if model.ckpt or not model.cfg or not isinstance(model.model, nn.Module):
        return False
    from ultralytics.engine.model import Model, yaml_model_load

    if 'get("resume") and self.ckpt' not in inspect.getsource(inspect.unwrap(Model.train)):
        return False  # before 8.4.37, train() always read the in-memory model.yaml
    return split_model_yaml(yaml_model_load(model.cfg))[1] != read_plan(model.model)


def _tune(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Model.tune` to import the plugin in the processes of a patched model."""
    if read_plan(self.model):
        from ultralytics.engine.tuner import Tuner

        if "model" not in inspect.signature(Tuner.__init__).parameters:
            raise ModelError(
                "this Ultralytics tunes in processes that rebuild the stock network: tuning a patched model needs "
                "Ultralytics 8.4.160 or newer"
            )
        # Ray workers unpickle the model; unpickling this callback imports the plugin.
        self.add_callback("on_pretrain_routine_start", import_plugin)
    return original(self, *args, **kwargs)


def import_plugin(trainer: Any) -> None:
    """Do nothing; unpickling a reference to this callback imports the plugin and installs its hooks."""
