"""Files that are whole or absent, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from rtdetr_act.errors import InputError, quote


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the new one, whole, whenever the process or the machine stops.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is then untouched.
    """
    write_files_atomically({path: content})


def write_files_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write several files, all of them or none: they get their names when the last of them lies whole on the disk.

    After an error or Ctrl-C the old files are there as they were. A process killed while it renames leaves some of the
    files old and the others new, each of them whole. What a killed process left of the same files is removed first.

    Raises:
        OSError: The disk is full or a folder cannot be written.
    """
    partials: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            target = _resolve_link(path)
            remove_leftovers(target)
            partials[target] = partial_path(target)
            with partials[target].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _replace(partials)
    except BaseException:
        for partial in partials.values():
            _delete(partial)
        raise


def move_files_atomically(sources: Mapping[Path, Path]) -> None:
    """Give files and folders that were written elsewhere on the same disk their final names, all of them or none.

    Args:
        sources: Where each of them lies now, by its final path. A folder takes the place of a folder, a file of a file.

    Raises:
        OSError: One of them cannot be moved; then all are where they were, and so are the old files and folders.
    """
    moves = {_resolve_link(target): source for target, source in sources.items()}
    for target, source in moves.items():
        remove_leftovers(target)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                with path.open("r+b") as file:  # Windows flushes what is open for writing only
                    os.fsync(file.fileno())
    _replace(moves)


def partial_path(path: Path) -> Path:
    """Return where this process writes a file before it gets its name; short enough wherever the file's name is."""
    return path.with_name(f"{_hidden_name(path.name)}.{os.getpid()}.partial")


def remove_leftovers(path: Path) -> None:
    """Remove what processes that no longer run left beside a file or folder that they were writing.

    An old one that they had moved aside, and not replaced yet, gets its name back.
    """
    pattern = re.compile(re.escape(_hidden_name(path.name)) + r"\.(\d{1,9})\.(partial|before)")
    try:
        found = [match for each in path.parent.iterdir() if (match := pattern.fullmatch(each.name))]
    except OSError:  # no such folder: the error that follows says more
        return
    for match in found:
        if _is_running(int(match[1])):
            continue
        if match[2] == "before":
            _restore_or_discard(path.with_name(match[0]), path)
        else:
            _delete(path.with_name(match[0]))


@contextlib.contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents for what the body writes; if the body fails, those that are new and empty go again.

    Raises:
        OSError: The folder cannot be made, or is a file.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):  # it was not made after all, or another process writes there
                each.rmdir()
        raise


@contextlib.contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a write in the body, to a file or into a folder, into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {quote(str(path))}: {error.strerror or error}") from error


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make the folder that the body writes to at its end, as `create_folder` does.

    Raises:
        InputError: The folder cannot be made or written to, which is found before the body begins.
    """
    with contextlib.ExitStack() as stack:
        with convert_write_errors(folder):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"cannot write to {quote(str(folder))}: it is a file, not a folder")
            stack.enter_context(create_folder(folder))
            tempfile.TemporaryFile(dir=folder).close()
        yield


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the time is spent that its content takes.

    Raises:
        InputError: Its folder is not there or cannot be written to, it is a folder itself, or its name is too long.
    """
    with convert_write_errors(path):
        if path.is_dir():
            raise InputError(f"cannot write {quote(str(path))}: it is a folder")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {quote(str(path))}: there is no folder {quote(str(path.parent))}")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # raises for a name that is too long
        tempfile.TemporaryFile(dir=path.parent).close()


def _replace(moves: Mapping[Path, Path]) -> None:
    for target, source in moves.items():
        if target.is_dir() and not source.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if source.is_dir() and target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    if len(moves) == 1 and (source := next(iter(moves.values()))).is_file():
        source.replace(next(iter(moves)))  # in one step, so that there is nothing to put back
    else:
        _replace_all(moves)
    for folder in {target.parent for target in moves}:
        _sync_folder(folder)


def _replace_all(moves: Mapping[Path, Path]) -> None:
    """Rename all, keeping the old ones beside until the last is renamed."""
    befores = {target: target.with_name(f"{_hidden_name(target.name)}.{os.getpid()}.before") for target in moves}
    moving = False
    try:
        for target, before in befores.items():
            _restore_or_discard(
                before, target
            )  # left by a killed process that had this one's number, as happens in containers
            if target.is_file():
                _back_up(target, before)
        moving = True
        for target, source in moves.items():
            if target.is_dir():
                target.rename(befores[target])
            source.replace(target)
    except BaseException:
        for target, source in moves.items():
            if moving and not source.exists():
                target.replace(source)
            _restore_or_discard(befores[target], target)
        raise
    for before in befores.values():
        _delete(before)


def _back_up(target: Path, before: Path) -> None:
    try:
        os.link(target, before)
    except OSError:  # the disk has no hard links, as FAT: then the file is away for a moment
        target.rename(before)


def _restore_or_discard(before: Path, target: Path) -> None:
    """Give an old file or folder its name back where nothing has taken its place, else remove it."""
    if before.exists():
        if target.exists():
            _delete(before)
        else:
            before.rename(target)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _resolve_link(path: Path) -> Path:
    """Return what a link points to, which is to be written, and not the link."""
    return path.resolve() if path.is_symlink() else path


def _hidden_name(name: str) -> str:
    encoded = os.fsencode(name)
    # File systems limit a name to 255 bytes, encrypting ones to 143.
    return f".{name}" if len(encoded) <= 100 else f".{name[:24]}-{zlib.crc32(encoded):08x}"


def _is_running(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))


def _sync_folder(folder: Path) -> None:
    """Bring new names to the disk, where the system can; Windows does not open folders."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
