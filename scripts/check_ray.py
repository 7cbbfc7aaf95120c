"""Lose a node while it works: a study on two local Ray nodes, one killed, against the engine of one machine.

    pip install 'rtdetr-act[ray]'
    python scripts/check_ray.py [folder]

Two variants and three seeds of rtdetr-n on a part of `shapes`. Once a run on the second node is past its second epoch,
every process of that node is killed with SIGKILL. Then every run must be there once, with the tables, the weights and
the leaderboard of the plain engine; exits with 1 where something differs. A few minutes on two cores.
"""

from __future__ import annotations

import csv
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from rtdetr_act.study.engines import open_engine
from rtdetr_act.study.folder import SNAPSHOT_FILE
from rtdetr_act.study.grid import make_study
from rtdetr_act.study.leaderboard import build, headline, tabulate
from rtdetr_act.study.prepare import prepare_runs
from rtdetr_act.study.process import read_attempts, read_progress, read_result
from rtdetr_act.study.records import read_records

EPOCHS = 5
STUDY = {
    "activations": ["stock", "arelu"],
    "seeds": 3,
    "epochs": EPOCHS,
    "imgsz": 64,
    "batch": 8,
    "fraction": 0.2,
    "val": True,
    "plots": False,
    "workers": 0,
    "device": "cpu",
}
DEFAULTS = {"model": "rtdetr-n.yaml", "data": "shapes"}
MEASURED = ("seconds_per_epoch", "latency_ms")  # differ from one time to the next


@dataclass
class Loss:
    """What the killed node was doing: for each of its runs, epochs done there and epochs that are kept here."""

    epochs: dict[str, tuple[int, int]] = field(default_factory=dict)
    time: float = 0.0


def main(folder: Path) -> int:
    """Run the study with both engines, print what became of each run, and return the exit code."""
    study = make_study(STUDY, defaults=DEFAULTS)
    plain, there = prepare_runs(study, folder / "plain"), prepare_runs(study, folder / "ray")
    loss, start = Loss(), time.monotonic()
    with two_nodes() as (address, second):

        def watch(at_work: Sequence[Path]) -> None:
            if not loss.epochs:
                loss.epochs = kill_busy(second, at_work)
                loss.time = time.monotonic() - start

        with open_engine("ray", address=address, device="cpu", cpus=None, retries=0) as run:
            run(there, watch=watch)
    print(f"Ray: {time.monotonic() - start:.0f} s, the second node killed after {loss.time:.0f} s")
    with open_engine("local", device="cpu", cpus=1, retries=0) as run:
        run(plain, watch=lambda _: None)

    faults = [fault for one, other in zip(there, plain, strict=True) for fault in compare(one, other)]
    faults += [] if loss.epochs else ["no node was killed"]
    tables = []
    for name in ("ray", "plain"):
        records = read_records(folder / name)
        tables.append(tabulate(build(records, baseline="stock"), headline(records)).drop(MEASURED, strict=False))
    faults += [] if tables[0].equals(tables[1]) else ["the leaderboards differ"]
    faults += [
        f"'{name}' began again at its first epoch" for name in loss.epochs if epochs_in_log(folder, name).count(1) != 1
    ]

    table = Table(
        "run", "state", "mAP50-95", "lost attempts", "done when killed", "kept", "done again", "epochs in the log"
    )
    for path in there:
        result = read_result(path)
        done, kept = loss.epochs.get(path.name, (0, 0))
        cells = [done, kept, done - kept] if path.name in loss.epochs else ["", "", ""]
        lost = len(read_attempts(path))
        score = result.scores.get("mAP50-95", float("nan")) if result else float("nan")
        epochs = " ".join(map(str, epochs_in_log(folder, path.name)))
        table.add_row(
            path.name, result.state if result else "none", f"{score:.6f}", str(lost), *map(str, cells), epochs
        )
    Console(width=150).print(table)
    print(tables[0])
    print("\n".join(faults) or f"as with the plain engine: {len(there)} runs, tables, weights, leaderboard")
    return int(bool(faults))


