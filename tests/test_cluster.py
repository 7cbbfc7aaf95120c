"""Studies with Ray: two local nodes of one CPU each, real runs, and the engine of one machine to compare with."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch

from rtdetr_act.errors import InputError
from rtdetr_act.study import cluster
from rtdetr_act.study.engines import open_engine
from rtdetr_act.study.grid import expand_study, make_study, read_run_config
from rtdetr_act.study.local import Slot
from rtdetr_act.study.local import run_locally as run_here
from rtdetr_act.study.preparation import is_study_finished
from rtdetr_act.study.process import LOG_FILE, is_finished, kill_run, read_progress, release_run, start_run
from rtdetr_act.study.storage import ATTEMPTS_FILE, RESULT_FILE, RUN_FILE, RUNS_FOLDER, SNAPSHOT_FILE, write_json

with suppress(ImportError):  # an extra, which slows the start of every training: `make test-ray` brings it
    import ray


pytestmark = pytest.mark.kill  # so end the two nodes, in the teardown of whichever test is the last


@pytest.fixture(scope="module")
def installed() -> None:
    """Skip a test without Ray."""
    pytest.importorskip("ray", reason="make test-ray runs these")


@pytest.fixture(scope="module")
def address(installed: None) -> Iterator[str]:
    """Start two nodes."""
    cluster._import_ray()  # keeps Ray quiet
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def write_rows(folder: Path, **given: Any) -> list[Path]:
    """Write the runs of a study of tiny models into a folder."""
    tiny_ones = tiny.train_args(Path(), Path())
    arguments = {key: value for key, value in tiny_ones.items() if key not in ("data", "project", "name", "exist_ok")}
    rows = expand_study(make_study({**arguments, **given}, defaults={}))
    for row in rows:
        (folder / row.name).mkdir(parents=True)
        write_json(folder / row.name / RUN_FILE, row.to_plain())
    return [folder / row.name for row in rows]


DONE = b'{"state": "done", "scores": {"mAP50-95": 0.5}}'


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run_on_ray(folders: Sequence[Path], address: str | None, **more: Any) -> None:
    """Run with the engine under test, on CPUs."""
    given = {"device": "cpu", "cpus": None, "retries": 0, "halving": None, **more}
    watch = given.pop("watch", lambda _: None)
    with open_engine("ray", address=address, **given) as run:
        run(folders, watch=watch)


def read_table(folder: Path) -> list[dict[str, str]]:
    """Return the rows of results.csv without their times."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return [
            {name.strip(): cell for name, cell in row.items() if name.strip() != "time"} for row in csv.DictReader(file)
        ]


def test_results_are_those_of_one_machine(address: str, data: Any, stock_yaml: Path, tmp_path: Path) -> None:
    given = {"activations": ["stock", "arelu"], "model": str(stock_yaml), "data": str(data.detect), "epochs": 2}
    there, here = write_rows(tmp_path / "ray", **given, seeds=1), write_rows(tmp_path / "queue", **given, seeds=1)
    [missing] = write_rows(tmp_path / "ray", **{**given, "activations": ["mish"], "data": "nowhere.yaml"}, seeds=1)
    watched: list[tuple[float, set[str]]] = []

    def watch(at_work: Sequence[Path]) -> None:
        assert len(at_work) <= 2  # a CPU each
        watched.append((time.monotonic(), {folder.name for folder in at_work}))

    run_on_ray([missing, *there], address, retries=1, watch=watch)
    run_here(here, [Slot("cpu", 1)], retries=0, watch=lambda _: None)

    for one, other in zip(there, here, strict=True):
        assert {path.name for path in one.rglob("*")} == {path.name for path in other.rglob("*")}
        assert not (one / ATTEMPTS_FILE).exists()
        found, wanted = (read_json(folder / RESULT_FILE) for folder in (one, other))
        assert {**found, "seconds_per_epoch": 0} == {**wanted, "seconds_per_epoch": 0}
        assert found["epochs"] == 2
        assert read_table(one) == read_table(other)
        for name in ("best.pt", "last.pt"):
            left, right = (tiny.load(folder / "weights" / name).state_dict() for folder in (one, other))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
    reasons = [attempt["reason"] for attempt in read_json(missing / ATTEMPTS_FILE)]
    assert len(reasons) == 2
    assert all("nowhere.yaml" in reason for reason in reasons)
    assert not is_finished(missing)
    assert set().union(*(names for _, names in watched)) == {folder.name for folder in [missing, *there]}


