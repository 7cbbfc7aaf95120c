"""Run every Python block and every command of README.md and of the pages in docs/, shrunk until each takes seconds.

    python scripts/run_docs.py [--only docs/swap.md README.md] [--output runs/docs]

A page has a folder of its own, with the files that its blocks name: a tiny RT-DETR under the name of each model that is
trained, checkpoints of it, and eight images under the name of each data set. The tables below say what a command is run
as. What runs on several pages runs once. Prints each block and command with its time, how many ran of how many, and why
the others did not; exits with 1 where one fails. About 25 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
os.environ.update(YOLO_OFFLINE="True", YOLO_VERBOSE="False", OMP_NUM_THREADS="1", TF_BUILD="1", PYTHONWARNINGS="ignore")
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="docs-settings-")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from activation_pages import write_pages  # noqa: E402
from docs_blocks import list_pages, read_blocks, read_commands  # noqa: E402

# What is written -> what is run, in commands and in Python.
SHRINK = {
    r"\bepochs=\d+": "epochs=1",
    r"\bimgsz=\d+": "imgsz=64",
    r"\bbatch=\d+": "batch=4",
    r"\bseeds=\d+": "seeds=2",
    r"\baverage_last=\d+": "average_last=1",
    r'"epochs": \d+': '"epochs": 1, "imgsz": 64, "batch": 4, "workers": 0, "plots": False',
}
LAYERS = ("@22-27", "@13")  # in commands, where the tiny RT-DETR of 14 layers stands in for RT-DETR-L
# By command: further arguments, where they are not given.
TRAINING = "imgsz=64 batch=4 nbs=4 workers=0 device=cpu amp=False plots=False deterministic=False"
FURTHER = {
    "train": f"epochs=1 {TRAINING}",
    "resume": "workers=0 device=cpu",
    "study": TRAINING,
    "search": f"budget=30 seeds=1 {TRAINING}",
    "val": "imgsz=64 batch=4 workers=0 device=cpu",
    "predict": "imgsz=64 device=cpu",
    "export": "imgsz=64",
    "bench": "imgsz=64 turns=2",
    "diagnose": "imgsz=64 images=4",
    "maps": "imgsz=64",
    "compare": "resamples=100",
}
# Commands that are run with further changes: a part of the command -> what is done to it.
CHANGED = {
    "train act=arelu": (r"$", " fraction=0.02"),  # the embedded data set has 400 images
    "search act=": (r"$", " cpus=1"),
    "learned best": (r"best\.pt", "arelu.pt"),
    "fold best": (r"best\.pt", "arelu.pt"),
    "study docs/evidence/": (r"$", " act=stock seeds=1 epochs=1 average_last=1"),
}
# Models and data that pages name; each is the tiny one. yolo11n and rtdetr-n are small as they are.
MODELS = ("rtdetr-l.yaml",)
DATA = ("my.yaml", "bccd.yaml", "coco8.yaml")
STOCK = ("best.pt", "rtdetr-l.pt", "runs/detect/rtdetr-l-stock/weights/best.pt", "runs/stock/s0/weights/best.pt")
ARELU = (
    "arelu.pt",
    "a/best.pt",
    "b/best.pt",
    "a/weights/best.pt",
    "b/weights/best.pt",
    "runs/detect/rtdetr-n-arelu/weights/best.pt",
    "runs/detect/best-arelu/weights/best.pt",
    "runs/detect/best-relu/weights/best.pt",
    "runs/arelu/s0/weights/best.pt",
)
TRUTH = "instances_val.json"
DETECTIONS = ("a.json", "b.json", *(f"{name}-s{seed}.json" for name in ("stock", "arelu") for seed in range(3)))
INTERRUPTED = "runs/detect/rtdetr-l-arelu/weights/last.pt"
# What is not run here -> why.
LEFT_OUT = {
    r"^make ": "a target of make, which exists",
    r"^pip install": "the environment is made already; the extra exists",
    r"^python scripts/": "takes minutes to hours; the script exists",
    r"^rtdetr-act exec": "`make repositories` runs scripts of the checkouts that it is given",
    r"shilu": "it takes a package that no test installs, torch-activation",
    r"^rtdetr-act plan": "it takes a pilot study that has learned something; tests/test_study_bootstrap.py has one",
    r"engine=ray": "`make test-ray` runs studies on Ray, in an environment of its own",
}
BY_TESTS = {"CONTRIBUTING.md": "tests/test_contributing.py runs it"}
BY_ZOO = "scripts/train_zoo.py trains every activation; the options are checked by the tests"


def prepare_files(folder: Path) -> None:
    """Write what pages name into a folder: data, models, trained checkpoints, an interrupted training."""
    from ultralytics import RTDETR, YOLO

    from rtdetr_act import patch_model

    folder.mkdir(parents=True)
    corners = "{cls} {a} {c} {b} {c} {b} {d} {a} {d}"
    tiny.draw_images(folder / "images8", {"detect": [corners]})
    data = {
        "path": str(folder / "images8" / "detect"),
        "train": "images",
        "val": "images",
        "test": "images",
        "names": ["a", "b"],
    }
    for name in DATA:
        tiny.write_yaml(folder / name, data)
    shutil.copy(folder / "images8" / "detect" / "images" / "0.png", folder / "image.jpg")
    write_detections(folder)
    shutil.copytree(ROOT / "docs" / "evidence", folder / "docs" / "evidence")
    for name in MODELS:
        tiny.write_yaml(folder / name, tiny.RTDETR)
    tiny.write_yaml(folder / "rtdetr-l-arelu.yaml", {**tiny.RTDETR, "activation": "arelu"})
    (study,) = [block for block in read_blocks(ROOT / "docs" / "compare.md", "yaml") if "study.yaml" in block.text]
    (folder / "study.yaml").write_text(shrink_study(study.text), encoding="utf-8")

    def train(names: tuple[str, ...], activation: str) -> None:
        model = RTDETR(str(folder / "rtdetr-l.yaml"))
        if activation:
            patch_model(model, activation)
        trained = tiny.train(model, folder / "my.yaml", folder / "made" / (activation or "stock")).parent / "best.pt"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trained, folder / name)

    train(STOCK, "")
    train(ARELU, "arelu")
    YOLO("yolo11n.yaml").save(str(folder / "yolo11n.pt"))
    code = """
