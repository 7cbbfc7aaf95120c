"""A private home for Ultralytics' settings and caches, tiny data, and tiny runs that many tests look into."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# No deadlines on shared machines; the same examples every time where a failure must be one of the change under test.
settings.register_profile("tests", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("tests")

# Before anything imports Ultralytics, which reads them on import.
_HOME = Path(tempfile.mkdtemp(prefix="rtdetr_act_tests_"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(YOLO_OFFLINE="True", YOLO_CONFIG_DIR=str(_HOME / "config"), XDG_CACHE_HOME=str(_HOME / "cache"))
# The networks are too small to share out: two processes of tests with a thread for each core only wait for each other.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# OpenVINO reports every import and export to its makers, except from the CI of Azure, which this names. Without a
# network each report forks the process and waits 3 s. Not "true", for which Hypothesis would take its settings for CI.
os.environ["TF_BUILD"] = "1"
for _name in ("config", "cache"):
    (_HOME / _name).mkdir()
# The font of Ultralytics' pictures, which each training otherwise asks GitHub for.
(_HOME / "config" / "Ultralytics").mkdir()
_FONTS = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"  # type: ignore[union-attr, arg-type]
shutil.copy(_FONTS / "DejaVuSans.ttf", _HOME / "config" / "Ultralytics" / "Arial.ttf")
# Ignored, and so by all processes that start from here, where the tests run in the background of a shell.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests start a dozen interpreters. Where bytecode is not written, each compiles torch and Ultralytics again, which
# is 7 s of the 13 s that a first training takes, and two thirds of what each run of the tests starts with. So it is
# written, to a place that `make clean` removes.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(
        Path(__file__).parents[1] / ".pytest_cache" / "bytecode"
    )

import kinds  # noqa: E402
import tiny  # noqa: E402

kinds.watch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its kind, and begin with the files that take long, so that the workers end together."""
    for item in items:
        kinds.settle(item)
    slow = {item.path for item in items if not item.get_closest_marker("unit")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold a test to its kind, its fixtures included."""
    with kinds.held_to(item):
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Keep what is alive by now out of garbage collections: a training and a benchmark ask for one again and again."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Data:
    """Data sets of eight images: two that differ in name only, and one for each task that needs its own labels."""

    detect: Path
    other: Path
    pose: Path
    classify: Path
    image: Path

    def of(self, task: str) -> Path:
        """Return the data set for a task; the four-cornered labels serve detect, segment and obb."""
        return {"pose": self.pose, "classify": self.classify}.get(task, self.detect)


def shared(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """Return a folder that the first process of tests to ask for it fills, while the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    # One lock for all folders: two trainings on the same data would write its label caches at once.
    with FileLock(folder.parent / ".lock"):
        if not (folder / "filled").exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that failed
            folder.mkdir()
            fill(folder)
            (folder / "filled").touch()
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Write the data sets."""
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path) -> Data:
    """Draw the images and labels of all data sets into a folder that holds none yet."""
    corners = "{cls} {a} {c} {b} {c} {b} {d} {a} {d}"
    box = "{cls} {x} {y} 0.375 0.375"
    tiny.draw_images(folder, {"detect": [corners], "pose": [box + " {a} {c} 2 {b} {c} 2 {x} {y} 2"]})
    common = {"train": "images", "val": "images", "names": ["a", "b"]}
    for name, where, more in (
        ("detect", "detect", {}),
        ("other", "detect", {}),
        ("pose", "pose", {"kpt_shape": [3, 3], "flip_idx": [1, 0, 2]}),
    ):
        tiny.write_yaml(folder / f"{name}.yaml", {"path": str(folder / where), **common, **more})
    return data_in(folder)


def data_in(folder: Path) -> Data:
    """Return the paths of the data sets in a folder."""
    files = [folder / f"{name}.yaml" for name in ("detect", "other", "pose")]
    return Data(*files, folder / "classify", folder / "detect" / "images" / "0.png")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Write data sets for the shared runs alone, so that all of them name the same."""
    return data_in(shared(tmp_path_factory, "data", write_data))


@pytest.fixture(scope="session")
def stock_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny RT-DETR as Ultralytics knows it."""
    folder = shared(tmp_path_factory, "stock_yaml", lambda folder: tiny.write_yaml(folder / "stock.yaml", tiny.RTDETR))
    return folder / "stock.yaml"


@pytest.fixture(scope="session")
def rows_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny RT-DETR with `activation: arelu` and two rows that name their own."""
    model_yaml = tiny.with_rows(tiny.RTDETR, {3: "prelu", 14: "gelu"}, activation="arelu")
    folder = shared(tmp_path_factory, "rows_yaml", lambda folder: tiny.write_yaml(folder / "rows.yaml", model_yaml))
    return folder / "rows.yaml"


@pytest.fixture
def own_zoo() -> Iterator[None]:
    """Take back what a test registers, and which names of ours it took over."""
    from rtdetr_act.activations import registry

    registry.names()
    tables = (registry._entries, registry._names_by_key, registry._by_class, registry._built_in)
    copies = [table.copy() for table in tables]
    yield
    os.environ.pop(registry.NOTIFIED, None)
    for table, before in zip(tables, copies, strict=True):
        table.clear()
        table.update(before)


@dataclass(frozen=True)
class Run:
    """A finished run: its checkpoint, and the weights outside the activations that its first step started from."""

    pt: Path
    start: dict
    model: object  # the network that train() left in the object it was called on


def train_and_watch(model: object, data: Path, folder: Path, **more: object) -> Run:
    """Train one epoch and keep what the trained network was before its first step."""
    start: dict = {}
    model.add_callback("on_train_start", lambda trainer: start.update(tiny.outside(trainer.model)))
    return Run(tiny.train(model, data, folder, **more), start, model.model)


def shared_run(factory: pytest.TempPathFactory, name: str, data: Path, build: Callable[[], object]) -> Run:
    """Train a model once for all processes of tests."""
    import torch

    def fill(folder: Path) -> None:
        run = train_and_watch(build(), data, folder)
        torch.save({"start": run.start, "model": run.model}, folder / "watched.pt")

    folder = shared(factory, name, fill)
    return Run(folder / "run" / "weights" / "last.pt", **torch.load(folder / "watched.pt", weights_only=False))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shared_data: Data) -> Path:
    """Train the tiny YOLO until it finds the squares."""
    import torch
    from ultralytics import YOLO

    def fill(folder: Path) -> None:
        torch.manual_seed(0)
        model = YOLO(str(tiny.write_yaml(folder / "tiny.yaml", tiny.yolo())))
        settings = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0, "hsv_v": 0.0, "erasing": 0.0}
        tiny.train(model, shared_data.detect, folder, epochs=40, **settings)

    return shared(tmp_path_factory, "trained", fill) / "run" / "weights" / "best.pt"