def test_hopeless_run_is_stopped(address: str, data: Any, tmp_path: Path) -> None:
    """A network that tells red from green stays as it is at this learning rate; with dead activations it guesses."""
    from ultralytics import YOLO

    steps = {"batch": 2, "nbs": 2, "optimizer": "SGD"}
    learned = YOLO(str(tiny.write_yaml(tmp_path / "classify.yaml", tiny.yolo("classify"))))
    tiny.train(learned, data.classify, tmp_path, epochs=8, lr0=0.05, scale=1.0, seed=1, **steps)
    model = tmp_path / "run" / "weights" / "best.pt"
    given = {"model": str(model), "data": str(data.classify), "epochs": 8, "lr0": 1e-6, "scale": 1.0, **steps}
    folders = write_rows(tmp_path / "runs", activations=["stock", "threshold(1000.0, 0.0)"], seeds=2, **given)
    run_on_ray(folders, address, halving="stock")
    results = {folder.name: read_json(folder / RESULT_FILE) for folder in folders}
    spared = [result for name, result in results.items() if name.startswith("stock")]
    assert [result["state"] for result in spared] == ["done", "done"]
    assert all(result["scores"]["top1"] > 0.5 for result in spared)
    stopped = [result for result in results.values() if result["state"] == "stopped"]
    assert stopped  # the last to start at the latest, when three have shown what they do
    for name, result in results.items():
        if result in stopped:
            assert result["epochs"] in (1, 2, 4)
            assert result["reason"] == f"stopped by halving after epoch {result['epochs']} of 8"
            assert len(read_table(tmp_path / "runs" / name)) == result["epochs"]  # it did not train on meanwhile


