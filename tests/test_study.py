"""A study as a user meets it: real processes, killed and gone on with, compared with trainings outside of any study."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import tiny
import torch
from conftest import Data, Run
from records import make_folder
from rich.console import Console
from typer.testing import CliRunner

from rtdetr_act import load_model, patch_model
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, RtdetrActError, TrainingError
from rtdetr_act.evaluation.detection_files import encode_detections, encode_scores
from rtdetr_act.files import write_atomically
from rtdetr_act.integrations.ultralytics.detections import collect_detections
from rtdetr_act.study.display import Display
from rtdetr_act.study.local import Slot, divide_into_slots, find_slots
from rtdetr_act.study.process import explain_exit, read_progress
from rtdetr_act.study.report import report_study
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.runner import run_study
from rtdetr_act.study.storage import lock_folder, write_json

EPOCHS = 3
ARGUMENTS = [f"epochs={EPOCHS}", "imgsz=64", "batch=4", "nbs=8", "amp=False", "plots=False", "deterministic=False"]
ARGUMENTS += ["optimizer=AdamW", "lr0=0.003", "verbose=False"]
MAIN = "from rtdetr_act.cli.main import main; main()"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def start(folder: Path, *words: str, **more: object) -> subprocess.Popen[str]:
    """Start `rtdetr-act study` in a process of its own."""
    command = [sys.executable, "-c", MAIN, "study", "--output", str(folder), *words]
    return subprocess.Popen(
        command, cwd=folder.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more
    )


def works_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if "rtdetr_act.study.worker" in p.cmdline()]


def wait_for(condition: object, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def study(stock_yaml: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Kill a study of two variants once with -9 and once with Ctrl-C, then let it end."""
    folder = tmp_path_factory.mktemp("studies") / "small"
    words = ["--act", "stock", "--act", "arelu", "--seeds", "1", "--cpus", "1", *ARGUMENTS]
    words += ["--model", str(stock_yaml), "--data", str(data.detect)]
    outputs = []
    for kill in ("SIGKILL", "SIGINT"):
        with start(folder, *words) as process:
            try:
                before = count_steps(folder)
                wait_for(lambda before=before: count_steps(folder) != before)
                works = works_of(process)
            finally:
                process.send_signal(getattr(signal, kill))
            outputs.append(process.communicate(timeout=60)[0])
        _, alive = psutil.wait_procs(works, timeout=20)
        assert not alive, "a run went on without its study"
    result = CliRunner().invoke(app, ["study", "--output", str(folder), *words], catch_exceptions=False)
    outputs.append(result.output)
    assert result.exit_code == 0, outputs[-1]
    return folder, outputs


def count_steps(folder: Path) -> tuple[int, int]:
    """Return how many runs are behind their first epoch, and how many are finished."""
    return len(list(folder.glob("runs/*/snapshot.pt"))), len(list(folder.glob("runs/*/result.json")))


posix = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.mark.kill
@posix
def test_killed_study_equals_trainings_outside_of_it(
    study: tuple[Path, list[str]], stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    from ultralytics import RTDETR

    folder, _ = study
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["arelu-s0", "stock-s0"]
    logs = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("log.txt"))
    assert "Resuming training" in logs, "no run was killed behind its first epoch"
    for name in ("stock-s0", "arelu-s0"):
        model = RTDETR(str(stock_yaml))
        if name.startswith("arelu"):
            patch_model(model, "arelu")
        more = {"epochs": EPOCHS, "nbs": 8, "lr0": 0.003, "warmup_epochs": 3.0, "workers": 8}
        model.train(**tiny.train_args(data.detect, tmp_path / name, **more, seed=0))
        expected = pl.read_csv(tmp_path / name / "run" / "results.csv").drop("time", strict=False)
        found = pl.read_csv(folder / "runs" / name / "results.csv").drop("time", strict=False)
        assert found.equals(expected)
        histories = [path / "activations.csv" for path in (tmp_path / name / "run", folder / "runs" / name)]
        if name.startswith("arelu"):
            assert histories[0].read_bytes() == histories[1].read_bytes()
        else:
            assert not any(path.exists() for path in histories)
        result = read_json(folder / "runs" / name / "result.json")
        assert result["scores"]["mAP50-95"] == pytest.approx(model.metrics.box.map)
        assert (result["precision"], result["recall"]) == pytest.approx((model.metrics.box.mp, model.metrics.box.mr))
        assert result["epochs"] == EPOCHS
        assert not (folder / "runs" / name / "snapshot.pt").exists()


