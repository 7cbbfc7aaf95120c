"""Check and measure everything that a GPU computes, part by part, on a machine that may have little else than PyTorch.

    python scripts/check_gpu.py [--part ops modules] [--minutes 8] [--output runs/gpu] [--report docs] [--list]

Needs torch, NumPy and wrapt, and Triton for the kernels; the parts that train detectors need Ultralytics and are left
out without it. All data is drawn, no network is needed. A part is a process of at most eight minutes, and writes each
result into the folder at once: the next call goes on behind the last one, and tries again what failed. Remove the
folder to begin anew. Without a GPU the parts that can run in Triton's interpreter do, on the CPU.

Exits with 0 where all is done and right, 1 where something failed, 3 where the minutes were over before the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where the package is not installed
PART_SECONDS = 8 * 60.0
GRACE = 20.0  # seconds that a process gets to end by itself
FAILED, LEFT = 1, 3
STOPPED = "its process ended before it did"


def main() -> int:
    """Run what is left of the parts asked for, or one part in this process."""
    given = parse_words()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.run:
        return run_part(given.run, given.output.resolve(), given.seconds)
    machine = ask_machine(given.output)
    if given.list:
        for name, title in machine["parts"].items():
            print(f"{name:20} {title}")
        return 0
    print(describe(machine))
    names = given.part or list(machine["parts"])
    if unknown := [name for name in names if name not in machine["parts"]]:
        print(f"'{unknown[0]}' is not a part: choose from {', '.join(machine['parts'])}", file=sys.stderr)
        return 2
    left = run_parts(names, machine, given.output, time.monotonic() + 60 * given.minutes)
    if given.report:
        from gpu_report import write_report

        for line in write_report(given.output, given.report):
            print(line)
    failed = [f"{part}: {name}: {item['said']}" for part, name, item in results(names, given.output) if not item["ok"]]
    print(*(f"failed: {line}" for line in failed), sep="\n")
    if left:
        print(f"left for the next call: {', '.join(left)}")
    return FAILED if failed else LEFT if left else 0


def parse_words() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", help="parts, all if none")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call, 8 if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for the results")
    parser.add_argument("--report", type=Path, help="folder for gpu.md, gpu.csv and gpu.png")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- the process that starts the others


def ask_machine(output: Path) -> dict[str, Any]:
    """Return what a process that imports torch says of the machine and of the parts."""
    file = output / "machine.json"
    code = subprocess.run([sys.executable, __file__, "--run", "machine", "--output", str(output)]).returncode
    if code:
        sys.exit(code)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def describe(machine: dict[str, Any]) -> str:
    """Say in a line where the parts run."""
    software = f"torch {machine['torch']}, Triton {machine['triton'] or 'not installed'}"
    if machine["gpu"]:
        return f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, {software}"
    return f"There is no GPU here: what can run in Triton's interpreter does, on the CPU. {software}"


def run_parts(names: list[str], machine: dict[str, Any], output: Path, deadline: float) -> list[str]:
    """Run parts until all are complete or the time is over; return those that are not."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not machine["gpu"]:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in names:
        forget_failed(output / f"{name}.json", machine)
        while not is_complete(output / f"{name}.json"):
            seconds = min(PART_SECONDS, deadline - time.monotonic())
            if seconds < GRACE:
                return [other for other in names if not is_complete(output / f"{other}.json")]
            command = [sys.executable, __file__, "--run", name, "--output", str(output), "--seconds", str(seconds)]
            print(f"{name}: ", end="", flush=True)
            start, before = time.monotonic(), count_items(output / f"{name}.json")
            try:
                code = subprocess.run(command, env=environment, timeout=seconds).returncode
            except subprocess.TimeoutExpired:
                code = 0
                judge_stopped(output / f"{name}.json", count_items(output / f"{name}.json") - before, seconds)
            items = load(output / f"{name}.json")["items"]
            failed = [key for key, item in items.items() if not item["ok"]]
            print(f"{len(items)} done, {len(failed)} failed, {time.monotonic() - start:.0f} s", flush=True)
            if code and count_items(output / f"{name}.json") == before:  # it would end alike for ever
                note_start_failure(output / f"{name}.json", code)
    return []


