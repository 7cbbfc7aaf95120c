"""Atomic writes: files are complete or absent, even if the process or the machine stops at any moment."""

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
    """Write a file atomically: at any moment it is either the complete old one or the complete new one.

    Args:
        path: File to write or replace; its folder must exist.
        content: The new content.

    Raises:
        OSError: The disk is full or the folder is not writable; the old file is then unchanged.
    """
    write_files_atomically({path: content})


def write_files_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write several files, all of them or none: they are renamed once the last of them is complete on the disk.

    After an error or Ctrl-C the old files are unchanged. A process killed while it renames leaves some files old and
    the others new, each of them complete. Temporary files of killed processes are removed first.

    Args:
        contents: New contents by path; the folders must exist.

    Raises:
        OSError: The disk is full or a folder is not writable.
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
    """Move files and folders to their final paths on the same disk, all of them or none.

    Args:
        sources: Current path by final path. A folder may replace a folder, and a file may replace a file.

    Raises:
        OSError: One of them cannot be moved; all sources and targets are then unchanged.
    """
    moves = {_resolve_link(target): source for target, source in sources.items()}
    for target, source in moves.items():
        remove_leftovers(target)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                with path.open("r+b") as file:  # Windows flushes only files open for writing
                    os.fsync(file.fileno())
    _replace(moves)


def partial_path(path: Path) -> Path:
    """Return the temporary path beside `path` to which this process writes before it renames.

    The name is short enough for any file system that allows the name of `path`.
    """
    return path.with_name(f"{_hidden_name(path.name)}.{os.getpid()}.partial")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed processes left beside a file or folder they were writing.

    An old file that was moved aside and not yet replaced is restored.
    """
    pattern = re.compile(re.escape(_hidden_name(path.name)) + r"\.(\d{1,9})\.(partial|before)")
    try:
        matches = [match for each in path.parent.iterdir() if (match := pattern.fullmatch(each.name))]
    except OSError:  # no such folder: the write that follows raises a clearer error
        return
    for match in matches:
        if _is_running(int(match[1])):
            continue
        if match[2] == "before":
            _restore_or_discard(path.with_name(match[0]), path)
        else:
            _delete(path.with_name(match[0]))


@contextlib.contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Create a folder for the body of a `with` statement, and remove it if the body fails; a context manager.

    Parents are created too. Only folders that were created and are still empty are removed.

    Raises:
        OSError: The folder cannot be created, or is a file.
    """
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in created:
            with contextlib.suppress(OSError):  # it was not created, or another process writes there
                each.rmdir()
        raise


@contextlib.contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError raised by the body of a `with` statement into an InputError; a context manager.

    Args:
        path: File or folder that the body writes, which the message names.

    Raises:
        InputError: The body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {quote(str(path))}: {error.strerror or error}") from error


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Create a writable folder for the body of a `with` statement, as `create_folder` does; a context manager.

    Raises:
        InputError: The folder cannot be created or written to; raised before the body runs.
    """
    with contextlib.ExitStack() as stack:
        with convert_write_errors(folder):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"cannot write to {quote(str(folder))}: it is a file, not a folder")
            stack.enter_context(create_folder(folder))
            tempfile.TemporaryFile(dir=folder).close()
        yield


def check_writable(path: Path) -> None:
    """Check that a file can be written, before its content is computed.

    Raises:
        InputError: Its folder does not exist or is not writable, the path is a folder, or its name is too long.
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
    """Rename each source to its target, all of them or none; folders replace folders, files replace files."""
    for target, source in moves.items():
        if target.is_dir() and not source.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if source.is_dir() and target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    if len(moves) == 1 and (source := next(iter(moves.values()))).is_file():
        source.replace(next(iter(moves)))  # atomic by itself, so that there is nothing to restore
    else:
        _replace_all(moves)
    for folder in {target.parent for target in moves}:
        _sync_folder(folder)


def _replace_all(moves: Mapping[Path, Path]) -> None:
    """Rename several files or folders, with backups of the old ones until the last is renamed."""
    backups = {target: target.with_name(f"{_hidden_name(target.name)}.{os.getpid()}.before") for target in moves}
    moving = False
    try:
        for target, backup in backups.items():
            # Left by a killed process with the same ID, as happens in containers.
            _restore_or_discard(backup, target)
            if target.is_file():
                _back_up(target, backup)
        moving = True
        for target, source in moves.items():
            if target.is_dir():
                target.rename(backups[target])
            source.replace(target)
    except BaseException:
        for target, source in moves.items():
            if moving and not source.exists():
                target.replace(source)
            _restore_or_discard(backups[target], target)
        raise
    for backup in backups.values():
        _delete(backup)


def _back_up(target: Path, backup: Path) -> None:
    """Link a file to its backup, or move it there where the file system has no hard links."""
    try:
        os.link(target, backup)
    except OSError:  # such as FAT: the file is missing until the new one is renamed
        target.rename(backup)


def _restore_or_discard(backup: Path, target: Path) -> None:
    """Rename a backup to its target if the target is missing, else remove the backup."""
    if backup.exists():
        if target.exists():
            _delete(backup)
        else:
            backup.rename(target)


def _delete(path: Path) -> None:
    """Remove a file or folder, ignoring errors."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _resolve_link(path: Path) -> Path:
    """Return the target of a symbolic link, so that writing does not replace the link; other paths as they are."""
    return path.resolve() if path.is_symlink() else path


def _hidden_name(name: str) -> str:
    """Return a name with a leading dot, shortened by a checksum if it is long."""
    encoded = os.fsencode(name)
    # File systems limit a name to 255 bytes, encrypting ones to 143.
    return f".{name}" if len(encoded) <= 100 else f".{name[:24]}-{zlib.crc32(encoded):08x}"


def _is_running(process: int) -> bool:
    """Return whether a process with this ID exists."""
    import psutil

    return bool(psutil.pid_exists(process))


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk; does nothing on Windows, which cannot open folders."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
