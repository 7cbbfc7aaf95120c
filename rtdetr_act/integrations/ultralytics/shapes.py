"""The embedded data set `shapes`: three classes of drawn shapes, generated at first use without a download."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
from PIL import Image

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import create_folder, partial_path, remove_leftovers, write_atomically

if TYPE_CHECKING:
    from numpy.random import PCG64

    Pixels = np.ndarray[Any, np.dtype[Any]]

# Part of the folder's name. Increase it with any change of the drawings, or old caches would pass for the new set.
VERSION = 1
NAMES = ("circle", "rectangle", "triangle")
SPLITS = {"train": 400, "val": 100}
YAML, MANIFEST = "shapes.yaml", "manifest.json"  # in the folder of the set
SIDE = 128  # pixels
SEED = 20240229
# Ranges of the half extents, in pixels, of small, medium and large objects, which are equally frequent.
RADII = ((10, 14), (14, 20), (20, 30))
# Fraction of an object that must be visible. Below it the object stays, but has no label: its class cannot be told.
MIN_VISIBLE = 0.6
_FOLDERS = [(kind, split) for kind in ("images", "labels") for split in SPLITS]
# Suffixes of files that Ultralytics trains on if they are in the folder. With cache="disk" it adds .npy files.
_IMAGE_SUFFIXES = frozenset(".avif .bmp .dng .heic .heif .jp2 .jpeg .jpg .mpo .pfm .png .tif .tiff .webp".split())
_GENERATING = threading.Lock()  # all threads of a process share one partial folder

# For `RTDETR("rtdetr-n.yaml").train(data=shapes(), **SHAPES_SETTINGS)`. Two CPU cores, 4 minutes: mAP50 with AReLU 0.64
# and 0.71 (seeds 0 and 1), stock 0.78 (seed 1). Stock with 18 epochs: 0.86 in 253 s of CPU time.
# Half the time was tried with AReLU and seed 0, where these settings gave mAP50 0.72 and 0.78 in two versions: nine
# epochs 0.53, with lr0=0.003 0.63, with that and a shorter warmup 0.43, or without flips 0.47; ten with lr0=0.004 0.55;
# batches of 8 0.52. A step is a thousand small operations: two threads shorten it by a tenth, and make it 28 times as
# long beside another busy process; fused AdamW shortens it by 7 %, channels_last by 3 %, images of 96 pixels by 17 %.
SHAPES_SETTINGS: dict[str, Any] = {
    "epochs": 14,  # so that an activation that takes 1.6 times as long still trains in six minutes
    "imgsz": SIDE,
    "batch": 4,  # small: a DETR needs many steps here more than many images; 1400 of about 0.13 s each
    "nbs": 4,  # equal to `batch`: the default of 64 would accumulate gradients over 16 batches per step
    "optimizer": "AdamW",  # `auto` selects AdamW too, with a learning rate of its own that ignores `lr0`
    "lr0": 0.002,  # with 0.001, mAP50 was 0.18 after 8 epochs instead of 0.32 (partly due to easier images)
    "momentum": 0.9,  # Adam's usual beta1; the default of 0.937 is meant for SGD
    "weight_decay": 1e-4,  # a fifth of the default, as in the RT-DETR paper
    "warmup_epochs": 1.0,
    "warmup_bias_lr": 0.0,  # the default of 0.1 is fifty times `lr0`, too large for AdamW
    "cos_lr": True,
    "lrf": 0.02,
    # A training this short underfits, and every augmentation except flips slows it down: the GIoU loss after 9 epochs
    # was 0.32 without translation, scaling and colour changes, 0.56 with them (and slightly smaller objects).
    "mosaic": 0.0,
    "translate": 0.0,
    "scale": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "fliplr": 0.5,
    "flipud": 0.5,
    "val": False,  # validating every epoch costs 2 to 3 s each; the last epoch is validated all the same
    "workers": 1,  # a second worker would compete with the training for two cores
    "amp": False,  # no effect on a CPU; on a GPU its check downloads a model, and Ultralytics warns of NaN in RT-DETR
    "plots": False,
}


def shapes(root: Path | None = None) -> Path:
    """Return the data YAML of `shapes`, and generate the data set first where it does not exist.

    It has 400 training and 100 validation PNG images of 128 x 128 pixels in YOLO format, with the same pixels on every
    machine. It appears under its final name only when complete, and several processes may call this at once. Each call
    compares the files with a manifest in the folder; those that are missing or changed are generated again.

    Args:
        root: Folder of the data set; None (default) for the user's cache.

    Returns:
        The absolute path of the YAML.

    Raises:
        InputError: The folder cannot be written, or holds a damaged data set that cannot be repaired.
    """
    if root is None:
        root = platformdirs.user_cache_path("rtdetr-act")
    folder = Path(root).resolve() / f"shapes-v{VERSION}"
    with _GENERATING:
        try:
            remove_leftovers(folder)
            if not folder.exists():
                with create_folder(folder.parent):
                    _generate(folder)
        except OSError as error:
            raise InputError(
                f"cannot write the shapes data set to {quote(str(folder))}: {error.strerror or error}"
            ) from error
        _check(folder)
    return folder / YAML


def _generate(folder: Path) -> None:
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had this process's id
    try:
        for kind, split in _FOLDERS:
            (partial / kind / split).mkdir(parents=True)
        for index in range(sum(SPLITS.values())):
            for name, content in draw_files(index).items():
                (partial / name).write_bytes(content)
        (partial / YAML).write_text(describe_set(folder), encoding="utf-8")
        _write_manifest(partial)
        partial.rename(folder)
    except OSError:
        # Another process may have been faster: the rename fails then, and its data set, which is equal, is used.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(folder: Path) -> None:
    """Compare a data set with its manifest, and generate files again that differ.

    Raises:
        InputError: A file differs and cannot be written, or the folder contains other images.
    """
    try:
        found, manifest, expected = _scan(folder), _read_manifest(folder), _image_indices()
        foreign = [name for name in found if name not in expected and Path(name).suffix.lower() in _IMAGE_SUFFIXES]
        touched = [name for name in expected if name not in found or found[name] != manifest.get(name, ())[:2]]
        damaged = [name for name in touched if not _has_checksum(folder / name, manifest.get(name))]
        indices = sorted({expected[name] for name in damaged})
        repaired = [name for index in indices for name in _repair(folder, index, damaged)]
        if repaired:
            for cache in (folder / "labels").glob("*.cache"):  # Ultralytics compares only the file sizes with it
                cache.unlink(missing_ok=True)
        if _read_text(folder / YAML) != describe_set(folder):
            write_atomically(folder / YAML, describe_set(folder).encode())
        if touched:
            with suppress(*([] if repaired else [OSError])):  # the user's cache may be read-only
                _write_manifest(folder)
    except OSError as error:
        raise InputError(
            f"the shapes data set in {quote(str(folder))} is damaged and cannot be repaired "
            f"({error.strerror or error}): make it writable, or delete the folder, which is then generated again"
        ) from error
    if foreign:
        raise InputError(
            f"{quote(str(folder))} has {len(foreign)} images that are not of the shapes data set, such as "
            f"{quote(foreign[0])}: move them away, or delete the folder, which is then generated again"
        )


def _repair(folder: Path, index: int, damaged: Container[str]) -> Iterator[str]:
    """Generate the damaged files of an image again, and yield the names of those whose contents differed."""
    for name, content in draw_files(index).items():
        path = folder / name
        if name in damaged and not (path.is_file() and path.read_bytes() == content):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            path.with_suffix(".npy").unlink(missing_ok=True)  # Ultralytics' copy with cache="disk"
            yield name


def _image_indices() -> dict[str, int]:
    """Return the index of the image that each file belongs to, by the path of the file relative to the folder."""
    return {name: index for index in range(sum(SPLITS.values())) for name in _file_names(index)}


def _file_names(index: int) -> tuple[str, str]:
    split = "train" if index < SPLITS["train"] else "val"
    return f"images/{split}/{index:04d}.png", f"labels/{split}/{index:04d}.txt"


def _scan(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size in bytes and modification time in ns of each file, by its path relative to the folder."""
    found = {}
    for kind, split in _FOLDERS:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / kind / split) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # of a partial file that another process has just renamed
                    if entry.is_file():
                        status = entry.stat()
                        found[f"{kind}/{split}/{entry.name}"] = (status.st_size, status.st_mtime_ns)
    return found


