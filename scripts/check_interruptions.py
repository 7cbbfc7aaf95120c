"""Stop every command that writes files by a full disk, Ctrl-C and kill -9, over good files, and see what is left.

    python scripts/check_interruptions.py [--only export plot] [--output runs/interruptions.md]

Each command runs over what it wrote before: on a disk with no room, or with room for half of its largest file (a tmpfs
where the script is root, else a limit on the size of files), interrupted and killed when it begins to write and at up
to three other moments. Old files must then be old or new ones, whole; only a kill may leave files under hidden names,
and none of those outlives the next call, which must succeed. Prints a table in Markdown; exits with 1 where this fails.
Fifteen minutes on two quiet cores. Not for Windows.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Settings of its own, so that no tracker of the user's writes too.
os.environ.update(YOLO_OFFLINE="True", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="interruptions-settings-")
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from leftovers import find_hidden, is_whole

CHECKPOINT = "runs/detect/run/weights/best.pt"
TRAINING = "epochs=1 imgsz=64 batch=4 nbs=4 workers=0 device=cpu amp=False plots=False deterministic=False val=False"
MODEL = "--model tiny.yaml --data {data}"
# What is done before, if anything, and the command, which runs over what it wrote before.
COMMANDS = {
    "train": ("", f"train --act arelu {MODEL} name=run exist_ok=True {TRAINING}"),
    "study": (
        f"study --act stock --act arelu --seeds 1 {MODEL} -o study {TRAINING}",
        f"study --act stock --act arelu --seeds 2 {MODEL} -o study {TRAINING}",
    ),
    "search": ("", f"search --act relu,arelu --seeds 1 --budget 12 {MODEL} -o search {TRAINING}"),
    "report": (f"study --act stock --act arelu --seeds 1 {MODEL} -o study {TRAINING}", "report study"),
    "export onnx": ("train", f"export {CHECKPOINT} format=onnx imgsz=64"),
    "export torchscript": ("train", f"export {CHECKPOINT} format=torchscript imgsz=64"),
    "export openvino": ("train", f"export {CHECKPOINT} format=openvino imgsz=64"),
    "fold": ("train", f"fold {CHECKPOINT} -o folded.pt"),
    "plot": ("", "plot arelu silu -o curves.png"),
    "learned": ("train", f"learned {CHECKPOINT} -o learned.png"),
    "maps": ("train", f"maps {CHECKPOINT} image={{images}}/0.png -o maps.png"),
    "val": ("train", f"val {CHECKPOINT} act=stock,relu imgsz=64 workers=0 plots=False data={{data}} -o table.csv"),
    "bench": ("", "bench --model tiny.yaml --act arelu --turns 2 imgsz=64 batch=2 -o bench"),
    "bench --format": ("train", f"bench --model {CHECKPOINT} --format torchscript --turns 2 imgsz=64 -o bench"),
    "diagnose": ("", f"diagnose {MODEL} --act arelu --images 4 imgsz=64 -o diagnosis"),
}
LONG = 8.0  # seconds; what takes longer is stopped at fewer moments
RESUMED = ("study", "search")  # add files while they run, so that new ones may be there beside the old
Snapshot = dict[str, str]


@dataclass
class Trial:
    """One command stopped in one way.

    Attributes:
        command: Its name in `COMMANDS`.
        way: "full disk", "Ctrl-C" or "kill -9".
        when: How much room there was, or the moment.
        code: Its exit code.
        said: The last line that it wrote.
        left: What became of the files.
        faults: What is wrong, in words.
    """

    command: str
    way: str
    when: str
    code: int = 0
    said: str = ""
    left: str = ""
    faults: list[str] = field(default_factory=list)


def main() -> None:
    """Try all commands, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), help="names of commands, or how they begin")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="file for the table")
    given = parser.parse_args()
    names = [name for name in COMMANDS if name.startswith(tuple(given.only))]
    atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)
    names.sort(key=lambda name: name not in ("search", "study"))  # the long ones first
    with tempfile.TemporaryDirectory(prefix="interruptions-") as folder:
        from tiny import RTDETR, draw_images, write_yaml

        draw_images(Path(folder), {"detect": ["{cls} {x} {y} 0.375 0.375"]})
        common = {"path": f"{folder}/detect", "train": "images", "val": "images", "names": ["a", "b"]}
        write_yaml(Path(folder, "data.yaml"), common)
        write_yaml(Path(folder, "tiny.yaml"), RTDETR)
        preload()
        context = multiprocessing.get_context("fork")
        with context.Pool(given.jobs, maxtasksperchild=1) as pool:
            tasks = [pool.apply_async(try_command, (name, Path(folder))) for name in names]
            trials = [trial for task in tasks for trial in task.get()]
    trials.sort(key=lambda trial: list(COMMANDS).index(trial.command))
    table = "\n".join(draw_table(trials))
    faults = [f"{t.command}, {t.way} ({t.when}): {fault}" for t in trials for fault in t.faults]
    print(table, *(["", "Wrong:", *faults] if faults else ["", f"{len(trials)} trials, nothing wrong"]), sep="\n")
    if given.output:
        given.output.write_text(f"{table}\n")
    sys.exit(bool(faults))


