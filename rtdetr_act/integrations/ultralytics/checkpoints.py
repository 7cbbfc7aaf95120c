"""Inspect the classes that a checkpoint file refers to, without executing its pickle."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from rtdetr_act.errors import ModelError, quote
from rtdetr_act.version import __version__

# torch.save does not compress its entries. A higher compression ratio indicates an archive made to exhaust memory.
_MAX_COMPRESSION = 100
# Ultralytics maps module names of its older releases, and has its own error message for those of YOLOv5.
_LEFT_TO_ULTRALYTICS = ("ultralytics", "models", "utils", "numpy")
_RENAMED = ("__builtin__", "copy_reg", "exceptions", "torch.tensor")  # old names that pickle and torch map
# Packages that pickles of tensors and plain data refer to, beside torch outside of torch.nn.modules.
_PLAIN_DATA = (
    "collections",
    "builtins",
    "__builtin__",
    "copyreg",
    "copy_reg",
    "_codecs",
    "numpy",
    "pathlib",
    "argparse",
)
_MIN_MEMO_SIZE = 1000  # memo indices up to this are always accepted
_LEGACY_HEAD = 3  # pickles before the object in files of torch before 1.6: magic number, protocol, system


def check_classes(weight: str | Path) -> None:
    """Check that all classes in a checkpoint can be imported, and that reading it does not exhaust memory.

    For a missing module Ultralytics would run `pip install` with a name taken from the file.

    Args:
        weight: Path of the file. Missing files and files that are not checkpoints are ignored here, since loading
            raises for them.

    Raises:
        ModelError: A class cannot be imported (the message names the first), or the file would exhaust memory.
    """
    found = list_classes(weight)
    if any(module.partition(".")[0] == "__torch__" for module, _ in found):
        raise ModelError(f"{quote(str(weight))} is a TorchScript file: give the .pt that it was exported from")
    if missing := sorted(f"{module}.{name}" for module, name in found if not _is_importable(module, name)):
        if missing[0].startswith("rtdetr_act."):
            raise ModelError(
                f"{quote(str(weight))} holds {quote(missing[0])}, which rtdetr-act {__version__} does not have: "
                "load it with the version that it was saved with"
            )
        raise ModelError(
            f"{quote(str(weight))} holds {quote(missing[0])}, which cannot be imported here: it is not installed here, "
            "or was registered in a script; import what defines it first, if you trust where the file comes from"
        )


def list_classes(weight: str | Path) -> list[tuple[str, str]]:
    """Return (module, name) of each class and function that a checkpoint refers to, in the order of the file.

    Nothing is imported. A file that cannot be read to its end gives those up to there, one that torch has not written
    none.

    Raises:
        ModelError: Reading the file would exhaust memory.
    """
    found: dict[tuple[str, str], None] = {}
    # Loading raises a more specific error.
    with suppress(*_READING_ERRORS), _open_pickle(Path(weight)) as (file, count):
        for _ in range(count):
            start = file.tell()
            _check_memo(file, weight)
            file.seek(start)
            _NameCollector(file, found).load()
    return list(found)


def find_needed_packages(weight: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the classes that loading a checkpoint takes beside those of torch and Ultralytics, by package."""
    found: dict[str, list[str]] = {}
    for module, name in list_classes(weight):
        package = module.partition(".")[0]
        if package not in ("torch", "torchvision", *_LEFT_TO_ULTRALYTICS, *_PLAIN_DATA, *_RENAMED):
            found.setdefault(package, []).append(name)
    return {package: tuple(names) for package, names in found.items()}


def describe_foreign_file(weight: str | Path) -> str | None:
    """Describe a file that Ultralytics could not load, by the classes that it refers to; None for one of Ultralytics.

    >>> describe_foreign_file("no such file")
    'it holds no network, or is damaged'
    """
    classes = list_classes(weight)
    names = [f"{module}.{name}" for module, name in classes]
    if any(name.startswith("ultralytics.") for name in names):
        return None
    if yolov5 := next((name for name in names if name.startswith(("models.yolo.", "models.common."))), None):
        return f"it holds {quote(yolov5)} of YOLOv5 or YOLOv7, whose networks Ultralytics' package does not load"
    if network := next((name for name in names if _can_be_network(name)), None):
        return f"it holds {quote(network)}, which is not a network of Ultralytics"
    if names:
        return "it holds tensors only, such as a state dict: load them into a network and save that"
    return "it holds no network, or is damaged"


