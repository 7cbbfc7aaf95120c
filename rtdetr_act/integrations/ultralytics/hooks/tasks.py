"""ultralytics.nn.tasks: building and loading."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_act.errors import ModelError, quote
from rtdetr_act.integrations.ultralytics import checkpoints, downloads, model_yaml
from rtdetr_act.integrations.ultralytics.hooks.replacing import replace
from rtdetr_act.integrations.ultralytics.log import log
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.model_plan import mark_fitted, normalise_model_yaml, read_plan, set_plan, split_model_yaml
from rtdetr_act.surgery.plan import Plan, Rule

if TYPE_CHECKING:
    from torch import nn


_defaults: list[tuple[nn.Module, str, float]] = []  # active default_act() blocks: placeholder, activation, act_lr


def hook_tasks(tasks: Any) -> None:
    """Hook `ultralytics.nn.tasks`."""
    # Every task model builds its layers with the module-level parse_model, looked up at call time: from a YAML, from a
    # checkpoint's model.yaml, on resume, in a DDP worker. One wrapper there reaches every build.
    replace(tasks, "parse_model", _parse_model)
    # The task is guessed from row[-2] of the last head row, which is the module name only in a row of four items. So a
    # YAML is normalised to four items per row, with its plan under `activation`, when it is read.
    replace(tasks, "yaml_model_load", load_model_yaml)
    # A restricted load (ULTRALYTICS_SAFE_LOAD, since 8.4) rejects classes not registered with torch. For a missing
    # package Ultralytics runs `pip install` with that name, which for a user's module may install an unrelated package.
    replace(tasks, "torch_safe_load", _torch_safe_load)
    replace(tasks, "check_requirements", _check_requirements)
    # A loaded checkpoint works in place wherever a module has the attribute. The names are those of 8.3 and of 8.4.
    for name in ("attempt_load_weights", "attempt_load_one_weight", "load_checkpoint"):
        if hasattr(tasks, name):
            replace(tasks, name, _load_checkpoint, by_name=True)
    # Here and not in a forward hook, which every pickle would name. In training, `loss` calls `predict`.
    classes = (each for each in vars(tasks).values() if isinstance(each, type) and issubclass(each, tasks.BaseModel))
    for cls in dict.fromkeys(classes):
        if "predict" in vars(cls):
            replace(cls, "predict", _predict)
    # "Transferred 419/475 items" is alarming if the rest is new activation parameters.
    replace(tasks.BaseModel, "load", _load)
    # BaseModel.fuse folds a BatchNorm into a single kernel, while a dynamic convolution has several. It, and the blocks
    # and heads with a fuse method, import the function by name.
    hook_fusing(tasks)
    # default_act() stores the plan in model.yaml, which exists only after the model is built.
    for cls in tasks.BaseModel.__subclasses__():
        if cls.__module__ == tasks.__name__ and "__init__" in vars(cls):
            replace(cls, "__init__", _init_model)
    # rtdetr-n.yaml sets fewer denoising queries, an argument after `act` in the decoder's row: 100 of them make a
    # training step at 128 pixels 1.6 times as long. The decoder accepts `act: None`, its default, only since 8.4.130.
    if inspect.signature(tasks.RTDETRDecoder.__init__).parameters["act"].default is not None:
        replace(tasks.RTDETRDecoder, "__init__", _init_decoder)


def hook_fusing(module: Any) -> None:
    """Hook the folding of BatchNorms in a module of Ultralytics that imports it by name."""
    if hasattr(module, "fuse_conv_and_bn"):
        replace(module, "fuse_conv_and_bn", _fuse_conv_and_bn)


def _fuse_conv_and_bn(original: Callable[..., Any], conv: Any, bn: Any) -> Any:
    """Wrap `fuse_conv_and_bn` to fold a BatchNorm into all kernels of a dynamic convolution."""
    from rtdetr_act.activations.dynamic_conv import DynamicConv2d

    if not isinstance(conv, DynamicConv2d):
        return original(conv, bn)
    conv.fold_norm(bn)
    return conv.requires_grad_(False)


def _init_decoder(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Wrap `RTDETRDecoder.__init__` to treat `act=None` as its default."""
    given = inspect.signature(original).bind(*args, **kwargs)
    if given.arguments.get("act", "own") is None:
        del given.arguments["act"]
    original(*given.args, **given.kwargs)


