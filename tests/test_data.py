"""The embedded data set: equal pixels everywhere, tight boxes, whole or not there at all."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rtdetr_act import data
from rtdetr_act.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.shapes(tmp_path_factory.mktemp("cache")).parent


def test_pixels_and_labels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for index in (0, 1, 2, 417):
        pixels, labels = data.draw_scene(index)
        digest.update(pixels.tobytes() + repr(labels).encode())
    assert digest.hexdigest() == "ca0e5bb2a6f6c7dad6267946dff4dcf59305201a4b6a6fb5fb9d86c2ed97ecb8"


def test_the_set_is_complete_and_in_yolo_format(folder: Path) -> None:
    described = yaml.safe_load((folder / "shapes.yaml").read_text())
    assert list(described["names"].values()) == list(data.NAMES) and Path(described["path"]) == folder
    for split, count in data.SPLITS.items():
        images = sorted((folder / described[split]).glob("*.png"))
        assert len(images) == count
        for image in images[:20]:
            rows = (folder / "labels" / split / f"{image.stem}.txt").read_text().splitlines()
            boxes = np.array([[float(cell) for cell in row.split()] for row in rows]).reshape(-1, 5)
            low, high = boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2
            assert (low > -1e-5).all() and (high < 1 + 1e-5).all() and (boxes[:, 3:] > 0.03).all()
            assert set(boxes[:, 0]) <= {0, 1, 2} and Image.open(image).size == (data.SIDE, data.SIDE)


def test_classes_and_sizes_are_balanced(folder: Path) -> None:
    rows = [
        row.split() for file in (folder / "labels" / "train").glob("*.txt") for row in file.read_text().splitlines()
    ]
    shares = np.bincount([int(row[0]) for row in rows]) / len(rows)
    assert (shares > 0.25).all()
    widths = np.array([float(row[3]) for row in rows]) * data.SIDE
    assert np.percentile(widths, 10) < 26 and np.percentile(widths, 90) > 42


def test_a_second_call_makes_nothing_new(folder: Path) -> None:
    stamp = (folder / "images" / "train" / "0000.png").stat().st_mtime_ns
    assert data.shapes(folder.parent).parent == folder
    assert (folder / "images" / "train" / "0000.png").stat().st_mtime_ns == stamp


def test_two_processes_at_once_end_in_one_set(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(data.shapes, [tmp_path, tmp_path])
    assert found[0] == found[1] and found[0].is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [f"shapes-v{data.VERSION}"]


def test_a_kill_leaves_no_half_set(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from rtdetr_act.data import shapes; shapes(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes-*/images/train/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / f"shapes-v{data.VERSION}").exists()
    assert data.shapes(tmp_path).is_file()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the shapes data set"):
        data.shapes(tmp_path / "file" / "cache")