import os, sys, tiny
from pathlib import Path
from ultralytics import RTDETR
from rtdetr_act import patch_model
model = RTDETR("rtdetr-l.yaml")
patch_model(model, "arelu")
model.add_callback("on_model_save", lambda trainer: os._exit(0))
settings = tiny.train_args(Path("my.yaml").absolute(), Path("runs/detect").absolute(), epochs=2)
model.train(**settings | {"name": "rtdetr-l-arelu"})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ["PYTHONPATH"]])}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=True)
    assert (folder / INTERRUPTED).is_file()


def write_detections(folder: Path) -> None:
    """Write a ground truth in COCO's format, and detections that are off by some pixels."""
    boxes = [[10 * column, 20 * row, 30, 40] for row in range(4) for column in range(5)]
    truth = {
        "images": [{"id": image} for image in range(10)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": index, "image_id": index % 10, "category_id": 1, "bbox": box} for index, box in enumerate(boxes)
        ],
    }
    (folder / TRUTH).write_text(json.dumps(truth), encoding="utf-8")
    for number, name in enumerate(DETECTIONS):
        found = [
            {"image_id": index % 10, "category_id": 1, "bbox": [x + number, *rest], "score": 1 / (1 + index)}
            for index, (x, *rest) in enumerate(boxes)
        ]
        (folder / name).write_text(json.dumps(found), encoding="utf-8")


def shrink(text: str) -> str:
    """Return a command or Python code with the values of `SHRINK`."""
    for pattern, value in SHRINK.items():
        text = re.sub(pattern, value, text)
    return text


def shrink_command(text: str) -> str:
    """Return a command as it is run, one of another program as it stands."""
    if not text.startswith("rtdetr-act"):
        return text
    command = text.split()[1]
    for part, (pattern, value) in CHANGED.items():
        if part in text:
            text = re.sub(pattern, value, text)
    text = shrink(text).replace(*LAYERS)
    given = {word.partition("=")[0] for word in text.split()}
    return " ".join([text, *(word for word in FURTHER.get(command, "").split() if word.partition("=")[0] not in given)])


def shrink_python(text: str) -> str:
    """Return the Python code of a block as it is run: trainings of one epoch."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in read_arguments(TRAINING).items())
    return re.sub(r"\.train\((?=[^)])", f".train({arguments}, ", shrink(text))


def shrink_study(text: str) -> str:
    """Return a study file as it is run."""
    study = yaml.safe_load(text)
    study.update({key: value for key, value in (("epochs", 1), ("seeds", 2)) if key in study})
    return yaml.safe_dump({**study, **read_arguments(TRAINING)})


def read_arguments(text: str) -> dict[str, object]:
    """Return the values of some `key=value` words by their keys."""
    return {key: yaml.safe_load(value) for key, value in (word.split("=") for word in text.split())}


def find_reason(command: str) -> str:
    """Return why a command is not run, or "" if it is."""
    return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, command)), "")


def run_python(page: Path, folder: Path) -> None:
    """Run the Python blocks of a page, one after the other in one process; models built by name are the real ones."""
    code = f"""