def _parse_model(original: Callable[..., Any], d: dict[str, Any], ch: int, verbose: bool = True) -> Any:
    """Wrap `parse_model` to validate a model YAML, and to apply its plan to the layers."""
    from rtdetr_act.surgery.patcher import KINDS, resolve_plan, swap_sites
    from rtdetr_act.surgery.sites import collect_sites

    stock, plan = split_model_yaml(d)
    model_yaml.check_form(stock)
    model_yaml.check_modules(stock, original.__globals__)
    plan = resolve_plan(plan)
    if downloads.are_downloads_blocked():
        stock, fetched = model_yaml.remove_pretrained_weights(stock, original.__globals__)
        for row in fetched:
            log(f"{row} would fetch weights: nothing was downloaded, and it is built without them", warn=True)
    with _stock_default_act(plan.default_act, verbose):
        try:
            layers, save = original(stock, ch, verbose)
        except model_yaml.BUILD_ERRORS as error:
            if (explained := model_yaml.explain_build_error(error, stock, original)) is None:
                raise
            raise explained from error
    if plan:
        report = swap_sites(collect_sites(layers, "model", d, KINDS, treat_as=dict(plan.treat_as)), plan)
        for layer in layers:
            layer.np = sum(parameter.numel() for parameter in layer.parameters())  # what info(detailed=True) prints
        if verbose:
            convolutions = len(report.of("convolution"))
            swapped = f"{len(report.of('activation'))} activations swapped"
            swapped += f", {convolutions} dynamic convolutions" if convolutions else ""
            log(f"{swapped}: {plan} ({report.parameters:,} parameters)" if plan.rules else str(plan))
    return layers, save


@contextmanager
def _stock_default_act(text: str | None, verbose: bool) -> Iterator[None]:
    """Set `Conv.default_act` to a stock `activation:` inside the block, as Ultralytics does, but without `eval`."""
    if text is None:
        yield
        return
    from ultralytics.nn.modules.conv import Conv

    from rtdetr_act.integrations.stock_activation import stock_default_act

    with stock_default_act(Conv, text):
        if verbose:
            log(f"activation: {text}")
        yield


def load_model_yaml(original: Callable[..., Any], path: str | Path) -> dict[str, Any]:
    """Read a model YAML, of this package or Ultralytics, and normalise it to four items per row and a separate plan."""
    from rtdetr_act.integrations.ultralytics.configs import find_config

    ours = find_config(path)
    if ours is None:
        found = original(path)
    else:
        from ultralytics.nn.tasks import guess_model_scale

        found = {**original(ours), "scale": guess_model_scale(path), "yaml_file": str(path)}
    normal = normalise_model_yaml(found)
    model_yaml.check_form(normal)
    return normal


def _allow_safe_load() -> None:
    """Register the classes of this package with torch for restricted loads."""
    import torch

    from rtdetr_act.activations.registry import list_own_classes
    from rtdetr_act.activations.temperature import Temperature
    from rtdetr_act.surgery.rewired import ultralytics as rewired
    from rtdetr_act.surgery.rewiring import rebuild

    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4
        own: list[Any] = [*list_own_classes(), *rewired.CLASSES, rebuild, Temperature]
        torch.serialization.add_safe_globals(own)


_loading: ContextVar[bool] = ContextVar("loading", default=False)  # whether a checkpoint is being loaded


