"""Check what the plugin promises with the Ultralytics release of this environment, and write the outcomes as JSON.

    .venv/bin/python scripts/check_release.py [--only building training] [--output release.json]

Real models, trainings, kills and exports, small ones. The checks stand in parts, each a process of its own with a time
limit, so that none stops the others: `building` imports the plugin before Ultralytics, `training` behind it,
`reopening` never. What a release does not have is said, with the reason. About two minutes; exits with 1 where a check
fails. `scripts/check_compat.py` runs this in an environment for each of many releases.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import yaml

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGES = ("ultralytics", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "onnxscript")
PARTS = ("building", "training", "reopening", "killing", "commands", "study")
LIMIT = 600  # seconds of a part, ten times what the longest takes on a quiet machine
COMMAND_LIMIT = 240  # of one command
MODELS = ["rtdetr-l", "rtdetr-x", "rtdetr-resnet50", "rtdetr-resnet101", "yolov6n", "yolov8n", "yolov9t", "yolov10n"]
MODELS += ["yolo11n", "yolo12n", "yolo26n"]
PLAN = "arelu, dynamic_conv@backbone"
OPTIMIZERS = ("auto", "SGD", "AdamW", "MuSGD")
EPOCHS = 8  # of the training that is killed after the first
SHORT = ["imgsz=64", "batch=4", "nbs=4", "workers=0", "device=cpu", "amp=False", "plots=False", "deterministic=False"]
SHORT += ["optimizer=AdamW", "lr0=0.01", "warmup_epochs=0"]
State = Literal["ok", "failed", "absent"]


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        check: Its name.
        state: "ok", "failed", or "absent" where the release or the environment has not what it is about.
        note: What was seen, or in one line why it failed or is absent.
        seconds: How long it took.
        numbers: What was counted.
    """

    check: str
    state: State
    note: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)


class AbsentError(Exception):
    """The release or the environment has not what a check is about."""


class FailedError(Exception):
    """Something is not as promised."""


@dataclass(frozen=True)
class Seen:
    """What a check that passed has to say."""

    note: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Path], Seen]
CHECKS: dict[str, dict[str, Check]] = {part: {} for part in PARTS}


def check(part: str, name: str) -> Callable[[Check], Check]:
    """Add a function to the checks of a part; it gets the folder that all parts share."""

    def add(function: Check) -> Check:
        CHECKS[part][name] = function
        return function

    return add


def expect(holds: bool, otherwise: str) -> None:
    """Fail the check where something does not hold."""
    if not holds:
        raise FailedError(otherwise)


def main() -> None:
    """Run the parts one after another, print what came out and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts; reopening needs training"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the outcomes")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        run_checks(given.part, given.folder)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="release-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        write_inputs(folder)
        outcomes = [outcome for part in given.only for outcome in run_part(part, folder)]
    times = os.times()
    used = {"python": platform.python_version(), **versions()}
    found = {
        "versions": used,
        "seconds": round(time.monotonic() - started, 1),
        "core_seconds": round(times.children_user + times.children_system, 1),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(", ".join(f"{package} {release}" for package, release in used.items()))
    for outcome in outcomes:
        print(f"{outcome.state:6} {outcome.check} ({outcome.seconds:.1f} s) {outcome.note}")
    sys.exit(any(outcome.state == "failed" for outcome in outcomes))


def versions() -> dict[str, str]:
    """Return the installed releases by package."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def write_inputs(folder: Path) -> None:
    """Write what all parts use: images, the tiny models, and a folder for Ultralytics' settings."""
    tiny.draw_images(folder, {"detect": ["{cls} {x} {y} 0.375 0.375"]})
    common = {"path": str(folder / "detect"), "train": "images", "val": "images", "names": ["a", "b"]}
    tiny.write_yaml(folder / "data.yaml", common)
    tiny.write_yaml(folder / "rtdetr.yaml", tiny.RTDETR)
    tiny.write_yaml(folder / "yolo.yaml", tiny.yolo())
    tiny.write_yaml(
        folder / "rtdetr-rows.yaml",
        tiny.with_rows(tiny.RTDETR, {3: "prelu", 14: "gelu"}, activation="rtdetr_act.arelu"),
    )
    (folder / "settings").mkdir()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of every process: settings of its own, one thread, and nothing installed on the way."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env.update(YOLO_CONFIG_DIR=str(folder / "settings"), YOLO_OFFLINE="True", YOLO_AUTOINSTALL="False")
    # OpenVINO reports its use except where this is set, and waits for a network that is not there.
    env.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TF_BUILD="1")
    return env