def _can_be_network(name: str) -> bool:
    """Return whether a class may be a network, by its qualified name: it is not a part of tensors or plain data."""
    package = name.partition(".")[0]
    return name.startswith("torch.nn.modules.") if package == "torch" else package not in _PLAIN_DATA


# The exceptions that reading a file raises that is not a checkpoint, those of an unpickler for invalid data included.
_READING_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
    ImportError,
    AssertionError,
)


@contextmanager
def _open_pickle(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open the pickle data of a checkpoint; yield the file, and the number of pickles in it to read."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file, _LEGACY_HEAD + 1
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed, unpacked = (sum(getattr(e, size) for e in entries) for size in ("compress_size", "file_size"))
        if unpacked > _MAX_COMPRESSION * max(packed, 1 << 20):
            raise ModelError(
                f"{quote(str(path))} unpacks from {packed:,} to {unpacked:,} bytes, which no checkpoint of torch does: "
                "it was not loaded"
            )
        inner = next((e for e in entries if e.filename.endswith("/data.pkl")), None)
        if inner is None:
            raise zipfile.BadZipFile("no data.pkl")
        # The checks read a few bytes at a time, which takes a file in an archive four times as long.
        yield io.BytesIO(archive.read(inner)), 1


def _check_memo(file: IO[bytes], weight: str | Path) -> None:
    """Raise ModelError for a pickle with memo indices larger than its size allows.

    Unpicklers, torch's too, allocate memory for the highest memo index: 32 GB for a pickle of eight bytes. The check
    takes 70 ms for rtdetr-x.
    """
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > max(position or 0, _MIN_MEMO_SIZE):
            raise ModelError(
                f"{quote(str(weight))} asks for room for {argument:,} objects, which no file of its size holds: it was "
                "not loaded"
            )


class _NameCollector(pickle.Unpickler):
    """Unpickler that collects the names of all classes and functions, and replaces each by an inert placeholder."""

    def __init__(self, file: IO[bytes], found: dict[tuple[str, str], None]) -> None:
        super().__init__(file)
        self.found = found

    def find_class(self, module: str, name: str) -> Any:
        self.found[module, name] = None
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert


def _ignore(*_: Any, **__: Any) -> None:
    pass


class _InertType(type):
    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls

    def __setitem__(cls, *_: Any) -> None:
        pass


class _Inert(metaclass=_InertType):
    """Placeholder for any class, function or object: calls return itself, and items and state are ignored."""

    __setstate__ = append = extend = add = staticmethod(_ignore)

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return cls


def _is_importable(module: str, name: str) -> bool:
    """Return whether a class can be imported, as far as that can be determined without importing modules."""
    package = module.partition(".")[0]
    if package in _LEFT_TO_ULTRALYTICS or module in _RENAMED:
        return True
    if module in sys.modules:
        # torch creates storage classes dynamically.
        return hasattr(sys.modules[module], name.partition(".")[0]) or (package == "torch" and "Storage" in name)
    path: Any = None
    full = ""
    for part in module.split("."):
        full = f"{full}.{part}" if full else part
        if full in sys.modules:
            path = getattr(sys.modules[full], "__path__", ())
            continue
        try:
            # importlib's find_spec would import the parent packages of a submodule.
            spec = find_spec(full) if full == part else PathFinder.find_spec(full, path)
        except (ImportError, ValueError):  # an invalid name, such as one with a zero byte
            return False
        if spec is None:
            return False
        path = spec.submodule_search_locations or ()
    return True


def refuse_install(requirements: Any = "", *_: Any) -> Any:
    """Replace Ultralytics' `check_requirements` while a checkpoint is loaded, so that no file triggers `pip install`.

    Raises:
        ModelError: Always.
    """
    raise ModelError(
        f"the checkpoint needs a module that cannot be imported here, {quote(str(requirements))}: import what defines "
        "it first, if you trust where the file comes from"
    )


def get_refused_class(error: BaseException) -> str | None:
    """Return the class that a restricted load rejected, or None for any other error.

    torch's message is `Unsupported global: GLOBAL module.Name was not an allowed global by default`.
    """
    match = re.search(r"Unsupported global: GLOBAL (\S+) ", str(error.__cause__ or error))
    return match[1] if match else None
