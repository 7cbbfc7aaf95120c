"""Check rtdetr-act in checkouts of other repositories: YOLOv5, YOLOv7, official RT-DETR and D-FINE.

    python scripts/check_repositories.py --yolov5 DIR --yolov7 DIR --rtdetr DIR --dfine DIR

It is run by the Python of an environment in which the scripts of the repositories run and rtdetr-act is installed, and
needs no network: images are drawn, and no weights are fetched. YOLOv5 and YOLOv7 are trained by `rtdetr-act exec` with
one activation for all sites and with one per layer in the YAML: the training is killed in its second epoch of three,
resumed, fine-tuned from its best.pt, validated, run on images and exported. The models of RT-DETR and D-FINE are
patched where their documentation says, and trained with their own losses and optimizers for some steps. Prints a table;
the exit code is 1 if a check fails. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from PIL import Image, ImageDraw

SIDE = 64  # pixels
MODEL_SIDE = 320  # pixels, for the models of RT-DETR and D-FINE
STEPS = 3  # of them
TIME_LIMIT = 600.0  # seconds for one script
# In the first warm-up steps the slopes move by less than a half-precision checkpoint can tell at the default rate.
LEARNING_RATE = 0.5
UNIFORM = {"arelu"}
PER_LAYER = {0: "arelu", 1: "prelu", 3: "dyrelu_b", 7: "hardswish"}  # over `mish`; convolutions in both repositories


@dataclass(frozen=True)
class Yolo:
    """How the scripts of a repository are called.

    Attributes:
        name: Its name.
        model: The model YAML.
        hyp: The hyperparameters.
        size: The option for the image size, with its value.
        batch: The option for the batch size.
        log: The file with a line for each epoch.
        val: The script that validates.
        quiet: Options that save time in training.
        export: Options of export.py.
        exported: The exported files, after the name of the checkpoint without `.pt`.
    """

    name: str
    model: str
    hyp: str
    size: tuple[str, ...]
    batch: str
    log: str
    val: str
    quiet: tuple[str, ...]
    export: tuple[str, ...]
    exported: tuple[str, ...]


YOLOS = (
    Yolo(
        "yolov5", "models/yolov5n.yaml", "data/hyps/hyp.scratch-low.yaml", ("--img", str(SIDE)), "--batch-size",
        "results.csv", "val.py", ("--noplots",), ("--include", "torchscript", "onnx"), (".torchscript", ".onnx"),
    ),
    Yolo(
        "yolov7", "cfg/training/yolov7-tiny.yaml", "data/hyp.scratch.tiny.yaml",
        ("--img-size", str(SIDE), str(SIDE)), "--batch-size", "results.txt", "test.py", (), ("--grid",),
        (".torchscript.pt", ".onnx"),
    ),
)  # fmt: skip


class CheckError(Exception):
    """A check failed."""


@dataclass
class Table:
    """The outcomes of the checks, printed as they come."""

    failed: int = 0
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def run(self, repository: str, what: str, check: Callable[[], str]) -> bool:
        """Run a check, record its outcome, and return whether it passed."""
        began = time.monotonic()
        try:
            outcome, detail = "ok", check()
        except (CheckError, subprocess.SubprocessError, OSError, KeyError, ValueError) as error:
            outcome, detail = "FAILED", str(error)
            self.failed += 1
        row = (repository, what, outcome, f"{time.monotonic() - began:.0f} s", detail)
        self.rows.append(row)
        print("{:<20} {:<34} {:<7} {:>6}  {}".format(*row), flush=True)
        return outcome == "ok"


def main() -> None:
    """Run the checks of the repositories that are given."""
    given = parse_words()
    if given.job:
        print(json.dumps(JOBS[given.job[0]](*given.job[1:])))
        return
    checkouts = {name: path for name in ("yolov5", "yolov7", "rtdetr", "dfine") if (path := getattr(given, name))}
    if not checkouts:
        sys.exit("give the folder of at least one checkout: --yolov5, --yolov7, --rtdetr or --dfine")
    for path in checkouts.values():
        if not path.is_dir():
            sys.exit(f"there is no folder {path}")
    shutil.rmtree(given.output, ignore_errors=True)
    table = Table()
    for repository in YOLOS:
        if checkout := checkouts.get(repository.name):
            check_yolo(repository, checkout.resolve(), given.output.resolve(), table)
    for name, configurations in MODELS.items():
        for folder, configuration, changes in configurations if name in checkouts else ():
            check_model(f"{name} {folder}".strip(), checkouts[name].resolve() / folder, configuration, changes, table)
    print(f"{len(table.rows)} checks, {table.failed} failed")
    sys.exit(1 if table.failed else 0)


def parse_words() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("yolov5", "yolov7", "rtdetr", "dfine"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"a checkout of {name}")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/repositories"), help="emptied first")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def check_yolo(repository: Yolo, checkout: Path, output: Path, table: Table) -> None:
    """Check a checkout of YOLOv5 or YOLOv7."""
    folder = output / repository.name
    data = draw_data(folder / "data")
    hyp = yaml.safe_load((checkout / repository.hyp).read_text(encoding="utf-8")) | {"lr0": LEARNING_RATE}
    (folder / "hyp.yaml").write_text(yaml.safe_dump(hyp), encoding="utf-8")
    stock = yaml.safe_load((checkout / repository.model).read_text(encoding="utf-8"))
    mixed = dict(stock, activation="mish")
    mixed["backbone"] = [
        [*row, PER_LAYER[index]] if index in PER_LAYER else row for index, row in enumerate(stock["backbone"])
    ]
    mixed_yaml = folder / "mixed.yaml"
    mixed_yaml.write_text(yaml.safe_dump(mixed), encoding="utf-8")
    for name, act, model, specs in (
        ("arelu", ["act=arelu"], checkout / repository.model, UNIFORM),
        ("per layer", [], mixed_yaml, {"mish", *PER_LAYER.values()}),
    ):
        run = YoloRun(repository, checkout, folder / name.replace(" ", "-"), data, act, model, specs)
        if not table.run(repository.name, f"{name}: killed in epoch 2 of 3", run.kill):
            continue
        table.run(repository.name, f"{name}: optimizer", run.check_optimizer)
        table.run(repository.name, f"{name}: resumed", run.resume)
        table.run(repository.name, f"{name}: fine-tuned, 2 epochs", run.tune)
        table.run(repository.name, f"{name}: {repository.val}", run.validate)
        table.run(repository.name, f"{name}: detect.py", run.detect)
        table.run(repository.name, f"{name}: export.py", run.export)
        table.run(repository.name, f"{name}: stock train.py refuses", run.train_without_plugin)


@dataclass
class YoloRun:
    """Trainings of a model with activations.

    Attributes:
        repository: How scripts are called.
        checkout: The checkout.
        folder: Folder of the results.
        data: The data YAML.
        act: Words of `rtdetr-act exec`.
        model: The model YAML.
        specs: The activations that must stand in every checkpoint, each somewhere.
    """

    repository: Yolo
    checkout: Path
    folder: Path
    data: Path
    act: list[str]
    model: Path
    specs: set[str]

    @property
    def weights(self) -> Path:
        """The folder of the first training's checkpoints."""
        return self.folder / "first" / "weights"

    def list_training_words(self, name: str, epochs: int) -> list[str]:
        """Return the arguments of train.py without model and weights."""
        words = ["--data", self.data, "--hyp", self.folder.parent / "hyp.yaml", "--epochs", epochs]
        words += [*self.repository.size, self.repository.batch, 4, "--workers", 0, "--device", "cpu"]
        words += ["--project", self.folder, "--name", name, *self.repository.quiet]
        return list(map(str, words))

    def start(self, log: str, words: Sequence[str], *, plugin: Sequence[str] | None = ()) -> subprocess.Popen[bytes]:
        """Start a script.

        Args:
            log: Name of the file for what it prints.
            words: The script, and its arguments.
            plugin: Words of `rtdetr-act exec`; None to run it without the plugin.
        """
        program = [sys.executable] if plugin is None else [sys.executable, "-m", "rtdetr_act", "exec", *plugin]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                [*program, *words], cwd=self.checkout, stdout=file, stderr=subprocess.STDOUT, env=make_environment()
            )

    def run(self, log: str, words: Sequence[str], *, plugin: Sequence[str] | None = ()) -> str:
        """Run a script, and return what it printed; raise CheckError if its exit code is not 0."""
        process = self.start(log, words, plugin=plugin)
        try:
            code = process.wait(TIME_LIMIT)
        except BaseException:
            process.kill()
            raise
        text = (self.folder / log).read_text(encoding="utf-8", errors="replace")
        if code:
            raise CheckError(f"exit code {code}, see {self.folder / log}: {text.strip().splitlines()[-1][:200]}")
        return text

    def inspect(self, path: Path) -> dict[str, Any]:
        """Return what a checkpoint holds; raise CheckError if it is not all of the activations."""
        found = run_job("inspect", str(self.checkout), str(path))
        if set(found["sites"]) != self.specs:
            raise CheckError(f"{path.name} holds {found['sites']}")
        return found

    def kill(self) -> str:
        """Kill a training in its second epoch."""
        words = ["train.py", "--weights", "", "--cfg", str(self.model), *self.list_training_words("first", 3)]
        process = self.start("killed.log", words, plugin=self.act)
        log, end = self.folder / "killed.log", time.monotonic() + TIME_LIMIT
        # Its progress bar begins after the checkpoint of the first epoch was written.
        while not re.search(r"^\s*1/2\s", read_lines(log), re.M):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise CheckError(f"it ended before the second epoch, see {log}")
            time.sleep(0.05)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        found = self.inspect(self.weights / "last.pt")
        return f"{sum(found['sites'].values())} sites in last.pt"

    def check_optimizer(self) -> str:
        """Check the groups of the optimizer in the checkpoint of the killed training."""
        found = self.inspect(self.weights / "last.pt")
        total, decayed = (
            sum(count for count, _ in found["groups"]),
            sum(count for count, decay in found["groups"] if decay),
        )
        if (total, decayed) != (found["parameters"], found["weights"]):
            raise CheckError(
                f"{total} of {found['parameters']} parameters, {decayed} with decay instead of {found['weights']}"
            )
        return f"all {total} parameters, {found['slopes']} slopes without decay"

    def resume(self) -> str:
        """Resume the killed training to its end."""
        killed = self.inspect(self.weights / "last.pt")
        text = self.run("resumed.log", ["train.py", "--resume", str(self.weights / "last.pt")])
        check_transfer(text)
        rows = (self.folder / "first" / self.repository.log).read_text(encoding="utf-8").strip().splitlines()
        if len([row for row in rows if "epoch" not in row]) != 3:
            raise CheckError(f"{self.repository.log} has {len(rows)} lines")
        found = self.inspect(self.weights / "last.pt")
        if found["sites"] != killed["sites"] or found["yaml"] != killed["yaml"]:
            raise CheckError(f"{killed['sites']} became {found['sites']}")
        if not found["moved"]:
            raise CheckError("no learned value moved")
        return describe_movements(text)

    def list_tuning_words(self, name: str, epochs: int) -> list[str]:
        """Return the words of a training from the best checkpoint, without a model YAML."""
        weights = str(self.weights / "best.pt")
        return ["train.py", "--weights", weights, "--cfg", "", *self.list_training_words(name, epochs)]

    def tune(self) -> str:
        """Fine-tune from the best checkpoint, without a model YAML."""
        words = self.list_tuning_words("tuned", 2)
        text = self.run("tuned.log", words)
        transferred = check_transfer(text)
        before, after = (
            self.inspect(self.weights / "best.pt"),
            self.inspect(self.folder / "tuned" / "weights" / "best.pt"),
        )
        if before["sites"] != after["sites"]:
            raise CheckError(f"{before['sites']} became {after['sites']}")
        return f"transferred {transferred}; {describe_movements(text)}"

    def validate(self) -> str:
        """Validate the best checkpoint."""
        options = ["--data", str(self.data), *self.repository.size[:2], "--batch-size", "4", "--device", "cpu"]
        options += ["--weights", str(self.weights / "best.pt"), "--project", str(self.folder), "--name", "val"]
        text = self.run("val.log", [self.repository.val, *options])
        row = re.search(r"^\s+all\s+(\d+)\s+(\d+)\s+(.*)$", text, re.M)
        if row is None:
            raise CheckError("it printed no score")
        return f"{row[1]} images, {row[2]} objects"

    def detect(self) -> str:
        """Run the best checkpoint on images."""
        options = ["--source", str(self.data.parent / "images" / "val"), *self.repository.size[:2], "--device", "cpu"]
        options += ["--weights", str(self.weights / "best.pt"), "--project", str(self.folder), "--name", "detected"]
        self.run("detect.log", ["detect.py", *options])
        return f"{len(list((self.folder / 'detected').glob('*.png')))} images"

    def export(self) -> str:
        """Export the best checkpoint, and compare the files with it."""
        best = self.weights / "best.pt"
        options = ["--weights", str(best), *self.repository.size, *self.repository.export]
        self.run("export.log", ["export.py", *options])
        files = [best.with_name(best.stem + suffix) for suffix in self.repository.exported]
        errors = run_job("compare", str(self.checkout), str(best), *map(str, files))
        if not all(error < 1e-3 for error in errors.values()):
            raise CheckError(f"relative errors {errors}")
        unseen = "" if len(errors) == len(files) else "; ONNX not compared, for want of onnxruntime"
        return ", ".join(f"{name} off by {error:.0e}" for name, error in errors.items()) + unseen

    def train_without_plugin(self) -> str:
        """Check that a training without the plugin stops instead of building the stock network."""
        words = self.list_tuning_words("stock", 1)
        try:
            self.run("stock.log", words, plugin=None)
        except CheckError:
            pass
        else:
            raise CheckError("it trained another network")
        text = (self.folder / "stock.log").read_text(encoding="utf-8", errors="replace")
        if "name 'rtdetr_act' is not defined" not in text:
            raise CheckError(f"it stopped by something else, see {self.folder / 'stock.log'}")
        return "name 'rtdetr_act' is not defined"


