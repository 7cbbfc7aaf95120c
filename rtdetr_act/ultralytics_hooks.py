"""Everything that replaces Ultralytics internals, each hook with its reason; nothing else in the package does.

`install()` runs when `rtdetr_act` is imported and waits for Ultralytics' modules, so that importing us loads neither
Ultralytics nor torch. Checked against Ultralytics 8.3.0 and 8.4.190.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from rtdetr_act import checkpoints, downloads, model_yaml
from rtdetr_act.errors import ModelError, SpecError, quote
from rtdetr_act.files import partial_path, remove_leftovers
from rtdetr_act.plan import ActSpec, Plan, Rule, normalise_model_yaml, split_model_yaml

if TYPE_CHECKING:
    from torch import nn

    from rtdetr_act.patcher import PatchReport

_replaced: list[tuple[Any, str, Any]] = []  # (owner, name, what stood there), in order, for remove()
_removed = False
_waiting = False
_sentinels: list[tuple[nn.Module, str, float]] = []  # open default_act() blocks: stand-in, activation, act_lr


def install() -> None:
    """Hook Ultralytics' modules, now where they are loaded and on their import where they are not; once."""
    global _waiting, _removed
    _removed = False
    if _waiting:
        loaded = [name for name in _HOOKS if name in sys.modules] if not _replaced else []
        for name in loaded:
            _HOOKS[name](sys.modules[name])
        return
    _waiting = True
    for name in _HOOKS:
        wrapt.register_post_import_hook(_on_import, name)


def _on_import(module: Any) -> None:
    if not _removed:
        _HOOKS[module.__name__](module)


def remove() -> None:
    """Put back every function that `install` replaced; Ultralytics then refuses patched models again."""
    global _removed
    _removed = True
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)


def _replace(owner: Any, name: str, wrapper: Callable[..., Any], *, by_name: bool = False) -> None:
    """Replace `owner.name`, and with `by_name` its imports by name, by a function that gets the original first."""
    original = getattr(owner, name)

    @wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    # What was loaded before may have imported a function from its module by name.
    modules = [found for key, found in list(sys.modules.items()) if key.startswith("ultralytics.")] if by_name else []
    for place in (owner, *(found for found in modules if found is not owner and vars(found).get(name) is original)):
        _replaced.append((place, name, original))
        setattr(place, name, replacement)


# --- ultralytics.nn.tasks: building and loading ---------------------------------------------------------------------


def _hook_tasks(tasks: Any) -> None:
    # Every task model builds its layers with the module-level parse_model, looked up at call time: from a YAML, from a
    # checkpoint's model.yaml, on resume, in a DDP worker. One wrapper there reaches every build.
    _replace(tasks, "parse_model", _parse_model)
    # The task is guessed from the last head row as row[-2], the name of its module in a row of four items. So a YAML
    # is brought to four items a row, its plan under `activation`, as soon as it is read.
    _replace(tasks, "yaml_model_load", _yaml_model_load)
    # A restricted load (ULTRALYTICS_SAFE_LOAD, since 8.4) refuses classes that are not named to torch before. And a
    # missing package is answered with `pip install` of that name, which for a user's own activation is noise at best,
    # somebody else's package at worst.
    _replace(tasks, "torch_safe_load", _torch_safe_load)
    _replace(tasks, "check_requirements", _check_requirements)
    # "Transferred 419/475 items" alarms where the rest is new activation parameters.
    _replace(tasks.BaseModel, "load", _load)
    # BaseModel.fuse folds a BatchNorm into one kernel, where a dynamic convolution has several. It and the blocks and
    # heads that fuse themselves look the function up by name in their own modules.
    _hook_fusing(tasks)
    # default_act() must leave the plan in model.yaml, which only the finished model has.
    for cls in tasks.BaseModel.__subclasses__():
        if cls.__module__ == tasks.__name__ and "__init__" in vars(cls):
            _replace(cls, "__init__", _init_model)
    # rtdetr-n.yaml asks for fewer denoising queries, an argument behind `act` in the decoder's row: 100 of them make a
    # training step at 128 pixels 1.6 times as long. `act: None`, for the decoder's own, is understood since 8.4.130.
    if inspect.signature(tasks.RTDETRDecoder.__init__).parameters["act"].default is not None:
        _replace(tasks.RTDETRDecoder, "__init__", _init_decoder)


