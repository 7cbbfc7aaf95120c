"""A private home for Ultralytics' settings and caches, tiny data, and tiny runs that many tests look into."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
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
# Ignored, and so by all processes that start from here, where the tests run in the background of a shell.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests start a dozen interpreters. Where bytecode is not written, each compiles torch and Ultralytics again, which
# is 7 s of the 13 s that a first training takes; so it is written, to a place that goes away.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(_HOME / "bytecode")

import tiny  # noqa: E402


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


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Write the data sets."""
    folder = tmp_path_factory.mktemp("data")
    corners = "{cls} {a} {c} {b} {c} {b} {d} {a} {d}"
    box = "{cls} {x} {y} 0.375 0.375"
    tiny.draw_images(folder, {"detect": [corners], "pose": [box + " {a} {c} 2 {b} {c} 2 {x} {y} 2"]})
    common = {"train": "images", "val": "images", "names": ["a", "b"]}
    files = [
        tiny.write_yaml(folder / f"{name}.yaml", {"path": str(folder / where), **common, **more})
        for name, where, more in (
            ("detect", "detect", {}),
            ("other", "detect", {}),
            ("pose", "pose", {"kpt_shape": [3, 3], "flip_idx": [1, 0, 2]}),
        )
    ]
    return Data(*files, folder / "classify", folder / "detect" / "images" / "0.png")


@pytest.fixture(scope="session")
def stock_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny RT-DETR as Ultralytics knows it."""
    return tiny.write_yaml(tmp_path_factory.mktemp("models") / "stock.yaml", tiny.RTDETR)


@pytest.fixture(scope="session")
def rows_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny RT-DETR with `activation: arelu` and two rows that name their own."""
    model_yaml = tiny.with_rows(tiny.RTDETR, {3: "prelu", 14: "gelu"}, activation="arelu")
    return tiny.write_yaml(tmp_path_factory.mktemp("models") / "rows.yaml", model_yaml)


@pytest.fixture
def own_zoo() -> Iterator[None]:
    """Take back what a test registers."""
    from rtdetr_act.activations import registry

    registry.names()
    tables = (registry._entries, registry._names_by_key, registry._by_class)
    copies = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, copies, strict=True):
        table.clear()
        table.update(before)


@dataclass(frozen=True)
class Run:
    """A finished run: its checkpoint, and the weights outside the activations that its first step started from."""

    pt: Path
    start: dict
    model: object


def train_and_watch(model: object, data: Path, folder: Path, **more: object) -> Run:
    """Train one epoch and keep what the trained network was before its first step."""
    start: dict = {}
    model.add_callback("on_train_start", lambda trainer: start.update(tiny.outside(trainer.model)))
    return Run(tiny.train(model, data, folder, **more), start, model)


@pytest.fixture(scope="session")
def stock_run(data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train the stock model."""
    from ultralytics import RTDETR

    return train_and_watch(RTDETR(str(stock_yaml)), data.detect, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def rows_run(data: Data, rows_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train from a YAML file with fifth items and `activation:`."""
    from ultralytics import RTDETR

    import rtdetr_act  # noqa: F401

    return train_and_watch(RTDETR(str(rows_yaml)), data.detect, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def patched_run(data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a stock YAML model patched in memory."""
    from ultralytics import RTDETR

    from rtdetr_act import patch_model

    model = RTDETR(str(stock_yaml))
    patch_model(model, "arelu")
    return train_and_watch(model, data.detect, tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="session")
def mish_run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a YOLO11n patched in memory with an activation of torch, whose checkpoint names no class of ours."""
    from ultralytics import YOLO

    from rtdetr_act import patch_model

    model = YOLO("yolo11n.yaml")
    patch_model(model, "mish")
    return train_and_watch(model, data.detect, tmp_path_factory.mktemp("mish"))


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
def resumed(data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Kill a run of three epochs after its first, from outside, and resume it here."""
    import copy
    import json
    import subprocess
    import time

    import torch
    from ultralytics import RTDETR

    folder = tmp_path_factory.mktemp("resumed")
    arguments = tiny.train_args(data.detect, folder, epochs=3, warmup_epochs=1)
    (folder / "args.json").write_text(json.dumps(arguments))
    (folder / "script.py").write_text(_KILLED)
    note = folder / "note.json"
    command = [sys.executable, "script.py", "args.json", str(stock_yaml), str(note)]
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
    checkpoint = torch.load(last, map_location="cpu", weights_only=False)
    seen: dict = {}

    def note_start(trainer):  # type: ignore[no-untyped-def]
        seen["state"] = copy.deepcopy(trainer.optimizer.state_dict()["state"])
        seen["groups"] = [{**g, "count": len(g["params"]), "params": None} for g in trainer.optimizer.param_groups]
        seen["start_epoch"] = trainer.start_epoch

    model = RTDETR(str(last))
    model.add_callback("on_train_start", note_start)
    model.train(resume=True)
    return Resumed(json.loads(note.read_text()), checkpoint, folder=folder, **seen)