def read_lines(log: Path) -> str:
    """Return what was printed, without control sequences, and with a line for each state of a progress bar."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n")


def check_transfer(text: str) -> str:
    """Return what a training says that it took from a checkpoint; raise CheckError if that is not everything."""
    match = re.search(r"Transferred (\d+)/(\d+) items", text)
    if match is None or match[1] != match[2]:
        raise CheckError(match[0] if match else "nothing was transferred")
    return f"{match[1]}/{match[2]}"


def describe_movements(text: str) -> str:
    """Return the first learned value that a training reports, with how far it moved; raise CheckError if none did."""
    moved = re.findall(r"rtdetr-act: (\S+: \w+ \S+ -> \S+), moved by \S+ on average and by (\S+) at most", text)
    if not moved:
        raise CheckError("no learned value is reported as moved")
    return f"{moved[0][0]} (at most {moved[0][1]})"


def draw_data(folder: Path) -> Path:
    """Draw ellipses and rectangles with labels in YOLO's format, and return the path of the data YAML."""
    generator = random.Random(0)
    for split, count in (("train", 24), ("val", 8)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (SIDE, SIDE), tuple(generator.randrange(60) for _ in range(3)))
            rows = list(draw_shapes(ImageDraw.Draw(image), generator))
            image.save(folder / "images" / split / f"{number}.png")
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(rows), encoding="utf-8")
    data = {"train": str(folder / "images/train"), "val": str(folder / "images/val"), "nc": 2}
    (folder / "data.yaml").write_text(yaml.safe_dump(data | {"names": ["ellipse", "rectangle"]}), encoding="utf-8")
    return folder / "data.yaml"