def test_a_run_waits_at_a_rung_and_after_a_kill_there_again(installed: None, data: Any, tmp_path: Path) -> None:
    model = tiny.write_yaml(tmp_path / "classify.yaml", tiny.yolo("classify"))
    [folder] = write_rows(tmp_path, activations=["stock"], seeds=1, model=str(model), data=str(data.classify), epochs=4)
    first = start_run(folder, threads=1, pauses=[2])
    wait_for(lambda: (folder / SNAPSHOT_FILE).exists() and read_progress(folder).epochs == 2, first)
    time.sleep(1)  # an epoch takes a tenth of that
    assert read_progress(folder).epochs == 2
    kill_run(first)
    trained = folder / "weights" / "last.pt"
    before = trained.stat().st_mtime_ns
    second = start_run(folder, threads=1, pauses=[2])
    wait_for(lambda: "Resuming training" in (folder / LOG_FILE).read_text(errors="replace"), second)
    time.sleep(1)
    assert trained.stat().st_mtime_ns == before
    release_run(second, 1)  # of an earlier rung, late
    time.sleep(0.5)
    assert trained.stat().st_mtime_ns == before
    release_run(second, 2)
    assert second.wait(timeout=120) == 0
    kill_run(second)
    assert (read_json(folder / RESULT_FILE)["epochs"], len(read_table(folder))) == (4, 4)


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something holds, while a process runs."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_the_rungs_are_those_of_asha(installed: None) -> None:
    from ray.tune.schedulers.async_hyperband import _Bracket

    for epochs in range(1, 400):
        known = [rung for rung, _ in _Bracket(max(1, epochs // cluster._GRACE_DIVISOR), epochs, 2, 0)._rungs]
        rungs = cluster.find_rungs(epochs)
        assert set(rungs) <= set(known)
        assert all(rung < epochs for rung in rungs) and len(rungs) == min(3, len([k for k in known if k < epochs]))


def test_interrupted_study_leaves_no_process(address: str, data: Any, stock_yaml: Path, tmp_path: Path) -> None:
    [folder] = write_rows(
        tmp_path, activations=["stock"], seeds=1, model=str(stock_yaml), data=str(data.detect), epochs=900
    )
    seen: list[psutil.Process] = []

    def interrupt(_: Sequence[Path]) -> None:
        seen.extend(find_processes(folder.name))
        if seen:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_ray([folder], address, watch=interrupt)
    _, alive = psutil.wait_procs(seen, timeout=60)
    assert seen
    assert not alive
    assert not ray.is_initialized()
    assert not (folder / ATTEMPTS_FILE).exists()


def find_processes(name: str) -> list[psutil.Process]:
    """Return the processes at work in a folder of this name."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "rtdetr_act.study.worker" in words and any(Path(word).name == name for word in words):
            found.append(process)
    return found


def test_only_the_last_attempt_writes(tmp_path: Path) -> None:
    [folder] = write_bare_rows(tmp_path, ["stock"])
    keeper = cluster.RunStore([folder], retries=1)
    first, files = keeper.claim(folder.name)
    assert set(files) == {RUN_FILE}
    assert keeper.save(folder.name, first, {"weights/last.pt": b"1", SNAPSHOT_FILE: b"1"})
    assert keeper.held_runs() == [folder.name]

    second, files = keeper.claim(folder.name)  # the first one's node was thought lost
    assert files["weights/last.pt"] == files[SNAPSHOT_FILE] == b"1"
    assert not keeper.save(folder.name, first, {SNAPSHOT_FILE: b"stale"})
    assert not keeper.finish(folder.name, first, {RESULT_FILE: DONE}, "")
    assert (folder / SNAPSHOT_FILE).read_bytes() == b"1"
    assert not is_finished(folder)

    assert keeper.finish(folder.name, second, {}, "exit code 1: no")  # one more try
    third, _ = keeper.claim(folder.name)
    assert not keeper.finish(folder.name, third, {RESULT_FILE: DONE}, "")
    assert not keeper.finish(folder.name, second, {RESULT_FILE: b"{}"}, "")
    assert (folder / RESULT_FILE).read_bytes() == DONE
    assert not (folder / SNAPSHOT_FILE).exists()
    assert keeper.claim(folder.name) is None
    reasons = [attempt["reason"] for attempt in read_json(folder / ATTEMPTS_FILE)]
    assert reasons == [cluster._LOST_REASON, "exit code 1: no"]


def test_tries_and_losses_end(tmp_path: Path) -> None:
    failing, losing = write_bare_rows(tmp_path, ["stock", "arelu"])
    keeper = cluster.RunStore([failing, losing], retries=2)
    again = []
    for _ in range(3):
        token, _files = keeper.claim(failing.name)
        again.append(keeper.finish(failing.name, token, {"log.txt": b"no\n"}, "exit code 1: no"))
    assert again == [True, True, False]
    claims = [keeper.claim(losing.name) for _ in range(cluster._MAX_LOST_NODES + 2)]
    assert [claim is None for claim in claims] == [False] * (cluster._MAX_LOST_NODES + 1) + [True]
    assert len(read_json(losing / ATTEMPTS_FILE)) == cluster._MAX_LOST_NODES + 1


def write_bare_rows(folder: Path, activations: Sequence[str]) -> list[Path]:
    """Write runs that are never started."""
    return write_rows(folder, activations=list(activations), model="rtdetr-n.yaml", data="shapes", seeds=1)


def test_weights_are_never_older_than_the_snapshot(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    sent: dict[Path, Any] = {}
    assert cluster._read_changed_files(tmp_path, sent) == {}
    (tmp_path / "results.csv").write_bytes(b"one")
    assert cluster._read_changed_files(tmp_path, sent) == {"results.csv": b"one"}
    assert cluster._read_changed_files(tmp_path, sent) == {}
    for name in ("weights/best.pt", "weights/last.pt", "snapshot.pt", "log.txt"):
        (tmp_path / name).write_bytes(b"two")
    assert list(cluster._read_changed_files(tmp_path, sent)) == [
        "weights/best.pt", "weights/last.pt", "log.txt", "results.csv", "snapshot.pt",
    ]  # fmt: skip
    assert cluster._read_changed_files(tmp_path, sent) == {}


def test_halving_spares_the_baseline_and_compares_within_a_setting(address: str, tmp_path: Path) -> None:
    folders = write_rows(
        tmp_path, activations=["stock", "arelu", "mish"], model="rtdetr-n.yaml", data="shapes", seeds=1,
        epochs=16, lr0=[0.01, 0.001],
    )  # fmt: skip
    rows = {folder.name: read_run_config(folder) for folder in folders}
    ray.init(address=address, log_to_driver=False)
    try:
        from ray.tune.experiment import Trial

        keeper = cluster._start_store(folders, 0)
        scheduler = cluster._make_scheduler(rows, "mish", keeper, cluster.TaskSettings(1, 0, "cpu", {"torch": "2"}, ""))
        trials = {name: Trial("none", config={"name": name}, stub=True) for name in rows}
        for name, trial in trials.items():
            scheduler.on_trial_add(None, trial)
            ray.get(keeper.claim.remote(name))

        def report(activation: str, lr0: float, epoch: int, score: float) -> bool:
            [name] = [n for n, r in rows.items() if (r.activation, r.arguments["lr0"]) == (activation, lr0)]
            return scheduler.on_trial_result(None, trials[name], {"epoch": epoch, "score": score}) == scheduler.STOP

        assert not report("stock", 0.01, 1, 0.9)  # before the first rung, at an eighth
        assert not report("arelu", 0.01, 1, 0.0)
        assert not report("stock", 0.01, 2, 0.9)
        assert not report("mish", 0.01, 2, 0.0)
        assert not report("stock", 0.001, 2, 0.2)  # far below those of the other learning rate
        assert report("arelu", 0.01, 2, 0.3)
        assert not report("mish", 0.001, 16, 0.0)  # its last epoch
        [stopped] = [folder for folder in folders if is_finished(folder)]
        assert rows[stopped.name].activation == "arelu"
        result = read_json(stopped / RESULT_FILE)
        assert (result["state"], result["epochs"]) == ("stopped", 2)
        assert result["reason"] == "stopped by halving after epoch 2 of 16"
    finally:
        ray.shutdown()


def test_what_the_cluster_lacks_is_refused(address: str, tmp_path: Path) -> None:
    [folder] = write_bare_rows(tmp_path, ["stock"])
    with pytest.raises(InputError, match="no node of the Ray cluster has what a run needs: CPUs: 64, GPUs: 0"):
        run_on_ray([folder], address, cpus=64)
    with pytest.raises(InputError, match="GPUs: 2"):
        run_on_ray([folder], address, device="0,1")
    assert not ray.is_initialized()


def test_other_versions_are_refused(address: str) -> None:
    ray.init(address=address, log_to_driver=False)
    try:
        order = cluster.TaskSettings(1, 0, "cpu", {**cluster._read_versions(), "torch": "1.0"}, "")
        with pytest.raises(InputError, match=r"has torch .*, the study 1\.0: install the same on every node"):
            cluster._check_nodes(order)
    finally:
        ray.shutdown()


@pytest.mark.parametrize("wrong", ["ray://head:10001", "head", "127.0.0.1:port", "127.0.0.1:"])
def test_malformed_address_is_refused(installed: None, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not HOST:PORT"):
        run_on_ray(write_bare_rows(tmp_path, ["stock"]), wrong)


def test_silent_address_is_refused(installed: None, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound but not listening: nothing else gets this port
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"no Ray cluster answers at '127.0.0.1:{port}'"):
            run_on_ray(write_bare_rows(tmp_path, ["stock"]), f"127.0.0.1:{port}")


def test_finished_study_starts_no_ray(tmp_path: Path) -> None:
    rows = {"activations": ["stock"], "model": "rtdetr-n.yaml", "data": "shapes", "seeds": 1}
    study = make_study(rows, defaults={})
    [folder] = write_rows(tmp_path / RUNS_FOLDER, **rows)
    assert not is_study_finished(study, tmp_path)
    (folder / RESULT_FILE).write_bytes(DONE)
    assert is_study_finished(study, tmp_path)


def test_study_without_ray_says_what_to_install(tmp_path: Path) -> None:
    with suppress(NameError):
        pytest.skip(f"Ray {ray.__version__} is installed")
    with pytest.raises(InputError, match=r"engine=ray needs Ray: pip install 'rtdetr-act\[ray\]'"):
        run_on_ray(write_bare_rows(tmp_path, ["stock"]), None)
