"""The embedded data set `shapes`: three classes of drawn shapes, made at first use, so a demo needs no download."""

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

# Part of the folder's name: raise it with any change to what is drawn, or old caches would be taken for the new set.
VERSION = 1
NAMES = ("circle", "rectangle", "triangle")
SPLITS = {"train": 400, "val": 100}
YAML, MANIFEST = "shapes.yaml", "manifest.json"  # in the folder of the set
SIDE = 128  # pixels
SEED = 20240229
# Half extents in pixels: small, medium and large objects are drawn equally often.
RADII = ((10, 14), (14, 20), (20, 30))
# An object with less of it left to see keeps its pixels but loses its label: its class can no longer be told.
MIN_VISIBLE = 0.6
_PLACES = [(kind, split) for kind in ("images", "labels") for split in SPLITS]
# Endings of what Ultralytics trains on when it lies there; with cache="disk" it puts .npy files beside.
_IMAGES = frozenset(".avif .bmp .dng .heic .heif .jp2 .jpeg .jpg .mpo .pfm .png .tif .tiff .webp".split())
_GENERATING = threading.Lock()  # the threads of a process have one partial folder

# For `RTDETR("rtdetr-n.yaml").train(data=shapes(), **SHAPES_SETTINGS)`. Two CPU cores, 4 minutes: mAP50 with AReLU 0.64
# and 0.71 (seeds 0 and 1), stock 0.78 (seed 1). Stock with 18 epochs: 0.86 in 253 s of CPU time.
SHAPES_SETTINGS: dict[str, Any] = {
    "epochs": 14,  # leaves an activation that costs 1.6 times as much inside six minutes
    "imgsz": SIDE,
    "batch": 4,  # steps, not images, are what a DETR lacks here: 1400 of about 0.13 s each
    "nbs": 4,  # equal to `batch`: the default of 64 would gather gradients over 16 batches per step
    "optimizer": "AdamW",  # `auto` takes AdamW too, at a rate of its own that ignores `lr0`
    "lr0": 0.002,  # 0.001 was slower: mAP50 0.18 after 8 epochs, against 0.32 (a part of it due to easier images)
    "momentum": 0.9,  # Adam's usual first beta; the default 0.937 is SGD's
    "weight_decay": 1e-4,  # a fifth of the default, as in the RT-DETR paper
    "warmup_epochs": 1.0,
    "warmup_bias_lr": 0.0,  # the default starts biases at 0.1, fifty times `lr0`, which AdamW would follow
    "cos_lr": True,
    "lrf": 0.02,
    # So short a run underfits, and every augmentation but the flips slows it: without shifts, scaling and colour
    # changes the GIoU loss after 9 epochs was 0.32, with them (and slightly smaller objects) 0.56.
    "mosaic": 0.0,
    "translate": 0.0,
    "scale": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "fliplr": 0.5,
    "flipud": 0.5,
    "val": False,  # validating every epoch costs 2 to 3 s each; the last epoch is validated all the same
    "workers": 1,  # a second loader would take the core that trains
    "amp": False,  # no use on a CPU; on a GPU its check downloads a model, and Ultralytics warns of NaN in RT-DETR
    "plots": False,
}