def run_part(part: str, folder: Path) -> list[Outcome]:
    """Run the checks of a part in a process of its own; those that it did not get to have failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--folder", str(folder)]
    with (folder / f"{part}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)
        try:
            end = f"the process ended with code {process.wait(LIMIT)}"
        except subprocess.TimeoutExpired:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()  # the command that it waits for, too, which would slow down what comes next
            process.wait()
            end = f"stopped after {LIMIT} s"
    written = folder / f"{part}.jsonl"
    lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
    found = [Outcome(**json.loads(line)) for line in lines]
    reached = {outcome.check for outcome in found}
    left = [name for name in CHECKS[part] if name not in reached]
    return found + [Outcome(name, "failed", end if name == left[0] else f"not reached: {end}") for name in left]


def run_checks(part: str, folder: Path) -> None:
    """Run the checks of a part in this process, and write a line for each as soon as it is over."""
    for name, function in CHECKS[part].items():
        started = time.monotonic()
        try:
            seen = function(folder)
            outcome = Outcome(name, "ok", seen.note, numbers=seen.numbers)
        except AbsentError as error:
            outcome = Outcome(name, "absent", str(error))
        except Exception as error:
            logging.getLogger(__name__).exception("%s failed", name)
            outcome = Outcome(name, "failed", explain(error))
        outcome = replace(outcome, seconds=round(time.monotonic() - started, 1))
        with (folder / f"{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def explain(error: Exception) -> str:
    """Return an error as one line."""
    line = " ".join(str(error).split()) or "without a word"
    return line if isinstance(error, FailedError) else f"{type(error).__name__}: {line}"


# --- building: the plugin is imported before Ultralytics --------------------------------------------------------------


@check("building", "imported before")
def check_import_before(folder: Path) -> Seen:
    """Import the plugin, which must not import Ultralytics, then Ultralytics."""
    import rtdetr_act

    expect("ultralytics" not in sys.modules, "importing the plugin imports Ultralytics")
    return check_hooks(folder, rtdetr_act.__version__)


def check_hooks(folder: Path, release: str) -> Seen:
    """Look for the hooks, and build a model that only they understand."""
    from ultralytics import RTDETR
    from ultralytics.engine import exporter, model, trainer
    from ultralytics.nn import tasks
    from ultralytics.utils import dist

    hooked = {
        "parse_model": tasks, "torch_safe_load": tasks, "train": model.Model, "build_optimizer": trainer.BaseTrainer,
        "save_model": trainer.BaseTrainer, "__call__": exporter.Exporter, "generate_ddp_file": dist,
    }  # fmt: skip
    missing = [name for name, owner in hooked.items() if not hasattr(getattr(owner, name), "__wrapped__")]
    expect(not missing, f"not hooked: {', '.join(missing)}")
    kinds = Counter(type(module).__name__ for module in RTDETR(str(folder / "rtdetr-rows.yaml")).model.modules())
    expect(kinds["AReLU"] == tiny.CONV_SITES - 4 and kinds["PReLU"] == 4, f"built {dict(kinds)}")
    return Seen(f"rtdetr-act {release}")


@check("building", "patch counts")
def check_counts(folder: Path) -> Seen:
    """Compare the report of a swap with the activations that a model has and calls, for each model of the release."""
    counts: dict[str, list[int]] = {}
    absent, wrong = [], []
    for name in MODELS:
        try:
            counts[name] = count_sites(name)
        except FileNotFoundError:
            absent.append(name)
        except FailedError as error:
            wrong.append(f"{name}: {error}")
    expect(not wrong, "; ".join(wrong))
    return Seen(f"no {', '.join(absent)} in this release" if absent else "", counts)


def count_sites(name: str) -> list[int]:
    """Return the sites that `Conv.default_act` reaches, those on maps and all of them, or fail where a swap differs."""
    from torch import nn
    from ultralytics.nn.modules import Conv

    from rtdetr_act import patch_model

    model = load(f"{name}.yaml")
    places = find_places(model.model)
    maps = sum(place.dimensions == 4 for place in places)
    report = patch_model(model, "mish")
    after = Counter((place.kind, place.dimensions) for place in find_places(model.model))
    placed = after.pop(("Mish", 4), 0)
    expect(len(report) == placed == maps, f"{maps} sites on maps, {len(report)} reported, {placed} became Mish")
    expect(all(dimensions == 3 for _, dimensions in after), f"stock activations are left on maps: {dict(after)}")
    report = patch_model(model, "mish", scope="all")
    placed = sum(place.kind == "Mish" for place in find_places(model.model))
    expect(len(report) == placed == len(places), f"{len(places)} sites, {len(report)} reported, {placed} became Mish")
    before, Conv.default_act = Conv.default_act, nn.Mish()
    try:
        reached = sum(place.kind == "Mish" for place in find_places(load(f"{name}.yaml").model, call=False))
    finally:
        Conv.default_act = before
    return [reached, maps, len(places)]


def load(source: str, kind: str = "") -> Any:
    """Return the RTDETR or YOLO of a model file, whose name tells which unless it is said."""
    from ultralytics import RTDETR, YOLO

    return (RTDETR if "rtdetr" in (kind or Path(source).name) else YOLO)(source)


@dataclass(frozen=True)
class Place:
    """An activation: its kind, and how many dimensions its input has (4 for maps, 0 where it was not called)."""

    kind: str
    dimensions: int


def find_places(model: nn.Module, call: bool = True) -> list[Place]:
    """Find activations without the plugin's own search: modules by their class, and what a forward pass calls."""
    import torch

    gates = ("Sigmoid", "Hardsigmoid", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "GLU", "MultiheadAttention")
    modules = {
        (id(owner), attribute): child
        for owner in model.modules()
        for attribute, child in owner._modules.items()
        if child is not None and is_activation(child) and type(child).__name__ not in gates
    }
    if not call:
        return [Place(type(child).__name__, 0) for child in modules.values()]
    seen = watch_calls(model, torch.zeros(2, 3, 160, 160))
    uncalled = [type(child).__name__ for (owner, _), child in modules.items() if (owner, id(child)) not in seen]
    expect(not uncalled, f"{len(uncalled)} activations were not called: {dict(Counter(uncalled))}")
    found = [Place(type(child).__name__, seen[owner, id(child)]) for (owner, _), child in modules.items()]
    return found + [Place(key[1], dimensions) for key, dimensions in seen.items() if isinstance(key[1], str)]