def _has_checksum(path: Path, recorded: tuple[int, ...] | None) -> bool:
    """Return whether a file has the recorded size and checksum; its modification time changes when it is copied."""
    if recorded is None:
        return False
    try:
        return path.stat().st_size == recorded[0] and zlib.crc32(path.read_bytes()) == recorded[2]
    except OSError:
        return False


def _read_manifest(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, modification time and checksum of each file; an empty dictionary if they are not recorded."""
    try:
        rows = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {str(name): (int(size), int(changed), int(crc)) for name, (size, changed, crc) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or damaged
        return {}


def _write_manifest(folder: Path) -> None:
    rows = {}
    for name in _image_indices():
        status = (folder / name).stat()
        rows[name] = (status.st_size, status.st_mtime_ns, zlib.crc32((folder / name).read_bytes()))
    write_atomically(folder / MANIFEST, json.dumps(rows).encode())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def describe_set(folder: Path) -> str:
    """Return the text of the data YAML of a data set in `folder`, an absolute path."""
    quoted = str(folder).replace("'", "''")
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    return f"path: '{quoted}'\ntrain: images/train\nval: images/val\nnames:\n{names}"


def draw_files(index: int) -> dict[str, bytes]:
    """Return the contents of the PNG and of the label file of an image, by their paths relative to the folder.

    Args:
        index: Index of the image, from 0; those of the validation split follow those of the training split.
    """
    pixels, labels = draw_scene(index)
    image, text = _file_names(index)
    content = io.BytesIO()
    # Level 1 takes 1.6 ms per image, level 6 2.8 ms for 5 % fewer bytes: noise hardly compresses.
    Image.fromarray(pixels).save(content, "png", compress_level=1)
    rows = "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in labels)
    return {image: content.getvalue(), text: rows.encode()}


def draw_scene(index: int) -> tuple[Pixels, list[tuple[int, float, float, float, float]]]:
    """Draw an image with integer arithmetic only, so that it does not depend on a platform's rounding or libm.

    Args:
        index: Index of the image, from 0.

    Returns:
        The image, uint8 RGB (SIDE, SIDE, 3), and a label (class, x, y, width, height) per object, the center and the
        size as fractions of SIDE.
    """
    bits = np.random.PCG64([SEED, index])
    canvas = draw_background(bits)
    owner = np.full((SIDE, SIDE), -1)
    drawn: list[tuple[int, int]] = []  # class and area in pixels
    for number in range(int(draw_integers(bits, 3, 8))):
        kind = int(draw_integers(bits, 0, len(NAMES)))
        low, high = RADII[int(draw_integers(bits, 0, len(RADII)))]
        mask = draw_mask(bits, kind, int(draw_integers(bits, low, high)))
        paint_object(bits, canvas, mask)
        owner[mask] = number
        drawn.append((kind, int(mask.sum())))

    labels = []
    for number, (kind, area) in enumerate(drawn):
        rows, columns = np.nonzero(owner == number)
        if rows.size >= MIN_VISIBLE * area:
            left, right = int(columns.min()), int(columns.max()) + 1
            top, bottom = int(rows.min()), int(rows.max()) + 1
            x, y = (left + right) / 2 / SIDE, (top + bottom) / 2 / SIDE
            labels.append((kind, x, y, (right - left) / SIDE, (bottom - top) / SIDE))
    return canvas.clip(0, 255).astype(np.uint8), labels


def draw_integers(bits: PCG64, low: int, high: int, shape: tuple[int, ...] = ()) -> Pixels:
    """Return random int64 of a shape, uniform in [low, high).

    They are made from the raw stream, which numpy guarantees to stay the same. `Generator.integers` may change.
    """
    raw = np.asarray(bits.random_raw(math.prod(shape)), dtype=np.uint64)
    numbers: Pixels = (raw >> np.uint64(32)).astype(np.int64).reshape(shape)
    return numbers % (high - low) + low


def draw_background(bits: PCG64) -> Pixels:
    """Draw a texture of interpolated shades, stripes and noise; int64 (SIDE, SIDE, 3)."""
    cells = int(draw_integers(bits, 2, 6))
    knots = draw_integers(bits, 60, 196, (cells + 1, cells + 1, 1)) + draw_integers(bits, -40, 41, (1, 1, 3))
    cell, part = np.divmod(np.arange(SIDE) * cells, SIDE)
    part = part[:, None]
    rows = knots[cell] * (SIDE - part[..., None]) + knots[cell + 1] * part[..., None]
    canvas: Pixels = (rows[:, cell] * (SIDE - part) + rows[:, cell + 1] * part) // (SIDE * SIDE)
    canvas += draw_stripes(bits, 24)[..., None] + draw_noise(bits, 20)
    return canvas


def draw_stripes(bits: PCG64, strength: int) -> Pixels:
    """Draw stripes of a random direction and width, 0 to `strength` levels bright; int64 (SIDE, SIDE)."""
    y, x = np.indices((SIDE, SIDE))
    a, b = (int(v) for v in draw_integers(bits, -4, 5, (2,)))
    period = int(draw_integers(bits, 8, 60))
    stripes: Pixels = (a * x + b * y) // period % 2 * int(draw_integers(bits, 0, strength))
    return stripes


def draw_noise(bits: PCG64, strength: int) -> Pixels:
    """Draw gray noise in blocks of 1, 2 or 4 pixels, of up to ±`strength` levels; int64 (SIDE, SIDE, 1)."""
    block = 1 << int(draw_integers(bits, 0, 3))
    amplitude = int(draw_integers(bits, 1, strength))
    noise = draw_integers(bits, -amplitude, amplitude + 1, (SIDE // block, SIDE // block, 1))
    return noise.repeat(block, 0).repeat(block, 1)


def draw_mask(bits: PCG64, kind: int, radius: int) -> Pixels:
    """Draw the mask of an object at a random position that is fully inside the image; bool (SIDE, SIDE).

    Args:
        bits: Random bits.
        kind: Class of the object, an index into `NAMES`.
        radius: Half extent of the object, in pixels.
    """
    y, x = np.indices((SIDE, SIDE))
    if NAMES[kind] == "circle":
        cx, cy = (int(v) for v in draw_integers(bits, radius, SIDE - radius, (2,)))
        disc: Pixels = (x - cx) ** 2 + (y - cy) ** 2 <= radius * radius
        return disc
    corners = draw_corners(bits, kind, radius)
    low, high = corners.min(0), corners.max(0)
    corners = corners + [int(draw_integers(bits, -int(low[i]), SIDE - int(high[i]))) for i in (0, 1)]
    mask = np.ones((SIDE, SIDE), dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        mask &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    return mask


def draw_corners(bits: PCG64, kind: int, radius: int) -> Pixels:
    """Return the corners (x, y) of a rotated rectangle or triangle around the origin, in pixels; int64 (4 or 3, 2).

    The direction is an integer vector scaled to `radius`: a rotation without sine and cosine.
    """
    a, b = (int(v) for v in draw_integers(bits, -64, 64, (2,)) * 2 + 1)
    u = np.array([a, b]) * radius * 16 // math.isqrt(a * a + b * b)  # in sixteenths of a pixel
    v = np.array([-u[1], u[0]])
    aspect = int(draw_integers(bits, 6, 9))  # in eighths: the narrowest rectangle is 3 : 4
    if NAMES[kind] == "rectangle":
        u, v = u * 13 // 16, v * 13 * aspect // 128
        corners = np.array([u + v, v - u, -u - v, u - v])
    else:
        base = v * aspect // 8
        corners = np.array([u, base - u // 2, -base - u // 2])
    return corners // 16


def paint_object(bits: PCG64, canvas: Pixels, mask: Pixels) -> None:
    """Paint a mask onto a canvas in place, in a random colour with stripes and noise that contrasts with the canvas."""
    background = canvas[mask].sum(0) // int(mask.sum())
    colours = draw_integers(bits, 0, 256, (4, 3))
    # The colour is independent of the class, and must differ from the background: of four, the most distant one.
    colour = colours[int(np.abs(colours - background).sum(1).argmax())]
    texture = draw_stripes(bits, 24) + draw_noise(bits, 16)[..., 0]
    canvas[mask] = colour + texture[mask][:, None]