@pytest.mark.kill
@posix
def test_runs_keep_what_they_find(study: tuple[Path, list[str]], data: Data, tmp_path: Path) -> None:
    run = study[0] / "runs" / "arelu-s0"
    found = collect_detections(load_model(run / "weights" / "best.pt"), data=str(data.detect), imgsz=64, batch=4)
    for name, encode in (("detections.npz", encode_detections), ("scores.npz", encode_scores)):
        with np.load(run / name, allow_pickle=False) as kept, np.load(io.BytesIO(encode(*found))) as expected:
            assert set(kept) == set(expected) and len(kept)
            for key in kept:
                if kept[key].dtype.kind == "f":
                    np.testing.assert_allclose(kept[key], expected[key], atol=2e-3)
                else:
                    assert (kept[key] == expected[key]).all(), key


@pytest.mark.kill
@posix
def test_interrupted_study_says_how_to_go_on(study: tuple[Path, list[str]]) -> None:
    _, (_, interrupted, last) = study
    assert "interrupted; nothing is lost: the same command continues" in interrupted
    assert "Traceback" not in interrupted + last
    assert re.search(r"(stock|arelu)-s0: done, mAP50 0\.\d+  mAP50-95 0\.\d+", last)


@pytest.mark.kill
@posix
def test_results_are_tables_and_a_page(study: tuple[Path, list[str]]) -> None:
    folder, _ = study
    board = pl.read_csv(folder / "leaderboard.csv")
    assert sorted(board["variant"]) == ["arelu", "stock"]
    assert board["runs"].to_list() == [1, 1]
    assert (board["latency_ms"] > 0).all()
    assert board.filter(pl.col("variant") == "arelu")["pairs"].item() == 1
    assert pl.read_parquet(folder / "leaderboard.parquet").columns == board.columns
    assert "nothing was learned" in (folder / "leaderboard.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "rtdetr-act train model=" in page and " act=arelu " in page
    shapes = read_json(folder / "runs" / "arelu-s0" / "activations.json")
    assert len(shapes["sites"]) == 25
    site = shapes["sites"][0]
    # AReLU starts with the slopes 1 + sigmoid(2) and 0.9; three epochs of Adam move them.
    assert site["before"][-1] == pytest.approx(4 * (1 + 1 / (1 + math.exp(-2))), abs=1e-3)
    assert site["before"] != site["after"]
    assert not (folder / "runs" / "stock-s0" / "activations.json").exists()


@pytest.mark.kill
@posix
def test_finished_study_is_not_done_again(study: tuple[Path, list[str]]) -> None:
    folder, _ = study
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = report_study(folder)
    assert {line.variant for line in report.rows} == {"arelu", "stock"}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "the same bytes again"
    assert {path.name for path in report.files} == {f"leaderboard.{end}" for end in ("csv", "parquet", "md")} | {
        "report.html"
    }


@pytest.mark.kill
@posix
def test_failures_are_recorded_and_the_study_goes_on(data: Data, tmp_path: Path) -> None:
    """The disk has no room for the weights at first; then one value makes the loss infinite, and the other is well."""
    model = tiny.write_yaml(tmp_path / "yolo.yaml", tiny.yolo())
    words = ["--act", "stock", "--seeds", "1", "--retries", "0", "--model", str(model), "--data", str(data.detect)]
    words += [*ARGUMENTS, "epochs=1", "cls=[1e38,0.5]"]
    with tiny.full_disk(60_000):  # of the processes of the runs, too
        full = CliRunner().invoke(app, ["study", "--output", str(tmp_path / "s"), *words])
    first = full.output
    assert isinstance(full.exception, TrainingError), first
    # It diverges before there is anything to save; that is an outcome, which another try would only meet again.
    assert re.search(r"stock-cls-1e-38-s0: failed, the loss became (nan|inf) in epoch 1", first)
    attempts = read_json(tmp_path / "s" / "runs" / "stock-cls-0.5-s0" / "attempts.json")
    assert "File too large" in attempts[0]["reason"]

    again = CliRunner().invoke(app, ["study", "--output", str(tmp_path / "s"), *words])
    assert isinstance(again.exception, TrainingError), again.output
    assert str(again.exception).startswith("1 runs gave no score")
    assert "stock-cls-1e-38-s0: started" not in again.output
    board = pl.read_csv(tmp_path / "s" / "leaderboard.csv")
    assert board["variant"].to_list() == ["stock cls=0.5", "stock cls=1e+38"]
    assert board["runs"].to_list() == [1, 0]
    assert board["failed"].to_list() == [0, 1]


@pytest.mark.integration
def test_second_study_in_a_folder_says_so(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        other = start(tmp_path, "--act", "stock", "--data", "shapes", "epochs=1")
        output, _ = other.communicate(timeout=120)
    assert other.returncode == 2
    assert f"error: another process is working in '{tmp_path}'" in output.replace("\n", "")
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


@pytest.mark.kill  # the engine kills what a worker may have left
def test_function_runs_a_study_as_the_command_does(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    file = tiny.write_yaml(
        tmp_path / "study.yaml",
        {"activations": ["stock", "arelu"], "seeds": 1, "model": str(stock_yaml), "data": str(data.detect),
         "epochs": 1, "imgsz": 64, "batch": 4, "amp": False, "plots": False, "deterministic": False},
    )  # fmt: skip
    report = run_study(file, tmp_path / "study")
    assert repr(report) == "<StudyReport: 2 variants, 2 finished runs>"
    assert {row.variant: row.is_baseline for row in report.rows} == {"stock": True, "arelu": False}
    assert all(path.is_file() for path in report.files)
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("runs/*/result.json")}
    again = run_study(str(file), str(tmp_path / "study"))
    assert again.to_dict() == report.to_dict() and len(results) == 2  # where unknown numbers are equal
    assert results == {path: path.stat().st_mtime_ns for path in results}, "what is done is not done again"


def test_function_reports_a_study_whose_runs_are_done(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "study")
    before = signal.getsignal(signal.SIGTERM)
    report = run_study({"activations": ["stock", "arelu"], "seeds": 2, "epochs": 2}, folder)
    assert [row.variant for row in report.rows] == ["arelu", "stock"]
    assert signal.getsignal(signal.SIGTERM) is before, "the handlers of the caller are left alone"


@pytest.mark.parametrize(
    ("definition", "error"),
    [
        ({"activation": "arelu"}, "^the study has an unknown key 'activation'; did you mean 'activations'"),
        ({}, "^a study needs activations"),
        ("nowhere.yaml", "^cannot read 'nowhere.yaml'|^there is no"),
        ({"activations": ["arelu"], "lr0": -1.0}, "lr0"),
    ],
)
def test_function_says_what_is_wrong(definition: Any, error: str, tmp_path: Path) -> None:
    with pytest.raises(RtdetrActError, match=error):
        run_study(definition, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_function_refuses_options_of_another_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="engine"):
        run_study({"activations": ["arelu"]}, tmp_path / "study", halving=True)


def test_dry_run_prints_rows_and_writes_nothing(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    words = ["--act", "stock", "--act", "arelu", "--seeds", "2", "--dry-run", "--model", str(stock_yaml)]
    words += ["--data", str(data.detect), "epochs=2", "imgsz=64", "batch=4"]
    result = CliRunner().invoke(app, ["study", "--output", str(tmp_path / "s"), *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("stock-s0", "arelu-s0", "stock-s1", "arelu-s1"))
    assert re.search(r"about \d+ (s|min) with \d+ at once", result.output)
    assert not (tmp_path / "s").exists()


def test_ultralytics_runs_made_without_us_are_reported(stock_run: Run, patched_run: Run, tmp_path: Path) -> None:
    import shutil

    for name, run in (("one", stock_run), ("two", patched_run)):
        shutil.copytree(run.pt.parents[1], tmp_path / name)
    records = {record.name: record for record in read_runs(tmp_path)}
    assert {record.activation for record in records.values()} == {"stock", "arelu"}
    assert all(record.state == "done" and record.epochs == 1 for record in records.values())
    assert records["two"].variant == "arelu", "folders and names of models are no settings"
    assert records["two"].parameters > records["one"].parameters
    assert {line.variant: line.is_baseline for line in report_study(tmp_path).rows} == {"stock": True, "arelu": False}
    with pytest.raises(InputError, match="the baseline 'relu' is not one of the activations: arelu, stock"):
        report_study(tmp_path, baseline="relu")


def test_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run in"):
        report_study(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        report_study(tmp_path / "nowhere")


def test_places_divide_the_machine() -> None:
    assert divide_into_slots([], ["0", "1"], 8, None) == [Slot("0", 0), Slot("1", 0)]
    assert divide_into_slots(["0", "1"], ["4", "5", "6", "7"], 8, None) == [Slot("4,5", 0), Slot("6,7", 0)]
    assert divide_into_slots(["2"], ["0", "1", "2"], 8, None) == [Slot("2", 0)]
    assert divide_into_slots([], [], 8, None) == [Slot("cpu", 1)] * 8
    assert divide_into_slots(["cpu"], ["0"], 8, 3) == [Slot("cpu", 3)] * 2
    assert divide_into_slots(["mps"], [], 8, None) == [Slot("mps", 1)]
    with pytest.raises(InputError, match="cpus=9 is not possible: this process may use 8 cores"):
        divide_into_slots([], [], 8, 9)
    with pytest.raises(InputError, match=r"this machine has 1 GPU$"):
        divide_into_slots(["0", "1"], ["0"], 8, None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_study_uses_the_cores_that_it_may(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert find_slots(None, None) == [Slot("cpu", 1)] or torch.cuda.is_available()
        with pytest.raises(InputError, match=r"may use 1 core$"):
            find_slots("cpu", 2)
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.kill
def test_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with tiny.full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, b"x" * 5000)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_ends_are_explained(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("Traceback\nRuntimeError: CUDA out of memory. Tried to allocate 2 GiB\n\n")
    assert explain_exit(tmp_path, 1) == "out of memory: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    (tmp_path / "log.txt").write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
    assert explain_exit(tmp_path, 1) == "exit code 1: OSError: [Errno 28] No space left on device"
    if os.name == "posix":
        assert explain_exit(tmp_path, -9) == "killed by SIGKILL, as the system does when memory runs out"


def test_progress_of_half_written_results_is_none(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    results.write_text("epoch,time,metrics/mAP50(B),metrics/mAP50-95(B)\n1,2.5,0.5,0.25\n2,5,0.6,0.375\n")
    assert read_progress(tmp_path).epochs == 2
    assert read_progress(tmp_path).score == 0.375
    results.write_text("epoch,time,metrics/mAP50(B),metrics/mAP50-95(B)\n1,2.5,0.")
    assert read_progress(tmp_path).epochs == 0


@pytest.mark.kill
def test_terminal_shows_a_table_of_what_runs(study: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = study
    (tmp_path / "new").mkdir()
    row = read_json(next((folder / "runs").iterdir()) / "run.json")
    write_json(tmp_path / "new" / "run.json", {**row, "name": "new", "arguments": {"epochs": 4}})
    (tmp_path / "new" / "results.csv").write_text("epoch,time,metrics/mAP50-95(B)\n1,30,0.125\n")
    console = Console(force_terminal=True, width=100, record=True)
    with Display([*sorted((folder / "runs").iterdir()), tmp_path / "new"], console) as display:
        display([tmp_path / "new"])
        text = console.export_text(clear=False)
    assert "2 of 3 runs are finished already" in text
    assert re.search(r"new\s+│\s+1 of 4\s+│\s+0\.1250\s+│\s+90 s", text)
    assert "1 running" in text