def watch_calls(model: nn.Module, images: torch.Tensor) -> dict[tuple[int, int | str], int]:
    """Return the dimensions of what activations get in a forward pass, by owner and either module or function."""
    import torch
    from torch.nn.modules import module as hooks
    from torch.overrides import TorchFunctionMode

    names = {"relu", "relu6", "leaky_relu", "silu", "gelu", "mish", "hardswish", "elu", "selu", "tanh"}
    owners: list[Any] = []
    seen: dict[tuple[int, int | str], int] = {}

    def enter(module: Any, inputs: tuple[Any, ...]) -> None:
        if owners and inputs and isinstance(inputs[0], torch.Tensor):
            seen[id(owners[-1]), id(module)] = inputs[0].dim()
        owners.append(module)

    def leave(module: Any, inputs: Any, output: Any) -> None:
        owners.pop()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "").rstrip("_")
            if name in names and owners and not is_activation(owners[-1]):
                seen[id(owners[-1]), name] = args[0].dim()
            return func(*args, **(kwargs or {}))

    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        # In evaluation, YOLOv10 and YOLO26 leave out one of their heads; in training, RT-DETR asks for boxes.
        with torch.no_grad(), Functions():
            model.train(type(model).__name__ != "RTDETRDetectionModel")(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_activation(module: Any) -> bool:
    """Say whether a module is one of torch's activations, which call the function of their name."""
    return type(module).__module__ == "torch.nn.modules.activation"


@check("building", "mixed YAMLs")
def check_mixed(folder: Path) -> Seen:
    """Build two shipped YAMLs and a tiny one, and compare each row's activations with its fifth item."""
    from rtdetr_act.integrations.ultralytics.configs import configs_folder

    classes = {"dyrelu_b": "DyReLUB", "dyrelu_c": "DyReLUC", "silu": "SiLU", "prelu": "PReLU", "gelu": "GELU"}
    files = {
        "rtdetr-n-mixed.yaml": configs_folder(),
        "yolo11n-mixed.yaml": configs_folder(),
        "rtdetr-rows.yaml": folder,
    }
    named = 0
    for name, place in files.items():
        rows = yaml.safe_load((place / name.replace("11n", "11")).read_text(encoding="utf-8"))
        model = load(str(folder / name) if place == folder else name).model
        for number, row in enumerate(rows["backbone"] + rows["head"]):
            found = outermost(model.model[number])
            if len(row) > 4:
                named += 1
                expect(set(found) == {classes[row[4]]}, f"row {number} of {name} has {dict(found)}, not {row[4]}")
            elif found and row[2] != "AIFI":  # tokens: only a row of its own names their activation
                expect(set(found) == {"AReLU"}, f"row {number} of {name} has {dict(found)}, not arelu")
    return Seen(f"{named} rows", {"rows": named})


def outermost(module: nn.Module) -> Counter[str]:
    """Count activations by class, without those inside of others."""
    found = tiny.activations(module)
    inside = {name for name in found if any(name.startswith(f"{other}.") for other in found if other)}
    return Counter(type(found[name]).__name__ for name in found if name not in inside)


@check("building", "default_act")
def check_default_act(folder: Path) -> Seen:
    """Build inside of `default_act`, and again from the model's own YAML behind it."""
    from torch import nn

    from rtdetr_act import default_act

    with default_act("mish"):
        model = load("yolov8n.yaml").model
    places = find_places(model, call=False)
    expect({place.kind for place in places} == {"Mish"}, f"built {dict(Counter(place.kind for place in places))}")
    tiny.count(model, nn.Mish)  # each its own instance
    rebuilt = type(model)(copy.deepcopy(model.yaml), verbose=False)
    expect(len(places) == tiny.count(rebuilt, nn.Mish), "rebuilt from its YAML, the model has other activations")
    expect(tiny.count(load("yolov8n.yaml").model, nn.Mish) == 0, "the next model is not stock")
    return Seen(f"{len(places)} Mish in yolov8n", {"sites": len(places)})


@check("building", "match")
def check_match(folder: Path) -> Seen:
    """Compare what the head gets after a swap with `init="match"` and a refit with what it gets after a plain one."""
    import torch

    from rtdetr_act import calibrate, patch_model, refit

    torch.manual_seed(0)
    images = read_images(folder)
    stock = load(str(folder / "yolo.yaml")).model
    calibrate(stock, images)
    expected = trunk(stock, images)
    errors = {}
    for init in ("paper", "match"):
        model = copy.deepcopy(stock)
        patch_model(model, "arelu", init=init)
        (refit if init == "match" else calibrate)(model, images)
        errors[init] = difference(trunk(model, images), expected)
    words = f"off by {errors['match']:.2f}, a plain swap by {errors['paper']:.2f}"
    expect(errors["match"] < errors["paper"] / 2, words)
    return Seen(words, errors)


def trunk(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return what the layer before the head gives for images in evaluation mode."""
    found: list[torch.Tensor] = []
    with model.model[-2].register_forward_hook(lambda _, __, output: found.append(output)):
        answer(model, images)
    return found[0]


def settle(model: nn.Module) -> nn.Module:
    """Give activations and BatchNorm values as if they were trained, and return the model in evaluation mode."""
    import torch
    from torch import nn

    for module in model.modules():
        if type(module).__module__.startswith("rtdetr_act.activations."):
            for parameter in module.parameters(recurse=False):
                parameter.data += 0.2 * torch.randn_like(parameter)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) / 10
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


def read_images(folder: Path) -> torch.Tensor:
    """Return the eight drawn images as Ultralytics gives them to a network."""
    import numpy as np
    import torch
    from PIL import Image

    files = sorted((folder / "detect" / "images").glob("*.png"))
    pixels = [torch.from_numpy(np.array(Image.open(file))) for file in files]
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def answer(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what a model gives for images in evaluation mode."""
    import torch

    with torch.no_grad():
        return model.eval()(images)[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, in units of the norm of the other."""
    return float((one - other).norm() / other.norm())


@check("building", "fold and ONNX")
def check_export(folder: Path) -> Seen:
    """Export a network with AReLU to ONNX, look for LeakyReLU in its place, and compare it with torch on an image."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise AbsentError(f"the extra 'export' is not installed: no {error.name}") from None
    import torch

    from rtdetr_act import fold_activations, patch_model

    torch.manual_seed(0)
    image = torch.rand(1, 3, 64, 64)
    asked: list[Any] = []
    errors = {}
    for name in ("yolo", "rtdetr"):
        model = load(str(folder / f"{name}.yaml"))
        sites = len(patch_model(model, "arelu"))
        settle(model.model)
        model.model.pt_path = str(folder / f"{name}.pt")
        expected = answer(model.model, image)
        folded = copy.deepcopy(model.model)
        report = fold_activations(folded)
        expect(len(report) == sites and outermost(folded)["AReLU"] == 0, f"{len(report)} of {sites} sites folded")
        expect(difference(answer(folded, image), expected) < 1e-4, f"the folded {name} gives something else")
        with noting_requirements(asked):
            path = model.export(format="onnx", imgsz=64)
        operators = Counter(node.op_type for node in onnx.load(path).graph.node)
        expect(operators["LeakyRelu"] == sites, f"{operators['LeakyRelu']} LeakyRelu in {name}.onnx for {sites} sites")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
        errors[name] = difference(torch.from_numpy(found), expected)
        expect(errors[name] < 1e-4, f"{name}.onnx is off by {errors[name]:.1e}")
    used = {"onnxscript": "onnxscript" in sys.modules, "asked": list(dict.fromkeys(asked))}
    return Seen(f"off by {max(errors.values()):.0e}", {**errors, **used})


@contextmanager
def noting_requirements(asked: list[Any]) -> Iterator[None]:
    """Collect the requirements of an export that are not met here, which Ultralytics would install where it may."""
    from ultralytics.engine import exporter

    original = exporter.check_requirements

    def note(requirements: Any, *args: Any, **kwargs: Any) -> Any:
        met = original(requirements, *args, **kwargs)
        if not met:
            each = [requirements] if isinstance(requirements, str) else requirements
            asked.extend(requirement for requirement in each if not original(requirement, *args, **kwargs))
        return met

    exporter.check_requirements = note
    try:
        yield
    finally:
        exporter.check_requirements = original


@check("building", "average precision")
def check_precision(folder: Path) -> Seen:
    """Integrate a curve as a validation does once something is detected, which the tiny trainings seldom reach."""
    from ultralytics.utils.metrics import compute_ap

    found = float(compute_ap([0.5, 1.0], [1.0, 0.5])[0])  # 1 up to a recall of 0.5, then down to 0.5
    expect(abs(found - 0.875) < 0.01, f"the average precision is {found:.3f}, not 0.875")
    return Seen(f"{found:.3f}")


# --- training: the plugin is imported behind Ultralytics --------------------------------------------------------------


@check("training", "imported behind")
def check_import_behind(folder: Path) -> Seen:
    """Import Ultralytics with all that is hooked, then the plugin."""
    from ultralytics import RTDETR, YOLO  # noqa: F401
    from ultralytics.engine import exporter, trainer, validator  # noqa: F401
    from ultralytics.models.rtdetr import train  # noqa: F401

    import rtdetr_act

    return check_hooks(folder, rtdetr_act.__version__)


def add_training_check(optimizer: str) -> None:
    """Add the check of a training under an optimizer."""

    @check("training", f"training, {optimizer}")
    def check_training(folder: Path) -> Seen:
        from ultralytics.engine import trainer

        if optimizer == "MuSGD" and not hasattr(trainer, "MuSGD"):
            raise AbsentError("Ultralytics has MuSGD since 8.4.0")
        chosen = [train(folder, name, optimizer) for name in ("rtdetr", "yolo")]
        return Seen(" and ".join(sorted(set(chosen))) if "auto" in optimizer else "")


for _name in (*OPTIMIZERS, "auto, long"):
    add_training_check(_name)


def train(folder: Path, name: str, optimizer: str) -> str:
    """Train a tiny model for two steps, check its parameters, groups and checkpoint, and return its optimizer."""
    import torch
    from ultralytics.engine.trainer import BaseTrainer

    from rtdetr_act import patch_model

    torch.manual_seed(0)
    model = load(str(folder / f"{name}.yaml"))
    sites = len(patch_model(model, PLAN))
    start: dict[str, torch.Tensor] = {}
    steepest: dict[str, float] = {}
    moved: set[str] = set()

    def note_start(trainer: BaseTrainer) -> None:
        for key, p in learned(trainer.model).items():
            start[key], steepest[key] = p.detach().clone(), 0.0
            p.register_hook(lambda grad, key=key: note_gradient(key, grad))
        check_groups(trainer)
        if "long" in optimizer:  # 20,000 iterations to the eyes of `auto`, one epoch of two in truth
            trainer.stopper.patience = 0  # stops after the first validation

    def note_gradient(key: str, grad: torch.Tensor) -> None:
        steepest[key] = max(steepest[key], float(grad.abs().max()))

    def note_moved(trainer: BaseTrainer) -> None:  # after each step, since a second may undo what a first did
        moved.update(key for key, p in learned(trainer.model).items() if not torch.equal(p, start[key]))

    model.add_callback("on_train_start", note_start)
    model.add_callback("on_train_batch_end", note_moved)
    epochs = 10_000 if "long" in optimizer else 1
    given = {"optimizer": optimizer.partition(",")[0], "epochs": epochs, "val": "long" in optimizer}
    model.train(**tiny.train_args(folder / "data.yaml", folder / slug(optimizer) / name, **given))
    trained = learned(model.trainer.model)
    expect(len(start) > 0 and trained.keys() == start.keys(), "the trained model has other parameters")
    # The boxes are too small for the coarser level of the YOLO: its last layers get gradients that float32 rounds away.
    pulled = [key for key, gradient in steepest.items() if gradient > 1e-3]
    expect(len(pulled) > 0.7 * len(start), f"{len(pulled)} of {len(start)} parameters have a gradient")
    stayed = [key for key in pulled if key not in moved]
    expect(not stayed, f"{len(stayed)} of {len(start)} parameters did not move, {stayed[:1]}")
    broken = [key for key, p in trained.items() if not bool(torch.isfinite(p).all())]
    expect(not broken, f"{len(broken)} parameters are not finite")
    saved = tiny.load(Path(model.trainer.last))
    placed = outermost(saved)
    expect(placed["AReLU"] + placed["DynamicConv2d"] == sites, f"the checkpoint has {dict(placed)} for {sites} sites")
    off = [key for key, p in learned(saved).items() if not torch.allclose(p, trained[key], atol=2e-2)]
    expect(not off, f"the checkpoint has other values: {off[:1]}")
    return type(model.trainer.optimizer).__name__


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of AReLU and of dynamic convolutions by name."""
    owners = {name for name, module in model.named_modules() if type(module).__name__ in ("AReLU", "DynamicConv2d")}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in owners}


def check_groups(trainer: Any) -> None:
    """Look for weight decay and Muon in the groups that hold parameters of activations and dynamic convolutions."""
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    expect(any(group["weight_decay"] > 0 for group in groups.values()), "nothing has weight decay")
    for name, module in trainer.model.named_modules():
        if type(module).__name__ == "AReLU":
            held = [groups[id(p)] for p in module.parameters()]
            expect(all(group["weight_decay"] == 0 for group in held), f"{name} has weight decay")
        elif type(module).__name__ == "DynamicConv2d":
            held = [groups[id(module.weight)]]
        else:
            continue
        expect(not any(group.get("use_muon") for group in held), f"{name} is Muon's")


@check("training", "training after match")
def check_training_after_match(folder: Path) -> Seen:
    """Train a checkpoint on, with another activation that starts from a match: the training must refit first."""
    from rtdetr_act import patch_model

    place = folder / "match"
    stock = load(str(folder / "rtdetr.yaml"))
    stock.train(**tiny.train_args(folder / "data.yaml", place / "rtdetr-stock", val=False))
    model = load(str(stock.trainer.last), "rtdetr")
    patch_model(model, "arelu", init="match")
    with tiny.logged() as lines:
        model.train(**tiny.train_args(folder / "data.yaml", place / "rtdetr-swap", val=False))
    fitted = [match[0] for line in lines if (match := re.search(r"\d+ layers fitted", line))]
    expect(len(fitted) == 1, f"{len(fitted)} lines of the training say that it refitted")
    saved = outermost(tiny.load(Path(model.trainer.last)))
    expect(saved["AReLU"] == tiny.CONV_SITES, f"the checkpoint has {dict(saved)}")
    return Seen(fitted[0])


@check("training", "training, mish")
def train_mish(folder: Path) -> Seen:
    """Train with an activation of torch's own, whose checkpoint names no class of the plugin."""
    from rtdetr_act import patch_model

    model = load(str(folder / "yolo.yaml"))
    sites = len(patch_model(model, "mish"))
    model.train(**tiny.train_args(folder / "data.yaml", folder / "mish" / "yolo", val=False))
    saved = outermost(tiny.load(Path(model.trainer.last)))
    expect(saved == {"Mish": sites}, f"the checkpoint has {dict(saved)} for {sites} sites")
    return Seen()


# --- reopening: the plugin is never imported here ---------------------------------------------------------------------


@check("reopening", "reopened without the plugin")
def check_reopening(folder: Path) -> Seen:
    """Validate and predict with checkpoints, and try to rebuild their networks."""
    mish, arelu = folder / "mish/yolo/run/weights/last.pt", folder / "adamw/rtdetr/run/weights/last.pt"
    use(folder, load(str(mish)))
    expect("rtdetr_act" not in sys.modules, "validating a network with Mish imports the plugin")
    model = load(str(mish))
    arguments = tiny.train_args(folder / "data.yaml", folder / "rebuilt")
    attempts: dict[str, Callable[[], Any]] = {
        "train goes on from the checkpoint": lambda: load(str(mish)).train(**arguments),
        "the checkpoint's YAML builds": lambda: type(model.model)(model.model.yaml, verbose=False),
        "a shipped YAML builds": lambda: load(str(Path(__file__).parents[1] / "configs" / "yolo11-mixed.yaml")),
        "a YAML with fifth items builds": lambda: load(str(folder / "rtdetr-rows.yaml")),
    }
    said = {}
    for words, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            said[words] = f"{type(error).__name__}: {error}"
    expect("rtdetr_act" not in sys.modules, "something imported the plugin")
    expect(
        not (others := attempts.keys() - said.keys()), f"without the plugin, {' and '.join(others)}: another network"
    )
    unclear = [words for words, line in said.items() if "rtdetr_act" not in line]
    expect(not unclear, f"not said that rtdetr_act is missing: {[f'{words}: {said[words]}' for words in unclear]}")
    use(folder, load(str(arelu), "rtdetr"))
    expect("rtdetr_act" in sys.modules, "a checkpoint with AReLU opened without its class")
    return Seen(f"a rebuild stops with {' or '.join(sorted(set(said.values())))}")


def use(folder: Path, model: Any) -> None:
    """Validate and predict with a model."""
    where = {"imgsz": 64, "device": "cpu", "verbose": False}
    found = model.predict(str(folder / "detect" / "images" / "0.png"), conf=1e-6, **where)[0]
    expect(len(found) > 0, f"{model.ckpt_path} predicts nothing")
    data = {"data": str(folder / "data.yaml"), "project": str(folder / "val"), "batch": 4, "workers": 0}
    fitness = float(model.val(**data, **where, plots=False).fitness)
    expect(math.isfinite(fitness), f"{model.ckpt_path} has a fitness of {fitness}")


# --- killing, commands, study: the command line as a user has it ------------------------------------------------------


@check("killing", "kill and resume")
def check_kill(folder: Path) -> Seen:
    """Kill a training once it has saved its first epoch, and go on with `rtdetr-act resume`."""
    place = folder / "killed"
    place.mkdir()
    words = ["train", "--act", PLAN, "--model", str(folder / "rtdetr.yaml"), "--data", str(folder / "data.yaml")]
    run = place / "run"
    with (place / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [command(), *words, *SHORT, f"epochs={EPOCHS}", f"project={place}", "name=run"],
            cwd=place, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        last = run / "weights" / "last.pt"
        deadline = time.monotonic() + COMMAND_LIMIT
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.wait()
    expect(last.exists(), f"no checkpoint: {(place / 'log.txt').read_text(encoding='utf-8')[-300:]}")
    before = learned(tiny.load(last))
    killed = read_epochs(run)
    expect(0 < len(killed) < EPOCHS, f"the kill came after {len(killed)} of {EPOCHS} epochs")
    call(place, "resume", str(last))
    epochs = read_epochs(run)
    expect(epochs == list(range(1, EPOCHS + 1)), f"results.csv has the epochs {epochs}")
    after = tiny.load(last)
    expect(outermost(after)["AReLU"] == tiny.CONV_SITES, f"the checkpoint has {dict(outermost(after))}")
    moved = [name for name, p in learned(after).items() if not bool((p == before[name]).all())]
    expect(len(moved) > len(before) / 2, f"{len(moved)} of {len(before)} parameters moved after the kill")
    return Seen(f"killed after {len(killed)} of {EPOCHS} epochs")


def read_epochs(run: Path) -> list[int]:
    """Return the epochs that results.csv has, counted from 1."""
    with (run / "results.csv").open(encoding="utf-8") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file, skipinitialspace=True)]


def command() -> str:
    """Return the path of `rtdetr-act` in this environment."""
    return str(Path(sys.executable).with_name("rtdetr-act"))


def call(place: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `rtdetr-act`, and fail where it ends with another code."""
    done = subprocess.run(
        [command(), *words], cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=COMMAND_LIMIT
    )
    if done.returncode != code:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise FailedError(f"`rtdetr-act {words[0]}` ended with {done.returncode}, not {code}: {' '.join(last)}")
    return done


@check("commands", "command line")
def check_commands(folder: Path) -> Seen:
    """Run commands one after another, as processes, and make a mistake."""
    place = folder / "commands"
    place.mkdir()
    model, data = str(folder / "rtdetr.yaml"), str(folder / "data.yaml")
    asked = [
        (["sites", model, "--act", "arelu"], f"{tiny.CONV_SITES} sites swapped"),
        (["train", "--act", "arelu", "--model", model, "--data", data, "epochs=1", "name=run", *SHORT], "mAP50-95"),
        (["val", "runs/detect/run/weights/best.pt", "--data", data, "imgsz=64", "plots=False"], "mAP50"),
        (["doctor", "runs/detect/run/weights/best.pt"], f"arelu stands at {tiny.CONV_SITES} of {tiny.CONV_SITES}"),
        (["fold", "runs/detect/run/weights/best.pt", "-o", "folded.pt"], "folded"),
        (["val", "runs", "folded.pt", "--data", data, "imgsz=64", "plots=False", "-o", "table.csv"], "table.csv"),
        (["checks"], "in place"),
    ]
    if find_spec("onnx"):
        asked.append((["export", "folded.pt", "format=onnx", "imgsz=64"], "file: "))
    for words, said in asked:
        output = call(place, *words).stdout
        expect(said in output, f"`rtdetr-act {words[0]}` does not say {said!r}")
    wrong = call(place, "train", model, "act=areluu", f"data={data}", code=2)
    expect(wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1, f"a mistake says {wrong.stderr!r}")
    return Seen(", ".join(words[0] for words, _ in asked))


@check("study", "study of two")
def check_study(folder: Path) -> Seen:
    """Run a study of two variants, and read its leaderboard."""
    place = folder / "studies"
    place.mkdir()
    words = ["--model", str(folder / "rtdetr.yaml"), "--data", str(folder / "data.yaml"), "--seeds", "1", "--cpus", "1"]
    call(place, "study", "--act", "stock", "--act", "arelu", "-o", "two", *words, "epochs=1", *SHORT)
    with (place / "two" / "leaderboard.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expect(len(rows) == 2, f"the leaderboard has {len(rows)} rows")
    expect((place / "two" / "report.html").stat().st_size > 10_000, "report.html is empty")
    return Seen()


def slug(text: str) -> str:
    """Return a text as the name of a folder."""
    return re.sub(r"\W+", "-", text.lower())


if __name__ == "__main__":
    main()