import sys
sys.path[:0] = {[str(ROOT / "scripts"), str(ROOT / "tests")]!r}
from pathlib import Path
from docs_blocks import Session, read_blocks
from run_docs import shrink_python
session = Session()
for block in read_blocks(Path({str(page)!r}), "python"):
    session.run(block, shrink_python(block.text))
"""
    for name in MODELS:
        (folder / name).rename(folder / f"{name}.tiny")
    try:
        call([sys.executable, "-c", code], folder)
    finally:
        for name in MODELS:
            (folder / f"{name}.tiny").rename(folder / name)


def run_command(text: str, folder: Path) -> None:
    """Run a command as a shell does."""
    call(re.sub(r"^rtdetr-act", lambda _: f'"{sys.executable}" -m rtdetr_act', text), folder)


def call(command: str | list[str], folder: Path) -> None:
    """Run a process in a folder; raise RuntimeError with the end of what it said where it fails."""
    done = subprocess.run(
        command, cwd=folder, shell=isinstance(command, str), capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError("\n".join([*done.stdout.splitlines()[-5:], *done.stderr.splitlines()[-25:]]))


class Record:
    """What ran, what failed, and what was left out."""

    def __init__(self) -> None:
        self.ran = 0
        self.failed: list[str] = []
        self.left: Counter[str] = Counter()
        self._done: dict[str, bool] = {}  # what ran, by what was run, and whether it passed

    def run(self, place: str, what: str, count: int, start: Callable[[], None]) -> None:
        """Run something that stands for some blocks or commands, once where it stands in several places."""
        if what not in self._done:
            began = time.monotonic()
            try:
                start()
                error = ""
            except (RuntimeError, subprocess.TimeoutExpired) as problem:
                error = str(problem)
            self._done[what] = not error
            print(f"{'FAILED' if error else 'ok':6} {time.monotonic() - began:5.1f} s  {place}  {what}", flush=True)
            if error:
                print(error, flush=True)
        if self._done[what]:
            self.ran += count
        else:
            self.failed += [f"{place}  {what}"] * count

    def conclude(self) -> int:
        """Print the sums, and return the exit code."""
        total = self.ran + len(self.failed) + sum(self.left.values())
        print(f"\n{self.ran} of {total} blocks and commands ran, {len(self.failed)} failed")
        for reason, count in self.left.most_common():
            print(f"{count} left out: {reason}")
        for line in self.failed:
            print(f"FAILED {line}")
        return bool(self.failed)


def run_page(page: Path, folder: Path, record: Record, *, generated: bool) -> None:
    """Run the Python blocks and the commands of a page in a folder that holds the files which it names."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    blocks = read_blocks(page, "python")
    commands = [command for block in read_blocks(page, "sh") for command in read_commands(block)]
    if page.name in BY_TESTS:
        record.left[BY_TESTS[page.name]] += len(blocks) + len(commands)
        return
    if blocks:
        record.run(name, f"Python of {name}", len(blocks), partial(run_python, page, folder))
    for command in commands:
        if reason := BY_ZOO if generated else find_reason(command.text):
            record.left[reason] += 1
        else:
            text = shrink_command(command.text)
            record.run(command.block.place, text, 1, partial(run_command, text, folder))


def main() -> int:
    """Run all pages, and print what ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="pages, such as docs/swap.md")
    parser.add_argument("--output", type=Path, default=Path("runs/docs"), help="folder of the runs, emptied before")
    given = parser.parse_args()
    output = given.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    prepare_files(output / "files")
    only = [Path(page).absolute() for page in given.only]
    written = [page for page in list_pages() if not only or page in only]
    generated = [] if only else write_pages(output / "activations", curves=False)
    record = Record()
    for page in [*written, *generated]:
        folder = output / f"{page.parent.name}-{page.stem}"
        shutil.copytree(output / "files", folder)
        run_page(page, folder, record, generated=page in generated)
        shutil.rmtree(folder)
    return record.conclude()


if __name__ == "__main__":
    sys.exit(main())