def shapes(root: Path | None = None) -> Path:
    """Return the data YAML of `shapes`, generating the set first if `root` (default: the user's cache) has none.

    The set is 400 training and 100 validation PNG images of 128 x 128 pixels in YOLO format, with equal pixels on
    every machine. It appears under its final name only when complete, and two processes may call this at once. Each
    call compares the files with a list of them in the folder; those that are missing or changed are drawn again.

    Raises:
        InputError: The folder cannot be written, or holds a damaged set that cannot be mended.
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
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with this one's number
    try:
        for kind, split in _PLACES:
            (partial / kind / split).mkdir(parents=True)
        for index in range(sum(SPLITS.values())):
            for name, content in draw_files(index).items():
                (partial / name).write_bytes(content)
        (partial / YAML).write_text(describe_set(folder), encoding="utf-8")
        _write_manifest(partial)
        partial.rename(folder)
    except OSError:
        # Another process may have been first: then the rename fails and its set, equal to ours, is the one to use.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(folder: Path) -> None:
    """Compare a set with its manifest, and draw again what differs.

    Raises:
        InputError: Something differs and cannot be written, or there are images of someone else.
    """
    try:
        found, known, expected = _find_files(folder), _read_manifest(folder), _names()
        strange = [name for name in found if name not in expected and Path(name).suffix.lower() in _IMAGES]
        touched = [name for name in expected if name not in found or found[name] != known.get(name, ())[:2]]
        wrong = [name for name in touched if not _is_same(folder / name, known.get(name))]
        mended = [name for index in sorted({expected[name] for name in wrong}) for name in _mend(folder, index, wrong)]
        if mended:
            for cache in (folder / "labels").glob("*.cache"):  # which Ultralytics takes for right if the sizes are
                cache.unlink(missing_ok=True)
        if _read_text(folder / YAML) != describe_set(folder):
            write_atomically(folder / YAML, describe_set(folder).encode())
        if touched:
            with suppress(*([] if mended else [OSError])):  # a cache may be read-only
                _write_manifest(folder)
    except OSError as error:
        raise InputError(
            f"the shapes data set in {quote(str(folder))} is damaged and cannot be mended "
            f"({error.strerror or error}): make it writable, or delete the folder, which is then made again"
        ) from error
    if strange:
        raise InputError(
            f"{quote(str(folder))} has {len(strange)} images that are not of the shapes data set, such as "
            f"{quote(strange[0])}: move them away, or delete the folder, which is then made again"
        )


def _mend(folder: Path, index: int, wrong: Container[str]) -> Iterator[str]:
    """Draw the files of an image again that are wrong, and yield the names of those that really differ."""
    for name, content in draw_files(index).items():
        path = folder / name
        if name in wrong and not (path.is_file() and path.read_bytes() == content):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            path.with_suffix(".npy").unlink(missing_ok=True)  # what Ultralytics made of it with cache="disk"
            yield name


def _names() -> dict[str, int]:
    """Return the number of the image that a file belongs to, by the file's name below the folder."""
    return {name: index for index in range(sum(SPLITS.values())) for name in _names_of(index)}


def _names_of(index: int) -> tuple[str, str]:
    split = "train" if index < SPLITS["train"] else "val"
    return f"images/{split}/{index:04d}.png", f"labels/{split}/{index:04d}.txt"