def _torch_safe_load(original: Callable[..., Any], weight: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Wrap `torch_safe_load` to check the classes in a checkpoint before loading it."""
    checkpoints.check_classes(weight)
    _allow_safe_load()
    token = _loading.set(True)
    try:
        found = original(weight, *args, **kwargs)
    except TypeError as error:
        if (refused := checkpoints.get_refused_class(error)) is None:
            raise
        raise ModelError(
            f"{quote(str(weight))} holds {quote(refused)}, which ULTRALYTICS_SAFE_LOAD does not allow: import the "
            "module that registers this activation first, if you trust where the file comes from"
        ) from error
    finally:
        _loading.reset(token)
    return found


def _load_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap what loads a checkpoint, so that activations of others work in place only if their specs say so.

    Ultralytics sets `inplace` of every module. Those of the package torch-activation then raise an error, and others
    may write over an input that is read again.
    """
    from torch import nn

    from rtdetr_act.activations.placed import get_placement
    from rtdetr_act.surgery.sites import iterate_placed_activations

    result = original(*args, **kwargs)
    for network in result if isinstance(result, tuple) else (result,):
        for _, module in iterate_placed_activations(network) if isinstance(network, nn.Module) else ():
            placed = get_placement(module)
            if placed and hasattr(module, "inplace") and not type(module).__module__.startswith(_KNOWN):
                given = dict(ActSpec.parse(placed.spec).kwargs).get("inplace", False)
                module.inplace = bool(given)  # type: ignore[assignment]
    return result


_KNOWN = ("torch.nn.", "rtdetr_act.")


def _check_requirements(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap `check_requirements` to raise while a checkpoint is loaded."""
    return checkpoints.refuse_install(*args) if _loading.get() else original(*args, **kwargs)


def _predict(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `predict` of task models to keep less for the backward pass where the plan says `memory=low`."""
    from rtdetr_act.surgery.low_memory import predict_in_low_memory

    return predict_in_low_memory(original, self, *args, **kwargs)


def _load(
    original: Callable[..., Any], self: Any, weights: Any, verbose: bool = True, *args: Any, **kwargs: Any
) -> Any:
    """Wrap `BaseModel.load` to initialise dynamic convolutions, and to log what was transferred."""
    result = original(self, weights, verbose, *args, **kwargs)
    plan = read_plan(self)
    model = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
    if any(rule.replaces == "convolution" for rule in plan.rules):
        from rtdetr_act.surgery.convolutions import load_plain_weights

        if (count := load_plain_weights(self, model.float().state_dict())) and verbose:
            log(f"{count} dynamic convolutions start from plain ones")
    if plan.needs_fit:
        source = read_plan(model)
        if source != plan and [s.rules for s in source.stages] != [s.rules for s in plan.reference.stages]:
            mark_fitted(self)  # the weights are from another network than the one before the swap
        else:
            from rtdetr_act.surgery.reference import carry_replaced

            carry_replaced(model, self)
    if verbose and plan:
        from rtdetr_act.surgery.sites import iterate_placed_activations

        given, own = ({name: value.shape for name, value in m.state_dict().items()} for m in (model, self))
        prefixes = tuple(f"{name}." for name, _ in iterate_placed_activations(self))
        inside = {name for name in own if name.startswith(prefixes)}
        matched = {name for name in own if given.get(name) == own[name]}
        log(
            f"{len(matched - inside)} of {len(own) - len(inside)} items outside the activations transferred; "
            f"{len(inside - matched)} items of the activations start from their initial values"
        )
    if plan:
        _check_same_classes(self, model)
    return result


def _check_same_classes(network: Any, source: Any) -> None:
    """Raise ModelError if an activation of a user in a checkpoint became one of this package, which has its name too.

    It was registered where the checkpoint was trained, and is not here.
    """
    from rtdetr_act.activations.placed import get_placement
    from rtdetr_act.activations.registry import find_entry
    from rtdetr_act.surgery.sites import iterate_placed_activations

    theirs = dict(iterate_placed_activations(source))
    for site, module in iterate_placed_activations(network):
        other = theirs.get(site)
        ours, placed = get_placement(module), get_placement(other)
        if not ours or not placed or ours.spec != placed.spec or find_entry(other) is not None:
            continue
        if type(module).__module__.startswith("rtdetr_act."):
            path = f"{type(other).__module__}.{type(other).__qualname__}"
            raise ModelError(
                f"the {quote(ours.spec)} of these weights is {path}, which is not registered here, where the name is "
                f"that of rtdetr_act's own activation: register {path} first"
            )


def _init_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap the constructors of task models to explain build errors, store plans, and apply `default_act`."""
    try:
        original(self, *args, **kwargs)
    except model_yaml.BUILD_ERRORS as error:  # raised in the forward pass that measures the strides
        explained = model_yaml.explain_forward_error(error, self.yaml) if hasattr(self, "yaml") else None
        if explained is None:
            raise
        raise explained from error
    if plan := read_plan(self):
        set_plan(self, plan)  # also of a mapping with five items per row, or with a plan as earlier versions stored it
    if not _defaults:
        return
    from rtdetr_act.surgery.patcher import patch_model
    from rtdetr_act.surgery.sites import find_sites

    placeholder, activation, act_lr = _defaults[-1]
    sites = find_sites(self)
    names = tuple(site.name for site in sites if site.module is placeholder)
    if not names:
        raise ModelError(
            "default_act() reached no activation, since the model YAML names its own: use patch_model on the model"
        )
    everywhere = all(site.module is placeholder for site in sites if site.layout == "map")
    rule = Rule(ActSpec.parse(activation), include=() if everywhere else names)
    patch_model(self, Plan((rule,), act_lr=act_lr))


@contextmanager
def default_act(activation: str, *, act_lr: float = 1.0) -> Iterator[None]:
    """Build Ultralytics models with another default activation inside the block.

    Every site that would use `Conv.default_act`, or that of RepConv or ConvTranspose, gets a separate instance. The
    plan is stored in `model.yaml`, so that training keeps it.

    Args:
        activation: A name with optional literal arguments, such as "mish".
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters in training. Default: 1.0.

    Raises:
        SpecError: The activation is unknown, or its arguments are invalid.
        ModelError: The YAML of a model built inside the block sets its own activation, so the default is unused.

    >>> from ultralytics.nn.tasks import DetectionModel
    >>> with default_act("mish"):
    ...     model = DetectionModel("yolov8n.yaml", verbose=False)
    >>> sorted({type(module).__name__ for module in model.modules()} & {"SiLU", "Mish"})
    ['Mish']
    """
    from rtdetr_act.activations.registry import resolve
    from rtdetr_act.integrations.ultralytics.rebuilding import shipped_default_act

    spec = str(resolve(activation))
    with shipped_default_act() as placeholder:
        _defaults.append((placeholder, spec, act_lr))
        try:
            yield
        finally:
            _defaults.pop()
