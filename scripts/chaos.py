"""Kill a study, a search, or a node of a Ray cluster twenty times while it works, and compare with an undisturbed one.

    python scripts/chaos.py study|search|ray [--kills 20] [--busy 0] [--output runs/chaos]

A study or a search dies by kill -9 of itself, of one of its runs, of both at once, by SIGTERM or by Ctrl-C, and the
same command goes on. Under Ray, every process of the second of two local nodes is killed while a run is at work there,
and a new node joins. A kill comes after so many more epochs, or so far into a start, as a seed draws, measured on the
undisturbed one: so it hits on slow machines and on fast ones. Only what hits counts; what ends before is compared, and
another begins. After each kill, the files of finished runs must be the same bytes as before; in the end every run must
be there once, with the epochs, the weights and the scores of the undisturbed one. Exits with 1 where not. --busy adds
so many processes that keep a core busy. Not for Windows; `ray` needs the extra of that name.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import psutil
import torch

from rtdetr_act.study.process import read_attempts

# Settings of its own: a tracker that somebody switches on meanwhile draws random numbers, and a training is another.
os.environ.update(YOLO_OFFLINE="True", YOLO_CONFIG_DIR=tempfile.mkdtemp(prefix="chaos-settings-"))
atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)

SEED = 7
COMMON = "--model rtdetr-n.yaml --data shapes --cpus 1 imgsz=64 fraction=0.1 batch=4"
STUDY = f"study --act stock --act arelu --act dyrelu_b --seeds 2 {COMMON} epochs=6"
COMMANDS = {"study": STUDY, "search": f"search --act relu,arelu --budget 66 --seeds 1 {COMMON} epochs=9", "ray": STUDY}
MEASURED = ("seconds_per_epoch", "latency_ms")
WAYS = ("kill -9 of it", "kill -9 of a run", "kill -9 of it and its runs", "SIGTERM", "Ctrl-C")
MOST_AT_THE_END = 3  # kills of one study or search that has no run at work; then it may conclude
MOST_LOSSES = 4  # nodes that a run loses here; the engine gives a run up that loses six
PATIENCE = 300  # seconds for something to start or to end


@dataclass(frozen=True)
class Pace:
    """How fast the undisturbed one was: seconds until its first epoch was done, and those of an epoch from then on."""

    start: float
    epoch: float


@dataclass(frozen=True)
class Hit:
    """A kill that hit: how, and in which phase ("start", "training", or "no run at work")."""

    way: str
    phase: str


@dataclass(frozen=True)
class Moment:
    """When to kill: after some more epochs, and then a share of the time of a start or an epoch."""

    epochs: int
    share: float

    def rest(self, pace: Pace) -> float:
        """Return the seconds to wait once the epochs are done."""
        return self.share * (pace.epoch if self.epochs else pace.start)


def draw_moments() -> Iterator[Moment]:
    """Yield moments without end: one in four during a start."""
    draw = random.Random(SEED)
    while True:
        yield Moment(draw.choice((0, 1, 3, 5)), draw.random())


def main() -> None:
    """Disturb until enough kills have hit, print what happened, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COMMANDS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy meanwhile")
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"), help="begun anew in each call")
    given = parser.parse_args()
    place = given.output / given.what
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    words = COMMANDS[given.what].split()
    # Ignored, and so by all processes that start from here, where this runs in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    with keep_busy(given.busy), ExitStack() as stack:
        calm = place / "calm"
        pace = measure_pace(words, calm)
        print(f"undisturbed: first epoch after {pace.start:.0f} s, an epoch {pace.epoch:.1f} s", flush=True)
        cluster = stack.enter_context(join_cluster()) if given.what == "ray" else None
        hits: list[Hit] = []
        faults: list[str] = []
        moments = draw_moments()
        for number in itertools.count(1):
            folder = place / f"disturbed{number}"
            print(f"'{folder}':", flush=True)
            before = len(hits)
            if cluster:
                faults += kill_nodes(words, folder, pace, moments, hits, given.kills, cluster)
            else:
                faults += kill_again_and_again(words, folder, pace, moments, hits, given.kills)
            if not faults:  # else something of it may not be there
                faults = [f"'{folder}': {fault}" for fault in compare(calm, folder)]
            if len(hits) >= given.kills or faults:
                break
            if len(hits) == before:
                sys.exit(f"error: no kill hit '{folder}', whose log is beside it")
    for title, counted in (("way", Counter(hit.way for hit in hits)), ("phase", Counter(hit.phase for hit in hits))):
        print(
            f"{len(hits)} kills that hit, by {title}: "
            + ", ".join(f"{count} {name}" for name, count in counted.items())
        )
    print(describe_starts(place))
    print(f"{time.monotonic() - started:.0f} s with {given.busy} busy processes beside it")
    print(
        "\n".join(faults) or f"{number} disturbed, each as the undisturbed one: epochs, weights, scores, every run once"
    )
    sys.exit(bool(faults))


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """Slow the machine down by processes that compute."""
    # Each in a session of its own, as the runs are: Linux shares a core out among sessions first.
    words = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(words, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- what is disturbed


def start(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command with a folder of its own, or go on with it."""
    command = [sys.executable, "-c", "from rtdetr_act.cli.main import main; main()", *words, "--output", str(folder)]
    with Path(f"{folder}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def measure_pace(words: Sequence[str], folder: Path) -> Pace:
    """Run a command to its end, undisturbed, and time its epochs."""
    begun = time.monotonic()
    process = start(words, folder)
    moments: list[float] = []
    while process.poll() is None:
        moments += [time.monotonic()] * (count_epochs(folder).total() - len(moments))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"error: the undisturbed one ended with exit code {process.returncode}: {folder}.log")
    return Pace(moments[0] - begun, (moments[-1] - moments[0]) / max(len(moments) - 1, 1))


def count_epochs(folder: Path) -> Counter[str]:
    """Return the epochs that each run below a folder has done, by the run's place."""
    found: Counter[str] = Counter()
    for table in folder.rglob("results.csv"):
        with suppress(FileNotFoundError):
            found[str(table.parent.relative_to(folder))] = max(table.read_bytes().count(b"\n") - 1, 0)
    return found


def find_runs(process: psutil.Process) -> dict[Path, psutil.Process]:
    """Return the processes of runs below a process, by the folders that they work in."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                words = child.cmdline()
                if "rtdetr_act.study.worker" in words and child.status() != psutil.STATUS_ZOMBIE:
                    found[Path(words[words.index("rtdetr_act.study.worker") + 1])] = child
    return found


# ---------------------------------------------------------------- kills of a study or a search


def kill_again_and_again(
    words: Sequence[str], folder: Path, pace: Pace, moments: Iterator[Moment], hits: list[Hit], wanted: int
) -> list[str]:
    """Kill a command until enough kills have hit or it has ended, then let it end; note hits, return faults."""
    faults: list[str] = []
    finished: dict[str, str] = {}
    most: Counter[str] = Counter()
    at_the_end = 0
    while len(hits) < wanted and at_the_end < MOST_AT_THE_END:
        way = WAYS[len(hits) % len(WAYS)]
        process = start(words, folder)
        phase = wait_for_moment(process, folder, next(moments), pace, most)
        hit = phase is not None and kill(process, way)
        now = hash_finished(folder)
        faults += [f"'{name}' changed after it was finished" for name in finished if now.get(name) != finished[name]]
        finished = now
        if phase is None or not hit:
            if process.wait(PATIENCE):
                faults.append(f"it ended with exit code {process.returncode} before a kill: {folder}.log")
            break
        hits.append(Hit(way, phase))
        at_the_end += phase == "no run at work"
        print(f"  hit {len(hits):2}: {way}, {phase}, {len(finished)} runs finished", flush=True)
    if code := start(words, folder).wait():
        faults.append(f"the last call ended with exit code {code}: {folder}.log")
    return faults


def wait_for_moment(
    process: subprocess.Popen[bytes], folder: Path, moment: Moment, pace: Pace, most: Counter[str]
) -> str | None:
    """Wait until a command is as far as the moment says, or has no run left; return its phase, None if it ended.

    Only epochs that no earlier call has done count, and those that each run has done at most are kept in `most`: a run
    that goes on has no results.csv for a moment, and gets its rows of before back at once.
    """
    most |= count_epochs(folder)
    before = most.total()
    done = 0
    trained = False
    while done < moment.epochs:
        if process.poll() is not None:
            return None
        runs = find_runs(psutil.Process(process.pid))
        if trained and not runs and has_concluded_runs(folder):
            break
        trained |= bool(runs)
        most |= count_epochs(folder)
        done = most.total() - before
        time.sleep(0.02)
    deadline = time.monotonic() + moment.rest(pace)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    if process.poll() is not None:
        return None
    if not find_runs(psutil.Process(process.pid)) and has_concluded_runs(folder):
        return "no run at work"
    return "training" if done else "start"


def has_concluded_runs(folder: Path) -> bool:
    """Say whether every run that has a folder has its result."""
    runs = [path.parent for path in folder.rglob("run.json")]
    return bool(runs) and all((run / "result.json").exists() for run in runs)


def kill(process: subprocess.Popen[bytes], way: str) -> bool:
    """End a command, or a run of it and then itself, and wait until nothing is left; say whether that hit."""
    runs = list(find_runs(psutil.Process(process.pid)).values())
    if way == "kill -9 of a run":
        if not kill_a_run(process):
            return False
    elif way == "kill -9 of it and its runs":
        for run in runs:
            run.kill()
    number = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}.get(way, signal.SIGKILL)
    process.send_signal(number)
    code = process.wait(PATIENCE)
    psutil.wait_procs(runs, timeout=PATIENCE)
    return way == "kill -9 of a run" or code in (-number, 130)


def kill_a_run(process: subprocess.Popen[bytes]) -> bool:
    """Kill a run once there is one, and wait until the command has noted it; False where the command ends instead."""
    while process.poll() is None:
        for place, run in find_runs(psutil.Process(process.pid)).items():
            before = len(read_attempts(place))
            run.kill()
            deadline = time.monotonic() + PATIENCE
            while len(read_attempts(place)) == before:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"error: the run of '{place}' was killed, and nothing noted it")
                time.sleep(0.02)
            return True
        time.sleep(0.02)
    return False


# ---------------------------------------------------------------- kills of a node


@dataclass
class Cluster:
    """Two local Ray nodes of one CPU each: the head, on which the study's own process works, and one to lose."""

    address: str
    launch: Callable[..., subprocess.Popen[bytes]]
    second: psutil.Process

    def replace_second(self) -> None:
        """Kill every process of the second node, as when the power goes, and let a new one join."""
        kill_tree(self.second)
        self.second = start_second(self.launch, self.address)


@contextmanager
def join_cluster() -> Iterator[Cluster]:
    """Start two nodes in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A secret of this cluster's own: other users of the machine cannot join, and none is written to the home folder.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    started: list[subprocess.Popen[bytes]] = []

    def launch(*options: str) -> subprocess.Popen[bytes]:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen([*ray, *options, "--node-ip-address=127.0.0.1"], **quiet))  # type: ignore[call-overload]
        return started[-1]

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        try:
            launch("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={place}")
            wait_until(lambda: answers(port), "the head of the cluster does not start")
            address = f"127.0.0.1:{port}"
            yield Cluster(address, launch, start_second(launch, address))
        finally:
            for process in reversed(started):
                if process.poll() is None:
                    kill_tree(psutil.Process(process.pid))
                process.wait()


def answers(port: int) -> bool:
    """Say whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start_second(launch: Callable[..., subprocess.Popen[bytes]], address: str) -> psutil.Process:
    """Start a node that joins the head."""
    node = psutil.Process(launch(f"--address={address}").pid)
    has_raylet = lambda: any(child.name() == "raylet" for child in node.children(recursive=True))  # noqa: E731
    wait_until(has_raylet, "the second node does not start")
    return node


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    """Wait until something holds; end the script where it never does."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {otherwise}")
        time.sleep(0.1)


def kill_tree(process: psutil.Process) -> None:
    """Kill a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        every = [*process.children(recursive=True), process]
        for one in every:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(every, timeout=PATIENCE)


def kill_nodes(
    words: Sequence[str],
    folder: Path,
    pace: Pace,
    moments: Iterator[Moment],
    hits: list[Hit],
    wanted: int,
    cluster: Cluster,
) -> list[str]:
    """Run a study on the cluster, and lose its second node until enough kills have hit; note hits, return faults."""
    faults: list[str] = []
    finished: dict[str, str] = {}
    losses: Counter[str] = Counter()
    process = start([*words, "--engine", "ray", "--address", cluster.address], folder)
    while len(hits) < wanted and process.poll() is None:
        found = wait_for_run(process, cluster.second, next(moments), pace, losses)
        if found is None:
            break
        name, phase = found
        cluster.replace_second()
        losses[name] += 1
        now = hash_finished(folder)
        faults += [f"'{key}' changed after it was finished" for key in finished if now.get(key) != finished[key]]
        finished = now
        hits.append(Hit("node", phase))
        print(f"  hit {len(hits):2}: the node of {name}, {phase}, {len(finished)} runs finished", flush=True)
    if code := process.wait():
        faults.append(f"it ended with exit code {code}: {folder}.log")
    for name, count in losses.items():
        noted = len(read_attempts(folder / "runs" / name))
        # The node may have been lost in the moment between a run's end and the next: then nothing of it was.
        if noted < count - 1:
            faults.append(f"'{name}' lost {count} nodes, and notes {noted}")
    return faults


def wait_for_run(
    process: subprocess.Popen[bytes], node: psutil.Process, moment: Moment, pace: Pace, losses: Counter[str]
) -> tuple[str, str] | None:
    """Wait until a run on a node is as far as the moment says; return its name and phase, None if the study ended."""
    first: dict[int, int] = {}
    while process.poll() is None:
        for place, run in find_runs(node).items():
            epochs = count_epochs(place).total()
            done = epochs - first.setdefault(run.pid, epochs)
            if losses[place.name] < MOST_LOSSES and done >= moment.epochs:
                deadline = (
                    run.create_time() + moment.rest(pace) if not moment.epochs else time.time() + moment.rest(pace)
                )
                while run.is_running() and time.time() < deadline:
                    time.sleep(0.01)
                if run.is_running() and run.status() != psutil.STATUS_ZOMBIE:
                    return place.name, "training" if count_epochs(place).total() > first[run.pid] else "start"
        time.sleep(0.02)
    return None


# ---------------------------------------------------------------- what must be equal


def hash_finished(folder: Path) -> dict[str, str]:
    """Return a hash over all files of each finished run, by its place."""
    found = {}
    for result in sorted(folder.rglob("runs/*/result.json")):
        digest = hashlib.sha256()
        for path in sorted(path for path in result.parent.rglob("*") if path.is_file() and path.name != ".lock"):
            digest.update(path.name.encode() + path.read_bytes())
        found[str(result.parent.relative_to(folder))] = digest.hexdigest()
    return found


def compare(calm: Path, other: Path) -> list[str]:
    """Return what differs between two studies or searches, measured times left out."""
    names, others = ({str(p.parent.relative_to(f)) for p in f.rglob("runs/*/run.json")} for f in (calm, other))
    faults = [f"runs differ: {sorted(names ^ others)}"] if names != others else []
    for name in sorted(names & others):
        one, two = calm / name, other / name
        if not (one / "results.csv").is_file() or not (two / "results.csv").is_file():
            faults.append(f"'{name}' has no results")
            continue
        tables = [pl.read_csv(path / "results.csv").drop("time") for path in (one, two)]
        if not tables[0].equals(tables[1]):
            faults.append(f"'{name}' has other epochs")
        for file in ("best.pt", "last.pt"):
            left, right = (read_weights(path / "weights" / file) for path in (one, two))
            if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
                faults.append(f"'{name}' has another {file}")
    for board in calm.rglob("leaderboard.csv"):
        rows = [pl.read_csv(path).drop(MEASURED) for path in (board, other / board.relative_to(calm))]
        if not rows[0].equals(rows[1]):
            faults.append(f"'{board.relative_to(calm)}' differs:\n{rows[0]}\n{rows[1]}")
    for file in ("search.csv", "best.yaml"):
        if (calm / file).exists() and (calm / file).read_bytes() != (other / file).read_bytes():
            faults.append(f"'{file}' differs")
    return faults


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint of ours."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    state: dict[str, torch.Tensor] = (checkpoint["ema"] or checkpoint["model"]).state_dict()
    return state


def describe_starts(place: Path) -> str:
    """Count the trainings that were started in disturbed folders, and those that went on from a snapshot."""
    logs = [log.read_text(encoding="utf-8", errors="replace") for log in place.glob("disturbed*/**/log.txt")]
    started, resumed = (sum(log.count(text) for log in logs) for text in ("Starting training for", "Resuming training"))
    return f"{len(logs)} runs, trainings started {started} times, {resumed} of them from a snapshot"


if __name__ == "__main__":
    main()
