"""What a checkpoint file names, read without running anything of it."""

from __future__ import annotations

import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from rtdetr_act.errors import ModelError, quote

# torch.save stores its entries as they are. What is packed tighter than this is made to fill the memory.
_MAX_COMPRESSION = 100
# Ultralytics maps module names of its older releases itself, and has its own words for YOLOv5's.
_LEFT_TO_ULTRALYTICS = ("ultralytics", "models", "utils", "numpy")
_RENAMED = ("__builtin__", "copy_reg", "exceptions", "torch.tensor")  # as pickle and torch know them
_MIN_MEMO_SIZE = 1000  # any pickle may number that many as it likes
_LEGACY_HEAD = 3  # pickles before the object in files of torch before 1.6: magic number, protocol, system


def check_classes(weight: str | Path) -> None:
    """Refuse a checkpoint that names classes which cannot be imported here, or that fills the memory as it is read.

    Ultralytics would answer a missing module with `pip install` of a name that came out of the file.

    Args:
        weight: The file; one that is not there, or is no checkpoint at all, is left to the loading.

    Raises:
        ModelError: Naming the first class that is missing.
    """
    found: set[tuple[str, str]] = set()
    try:
        with _open_pickle(Path(weight)) as (file, count):
            for _ in range(count):
                start = file.tell()
                _check_memo(file, weight)
                file.seek(start)
                _NameCollector(file, found).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, *_UNPICKLING_ERRORS):
        pass  # about which the loading says more
    if missing := sorted(f"{module}.{name}" for module, name in found if not _is_importable(module, name)):
        raise ModelError(
            f"{quote(str(weight))} holds {quote(missing[0])}, which cannot be imported here: it is not installed here, "
            "or was registered in a script; import what defines it first, if you trust where the file comes from"
        )


# What an unpickler raises on bytes that only look like a pickle.
_UNPICKLING_ERRORS = (
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
    """Open the pickled object of a checkpoint; yield it, and how many pickles to read."""
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
        with archive.open(inner) as file:
            yield file, 1


def _check_memo(file: IO[bytes], weight: str | Path) -> None:
    """Refuse a pickle that numbers its objects otherwise than in order, and read it to its end.

    Reading makes room for as many objects as the highest number: 32 GB for a pickle of eight bytes. That holds for
    torch's reading too. 80 ms for rtdetr-x.
    """
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > max(position or 0, _MIN_MEMO_SIZE):
            raise ModelError(
                f"{quote(str(weight))} asks for room for {argument:,} objects, which no file of its size holds: it was "
                "not loaded"
            )


class _NameCollector(pickle.Unpickler):
    """Reads a pickle of any protocol with an inert stand-in for every class and function, and notes their names."""

    def __init__(self, file: IO[bytes], found: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self.found = found

    def find_class(self, module: str, name: str) -> Any:
        self.found.add((module, name))
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
    """Class, function, result and object in one: it can be called, made, filled and given a state, and stays itself."""

    __setstate__ = append = extend = add = staticmethod(_ignore)

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return cls


def _is_importable(module: str, name: str) -> bool:
    """Return whether a class is where a pickle looks for it, as far as that can be told without importing anything."""
    package = module.partition(".")[0]
    if package in _LEFT_TO_ULTRALYTICS or module in _RENAMED:
        return True
    if module in sys.modules:
        # torch makes classes of storages itself.
        return hasattr(sys.modules[module], name.partition(".")[0]) or (package == "torch" and "Storage" in name)
    path: Any = None
    full = ""
    for part in module.split("."):
        full = f"{full}.{part}" if full else part
        if full in sys.modules:
            path = getattr(sys.modules[full], "__path__", ())
            continue
        try:
            # Not importlib's find_spec for a submodule, which imports what is above it.
            spec = find_spec(full) if full == part else PathFinder.find_spec(full, path)
        except (ImportError, ValueError):  # no name at all, such as one with a zero byte
            return False
        if spec is None:
            return False
        path = spec.submodule_search_locations or ()
    return True


def refuse_install(requirements: Any = "", *_: Any) -> Any:
    """Stand in for Ultralytics' `check_requirements` where a checkpoint is loaded: no file makes pip install anything.

    Raises:
        ModelError: Always.
    """
    raise ModelError(
        f"the checkpoint needs a module that cannot be imported here, {quote(str(requirements))}: import what defines "
        "it first, if you trust where the file comes from"
    )


def get_refused_class(error: BaseException) -> str | None:
    """Return the class that a restricted load refused, or None for another error.

    torch writes `Unsupported global: GLOBAL module.Name was not an allowed global by default`.
    """
    match = re.search(r"Unsupported global: GLOBAL (\S+) ", str(error.__cause__ or error))
    return match[1] if match else None
