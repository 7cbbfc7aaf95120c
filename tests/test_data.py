"""The embedded data set: equal pixels everywhere, tight boxes, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics import shapes as shapes_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_module.shapes(tmp_path_factory.mktemp("cache")).parent


def test_pixels_and_labels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for index in (0, 1, 2, 417):
        pixels, labels = shapes_module.draw_scene(index)
        digest.update(pixels.tobytes() + repr(labels).encode())
    assert digest.hexdigest() == "ca0e5bb2a6f6c7dad6267946dff4dcf59305201a4b6a6fb5fb9d86c2ed97ecb8"


@pytest.mark.integration
def test_the_set_is_complete_and_in_yolo_format(folder: Path) -> None:
    described = yaml.safe_load((folder / "shapes.yaml").read_text())
    assert list(described["names"].values()) == list(shapes_module.NAMES) and Path(described["path"]) == folder
    for split, count in shapes_module.SPLITS.items():
        images = sorted((folder / described[split]).glob("*.png"))
        assert len(images) == count
        for image in images[:20]:
            rows = (folder / "labels" / split / f"{image.stem}.txt").read_text().splitlines()
            boxes = np.array([[float(cell) for cell in row.split()] for row in rows]).reshape(-1, 5)
            low, high = boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2
            assert (low > -1e-5).all() and (high < 1 + 1e-5).all() and (boxes[:, 3:] > 0.03).all()
            assert set(boxes[:, 0]) <= {0, 1, 2} and Image.open(image).size == (shapes_module.SIDE, shapes_module.SIDE)


@pytest.mark.integration
def test_classes_and_sizes_are_balanced(folder: Path) -> None:
    rows = [
        row.split() for file in (folder / "labels" / "train").glob("*.txt") for row in file.read_text().splitlines()
    ]
    shares = np.bincount([int(row[0]) for row in rows]) / len(rows)
    assert (shares > 0.25).all()
    widths = np.array([float(row[3]) for row in rows]) * shapes_module.SIDE
    assert np.percentile(widths, 10) < 26 and np.percentile(widths, 90) > 42


@pytest.mark.integration
def test_a_second_call_makes_nothing_new(folder: Path) -> None:
    stamp = (folder / "images" / "train" / "0000.png").stat().st_mtime_ns
    assert shapes_module.shapes(folder.parent).parent == folder
    assert (folder / "images" / "train" / "0000.png").stat().st_mtime_ns == stamp


def make_small(folder: Path) -> Path:
    shapes_module.SPLITS = {"train": 100, "val": 20}
    return shapes_module.shapes(folder)


@pytest.mark.integration
def test_two_processes_at_once_end_in_one_set(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(make_small, [tmp_path, tmp_path], chunksize=1)
    assert found[0] == found[1] and found[0].is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [f"shapes-v{shapes_module.VERSION}"]


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a small set, as it is after a copy to another place."""
    monkeypatch.setattr(shapes_module, "SPLITS", {"train": 10, "val": 4})
    made = shapes_module.shapes(tmp_path / "made").parent
    return Path(shutil.copytree(made, tmp_path / "copied" / made.name))


def test_a_set_that_was_copied_is_taken_as_it_is(copied: Path) -> None:
    before = read(copied).keys()
    assert shapes_module.shapes(copied.parent) == copied / "shapes.yaml"
    described = yaml.safe_load((copied / "shapes.yaml").read_text())
    assert Path(described["path"]) == copied
    assert read(copied).keys() == before


def damage_half(folder: Path) -> None:
    for path in sorted((folder / "images" / "train").iterdir())[::2]:
        path.unlink()


def damage_ends(folder: Path) -> None:
    for path in sorted((folder / "images" / "val").iterdir())[:2]:
        path.write_bytes(path.read_bytes()[:1000])
    (folder / "labels" / "val" / "0012.txt").write_text("")


def damage_classes(folder: Path) -> None:
    path = folder / "labels" / "train" / "0007.txt"
    path.write_text("".join(f"2{row[1:]}" for row in path.read_text().splitlines(keepends=True)))
    (folder / "labels" / "train.cache").write_bytes(b"of the wrong labels, whose size is the same")


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"images/train/0000.png": [1, 2')
    (folder / "images" / "train" / "0003.png").unlink()


def damage_yaml(folder: Path) -> None:
    (folder / "shapes.yaml").unlink()


@pytest.mark.parametrize("damage", [damage_half, damage_ends, damage_classes, damage_manifest, damage_yaml])
def test_a_damaged_set_is_mended(damage: Callable[[Path], None], copied: Path) -> None:
    shapes_module.shapes(copied.parent)  # the data YAML names its place
    before = {name: content for name, content in read(copied).items() if name != "manifest.json"}
    damage(copied)
    shapes_module.shapes(copied.parent)
    after = read(copied)
    assert after.pop("manifest.json") and after == before
    stamp = (copied / "manifest.json").stat().st_mtime_ns
    shapes_module.shapes(copied.parent)  # and is known to be whole then
    assert (copied / "manifest.json").stat().st_mtime_ns == stamp


def test_a_set_without_a_manifest_gets_one(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    image = copied / "images" / "train" / "0000.png"
    stamp = image.stat().st_mtime_ns
    shapes_module.shapes(copied.parent)
    assert (copied / "manifest.json").is_file() and image.stat().st_mtime_ns == stamp


def test_files_of_others_beside_the_set(copied: Path) -> None:
    (copied / "labels" / "train.cache").write_bytes(b"Ultralytics'")
    (copied / "images" / "train" / "0000.npy").write_bytes(b"Ultralytics'")
    shapes_module.shapes(copied.parent)
    assert (copied / "labels" / "train.cache").exists() and (copied / "images" / "train" / "0000.npy").exists()
    (copied / "images" / "val" / "own.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 images that are not of the shapes data set, such as 'images/val/own.jpg'"):
        shapes_module.shapes(copied.parent)


def test_a_set_that_cannot_be_written_is_used_if_it_is_whole(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes_module.shapes(copied.parent)

    def refuse(path: Path, content: bytes) -> None:  # as a read-only disk does; root may write into any folder
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(shapes_module, "write_atomically", refuse)
    shapes_module.shapes(copied.parent)
    os.utime(copied / "images" / "val" / "0013.png", (1, 1))
    shapes_module.shapes(copied.parent)
    (copied / "images" / "val" / "0013.png").unlink()
    with pytest.raises(InputError, match=r"is damaged and cannot be repaired \(.*[Rr]ead-only.*\): make it writable"):
        shapes_module.shapes(copied.parent)


@pytest.mark.kill
def test_a_kill_leaves_no_half_set(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from rtdetr_act import shapes\nshapes(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes-*/images/train/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / f"shapes-v{shapes_module.VERSION}").exists()
    assert shapes_module.shapes(tmp_path).is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [f"shapes-v{shapes_module.VERSION}"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the shapes data set"):
        shapes_module.shapes(tmp_path / "file" / "cache")