def preload() -> None:
    """Import once what each command would import: a process forked from this one then takes a second, not ten.

    Not what starts threads on import, which no fork survives.
    """
    for name in (
        "rtdetr_act.cli.main", "ultralytics.models", "ultralytics.engine.exporter", "ultralytics.engine.trainer",
        "matplotlib.figure", "rtdetr_act.workflows.bench", "rtdetr_act.workflows.train",
        "rtdetr_act.analysis.diagnosis", "torch.jit", "torch.onnx", "torch._dynamo",
    ):  # fmt: skip
        importlib.import_module(name)


def try_command(name: str, shared: Path) -> list[Trial]:
    """Stop one command in every way, each time over good files of its own."""
    with own_disk(shared / name.replace(" ", "-")) as disk:
        work, good = disk / "work", shared / f"{name.replace(' ', '-')}-good"
        work.mkdir()
        shutil.copy(shared / "tiny.yaml", work)
        places = {"data": shared / "data.yaml", "images": shared / "detect" / "images"}
        before, command = (text.format(**places) for text in COMMANDS[name])
        if before:
            call((COMMANDS["train"][1] if before == "train" else before).format(**places), work, shared)
        if name != "study":  # its second call adds runs
            call(command, work, shared)
        shutil.copytree(work, good)
        started = time.monotonic()
        call(command, work, shared)
        duration = time.monotonic() - started
        largest = max((p.stat().st_size for p in changed(good, work)), default=0)
        trials = []
        for way, when, stop in ways(disk, largest, duration):
            shutil.rmtree(work)
            shutil.copytree(good, work)
            trials.append(try_once(Trial(name, way, when), command, work, good, shared, stop))
        return trials


Stop = Callable[["Child"], None]


def ways(disk: Path, largest: int, duration: float) -> Iterator[tuple[str, str, Stop]]:
    """Yield each way to stop a command, when, and the function that does it to its process."""
    for room in (0, largest // 2):
        yield "full disk", f"{room // 1000} kB free", partial(Child.fill, disk=disk, room=room)
    for way, number in (("Ctrl-C", signal.SIGINT), ("kill -9", signal.SIGKILL)):
        yield way, "at the first file", partial(Child.stop_at_file, number=number)
        for share in (0.3, 0.6, 0.9) if duration < LONG else (0.6,):
            seconds = share * duration
            yield way, f"after {seconds:.1f} s", partial(Child.stop_after, seconds=seconds, number=number)


@dataclass
class Child:
    """A running command."""

    process: int
    work: Path
    waits: int  # a pipe, on which it waits for the limit on the size of files, 0 for none

    def go(self, limit: int = 0) -> None:
        """Let the command begin."""
        os.write(self.waits, b"%d\n" % limit)

    def fill(self, disk: Path, room: int) -> None:
        """Fill the disk but for some room, then let the command begin."""
        limit = 0
        if disk.is_mount():
            with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - room)
        else:
            limit = max(room, 1)
        self.go(limit)

    def stop_after(self, seconds: float, number: int) -> None:
        """Send a signal at a moment."""
        self.go()
        time.sleep(seconds)
        self.send(number)

    def stop_at_file(self, number: int) -> None:
        """Send a signal as soon as there is a file under a hidden name."""
        self.go()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not find_hidden(self.work) and self.is_running():
            time.sleep(0.0005)
        self.send(number)

    def is_running(self) -> bool:
        """Say whether the command has not ended."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: int) -> None:
        """Send Ctrl-C to the whole group, as a terminal does; a kill to the one process."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGINT else os.kill)(self.process, number)