def _find_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of the last change of each file, by name below the folder."""
    found = {}
    for kind, split in _PLACES:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / kind / split) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process's partial file
                    if entry.is_file():
                        status = entry.stat()
                        found[f"{kind}/{split}/{entry.name}"] = (status.st_size, status.st_mtime_ns)
    return found


def _is_same(path: Path, known: tuple[int, ...] | None) -> bool:
    """Say whether a file has the content that it had, such as one that was copied to another machine."""
    if known is None:
        return False
    try:
        return path.stat().st_size == known[0] and zlib.crc32(path.read_bytes()) == known[2]
    except OSError:
        return False


def _read_manifest(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, time of the last change and checksum of each file; nothing where that is not known."""
    try:
        rows = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {str(name): (int(size), int(changed), int(crc)) for name, (size, changed, crc) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # an earlier version wrote none; or it is damaged
        return {}


def _write_manifest(folder: Path) -> None:
    rows = {}
    for name in _names():
        status = (folder / name).stat()
        rows[name] = (status.st_size, status.st_mtime_ns, zlib.crc32((folder / name).read_bytes()))
    write_atomically(folder / MANIFEST, json.dumps(rows).encode())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def describe_set(folder: Path) -> str:
    """Return the text of the data YAML for a set that lies in `folder` (absolute)."""
    quoted = str(folder).replace("'", "''")
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    return f"path: '{quoted}'\ntrain: images/train\nval: images/val\nnames:\n{names}"


def draw_files(index: int) -> dict[str, bytes]:
    """Return the files of image number `index`, the PNG and its labels, by name below the folder of the set."""
    pixels, labels = draw_scene(index)
    image, text = _names_of(index)
    content = io.BytesIO()
    # Level 1 takes 1.6 ms an image and level 6 2.8 ms, for 5 % fewer bytes: the grain hardly compresses.
    Image.fromarray(pixels).save(content, "png", compress_level=1)
    rows = "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in labels)
    return {image: content.getvalue(), text: rows.encode()}


def draw_scene(index: int) -> tuple[Pixels, list[tuple[int, float, float, float, float]]]:
    """Draw image number `index`: uint8 (SIDE, SIDE, 3) RGB, and (class, x, y, w, h) per label as fractions of SIDE.

    All drawing is in integers, so no platform's rounding or libm can move a pixel.
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
    """Draw int64 of `shape`, uniform in [low, high).

    From the raw stream, which numpy keeps the same for ever; what `Generator.integers` makes of it may change.
    """
    raw = np.asarray(bits.random_raw(math.prod(shape)), dtype=np.uint64)
    numbers: Pixels = (raw >> np.uint64(32)).astype(np.int64).reshape(shape)
    return numbers % (high - low) + low


def draw_background(bits: PCG64) -> Pixels:
    """Draw a texture: shades flowing between a few points, stripes over them, then grain; int64 (SIDE, SIDE, 3)."""
    cells = int(draw_integers(bits, 2, 6))
    knots = draw_integers(bits, 60, 196, (cells + 1, cells + 1, 1)) + draw_integers(bits, -40, 41, (1, 1, 3))
    cell, part = np.divmod(np.arange(SIDE) * cells, SIDE)
    part = part[:, None]
    rows = knots[cell] * (SIDE - part[..., None]) + knots[cell + 1] * part[..., None]
    canvas: Pixels = (rows[:, cell] * (SIDE - part) + rows[:, cell + 1] * part) // (SIDE * SIDE)
    canvas += draw_stripes(bits, 24)[..., None] + draw_grain(bits, 20)
    return canvas


def draw_stripes(bits: PCG64, strength: int) -> Pixels:
    """Draw stripes of a random direction and width, of 0 to `strength` levels; int64 (SIDE, SIDE)."""
    y, x = np.indices((SIDE, SIDE))
    a, b = (int(v) for v in draw_integers(bits, -4, 5, (2,)))
    period = int(draw_integers(bits, 8, 60))
    stripes: Pixels = (a * x + b * y) // period % 2 * int(draw_integers(bits, 0, strength))
    return stripes


def draw_grain(bits: PCG64, strength: int) -> Pixels:
    """Draw grey noise in blocks of 1, 2 or 4 pixels, of up to ±`strength` levels; int64 (SIDE, SIDE, 1)."""
    block = 1 << int(draw_integers(bits, 0, 3))
    amplitude = int(draw_integers(bits, 1, strength))
    grain = draw_integers(bits, -amplitude, amplitude + 1, (SIDE // block, SIDE // block, 1))
    return grain.repeat(block, 0).repeat(block, 1)


def draw_mask(bits: PCG64, kind: int, radius: int) -> Pixels:
    """Place an object of class `kind` wholly inside the image; bool (SIDE, SIDE), true on the object."""
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
    """Draw the corners (x, y) of a turned rectangle or triangle about the origin, in pixels; int64 (4 or 3, 2).

    The direction is an integer vector scaled to `radius`: a turn without sine and cosine.
    """
    a, b = (int(v) for v in draw_integers(bits, -64, 64, (2,)) * 2 + 1)
    u = np.array([a, b]) * radius * 16 // math.isqrt(a * a + b * b)  # in sixteenths of a pixel
    v = np.array([-u[1], u[0]])
    share = int(draw_integers(bits, 6, 9))  # eighths: the slimmest rectangle is 3 : 4
    if NAMES[kind] == "rectangle":
        u, v = u * 13 // 16, v * 13 * share // 128
        corners = np.array([u + v, v - u, -u - v, u - v])
    else:
        base = v * share // 8
        corners = np.array([u, base - u // 2, -base - u // 2])
    return corners // 16


def paint_object(bits: PCG64, canvas: Pixels, mask: Pixels) -> None:
    """Paint `mask` onto `canvas` in place: a random colour, unlike what it covers, with stripes and grain."""
    behind = canvas[mask].sum(0) // int(mask.sum())
    colours = draw_integers(bits, 0, 256, (4, 3))
    # The colour says nothing about the class, but it must differ from the ground: of four, the one farthest from it.
    colour = colours[int(np.abs(colours - behind).sum(1).argmax())]
    texture = draw_stripes(bits, 24) + draw_grain(bits, 16)[..., 0]
    canvas[mask] = colour + texture[mask][:, None]
