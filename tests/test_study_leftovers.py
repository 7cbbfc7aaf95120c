"""Commands that fail in their checks, on a full disk or by Ctrl-C: what they leave, and that nothing is in the way."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Data
from records import DEFAULTS, make_folder
from typer.testing import CliRunner

from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.files import partial_path
from rtdetr_act.study.grid import Study, expand_study, make_study
from rtdetr_act.study.local import divide_into_slots, find_slots
from rtdetr_act.study.preparation import prepare_runs
from rtdetr_act.study.report import report_study
from rtdetr_act.study.search import make_search, run_rungs
from rtdetr_act.study.storage import lock_folder

posix = pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
has_ray = importlib.util.find_spec("ray") is not None


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return all below a folder, with the contents of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


WRONG = [
    (["device=77"], "device=77 is not available: this machine has"),
    (["device=0,1,2,3,4,5,6,7,8"], "is not available: this machine has"),
    (["device=0,0"], "name each GPU once"),
    (["device=cpu,0"], "name each GPU once, and nothing else"),
    (["device=toaster"], "device='toaster' is not available"),
    (["--cpus", "999"], "cpus=999 is not possible: this process may use"),
    (["--seeds", "100000000"], "are too many"),
    (["batch=0"], "batch"),
    (["batch=-1"], "batch=-1 would choose a size per variant"),
    (["batch=None"], "batch"),
    (["epochs=0"], "epochs"),
    (["epochs=None"], "epochs"),
    (["epochs=True"], "epochs"),
    (["imgsz=-1"], "imgsz"),
    (["imgsz=0"], "imgsz"),
    (["imgsz=big"], "imgsz"),
    (["imgsz=None"], "imgsz"),
    (["lr0=nan"], "lr0"),
    (["lr0={'a': 1}"], "lr0"),
    (["epochs={[]:1}"], "epochs"),
    (["--scope", "foo"], "scope"),
    (["--act-lr", "nan"], "act_lr"),
    (["--model", "nowhere.yaml"], "there is no model"),
    (["--data", "nowhere.yaml"], "there is no data set"),
]
STUDY_WRONG = [
    (["--baseline", "mish"], "the baseline 'mish' is not one of the activations"),
    (["--engine", "slurm"], "engine must be local or ray, not 'slurm'"),
    (["--address", "10.0.0.1:1"], "address= and halving= need engine=ray"),
    (["--act", "arelu"], "'arelu' is given twice"),
    (["lr0=[0.1,0.1]"], "'lr0' has 0.1 twice"),
]


@pytest.mark.integration
@pytest.mark.parametrize("command", ["study", "search"])
@pytest.mark.parametrize("there", [False, True])
def test_commands_that_fail_in_their_checks_leave_nothing(
    command: str, there: bool, stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    if command == "study":
        acts, cases = ["--act", "stock", "--act", "arelu"], [*WRONG, *STUDY_WRONG]
        if not has_ray:
            cases.append((["--engine", "ray"], "engine=ray needs Ray: pip install"))
    else:
        acts, cases = ["--act", "arelu,silu"], [*WRONG, (["--budget", "1"], "is too small")]
    for words, sentence in cases:
        options = {"--model": str(stock_yaml), "--data": str(data.detect)}
        options |= dict(zip(words[::2], words[1::2], strict=False)) if words[0] in options else {}
        rest = [] if words[0] in options else words
        given = [command, *acts, "-o", str(folder), *(word for pair in options.items() for word in pair), *rest]
        result = CliRunner().invoke(app, given)
        assert isinstance(result.exception, RtdetrActError), (words, result.exception)
        assert re.search(re.escape(sentence), str(result.exception)), (words, result.exception)
        assert tree(tmp_path) == before, words


@pytest.mark.parametrize("command", ["study", "search", "report"])
def test_outputs_that_cannot_be_are_refused_first(command: str, stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    (tmp_path / "taken" / "search.md").mkdir(parents=True)
    before = tree(tmp_path)
    words = ["--act", "arelu,silu", "--model", str(stock_yaml), "--data", str(data.detect), "-o"]
    words = [] if command == "report" else words
    for name in ("file", "file/below", "x" * 300, f"new/{'x' * 300}/y", "taken"):
        output = [str(tmp_path / name)]
        result = CliRunner().invoke(app, [command, *words, *output])
        assert isinstance(result.exception, InputError), (name, result.exception)
        assert len(str(result.exception)) < 400
        assert tree(tmp_path) == before


def test_the_corrected_command_works_in_the_same_folder(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    given = {"activations": ["stock"], "model": str(stock_yaml), "data": str(data.detect), "seeds": 1}
    for batch, fails in ((0, True), (4, False)):
        study = make_study({**given, "batch": batch}, defaults=DEFAULTS)
        with pytest.raises(InputError) if fails else nullcontext(), lock_folder(tmp_path / "study"):
            prepare_runs(study, tmp_path / "study")
    assert sorted(tree(tmp_path)) == [
        "study", "study/.lock", "study/runs", "study/runs/stock-s0", "study/runs/stock-s0/run.json", "study/study.json",
    ]  # fmt: skip


def refuse(study: Study, folders: Sequence[Path]) -> None:
    raise KeyboardInterrupt


def test_search_writes_its_picks_behind_the_checks(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    settings = {"budget": 15, "seeds": 1, "scope": "conv", "act_lr": 1.0, "arguments": {"epochs": 3}}
    wrong = make_search(["arelu,silu"], model=str(stock_yaml), data=str(tmp_path / "nowhere.yaml"), **settings)
    with pytest.raises(InputError, match="there is no data set"):
        run_rungs(wrong, tmp_path, refuse)
    assert tree(tmp_path) == {}
    right = make_search(["arelu,silu"], model=str(stock_yaml), data=str(data.detect), **settings)
    with pytest.raises(KeyboardInterrupt):
        run_rungs(right, tmp_path, refuse)
    assert {"search.json", "rung0/picks.json", "rung0/study.json"} < set(tree(tmp_path))


def test_lock_goes_with_the_command_that_made_it_and_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), lock_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        raise ValueError("no")
    assert tree(tmp_path) == {}
    with lock_folder(tmp_path / "a"):
        with pytest.raises(InputError, match="another process is working in"), lock_folder(tmp_path / "a"):
            pass
        assert sorted(tree(tmp_path)) == ["a", "a/.lock"]
    with pytest.raises(ValueError, match="no"), lock_folder(tmp_path / "a"):
        raise ValueError("no")
    assert sorted(tree(tmp_path)) == ["a", "a/.lock"], "it was there before"


@pytest.mark.kill
@posix
def test_full_disk_writes_all_rows_or_none(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    given = {"activations": ["stock", "arelu"], "model": str(stock_yaml), "data": str(data.detect), "seeds": 2}
    study = make_study({**given, "epochs": 1}, defaults=DEFAULTS)
    (tmp_path / "runs" / "arelu-s1").mkdir(parents=True)
    stale = partial_path(tmp_path / "runs" / "arelu-s1" / "run.json")
    stale = stale.with_name(stale.name.replace(str(os.getpid()), "999999999"))
    stale.write_text("of a killed process")
    with tiny.full_disk(100), pytest.raises(InputError, match="File too large; nothing was started"):
        prepare_runs(study, tmp_path)
    assert set(tree(tmp_path)) <= {"runs"}, "leftovers of the killed process are cleared too"
    assert len(prepare_runs(study, tmp_path)) == 4


def test_the_snapshot_of_a_run_that_is_done_is_removed(tmp_path: Path) -> None:
    """The process that made it was killed between its result and that."""
    folder = make_folder(tmp_path)
    study = make_study({"activations": ["stock", "arelu"], "seeds": 2, "epochs": 2}, defaults=DEFAULTS)
    snapshots = [folder / "runs" / row.name / "snapshot.pt" for row in expand_study(study)]
    for path in snapshots:
        path.touch()
    (snapshots[1].parent / "result.json").unlink()
    prepare_runs(study, folder)
    assert [path for path in snapshots if path.exists()] == [snapshots[1]], "it goes on from there"


@pytest.mark.kill
@posix
@pytest.mark.parametrize("size", [100, 2000, 100_000, 1_000_000])
def test_full_disk_leaves_the_old_report_whole(size: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "study")
    report_study(folder)
    before = tree(folder)
    (folder / "runs" / "arelu-s0" / "result.json").write_text('{"state": "failed", "reason": "no"}')
    changed = tree(folder)
    with tiny.full_disk(size), pytest.raises(InputError, match="File too large; its files are unchanged"):
        report_study(folder)
    assert tree(folder) == changed
    report_study(folder)
    after = tree(folder)
    assert {name for name in before if before[name] != after[name]} == {
        "leaderboard.csv", "leaderboard.parquet", "leaderboard.md", "report.html", "runs/arelu-s0/result.json",
    }  # fmt: skip


@posix
def test_ctrl_c_while_a_report_is_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "study")
    report_study(folder)
    (folder / "runs" / "arelu-s0" / "result.json").write_text('{"state": "failed", "reason": "no"}')
    before, synced = tree(folder), os.fsync
    for last in range(4):
        calls: list[int] = []

        def interrupt(file: int, calls: list[int] = calls, last: int = last) -> None:
            calls.append(file)
            if len(calls) > last:
                raise KeyboardInterrupt
            synced(file)

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            report_study(folder)
        monkeypatch.setattr(os, "fsync", synced)
        assert tree(folder) == before


def test_gpus_that_are_not_there_are_refused() -> None:
    for device, gpus in ((["77"], []), (["2"], ["0", "1"]), (["0", "1"], ["0"]), (["0"], [])):
        with pytest.raises(InputError, match="this machine has"):
            divide_into_slots(device, gpus, 8, None)
    before = dict(os.environ)
    with pytest.raises(InputError, match="is not available"):
        find_slots("toaster", None)
    assert find_slots("cpu", 1)[0].device == "cpu"
    assert dict(os.environ) == before


def dry_run(command: str, *words: str, folder: Path, stock_yaml: Path) -> Any:
    given = [command, *words, "--model", str(stock_yaml), "-o", str(folder), "--dry-run", "--cpus", "1", "imgsz=64"]
    return CliRunner().invoke(app, given)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("study", ["--act", "stock", "--seeds", "1"]),
        ("search", ["--act", "arelu,silu", "--budget", "15", "--seeds", "1", "epochs=3"]),
    ],
)
def test_dry_runs_write_and_download_nothing(
    command: str, words: list[str], stock_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = dry_run(command, *words, folder=tmp_path / "found", stock_yaml=stock_yaml)
    assert found.exit_code == 0, found.exception
    assert "about" in found.output
    assert tree(tmp_path) == {}, "the embedded data set is drawn when a run needs it"
    missing = dry_run(command, *words, "--data", "coco8.yaml", folder=tmp_path / "found", stock_yaml=stock_yaml)
    assert isinstance(missing.exception, InputError)
    assert "are not here, and this command downloads nothing" in str(missing.exception)
    assert tree(tmp_path) == {}
