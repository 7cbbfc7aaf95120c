"""Files are whole or absent: after errors, Ctrl-C and kills between any two of their steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rtdetr_act import files
from rtdetr_act.files import (
    create_folder,
    move_files_atomically,
    partial_path,
    remove_leftovers,
    write_atomically,
    write_files_atomically,
)

EVENTS = ("open", "os.link", "os.rename", "os.remove", "os.rmdir")
# Runs code and dies, or is interrupted, at the file operation of a given number; without the package, whose import
# takes longer than all of this.
STOPPED = """
import os, sys
from pathlib import Path
from types import ModuleType
sys.modules["rtdetr_act"] = package = ModuleType("rtdetr_act")
package.__path__ = [{package!r}]
from rtdetr_act import files
count = 0
def watch(event, args):
    global count
    if armed and event in {events!r} and str(args[0]).startswith({folder!r}):
        count += 1
        if count == {number}:
            if {killed}:
                os._exit(9)
            raise KeyboardInterrupt
armed = False
sys.addaudithook(watch)
folder = Path({folder!r})
{prepare}
armed = True
{code}
armed = False
print("done")
"""
WRITE = "files.write_files_atomically({folder / 'a.json': b'new a', folder / 'b.png': b'new b'})"
STAGE = """
(folder / 'staged').mkdir(exist_ok=True)
(folder / 'staged' / 'one').write_text('new')
(folder / 'staged.bin').write_text('new')
"""
MOVE = "files.move_files_atomically({folder / 'model': folder / 'staged', folder / 'model.bin': folder / 'staged.bin'})"


def stop(folder: Path, number: int, code: str, *, prepare: str = "", killed: bool) -> int:
    text = STOPPED.format(
        package=str(Path(files.__file__).parent),
        events=EVENTS,
        folder=str(folder),
        number=number,
        prepare=prepare,
        code=code,
        killed=killed,
    )
    done = subprocess.run([sys.executable, "-S", "-c", text], capture_output=True, text=True)
    return 0 if "done" in done.stdout else done.returncode


def read_all(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def dead_process() -> int:
    ended = subprocess.run([sys.executable, "-S", "-c", "import os; print(os.getpid())"], capture_output=True)
    return int(ended.stdout)


OLD = {"a.json": "old a", "b.png": "old b"}
NEW = {"a.json": "new a", "b.png": "new b"}


def test_files_of_one_write_appear_together(tmp_path: Path) -> None:
    write_files_atomically({tmp_path / "a.json": b"new a", tmp_path / "b.png": b"new b"})
    assert read_all(tmp_path) == NEW


def test_no_file_is_written_where_one_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old a")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(IsADirectoryError):
        write_files_atomically({tmp_path / "a.json": b"new a", tmp_path / "b.png": b"new b"})
    assert read_all(tmp_path) == {"a.json": "old a"}
    with pytest.raises(FileNotFoundError):
        write_files_atomically({tmp_path / "a.json": b"new a", tmp_path / "gone" / "b.png": b"new b"})
    assert read_all(tmp_path) == {"a.json": "old a"}


@pytest.mark.kill
@pytest.mark.parametrize("killed", [False, True], ids=["interrupted", "killed"])
@pytest.mark.parametrize(
    ("code", "prepare", "old", "new"),
    [
        (WRITE, "", OLD, NEW),
        (MOVE, STAGE, {"model/one": "old", "model.bin": "old"}, {"model/one": "new", "model.bin": "new"}),
    ],
    ids=["write", "move"],
)
def test_files_are_whole_wherever_a_write_stops(
    code: str, prepare: str, old: dict[str, str], new: dict[str, str], killed: bool, tmp_path: Path
) -> None:
    for number in range(1, 60):
        folder = tmp_path / str(number)
        for name, text in old.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        ended = stop(folder, number, code, prepare=prepare, killed=killed)
        for name in {Path(name).parts[0] for name in old}:
            remove_leftovers(folder / name)
        left = {name: text for name, text in read_all(folder).items() if not name.startswith("staged")}
        if killed:
            assert left.keys() == old.keys()
            assert all(text in (old[name], new[name]) for name, text in left.items())
        else:
            assert left in (old, new)
        if not ended:
            assert left == new
            assert number > 4  # the steps before were all tried
            return
    raise AssertionError("the write never got through")


@pytest.mark.integration
def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = dead_process()
    path = tmp_path / "model.onnx"
    (tmp_path / f".model.onnx.{dead}.partial").write_text("half")
    (tmp_path / f".other.onnx.{dead}.partial").write_text("half")
    (tmp_path / f".model.onnx.{os.getppid()}.partial").write_text("half")  # being written
    write_atomically(path, b"new")
    assert sorted(read_all(tmp_path)) == [
        f".model.onnx.{os.getppid()}.partial",
        f".other.onnx.{dead}.partial",
        "model.onnx",
    ]


@pytest.mark.integration
def test_an_old_folder_that_a_killed_process_moved_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / f".model.{dead_process()}.before"
    aside.mkdir()
    (aside / "one").write_text("old")
    remove_leftovers(tmp_path / "model")
    assert read_all(tmp_path) == {"model/one": "old"}


def test_a_folder_takes_no_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("old")
    (tmp_path / "staged").mkdir()
    with pytest.raises(NotADirectoryError):
        move_files_atomically({tmp_path / "model": tmp_path / "staged"})
    assert read_all(tmp_path) == {"model": "old"}


@pytest.mark.parametrize("letter", ["a", "ä", "猫"])
def test_the_partial_has_room_where_the_file_has(letter: str, tmp_path: Path) -> None:
    try:
        size = len(os.fsencode(letter))
    except UnicodeEncodeError:
        pytest.skip("this system's encoding has no such letter")
    name = letter * (251 // size) + ".png"
    write_atomically(tmp_path / name, b"new")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert partial_path(Path("a" * 250 + ".png")) != partial_path(Path("a" * 250 + ".svg"))
    with pytest.raises(OSError, match=r"too long|cannot find|syntax"):
        write_atomically(tmp_path / ("a" * 300), b"new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_is_written_through(tmp_path: Path, symlink: Callable[[Path, Path], None]) -> None:
    (tmp_path / "there").mkdir()
    symlink(tmp_path / "link.png", tmp_path / "there" / "real.png")
    write_atomically(tmp_path / "link.png", b"new")
    assert (tmp_path / "link.png").is_symlink()
    assert read_all(tmp_path / "there") == {"real.png": "new"}


@pytest.fixture
def symlink() -> Callable[[Path, Path], None]:
    def make(link: Path, target: Path) -> None:
        try:
            link.symlink_to(target)
        except OSError:
            pytest.skip("no links on this system")

    return make


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(OSError, match="full"), create_folder(tmp_path / "kept" / "a" / "b"):
        raise OSError("full")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "kept"]
    with create_folder(tmp_path / "kept" / "a"):
        (tmp_path / "kept" / "a" / "file").write_text("new")
    assert read_all(tmp_path) == {"kept/a/file": "new"}
