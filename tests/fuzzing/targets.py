"""What the inputs of each kind are given to, as the package itself would.

Imported once in the process that those of the examples are forked from, so all that they need is imported here.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import tiny
import torch
import torchvision  # noqa: F401
import ultralytics.cfg
import ultralytics.engine.exporter  # noqa: F401
import ultralytics.engine.trainer  # noqa: F401
import ultralytics.utils
import yaml
from ultralytics.nn import tasks
from ultralytics.utils import USER_CONFIG_DIR

import rtdetr_act.analysis.diagnosis  # noqa: F401
import rtdetr_act.integrations.ultralytics.latency  # noqa: F401
import rtdetr_act.surgery.match  # noqa: F401
from fuzzing.watch import Refusal, Target, captured
from rtdetr_act import create, patch_model, unpatch_model
from rtdetr_act.errors import RtdetrActError
from rtdetr_act.integrations.ultralytics.checkpoints import check_classes
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.spec import ActSpec
from rtdetr_act.study.grid import expand_study, make_study, read_study_file
from rtdetr_act.surgery.model_plan import split_model_yaml
from rtdetr_act.surgery.plan import Plan

DEFAULTS = {"model": "rtdetr-n.yaml", "data": "shapes"}
_ERROR = re.compile(r"^error: (.*)", re.MULTILINE)


def read_spec(text: str) -> None:
    """Parse and build an activation."""
    spec = ActSpec.parse(text)
    assert ActSpec.parse(str(spec)) == spec, f"{spec} reads back as another"
    create(text, channels=8)


def read_plan(text: str) -> None:
    """Parse a plan and put it into a network, which a refused one leaves as it was."""
    plan = Plan.parse(text)
    assert Plan.from_yaml(yaml.safe_load(yaml.safe_dump(plan.to_yaml()))) == plan, f"{plan} reads back as another"
    assert Plan.from_yaml(plan.to_model_yaml()) == plan, f"{plan} reads back as another from a model YAML"
    assert Plan.parse(str(plan)) == plan, f"{plan} reads back as another from its text"
    network = _network()
    before = list(network.modules())
    try:
        patch_model(network, text)
    except RtdetrActError:
        assert list(network.modules()) == before, "a refused plan changed the network"
        raise
    unpatch_model(network)
    assert list(network.modules()) == before, "the network is not what it was after unpatch_model"


@functools.cache
def _network() -> Any:
    torch.manual_seed(0)
    return tasks.DetectionModel(tiny.yolo(), verbose=False)


def read_activation(content: bytes) -> None:
    """Read YAML text as the value of a model YAML's `activation:` key."""
    try:
        value = yaml.safe_load(content)
    except Exception as error:  # PyYAML's own, which readers of files are tried with elsewhere
        raise Refusal("no YAML") from error
    _, plan = split_model_yaml({**tiny.yolo(), "activation": value})
    # One without rules changes nothing, and is not written.
    for stored in (plan.to_yaml(), plan.to_model_yaml()):
        assert not plan or Plan.from_yaml(stored) == plan, f"{plan} reads back as another"
    plan.schedule_ends()
    plan.without_finished_schedules()


def read_model(_: bytes) -> None:
    """Load the model YAML in the working folder as the commands do that only look."""
    with no_downloads():
        load_model("model.yaml")


def read_study(_: bytes) -> None:
    """Read the study file in the working folder, as far as the names of its runs."""
    for row in expand_study(make_study(read_study_file(Path("study.yaml")), defaults=DEFAULTS)):
        assert row.name.isprintable() and len(row.name.encode()) < 240


def load_checkpoint(_: bytes) -> None:
    """Load the checkpoint in the working folder, a valid one but for damage."""
    load_model("model.pt")


def load_pickle(_: bytes) -> None:
    """Look into a checkpoint that asks for code to be run, then load it as ULTRALYTICS_SAFE_LOAD=1 does."""
    check_classes("model.pt")
    if not hasattr(tasks, "_SafeLoad"):
        raise Refusal("this Ultralytics has no restricted loading")
    tasks.SAFE_LOAD = True
    try:
        load_model("model.pt")
    finally:
        tasks.SAFE_LOAD = False


