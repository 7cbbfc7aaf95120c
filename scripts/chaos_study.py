"""Kill a study at random moments, let it go on each time, and compare it with one that nobody disturbed.

    python scripts/chaos_study.py [--kills 20] [--output runs/chaos]

Each kill is one of: kill -9 of the study, of one of its runs, of both at once, SIGTERM, Ctrl-C. After each, the files
of finished runs must be the same bytes as before; in the end every run must be there once, with the numbers of the
undisturbed study, each epoch's, and the leaderboards must be equal but for measured times. Exits with 1 where not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl
import psutil

SEED = 7
STUDY = "--act stock --act arelu --act dyrelu_b --seeds 2 --model rtdetr-n.yaml --data shapes --cpus 1".split()
ARGUMENTS = "epochs=6 imgsz=64 fraction=0.1 batch=4".split()
MEASURED = ("seconds_per_epoch", "latency_ms")
KINDS = ("study", "run", "study and runs", "SIGTERM", "Ctrl-C")


def main() -> None:
    """Run both studies and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"))
    given = parser.parse_args()
    calm, chaotic = given.output / "calm", given.output / "chaotic"
    started = time.monotonic()
    start_study(calm).wait()
    duration = time.monotonic() - started
    print(f"undisturbed: {duration:.0f} s", flush=True)

    moments = random.Random(SEED)
    kinds: Counter[str] = Counter()
    finished: dict[str, str] = {}
    faults: list[str] = []
    for number in range(given.kills):
        process = start_study(chaotic)
        wait = moments.uniform(2, 30)
        kind = KINDS[number % len(KINDS)]
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        over = process.poll() is not None
        if not over:
            kill(process, kind)
        kinds[kind if not over else "(had ended)"] += 1
        now = hash_finished(chaotic)
        faults += [
            f"kill {number}: '{name}' changed after it was finished"
            for name in finished
            if now.get(name) != finished[name]
        ]
        finished = now
        print(f"kill {number + 1:2}: {kind} after {wait:.1f} s, {len(finished)} runs finished", flush=True)
    code = start_study(chaotic).wait()
    if code:
        faults.append(f"the last call ended with exit code {code}: {chaotic}.log")
    faults += compare(calm, chaotic)
    resumed = sum(log.read_text(errors="replace").count("Resuming training") for log in chaotic.rglob("log.txt"))
    starts = sum(log.read_text(errors="replace").count("Starting training for") for log in chaotic.rglob("log.txt"))
    runs = len(list((chaotic / "runs").iterdir()))
    print(f"{sum(kinds.values())} kills: {dict(kinds)}")
    print(f"{runs} runs, trainings started {starts} times, {resumed} of them from a snapshot")
    print("\n".join(faults) or "every run once, finished runs byte-identical, leaderboards equal")
    sys.exit(bool(faults))


def start_study(folder: Path) -> subprocess.Popen[bytes]:
    """Start the study of a folder, or go on with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from rtdetr_act.cli import main; main()", "study", *STUDY, *ARGUMENTS]
    with Path(f"{folder}.log").open("ab") as log:
        return subprocess.Popen([*command, "--output", str(folder)], stdout=log, stderr=log, start_new_session=True)


def kill(process: subprocess.Popen[bytes], kind: str) -> None:
    """End a study, or something of it, and wait until nothing of it is left."""
    runs = [child for child in psutil.Process(process.pid).children() if "rtdetr_act.study.work" in child.cmdline()]
    if kind in ("run", "study and runs"):
        for run in runs[:1] if kind == "run" else runs:
            run.kill()
    if kind == "run":
        time.sleep(1)  # the study notes it and goes on; then the study itself, so that every round starts one anew
    if kind in ("study", "study and runs", "run"):
        process.kill()
    else:
        os.kill(process.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT)
    process.wait(timeout=60)
    psutil.wait_procs(runs, timeout=60)


def hash_finished(folder: Path) -> dict[str, str]:
    """Return a hash over all files of each finished run, by its name."""
    found = {}
    for result in sorted(folder.glob("runs/*/result.json")):
        digest = hashlib.sha256()
        for path in sorted(path for path in result.parent.rglob("*") if path.is_file() and path.name != ".lock"):
            digest.update(path.name.encode() + path.read_bytes())
        found[result.parent.name] = digest.hexdigest()
    return found


def compare(calm: Path, chaotic: Path) -> list[str]:
    """Return what differs between two studies, measured times left out."""
    faults = []
    names, others = (sorted(path.name for path in (folder / "runs").iterdir()) for folder in (calm, chaotic))
    if names != others:
        faults.append(f"runs differ: {names} and {others}")
    for name in set(names) & set(others):
        curves = [pl.read_csv(folder / "runs" / name / "results.csv").drop("time") for folder in (calm, chaotic)]
        if not curves[0].equals(curves[1]):
            faults.append(f"'{name}' has other epochs")
    boards = [pl.read_csv(folder / "leaderboard.csv").drop(MEASURED) for folder in (calm, chaotic)]
    if not boards[0].equals(boards[1]):
        faults.append(f"leaderboards differ:\n{boards[0]}\n{boards[1]}")
    return faults


if __name__ == "__main__":
    main()