def _hook_fusing(module: Any) -> None:
    if hasattr(module, "fuse_conv_and_bn"):
        _replace(module, "fuse_conv_and_bn", _fuse_conv_and_bn)


def _fuse_conv_and_bn(original: Callable[..., Any], conv: Any, bn: Any) -> Any:
    from rtdetr_act.convolutions.dynamic import DynamicConv2d

    if not isinstance(conv, DynamicConv2d):
        return original(conv, bn)
    conv.fold_norm(bn)
    return conv.requires_grad_(False)


def _init_decoder(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(original).bind(*args, **kwargs)
    if given.arguments.get("act", "own") is None:
        del given.arguments["act"]
    original(*given.args, **given.kwargs)


def _parse_model(original: Callable[..., Any], d: dict[str, Any], ch: int, verbose: bool = True) -> Any:
    from rtdetr_act.convolutions.patching import build, find_convs, install
    from rtdetr_act.patcher import resolve_plan

    stock, plan = split_model_yaml(d)
    model_yaml.check_form(stock)
    model_yaml.check_modules(stock, original.__globals__)
    plan = resolve_plan(plan)
    if downloads.is_looking():
        stock, fetched = model_yaml.without_weights(stock, original.__globals__)
        for row in fetched:
            log(f"{row} would fetch weights: nothing was downloaded, and it stands here without them", warn=True)
    with _stock_default_act(plan.default_act, verbose):
        try:
            layers, save = original(stock, ch, verbose)
        except model_yaml.BUILDING_ERRORS as error:
            if (explained := model_yaml.explain_building(error, stock, original)) is None:
                raise
            raise explained from error
    if plan:
        report = _apply_plans(layers, d, plan)
        places = find_convs(layers, "model", d) if plan.convolutions else []
        convs = install(build(places, plan.convolutions), places)
        for layer in layers:
            layer.np = sum(parameter.numel() for parameter in layer.parameters())  # what info(detailed=True) prints
        if verbose:
            swapped = f"{len(report)} activations swapped" + (f", {len(convs)} dynamic convolutions" if convs else "")
            log(f"{swapped}: {plan} ({report.parameters + convs.parameters:,} parameters)")
    return layers, save


def _apply_plans(layers: nn.Module, d: dict[str, Any], plan: Plan) -> PatchReport:
    """Place a plan on top of the one it starts from, and return the report of the last."""
    from rtdetr_act.patcher import apply_plan, resolve_plan
    from rtdetr_act.sites import walk

    if plan.base:
        _apply_plans(layers, d, resolve_plan(plan.base))
    return apply_plan(walk(layers, "model", d), plan)


@contextmanager
def _stock_default_act(text: str | None, verbose: bool) -> Iterator[None]:
    """Give a stock `activation:` its stock meaning, one shared module as `Conv.default_act`, without its `eval`."""
    if text is None:
        yield
        return
    from torch import nn
    from ultralytics.nn.modules.conv import Conv

    spec = ActSpec.parse(text)
    cls = getattr(nn, spec.name.rpartition(".")[2], None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise SpecError(f"'activation: {text}' names no class of torch.nn: write e.g. nn.SiLU() or a name such as silu")
    try:
        module = cls(*spec.args, **dict(spec.kwargs))
    except (TypeError, ValueError) as error:
        raise SpecError(f"'activation: {text}' cannot be built: {error}") from None
    if verbose:
        log(f"activation: {text}")
    before = Conv.default_act
    Conv.default_act = module
    try:
        yield
    finally:
        Conv.default_act = before  # Ultralytics before 8.4 left it to the next model of the process


def _yaml_model_load(original: Callable[..., Any], path: str | Path) -> dict[str, Any]:
    from rtdetr_act.configs import find_config

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
    import torch

    from rtdetr_act.activations.registry import own_classes
    from rtdetr_act.convolutions.dynamic import DynamicConv2d
    from rtdetr_act.rewired import ultralytics as rewired
    from rtdetr_act.schedules import Temperature

    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4
        own: list[Any] = [*own_classes(), *rewired.CLASSES.values(), Temperature, DynamicConv2d]
        torch.serialization.add_safe_globals(own)


_loading: ContextVar[bool] = ContextVar("loading", default=False)  # whether a checkpoint is being loaded


def _torch_safe_load(original: Callable[..., Any], weight: str | Path, *args: Any, **kwargs: Any) -> Any:
    checkpoints.check_classes(weight)
    _allow_safe_load()
    token = _loading.set(True)
    try:
        found = original(weight, *args, **kwargs)
    except TypeError as error:
        if (refused := checkpoints.find_refused(error)) is None:
            raise
        raise ModelError(
            f"{quote(str(weight))} holds {quote(refused)}, which ULTRALYTICS_SAFE_LOAD does not allow: import the "
            "module that registers this activation first, if you trust where the file comes from"
        ) from error
    finally:
        _loading.reset(token)
    checkpoints.refuse_renamed(weight, found[0])
    return found


def _check_requirements(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoints.refuse_install(*args) if _loading.get() else original(*args, **kwargs)


def _load(
    original: Callable[..., Any], self: Any, weights: Any, verbose: bool = True, *args: Any, **kwargs: Any
) -> Any:
    result = original(self, weights, verbose, *args, **kwargs)
    plan = plan_of(self)
    model = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
    if plan.convolutions:
        from rtdetr_act.convolutions.patching import load_plain

        if (count := load_plain(self, model.float().state_dict())) and verbose:
            log(f"{count} dynamic convolutions start from plain ones")
    if plan.awaits_fit:
        from rtdetr_act.patcher import mark_fitted

        source = plan_of(model)
        if source != plan and source.rules != (plan.base or Plan()).rules:
            mark_fitted(self)  # the weights are not those of the network before the swap
    if verbose and plan:
        from rtdetr_act.sites import placed_activations

        given, own = ({name: value.shape for name, value in m.state_dict().items()} for m in (model, self))
        prefixes = tuple(f"{name}." for name, _ in placed_activations(self))
        inside = {name for name in own if name.startswith(prefixes)}
        matched = {name for name in own if given.get(name) == own[name]}
        log(
            f"{len(matched - inside)} of {len(own) - len(inside)} items outside the activations transferred; "
            f"{len(inside - matched)} items of the activations start from their initial values"
        )
    return result


def _init_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    try:
        original(self, *args, **kwargs)
    except model_yaml.BUILDING_ERRORS as error:  # its first forward pass, which measures the strides
        explained = model_yaml.explain_forward(error, self.yaml) if hasattr(self, "yaml") else None
        if explained is None:
            raise
        raise explained from error
    if not _sentinels:
        return
    from rtdetr_act.patcher import patch_model
    from rtdetr_act.sites import find_sites

    stand_in, activation, act_lr = _sentinels[-1]
    sites = find_sites(self)
    names = tuple(site.name for site in sites if site.activation is stand_in)
    if not names:
        raise ModelError(
            "default_act() reached no activation, since the model YAML names its own: use patch_model on the model"
        )
    everywhere = all(site.activation is stand_in for site in sites if site.layout == "map")
    rule = Rule(ActSpec.parse(activation), include=() if everywhere else names)
    patch_model(self, Plan((rule,), act_lr=act_lr))


@contextmanager
def default_act(activation: str, *, act_lr: float = 1.0) -> Iterator[None]:
    """Build Ultralytics models with another default activation, as editing `default_act` would, but for real.

    Inside the block, every site that a new model would give `Conv.default_act` (or that of RepConv and ConvTranspose)
    gets an instance of its own, and the plan stands in `model.yaml`, so that training keeps it.

    Args:
        activation: A name with optional literal arguments, such as "mish".
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters in training.

    Raises:
        SpecError: The activation is unknown.
        ModelError: A model built inside names its own activation, so that the default reaches nothing.

    >>> from ultralytics.nn.tasks import DetectionModel
    >>> with default_act("mish"):
    ...     model = DetectionModel("yolov8n.yaml", verbose=False)
    >>> sorted({type(module).__name__ for module in model.modules()} & {"SiLU", "Mish"})
    ['Mish']
    """
    from torch import nn
    from ultralytics.nn.modules.conv import Conv, ConvTranspose, RepConv

    from rtdetr_act.activations.registry import resolve

    spec = str(resolve(activation))
    stand_in = nn.SiLU()
    before = [(cls, cls.default_act) for cls in (Conv, ConvTranspose, RepConv)]
    for cls, _ in before:
        cls.default_act = stand_in
    _sentinels.append((stand_in, spec, act_lr))
    try:
        yield
    finally:
        _sentinels.pop()
        for cls, module in before:
            cls.default_act = module


# --- ultralytics.data.utils: data sets --------------------------------------------------------------------------------


def _hook_data(utils: Any) -> None:
    # Where images are missing it runs what the YAML has under `download`, code of any kind.
    _replace(utils, "check_det_dataset", downloads.check_det_dataset, by_name=True)


# --- ultralytics.engine.model: the RTDETR and YOLO objects ----------------------------------------------------------


def _hook_model(engine: Any) -> None:
    _replace(engine, "yaml_model_load", _yaml_model_load)  # imported there by name
    # A model built from a YAML is trained from that file: since 8.4.37 (8.4.35 still did) its in-memory model.yaml is
    # not read.
    _replace(engine.Model, "train", _train)
    # Tuning trains in subprocesses that would never import the plugin.
    _replace(engine.Model, "tune", _tune)


def _train(original: Callable[..., Any], self: Any, trainer: Any = None, **kwargs: Any) -> Any:
    if not _differs_from_file(self):
        return original(self, trainer=trainer, **kwargs)
    from ultralytics.utils import YAML, checks

    file = YAML.load(checks.check_yaml(kwargs["cfg"])) if kwargs.get("cfg") else {}
    given = {**self.overrides, **file, **kwargs}
    # A checkpoint named by its path is resumed from there; resume=True without one in memory starts anew. With several
    # data sets, train() starts each run from the model in memory, YAML-built or not.
    if isinstance(given.get("resume"), (str, Path)) or isinstance(given.get("data"), (list, tuple)):
        return original(self, trainer=trainer, **kwargs)
    # With a checkpoint set, train() builds from the in-memory model.yaml; with pretrained=False it takes no weights
    # from the model in memory, so that the network starts from the run's own seed like any stock run.
    pretrained = given.get("pretrained", True)
    kwargs["pretrained"] = False if pretrained is True else pretrained
    self.ckpt = {"model": self.model}
    try:
        return original(self, trainer=trainer, **kwargs)
    finally:
        if self.ckpt.keys() == {"model"}:  # the run did not end: nothing was loaded
            self.ckpt = {}


def _differs_from_file(model: Any) -> bool:
    """Say whether train() would read a YAML file whose plan is not that of the model in memory."""
    from torch import nn

    if model.ckpt or not model.cfg or not isinstance(model.model, nn.Module):
        return False
    from ultralytics.engine.model import Model, yaml_model_load

    if 'get("resume") and self.ckpt' not in inspect.getsource(inspect.unwrap(Model.train)):
        return False  # before 8.4.37, train() always read the in-memory model.yaml
    return split_model_yaml(yaml_model_load(model.cfg))[1] != plan_of(model.model)


def _tune(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if plan_of(self.model):
        from ultralytics.engine.tuner import Tuner

        if "model" not in inspect.signature(Tuner.__init__).parameters:
            raise ModelError(
                "this Ultralytics tunes in processes that rebuild the stock network: tuning a patched model needs "
                "Ultralytics 8.4.160 or newer"
            )
        # Ray workers unpickle the model object; a callback of ours in it makes them import the plugin.
        self.add_callback("on_pretrain_routine_start", import_plugin)
    return original(self, *args, **kwargs)


def import_plugin(trainer: Any) -> None:
    """Do nothing: unpickling a reference to this callback imports the plugin, and with it the hooks."""


# --- ultralytics.engine.exporter ------------------------------------------------------------------------------------


def _hook_exporter(exporter: Any) -> None:
    # A deployed network should not pay for what training needed: whoever exports a patched model, exports the folded
    # one. And Ultralytics writes over the exported file in place: a full disk leaves half of it over a good one.
    _replace(exporter.Exporter, "__call__", _export)


def _export(original: Callable[..., Any], self: Any, model: Any = None, *args: Any, **kwargs: Any) -> Any:
    from rtdetr_act.deploy.export import export_staged, is_our_export

    if plan_of(model) or is_our_export():
        return export_staged(original, self, model, *args, **kwargs)
    return original(self, model, *args, **kwargs)


# --- ultralytics.engine.trainer -------------------------------------------------------------------------------------


def _hook_trainer(trainer: Any) -> None:
    # Ultralytics decays every parameter whose name lacks "bias" outside of *Norm* modules, slopes of PReLU included.
    _replace(trainer.BaseTrainer, "build_optimizer", _build_optimizer)
    # Temperatures follow the epoch, on every worker: callbacks of a user reach the first one only in 8.3.
    _replace(trainer.BaseTrainer, "run_callbacks", _run_callbacks)
    # Both write over the checkpoint in place: a kill or a full disk in the middle leaves half a file, and with last.pt
    # goes all that was trained.
    _replace(trainer.BaseTrainer, "save_model", _save_model)
    _replace(trainer, "strip_optimizer", _strip_optimizer)
    # Trackers log what stands in trainer.metrics, in callbacks that are added here and that ours must stand around.
    _replace(trainer.callbacks, "add_integration_callbacks", _add_integration_callbacks)
    # Tuning and training over several data sets start `python -m ultralytics…`, which never imports the plugin.
    if command := getattr(trainer, "_YOLO_CLI_COMMAND", None):
        _replaced.append((trainer, "_YOLO_CLI_COMMAND", command))
        run = "import rtdetr_act; from ultralytics.cfg import entrypoint; entrypoint()"
        trainer._YOLO_CLI_COMMAND = [sys.executable, "-c", run]


def _build_optimizer(original: Callable[..., Any], self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    optimizer = original(self, model, *args, **kwargs)
    plan = plan_of(_inside(model))
    if not plan:
        return optimizer
    from rtdetr_act.training import keep_stacks_out_of_muon, separate_activation_parameters

    keep_stacks_out_of_muon(optimizer, model)
    if count := separate_activation_parameters(optimizer, model, plan.act_lr):
        rate = "" if plan.act_lr == 1.0 else f", their learning rate times {plan.act_lr:g}"
        log(f"{count} scalar and per-channel activation parameters without weight decay{rate}")
    return optimizer


def _run_callbacks(original: Callable[..., Any], self: Any, event: str) -> Any:
    from rtdetr_act.training import follow

    follow(self, event)
    return original(self, event)


def started_here(trainer: Any) -> None:
    """Do nothing: a trainer that has this callback was started by a command of ours, be its model patched or not."""


def is_ours(trainer: Any) -> bool:
    """Say whether a training is of a patched model or of a command of ours; all others stay as they are."""
    return started_here in trainer.callbacks.get("on_pretrain_routine_start", ()) or bool(
        plan_of(_inside(trainer.model))
    )


_whole: set[Path] = set()  # checkpoints that are written whole, by their paths


def _save_model(original: Callable[..., Any], self: Any) -> Any:
    if not is_ours(self):
        return original(self)
    last, best = self.last, self.best
    _whole.update((Path(last), Path(best)))
    for path in (last, best):
        remove_leftovers(path)
    self.last, self.best = partial_path(last), partial_path(best)
    try:
        result = original(self)
        for written, path in ((self.best, best), (self.last, last)):
            if written.exists():
                written.replace(path)
        return result
    finally:
        self.last.unlink(missing_ok=True)
        self.best.unlink(missing_ok=True)
        self.last, self.best = last, best


def _inside(model: Any) -> Any:
    from rtdetr_act.training import task_model

    return task_model(model)


def _strip_optimizer(original: Callable[..., Any], f: str | Path, s: str = "", *args: Any, **kwargs: Any) -> Any:
    if s or Path(f) not in _whole:
        return original(f, s, *args, **kwargs)
    partial = partial_path(Path(f))
    try:
        result = original(f, str(partial), *args, **kwargs)
        if partial.exists():
            partial.replace(f)
        return result
    finally:
        partial.unlink(missing_ok=True)


def _add_integration_callbacks(original: Callable[..., Any], instance: Any) -> None:
    from ultralytics.engine.trainer import BaseTrainer

    from rtdetr_act.tracking import add_callbacks

    original(instance)
    if isinstance(instance, BaseTrainer):  # validators, predictors and exporters come here too
        add_callbacks(instance)


# --- ultralytics.utils.dist: multi-GPU ------------------------------------------------------------------------------


def _hook_dist(dist: Any) -> None:
    # A DDP worker is a new process that runs a generated file; without us it would stop at the first patched row.
    _replace(dist, "generate_ddp_file", _generate_ddp_file)


def _generate_ddp_file(original: Callable[..., Any], trainer: Any) -> str:
    path = str(original(trainer))
    source = Path(path).read_text(encoding="utf-8")
    if 'state["model"]' not in source and _lost_by_workers(trainer):
        Path(path).unlink()
        raise ModelError(
            "this Ultralytics gives multi-GPU workers the model file only, not the activations patched in Python: "
            "name them in the model YAML, or use Ultralytics 8.4.160 or newer"
        )
    lines = source.splitlines(keepends=True)
    anchors = [
        i for i, line in enumerate(lines) if line.strip().startswith(("sys.path =", 'if __name__ == "__main__"'))
    ]
    if not anchors:
        raise ModelError("this Ultralytics writes multi-GPU workers in a form that rtdetr-act does not know yet")
    lines.insert(anchors[-1] + 1, "    import rtdetr_act  # its hooks rebuild the patched model\n")
    Path(path).write_text("".join(lines), encoding="utf-8")
    return path


def _lost_by_workers(trainer: Any) -> bool:
    from torch import nn
    from ultralytics.nn.tasks import yaml_model_load

    if not isinstance(trainer.model, nn.Module):
        return False
    source = str(trainer.args.model)
    if source.endswith((".yaml", ".yml")):
        return split_model_yaml(yaml_model_load(source))[1] != plan_of(trainer.model)
    from ultralytics import YOLO

    return plan_of(YOLO(source).model) != plan_of(trainer.model)


# --------------------------------------------------------------------------------------------------------------------


def plan_of(model: Any) -> Plan:
    """Return the plan that a task model carries in its `yaml`; an empty plan for any other model."""
    from rtdetr_act.patcher import carries_yaml

    return split_model_yaml(model.yaml)[1] if carries_yaml(model) else Plan()


def log(text: str, *, warn: bool = False) -> None:
    """Say something through Ultralytics' logger."""
    from ultralytics.utils import LOGGER, colorstr

    (LOGGER.warning if warn else LOGGER.info)(f"{colorstr('rtdetr-act:')} {text}")


_HOOKS: dict[str, Callable[[Any], None]] = {
    "ultralytics.nn.tasks": _hook_tasks,
    "ultralytics.data.utils": _hook_data,
    "ultralytics.nn.modules.block": _hook_fusing,
    "ultralytics.nn.modules.head": _hook_fusing,
    "ultralytics.engine.model": _hook_model,
    "ultralytics.engine.exporter": _hook_exporter,
    "ultralytics.engine.trainer": _hook_trainer,
    "ultralytics.utils.dist": _hook_dist,
}