@contextmanager
def two_nodes() -> Iterator[tuple[str, psutil.Process]]:
    """Start two nodes of one CPU each in processes of their own; give the address and the second one's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0"]
    # A secret of this cluster's own: other users of the machine cannot join, and none is written to the home folder.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen([*ray, *options], **quiet))  # type: ignore[call-overload]

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        try:
            start(
                "--head",
                f"--port={port}",
                "--node-ip-address=127.0.0.1",
                "--include-dashboard=false",
                f"--temp-dir={place}",
            )
            wait_for_port(port)
            start(f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1")
            wait_for_raylet(started[1])
            yield f"127.0.0.1:{port}", psutil.Process(started[1].pid)
        finally:
            for process in reversed(started):
                if process.poll() is None:
                    kill_tree(psutil.Process(process.pid))
                process.wait()


def wait_for_port(port: int) -> None:
    """Wait until the head answers."""
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise SystemExit("the head of the cluster does not start")


def wait_for_raylet(node: subprocess.Popen[bytes]) -> None:
    """Wait until a node is there, and a little longer, for it to tell the head."""
    for _ in range(240):
        if any(child.name() == "raylet" for child in psutil.Process(node.pid).children(recursive=True)):
            time.sleep(5)
            return
        time.sleep(0.5)
    raise SystemExit("the second node does not start")


def kill_tree(process: psutil.Process) -> None:
    """Kill a process and all below it, as when the power goes."""
    every = [*process.children(recursive=True), process]
    for one in every:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(every, timeout=30)


def kill_busy(node: psutil.Process, at_work: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """Kill a node if a run of it is past its second epoch, but not in its last; say what its runs had done."""
    own: dict[str, Path] = {}
    for child in node.children(recursive=True):
        try:
            words = child.cmdline()
        except psutil.Error:
            continue
        if "rtdetr_act.study.work" in words:
            place = Path(words[words.index("rtdetr_act.study.work") + 1])
            own[place.name] = place
    busy = {folder.name: folder for folder in at_work if folder.name in own}
    if not any(2 <= read_progress(folder).epochs < EPOCHS - 1 and has_snapshot(folder) for folder in busy.values()):
        return {}
    kill_tree(node)
    return {name: (read_progress(own[name]).epochs, epochs_kept(folder)) for name, folder in busy.items()}


def has_snapshot(folder: Path) -> bool:
    """Say whether a run can go on elsewhere."""
    return (folder / SNAPSHOT_FILE).exists()


def epochs_kept(folder: Path) -> int:
    """Return the epochs after which a successor goes on."""
    if not has_snapshot(folder):
        return 0
    return int(torch.load(folder / SNAPSHOT_FILE, map_location="cpu", weights_only=False)["epoch"]) + 1


def epochs_in_log(folder: Path, name: str) -> list[int]:
    """Return the epochs that Ultralytics printed, in order, of all attempts whose log came back."""
    text = (folder / "ray" / "runs" / name / "log.txt").read_text(encoding="utf-8", errors="replace")
    found = [int(epoch) for epoch in re.findall(rf"(?:^|[\r\n]|\x1b\[K)\s*(\d+)/{EPOCHS}\s", text)]
    return [epoch for index, epoch in enumerate(found) if index == 0 or epoch != found[index - 1]]


def compare(one: Path, other: Path) -> list[str]:
    """Say how two folders of the same run differ, but for times."""
    left, right = map(read_result, (one, other))
    if left is None or right is None:
        return [f"'{one.name}' has no result"]
    faults = []
    if replace(left, seconds_per_epoch=None) != replace(right, seconds_per_epoch=None):
        faults.append(f"'{one.name}' has another result")
    if read_table(one) != read_table(other):
        faults.append(f"'{one.name}' has another results.csv")
    for name in ("best.pt", "last.pt"):
        own, others = (read_weights(folder / "weights" / name) for folder in (one, other))
        if own.keys() != others.keys() or not all(torch.equal(own[key], others[key]) for key in own):
            faults.append(f"'{one.name}' has another {name}")
    return faults


def read_table(folder: Path) -> list[dict[str, str]]:
    """Return results.csv without its times."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name.strip(): cell for name, cell in row.items() if name.strip() != "time"} for row in rows]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    state: dict[str, torch.Tensor] = (checkpoint["ema"] or checkpoint["model"]).state_dict()
    return state


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as place:
        sys.exit(main(Path(place)))