def load(file: Path) -> dict[str, Any]:
    """Return the results of a part so far."""
    if not file.is_file():
        return {"complete": False, "missing": [], "machine": None, "items": {}}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def is_complete(file: Path) -> bool:
    """Say whether a part has come to its end."""
    return bool(load(file)["complete"])


def count_items(file: Path) -> int:
    """Return how many items of a part have a result."""
    return len(load(file)["items"])


def forget_failed(file: Path, machine: dict[str, Any]) -> None:
    """Let what failed in an earlier call be tried again, and all that another machine did."""
    found = load(file)
    kept = {name: item for name, item in found["items"].items() if item["ok"]}
    if found["machine"] is not None and found["machine"] != machine["same"]:
        kept = {}
    if kept != found["items"] or found["missing"]:
        save(file, {**found, "complete": False, "items": kept, "missing": []})


def judge_stopped(file: Path, begun: int, seconds: float) -> None:
    """Let an item that was stopped be run again, unless it had all of a part's time for itself."""
    found = load(file)
    for name, item in [*found["items"].items()]:
        if item["said"] == STOPPED and not item["ok"]:
            if begun == 1 and seconds >= PART_SECONDS:
                item["said"] = f"it did not end in {seconds:.0f} s"
            else:
                del found["items"][name]
    save(file, found)


def note_start_failure(file: Path, code: int) -> None:
    """Note that a part could not even start."""
    found = load(file)
    found["items"]["start"] = failure(f"the part ended with code {code}")
    save(file, {**found, "complete": True})


def failure(said: str) -> dict[str, Any]:
    """Return the result of an item that gave none."""
    return {"ok": False, "seconds": 0.0, "error": None, "measures": {}, "said": said}


def results(names: list[str], output: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Return part, name and result of every item."""
    return [(part, name, item) for part in names for name, item in load(output / f"{part}.json")["items"].items()]


def save(file: Path, content: dict[str, Any]) -> None:
    """Write a file of results, whole."""
    from rtdetr_act.files import write_atomically

    write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False).encode())


# ---------------------------------------------------------------- the process of one part


def run_part(name: str, output: Path, seconds: float) -> int:
    """Run the items of a part that have no result, until the time is over."""
    started = time.monotonic()
    import torch
    from gpu_parts import PARTS, missing_for, prepare

    if name == "machine":
        save(output / "machine.json", {**read_machine(), "parts": {key: part.title for key, part in PARTS.items()}})
        return 0
    place, part, file = prepare(output), PARTS[name], output / f"{name}.json"
    found: dict[str, Any] = {**load(file), "machine": read_machine()["same"]}
    if missing := missing_for(part, place):
        save(file, {**found, "complete": True, "missing": missing})
        return 0
    for label, call in part.items(place):
        if label in found["items"]:
            continue
        if time.monotonic() - started > seconds - GRACE:
            save(file, found)
            return 0
        # Should it take the process with it, that is its result.
        found["items"][label] = failure(STOPPED)
        save(file, found)
        torch.manual_seed(0)
        item = try_item(call)
        found["items"][label] = item
        save(file, found)
        if not item["ok"] and any(sign in item["said"] for sign in ("CUDA error", "Triton Error [CUDA]")):
            return FAILED  # this process can use the GPU no more; another one goes on with the next item
    save(file, {**found, "complete": True})
    return 0


def try_item(call: Callable[[], Any]) -> dict[str, Any]:
    """Run an item, and return its result as data."""
    start = time.perf_counter()
    try:
        outcome = {"ok": True, **call().as_data()}
    except Exception as error:  # whatever it is, the next item is to run
        said = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
        outcome = {"ok": False, "error": None, "measures": {}, "said": " ".join(said.split())[:600] or repr(error)}
    return {**outcome, "seconds": round(time.perf_counter() - start, 3)}


def read_machine() -> dict[str, Any]:
    """Return the names and versions of what computes here; "same" is what tells two machines apart."""
    import platform

    import torch

    from rtdetr_act.version import __version__

    triton = find_version("triton")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        "gpu": gpu,
        "driver": read_driver() if gpu else None,
        "memory": torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "torch": torch.__version__,
        "triton": triton,
        "ultralytics": find_version("ultralytics"),
        "numpy": find_version("numpy"),
        "python": platform.python_version(),
        "rtdetr_act": __version__,
    }
    return {**found, "date": time.strftime("%Y-%m-%d"), "same": found}


def find_version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_driver() -> str:
    """Return the version of the driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