@pytest.fixture(scope="session")
def stock_run(shared_data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train the stock model."""
    from ultralytics import RTDETR

    return shared_run(tmp_path_factory, "stock", shared_data.detect, lambda: RTDETR(str(stock_yaml)))


@pytest.fixture(scope="session")
def rows_run(shared_data: Data, rows_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train from a YAML file with fifth items and `activation:`."""
    from ultralytics import RTDETR

    import rtdetr_act  # noqa: F401

    return shared_run(tmp_path_factory, "rows", shared_data.detect, lambda: RTDETR(str(rows_yaml)))


@pytest.fixture(scope="session")
def patched_run(shared_data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a stock YAML model patched in memory."""
    from ultralytics import RTDETR

    return shared_run(
        tmp_path_factory, "patched", shared_data.detect, lambda: patched(RTDETR(str(stock_yaml)), "arelu")
    )


@pytest.fixture(scope="session")
def mish_run(shared_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a YOLO11n patched in memory with an activation of torch, whose checkpoint names no class of ours."""
    from ultralytics import YOLO

    return shared_run(tmp_path_factory, "mish", shared_data.detect, lambda: patched(YOLO("yolo11n.yaml"), "mish"))


def patched(model: object, activation: str) -> object:
    """Return a model after patching it in place."""
    from rtdetr_act import patch_model

    patch_model(model, activation)
    return model


@dataclass(frozen=True)
class Resumed:
    """A run killed after the first of three epochs, and what the resumed trainer had before its first step."""

    killed: dict  # what the killed process wrote down: its groups and the learning rates after each batch
    checkpoint: dict  # last.pt as the kill left it
    groups: list[dict]
    state: dict
    start_epoch: int
    folder: Path


_KILLED = """
import json, sys, time
from pathlib import Path
from ultralytics import RTDETR
from rtdetr_act import patch_model

arguments, model_yaml = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
seen = {"groups": [], "lr": []}

def note_groups(trainer):
    seen["groups"] = [[len(g["params"]), g["weight_decay"], g["initial_lr"]] for g in trainer.optimizer.param_groups]

def note_rates(trainer):
    seen["lr"].append([group["lr"] for group in trainer.optimizer.param_groups])

def wait_for_the_kill(trainer):
    Path(sys.argv[3]).write_text(json.dumps(seen))
    time.sleep(600)

model = RTDETR(model_yaml)
patch_model(model, "arelu", act_lr=10)
model.add_callback("on_train_start", note_groups)
model.add_callback("on_train_batch_end", note_rates)
model.add_callback("on_model_save", wait_for_the_kill)
model.train(**arguments)
"""


@pytest.fixture(scope="session")
def resumed(shared_data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Kill a run of three epochs after its first, from outside, and resume it here."""
    import torch

    folder = shared(tmp_path_factory, "resumed", lambda folder: kill_and_resume(shared_data.detect, stock_yaml, folder))
    checkpoint = torch.load(folder / "killed.pt", map_location="cpu", weights_only=False)
    return Resumed(
        checkpoint=checkpoint,
        folder=folder,
        **torch.load(folder / "watched.pt", map_location="cpu", weights_only=False),
    )


def kill_and_resume(data: Path, model_yaml: Path, folder: Path) -> None:
    """Leave in the folder the run, its checkpoint as the kill left it, and what both its processes had."""
    import copy
    import json
    import subprocess
    import time

    import torch
    from ultralytics import RTDETR

    arguments = tiny.train_args(data, folder, epochs=3, warmup_epochs=1)
    (folder / "args.json").write_text(json.dumps(arguments))
    (folder / "script.py").write_text(_KILLED)
    note = folder / "note.json"
    command = [sys.executable, "script.py", "args.json", str(model_yaml), str(note)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not note.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
        process.kill()
        code = process.wait()
    assert code == -9, (folder / "log.txt").read_text()

    last = folder / "run" / "weights" / "last.pt"
    shutil.copy(last, folder / "killed.pt")
    seen: dict = {"killed": json.loads(note.read_text())}

    def note_start(trainer):  # type: ignore[no-untyped-def]
        seen["state"] = copy.deepcopy(trainer.optimizer.state_dict()["state"])
        seen["groups"] = [{**g, "count": len(g["params"]), "params": None} for g in trainer.optimizer.param_groups]
        seen["start_epoch"] = trainer.start_epoch

    model = RTDETR(str(last))
    model.add_callback("on_train_start", note_start)
    model.train(resume=True)
    torch.save(seen, folder / "watched.pt")
