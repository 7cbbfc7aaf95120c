"""The images of a data set, and other splits of them into training and validation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import yaml
from filelock import FileLock
from ultralytics.data.utils import IMG_FORMATS

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import write_files_atomically
from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.yaml_files import read_yaml_mapping


@dataclass(frozen=True)
class Split:
    """A data set whose images were divided anew.

    Attributes:
        data: Its YAML.
        train, val: Numbers of images.
    """

    data: Path
    train: int
    val: int


def list_images(source: Any) -> list[Path]:
    """Return the images of a split, in the order of their names.

    Args:
        source: Path of a folder or of a text file with a path per line, or a list of such paths.
    """
    found: list[Path] = []
    for path in map(Path, source if isinstance(source, (list, tuple)) else [source]):
        if path.is_dir():
            found += path.rglob("*.*")
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if name := line.strip():
                found.append(path.parent / name[2:] if name.startswith("./") else Path(name))
    return sorted({Path(each).absolute() for each in found if each.suffix[1:].lower() in IMG_FORMATS})


def split_data(data: str, task: str, seed: int, folder: Path) -> Split:
    """Divide the images for training and validation of a data set anew, at random, in the numbers that they had.

    Labels are found as before, since no image is moved. Images for testing stay what they were.

    Args:
        data: Ultralytics' `data` argument, as `resolve_data` returns it.
        task: Ultralytics' task, such as "detect".
        seed: Equal seeds give equal splits.
        folder: Folder to write data.yaml, train.txt and val.txt to; it is created if missing.

    Raises:
        InputError: The data set is one for classification, is wrong or has fewer than two images.
        OSError: The disk is full or the folder is not writable.
    """
    if task == "classify":
        raise InputError("the classes of a data set for classification are folders, which are not split anew")
    checked = check_data(data, task)
    given = {name: list_images(checked.get(name) or []) for name in ("train", "val")}
    images = sorted({*given["train"], *given["val"]})
    if len(images) < 2:
        raise InputError(f"data set {quote(data)} has {len(images)} images, which cannot be divided")
    share = len(given["val"]) / (len(given["train"]) + len(given["val"]))
    val = min(max(round(share * len(images)), 1), len(images) - 1)
    order = [images[index] for index in np.random.default_rng(seed).permutation(len(images))]
    parts = {"val": sorted(order[:val]), "train": sorted(order[val:])}
    settings = read_yaml_mapping(Path(checked["yaml_file"]))
    # Without `path`, names are relative to the YAML, so that the folder may be moved.
    settings = {key: value for key, value in settings.items() if key not in ("download", "path", "test")}
    if test := checked.get("test"):
        settings["test"] = [str(each) for each in test] if isinstance(test, list) else str(test)
    contents = {}
    for name, members in parts.items():
        settings[name] = f"{name}.txt"
        contents[folder / f"{name}.txt"] = "".join(f"{member}\n" for member in members).encode()
    contents[folder / "data.yaml"] = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    folder.mkdir(exist_ok=True)
    write_files_atomically(contents)
    return Split(folder / "data.yaml", len(parts["train"]), len(parts["val"]))


class LabelCacheLock:
    """Lock on the label caches of a data set, for trainings that divide its images in different ways.

    Ultralytics keeps the labels of a set beside them in one file, and writes it again where it holds other images. Two
    processes that do so at once may read a file that is being written. A lock held by a process that ends is released.

    Args:
        data: Ultralytics' `data` argument of the set that is divided.
    """

    def __init__(self, data: str) -> None:
        name = hashlib.sha256(str(Path(data).absolute()).encode()).hexdigest()[:16]
        folder = platformdirs.user_cache_path("rtdetr-act", ensure_exists=True)
        self.lock = FileLock(folder / f"labels-{name}.lock")

    def attach(self, model: Any) -> None:
        """Hold the lock while a training of an RTDETR or YOLO model builds its data loaders."""
        model.add_callback("on_pretrain_routine_start", lambda _: self.lock.acquire())
        model.add_callback("on_pretrain_routine_end", lambda _: self.lock.release())