def draw_shapes(draw: ImageDraw.ImageDraw, generator: random.Random) -> Iterator[str]:
    """Draw one to three shapes, and yield their labels."""
    for _ in range(generator.randrange(1, 4)):
        width, height = generator.randrange(14, 30), generator.randrange(14, 30)
        x, y = generator.randrange(SIDE - width), generator.randrange(SIDE - height)
        label = generator.randrange(2)
        colour = tuple(generator.randrange(120, 255) for _ in range(3))
        (draw.rectangle if label else draw.ellipse)((x, y, x + width, y + height), fill=colour)
        centre = (x + width / 2) / SIDE, (y + height / 2) / SIDE
        yield f"{label} {centre[0]:.4f} {centre[1]:.4f} {width / SIDE:.4f} {height / SIDE:.4f}"


def make_environment() -> dict[str, str]:
    """Return the environment of a script: no service, no installation, and a font where YOLOv5 looks for one."""
    import matplotlib

    fonts = Path(os.environ.get("YOLOV5_CONFIG_DIR", Path("runs/repositories-fonts").absolute()))
    fonts.mkdir(parents=True, exist_ok=True)
    if not (fonts / "Arial.ttf").exists():  # which it would fetch
        shutil.copy(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), fonts / "Arial.ttf")
    own = {"YOLOV5_CONFIG_DIR": str(fonts), "WANDB_MODE": "disabled", "YOLO_OFFLINE": "true"}
    return {**os.environ, **own, "YOLO_AUTOINSTALL": "false", "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}


def run_job(*words: str) -> Any:
    """Return what a function of this file returns in a process of its own: all repositories name a folder `models`."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", *words], capture_output=True, text=True, env=make_environment(), check=False
    )
    if done.returncode:
        raise CheckError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def inspect(checkout: str, path: str) -> dict[str, Any]:
    """Return what a checkpoint of YOLOv5 or YOLOv7 holds.

    Returns:
        The number of sites by activation; whether the value of a slope differs from its start; the plan in the YAML;
        the number of parameters, of weights of layers, and of slopes; the groups of the optimizer, as number of
        parameters and weight decay.
    """
    import torch

    from rtdetr_act import patch_model
    from rtdetr_act.activations.placed import get_placement
    from rtdetr_act.analysis.learned import read_quantities
    from rtdetr_act.surgery.parameters import find_scalar_and_channel_parameters
    from rtdetr_act.surgery.plan import Plan
    from rtdetr_act.surgery.sites import iterate_placed_activations

    sys.path.insert(0, checkout)
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    model = checkpoint["model"].float()
    placed = dict(iterate_placed_activations(model))
    sites = Counter(record.spec for module in placed.values() if (record := get_placement(module)))
    weights = sum(p.ndim >= 2 and p.numel() > max(p.shape) for p in model.parameters())  # not slopes, not `implicit`
    learned = read_quantities(model)
    slopes = len(list(find_scalar_and_channel_parameters(model)))
    optimizer = checkpoint.get("optimizer") or {"param_groups": []}
    parameters = len(list(model.parameters()))
    plan = model.yaml["activation"]
    patch_model(model, Plan.from_yaml(plan))
    start = {(each.site, each.name): each.value for each in read_quantities(model)}
    moved = any(
        abs(each.value - start[each.site, each.name]) > 1e-3 for each in learned if each.name in ("alpha", "weight")
    )
    return {
        "sites": dict(sites),
        "moved": moved,
        "yaml": plan,
        "parameters": parameters,
        "weights": weights,
        "slopes": slopes,
        "groups": [(len(group["params"]), group["weight_decay"]) for group in optimizer["param_groups"]],
    }


def compare(checkout: str, path: str, *files: str) -> dict[str, float]:
    """Return the relative error of exported files on a random image, compared with their checkpoint.

    ONNX is left out where there is no onnxruntime.
    """
    import torch

    os.chdir(checkout)
    sys.path.insert(0, checkout)
    import importlib

    model = importlib.import_module("models.experimental").attempt_load(path, "cpu")
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)[0]
    errors = {}
    for file in files:
        if file.endswith(".onnx"):
            if find_spec("onnxruntime") is None:
                continue
            import onnxruntime

            session = onnxruntime.InferenceSession(file)
            result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
        else:
            outputs = torch.jit.load(file)(image)
            result = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        errors[Path(file).name] = float((result - expected).abs().max() / expected.abs().max())
    return errors


_UNTRAINED = {"PResNet": {"pretrained": False}}
_SIZE = {"eval_spatial_size": [MODEL_SIDE, MODEL_SIDE]}
# The folder, the configuration, and what is changed in it: no weights are fetched, and images are small.
MODELS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "rtdetr": (
        (
            "rtdetr_pytorch",
            "configs/rtdetr/rtdetr_r18vd_6x_coco.yml",
            {**_UNTRAINED, "HybridEncoder": _SIZE, "RTDETRTransformer": _SIZE},
        ),
        ("rtdetrv2_pytorch", "configs/rtdetrv2/rtdetrv2_r18vd_120e_coco.yml", {**_UNTRAINED, **_SIZE}),
    ),
    "dfine": (("", "configs/dfine/dfine_hgnetv2_n_coco.yml", {"HGNetv2": {"pretrained": False}, **_SIZE}),),
}


def check_model(name: str, checkout: Path, configuration: str, changes: dict[str, Any], table: Table) -> None:
    """Check a model that is built from a configuration."""

    def check() -> str:
        found = run_job("take_steps", str(checkout), configuration, json.dumps(changes))
        if not found["moved"] or found["missing"] or found["difference"]:
            raise CheckError(str(found))
        return f"{found['sites']} sites, loss {found['first']:.1f} -> {found['last']:.1f}, {found['moved']:.0%} moved"

    table.run(name, f"arelu: {STEPS} steps, saved and loaded", check)


def take_steps(checkout: str, configuration: str, changes: str) -> dict[str, Any]:
    """Train a patched model of RT-DETR or D-FINE for some steps, and load its weights into another one.

    Returns:
        The number of sites; the first and last loss; the share of slopes that moved; the number of slopes
        that the optimizer lacks or decays; the largest difference of the outputs of the loaded model.
    """
    import torch

    from rtdetr_act import add_to_optimizer, patch_model
    from rtdetr_act.surgery.parameters import find_scalar_and_channel_parameters

    os.chdir(checkout)
    sys.path.insert(0, checkout)
    supply_datapoints()
    core = __import__("src.core", fromlist=["YAMLConfig"])
    torch.manual_seed(0)

    def build() -> tuple[Any, int]:
        cfg = core.YAMLConfig(configuration, **json.loads(changes))
        return cfg, len(patch_model(cfg.model, "arelu"))  # before anything asks for cfg.optimizer

    cfg, sites = build()
    model, optimizer, criterion = cfg.model.train(), cfg.optimizer, cfg.criterion.train()
    add_to_optimizer(model, optimizer)
    slopes = list(find_scalar_and_channel_parameters(model))
    start = [slope.detach().clone() for slope in slopes]
    takes_steps = any(each.kind is each.VAR_KEYWORD for each in signature(criterion.forward).parameters.values())
    images = torch.rand(2, 3, MODEL_SIDE, MODEL_SIDE)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.3]])
    targets = [{"labels": torch.tensor([0, 1]), "boxes": boxes} for _ in range(2)]
    losses = []
    for step in range(STEPS):
        place = {"epoch": 0, "step": step, "global_step": step, "epoch_step": STEPS} if takes_steps else {}
        loss = sum(criterion(model(images, targets), targets, **place).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    groups = [group for group in optimizer.param_groups if not group["weight_decay"]]
    inside = {id(parameter) for group in groups for parameter in group["params"]}
    other = build()[0].model
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        outputs = [each.eval()(images)["pred_boxes"] for each in (model, other)]
    return {
        "sites": sites,
        "first": losses[0],
        "last": losses[-1],
        "moved": sum(not torch.equal(a, b) for a, b in zip(slopes, start, strict=True)) / len(slopes),
        "missing": sum(id(slope) not in inside for slope in slopes),
        "difference": (outputs[0] - outputs[1]).abs().max().item(),
    }


def supply_datapoints() -> None:
    """Supply what the first RT-DETR imports from torchvision 0.15, under the names of later releases."""
    import torchvision

    try:
        from torchvision import datapoints  # noqa: F401
    except ImportError:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        supplied: Any = ModuleType("torchvision.datapoints")
        vars(supplied).update(vars(tv_tensors), BoundingBox=tv_tensors.BoundingBoxes)
        torchvision.datapoints = sys.modules[supplied.__name__] = supplied
        for old, new in (
            ("ToImageTensor", "ToImage"),
            ("ConvertDtype", "ToDtype"),
            ("SanitizeBoundingBox", "SanitizeBoundingBoxes"),
        ):
            vars(v2).setdefault(old, getattr(v2, new))


JOBS: dict[str, Callable[..., Any]] = {"inspect": inspect, "compare": compare, "take_steps": take_steps}


if __name__ == "__main__":
    main()