def run_command_line(words: list[str]) -> None:
    """Run a command in the working folder, whose mistakes have exit code 2 and a sentence."""
    from rtdetr_act.cli.main import main

    sys.argv = ["rtdetr-act", *words]
    # Where Ultralytics puts results, which it looks up on import: in the folder that a command is called in. Releases
    # take it from different places; in the settings of this process only, not in their file.
    ultralytics.utils.RUNS_DIR = ultralytics.cfg.RUNS_DIR = Path("runs")
    dict.__setitem__(ultralytics.utils.SETTINGS, "runs_dir", "runs")
    code: object = 0
    with captured() as (out, err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    said = f"{out.getvalue()}\n{err.getvalue()}"
    assert "Traceback (most recent call last)" not in said, said[-3000:]
    assert code in (0, 1, 2, 130), f"exit code {code}: {said[-1000:]}"
    if code:
        sentences = _ERROR.findall(err.getvalue())
        said_why = sentences or any(word in said for word in ("verdict: ", "Usage: ", "─ Error ─"))
        assert said_why, f"exit code {code} without a word: {said[-1000:]}"
        assert len(sentences) <= 1, f"several errors: {sentences}"
    if code == 2:  # a mistake, where 1 is a training that gave no result and keeps its records
        raise Refusal(sentences[0] if sentences else "usage")


SPECS = Target("spec", read_spec)
PLANS = Target("plan text", read_plan)
ACTIVATIONS = Target("plan as YAML", read_activation)
STUDIES = Target("study file", read_study, file="study.yaml")
# A model may be as large as its YAML says.
MODELS = Target("model YAML", read_model, file="model.yaml", seconds=5, memory=1 << 30)
CHECKPOINTS = Target("checkpoint", load_checkpoint, file="model.pt", memory=512 << 20)
PICKLES = Target("hostile pickle", load_pickle, file="model.pt", memory=512 << 20)


def command_lines(template: Path) -> Target:
    """Return the target of command lines, each of which runs in a copy of a folder; a training may take its time."""
    return Target(
        "command line", run_command_line, template=template, fresh=True, writes=True, seconds=30, memory=2 << 30
    )


def make_template(folder: Path) -> Path:
    """Write a folder with what command lines name, and beside it a data set of eight images; return the folder."""
    from records import make_folder

    tiny.draw_images(folder / "images", {"detect": ["{cls} {x} {y} 0.375 0.375"]})
    data = {"path": str(folder / "images" / "detect"), "train": "images", "val": "images", "names": ["a", "b"]}
    work = folder / "template"
    tiny.write_yaml(work / "data.yaml", data)
    tiny.write_yaml(work / "tiny.yaml", tiny.yolo())
    tiny.write_yaml(work / "mixed.yaml", tiny.with_rows(tiny.RTDETR, {3: "prelu"}, activation="arelu"))
    tiny.write_yaml(work / "code.yaml", {**data, "path": "gone", "download": "open('planted_by_the_fuzzer', 'w')"})
    tiny.write_yaml(work / "study.yaml", {"activations": ["stock", "arelu"], "model": "tiny.yaml", "data": "data.yaml"})
    (work / "broken.yaml").write_text("backbone: [\n")
    (work / "text.pt").write_text("hello\n")
    network = tasks.DetectionModel(tiny.yolo(), verbose=False)
    patch_model(network, "arelu")
    for name, source in (("best.pt", work / "data.yaml"), ("lost.pt", folder / "gone" / "data.yaml")):
        arguments = {"task": "detect", "data": str(source), "imgsz": 64}
        saved = {"model": network, "ema": None, "train_args": arguments, "epoch": -1, "optimizer": None}
        torch.save(saved, work / name)
    make_folder(work / "study")
    (work / "empty").mkdir()
    # Ultralytics fetches the font of its pictures where there is none of that name.
    shutil.copy(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", USER_CONFIG_DIR / "Arial.ttf")
    return work