def try_once(trial: Trial, command: str, work: Path, good: Path, shared: Path, stop: Stop) -> Trial:
    """Stop a command once, look at what is left, and call it again."""
    trial.code, output = call(command, work, shared, stop)
    (work.parent / "filler").unlink(missing_ok=True)
    lines = [line for line in output.splitlines() if line.strip()]
    trial.said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    ended = trial.code == 0
    if "Traceback (most recent call last)" in output:
        trial.faults.append(f"a traceback: {lines[-1]}")
    expected = {"full disk": (1, 2), "Ctrl-C": (130,), "kill -9": (-9,)}[trial.way]
    if not ended and trial.code not in expected:
        trial.faults.append(f"exit code {trial.code}")
    if trial.way == "Ctrl-C" and not lines and snapshot(work) == snapshot(good):
        trial.said = "(nothing: it had not begun)"
    if trial.way == "Ctrl-C" and lines and lines[-1].startswith("file: "):
        trial.said = "(it had ended)"
    if not ended and trial.way != "kill -9" and not trial.said:
        trial.faults.append(f"no sentence, but: {lines[-1] if lines else 'nothing'}")
    left = find_hidden(work)
    if left and trial.way != "kill -9":
        trial.faults.append(f"left {', '.join(left)}")
    kinds = Counter(compare(trial, good, work))
    trial.left = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    trial.left += f"; {len(left)} hidden" if left else ""
    if ended:
        trial.said = "(it had ended)"
    code, output = call(command, work, shared)
    if code:
        trial.faults.append(f"the next call ended with {code}: {output.splitlines()[-1:]}")
    if left := find_hidden(work):
        trial.faults.append(f"the next call left {', '.join(left)}")
    return trial


def compare(trial: Trial, good: Path, work: Path) -> Iterator[str]:
    """Yield what became of each file of before: "old", "new", or what is wrong with it."""
    before, after = snapshot(good), snapshot(work)
    for name in before:
        if name not in after:
            # Ultralytics begins a run folder anew; the records of the run before go first.
            if not (trial.command == "train" and name.endswith((".csv", "args.yaml"))):
                trial.faults.append(f"{name} is gone")
            yield "gone"
        elif after[name] == before[name]:
            yield "old"
        else:
            if not is_whole(work / name):
                trial.faults.append(f"{name} is not whole")
            yield "new"
    for name in sorted(after.keys() - before.keys()):
        run = next((place for place in (work / name).parents if place.parent.name == "runs"), None)
        if trial.command in RESUMED and run and not (run / "result.json").exists():
            continue  # Ultralytics' files of a run that is not finished, which goes on or begins anew
        if not is_whole(work / name):
            trial.faults.append(f"{name} is not whole")
        if trial.command not in RESUMED:
            trial.faults.append(f"{name} is there beside the old files")


def snapshot(folder: Path) -> Snapshot:
    """Return a hash of each file that has a name to be seen."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def changed(good: Path, work: Path) -> list[Path]:
    """Return the files that a command wrote."""
    before = snapshot(good)
    return [work / name for name, content in snapshot(work).items() if before.get(name) != content]


def call(command: str, work: Path, shared: Path, stop: Stop | None = None) -> tuple[int, str]:
    """Run a command in a process forked from this one; return its exit code and all it wrote."""
    log = Path(tempfile.mkstemp(dir=shared, suffix=".log")[1])
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        _become(command, work, log, reading)
    os.close(reading)
    child = Child(process, work, writing)
    stop(child) if stop else child.go()
    os.close(writing)
    _, status = os.waitpid(process, 0)
    _end_group(process)
    output = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    return os.waitstatus_to_exitcode(status), output


def _become(command: str, work: Path, log: Path, reading: int) -> None:
    """Be the command: in a group of its own, its output in a file, after what the parent says."""
    import resource

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.chdir(work)
    words = b""
    while not words.endswith(b"\n"):
        words += os.read(reading, 64)
    if limit := int(words):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from rtdetr_act.cli.main import main

    sys.argv = ["rtdetr-act", *command.split()]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # what Python itself would print before it ends
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _end_group(leader: int) -> None:
    """Wait for what a killed command started, such as runs of a study, and end what does not end by itself."""
    import psutil

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not [p for p in psutil.process_iter() if _group(p.pid) == leader]:
            return
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
        time.sleep(0.5)


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return 0


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[Path]:
    """Give a small disk in memory where the script may mount one, else a folder."""
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if mounted:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder]).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def draw_table(trials: list[Trial]) -> Iterator[str]:
    """Yield the rows of the table: a command stopped in one way, at all moments."""
    yield "| command | stopped by | times | exit codes | old files | said |"
    yield "|---|---|---|---|---|---|"
    for command in dict.fromkeys(trial.command for trial in trials):
        for way in ("full disk", "Ctrl-C", "kill -9"):
            own = [trial for trial in trials if (trial.command, trial.way) == (command, way)]
            codes = ", ".join(str(code) for code in sorted({trial.code for trial in own}))
            left = "<br>".join(dict.fromkeys(trial.left for trial in own))
            said = "<br>".join(dict.fromkeys(trial.said.replace("|", "\\|") for trial in own if trial.said))
            wrong = f" **{sum(bool(trial.faults) for trial in own)} wrong**" if any(t.faults for t in own) else ""
            yield f"| {command} | {way} | {len(own)}{wrong} | {codes} | {left} | {said} |"


if __name__ == "__main__":
    main()
