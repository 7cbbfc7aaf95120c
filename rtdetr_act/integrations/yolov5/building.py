"""models.yolo: building models from a YAML."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn

from rtdetr_act.errors import SpecError
from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.stock_activation import stock_default_act
from rtdetr_act.integrations.yolov5.messages import say
from rtdetr_act.surgery.low_memory import predict_in_low_memory
from rtdetr_act.surgery.model_plan import require_plugin, set_yaml_plan, split_model_yaml
from rtdetr_act.surgery.patcher import KINDS, resolve_plan, swap_sites
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.simplify import simplify_plan
from rtdetr_act.surgery.sites import collect_sites, iterate_placed_activations


class ModelBuilder:
    """Build the models of a checkout with the plan of their YAML, and one that is added to it.

    Every build goes through `parse_model`, which is looked up at call time: from a YAML file, and from the `yaml` of a
    checkpoint's model for `--weights` and `--resume`.

    Args:
        yolo: The module `models.yolo`, whose functions are replaced.
        added: A resolved plan for all models; empty for the plans of their YAMLs alone.
        on_built: Called with each model once it is built.
    """

    def __init__(self, yolo: ModuleType, added: Plan, on_built: Callable[[nn.Module], None]) -> None:
        self.yolo, self.added, self.on_built = yolo, added, on_built
        self.parse, self.init, self.forward = yolo.parse_model, yolo.Model.__init__, yolo.Model.forward
        # YOLOv5 evaluates `activation:`; YOLOv7, and YOLOv5 before 7.0, do not know it.
        self.knows_activation = "activation" in self.parse.__code__.co_consts
        self.plan = Plan()  # of the model under construction
        self._replace()

    def _replace(self) -> None:
        @wraps(self.parse)
        def parse_model(*args: Any, **kwargs: Any) -> Any:
            return self.parse_model(*args, **kwargs)

        @wraps(self.init)
        def init_model(model: Any, *args: Any, **kwargs: Any) -> None:
            self.init_model(model, *args, **kwargs)

        @wraps(self.forward)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return predict_in_low_memory(self.forward, model, *args, **kwargs)

        self.yolo.parse_model = parse_model  # type: ignore[attr-defined]
        self.yolo.Model.__init__ = init_model
        self.yolo.Model.forward = forward

    def parse_model(self, d: dict[str, Any], ch: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the layers of a model YAML as the checkout does, then apply the plan."""
        stock, plan = split_model_yaml(d)
        plan = resolve_plan(plan)
        refuse_convolutions(plan)
        with self._set_default_act(plan.default_act):
            layers, save = self.parse(stock, ch, *args, **kwargs)
        if plan:
            swap_sites(collect_sites(layers, "model", d, KINDS, treat_as=dict(plan.treat_as)), plan)
        if self.added:
            sites = collect_sites(layers, "model", d, KINDS, treat_as=dict(plan.treat_as))
            for stage in self.added.stages:
                plan = simplify_plan(sites, plan.followed_by(stage))
            swap_sites(sites, self.added, strict=True)
        if plan.rules:
            _describe_swap(layers, plan)
        self.plan = plan
        return layers, save

    def init_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Build a model, and let its `yaml` carry the plan, as its checkpoints then do."""
        self.plan = Plan()
        self.init(model, *args, **kwargs)
        if self.plan:
            model.yaml = set_yaml_plan(model.yaml, self.plan)
            if not self.knows_activation:
                model.yaml = require_plugin(model.yaml)
        self.on_built(model)

    def _set_default_act(self, text: str | None) -> Any:
        """Return a context in which a stock `activation:` is the default, as `parse_model` sets it, without `eval`."""
        if text is None:
            return nullcontext()
        if not hasattr(self.yolo.Conv, "default_act"):
            name = text.removeprefix("torch.").removeprefix("nn.")
            raise SpecError(f"'activation: {text}' has no meaning in this repository: write {name}, from the zoo")
        return stock_default_act(self.yolo.Conv, text)


def refuse_convolutions(plan: Plan) -> None:
    """Raise SpecError if a plan replaces convolutions, which these repositories would fold as plain ones."""
    if any(rule.replaces == "convolution" for stage in plan.stages for rule in stage.rules):
        raise SpecError(f"'{plan}' replaces convolutions: in YOLOv5 and YOLOv7, activations alone are swapped")


def _describe_swap(layers: nn.Module, plan: Plan) -> None:
    """Update the parameter counts of the layers, and say what was swapped."""
    for layer in layers.children():
        layer.np = sum(parameter.numel() for parameter in layer.parameters())  # type: ignore[assignment]
    placed = [module for _, module in iterate_placed_activations(layers)]
    parameters = sum(parameter.numel() for module in placed for parameter in module.parameters())
    say(f"{format_count(len(placed), 'activation')} swapped: {plan} ({parameters:,} parameters)")
    if plan.needs_fit:
        say("init=match fits the activations, not the network: only trainings of Ultralytics begin with refit")
