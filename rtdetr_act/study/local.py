"""Run rows on this machine, several at once: one process each, on a GPU of its own or on some cores."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.torch_utils import select_device

from rtdetr_act.errors import InputError, quote
from rtdetr_act.study.process import explain_exit, is_finished, kill_run, record_attempt, start_run

_POLL_SECONDS = 0.1  # seconds


@dataclass(frozen=True)
class Slot:
    """Where one run at a time goes.

    Attributes:
        device: Ultralytics' `device`: "cpu", "0", or "0,1" for a multi-GPU run.
        threads: Threads on a CPU; 0 leaves Ultralytics its own choice.
    """

    device: str
    threads: int


def find_slots(device: Any, cpus: int | None) -> list[Slot]:
    """Return the places of this machine.

    Args:
        device: The `device` of all runs as Ultralytics takes it; None for a GPU each, or the CPU where there is none.
            Several GPUs ("0,1") are those of each run.
        cpus: Cores of each run; None for one on a CPU.

    Raises:
        InputError: A run needs more than the machine has, or there is no such device.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [name for name in visible.split(",") if name] if visible else list(map(str, range(torch.cuda.device_count())))
    )
    gpus = gpus[: torch.cuda.device_count()]
    names = split_device(device)
    places = divide_into_slots(names, gpus, os.cpu_count() or 1, cpus)
    if names and not any(name.isdecimal() for name in names):
        _check_device(device)
    return places


def split_device(device: Any) -> list[str]:
    """Return the names in Ultralytics' `device`, as it takes them: "0,1", [0, 1], "cuda:0", "cpu" or None."""
    words = device if isinstance(device, (list, tuple)) else [] if device is None else str(device).split(",")
    return [str(word).strip().removeprefix("cuda:") for word in words if str(word).strip()]


def _check_device(device: Any) -> None:
    """Let Ultralytics look for a device that is no number: cpu, mps, npu:0, and whatever else it knows."""
    if str(device).startswith("mps") and not torch.backends.mps.is_available():
        raise InputError("device=mps cannot be: this machine has none, and Ultralytics would take the CPU instead")
    before = dict(os.environ)
    try:
        select_device(device, verbose=False)
    except (ValueError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"device={quote(device)} cannot be: {first}") from None
    finally:  # some releases hide GPUs from this process and its children
        os.environ.clear()
        os.environ.update(before)


def divide_into_slots(device: Sequence[str], gpus: Sequence[str], cores: int, cpus: int | None) -> list[Slot]:
    """Divide GPUs or cores among runs.

    Args:
        device: Names that the study asks for, [] for no wish.
        gpus: Names of the visible GPUs.
        cores: Cores of the machine.
        cpus: Cores of each run, or None.

    Raises:
        InputError: A run needs more than the machine has.
    """
    if cpus is not None and not 1 <= cpus <= cores:
        raise InputError(f"--cpus {quote(cpus)} cannot be: this machine has {cores} cores")
    on_gpu = [name for name in device if name.isdecimal()]
    if (on_gpu and len(set(device)) < len(device)) or len(on_gpu) not in (0, len(device)):
        raise InputError(f"device={quote(','.join(device))} cannot be: name each GPU once, and nothing else")
    if device and not on_gpu:  # cpu, mps and others are one device, and only the CPU can be divided
        threads = cpus or 1
        return [Slot(",".join(device), threads)] * (cores // threads if device == ["cpu"] else 1)
    if len(on_gpu) > 1:
        if len(on_gpu) > len(gpus):
            raise InputError(f"device={','.join(on_gpu)} cannot be: this machine shows {_format_gpu_count(gpus)}")
        size = len(on_gpu)
        return [Slot(",".join(gpus[i : i + size]), 0) for i in range(0, len(gpus) - size + 1, size)]
    if on_gpu:
        if on_gpu[0] not in gpus and int(on_gpu[0]) >= len(gpus):
            raise InputError(f"device={on_gpu[0]} cannot be: this machine shows {_format_gpu_count(gpus)}")
        return [Slot(on_gpu[0], 0)]
    if gpus:
        return [Slot(name, 0) for name in gpus]
    return [Slot("cpu", cpus or 1)] * (cores // (cpus or 1))


def _format_gpu_count(gpus: Sequence[str]) -> str:
    if not gpus:
        return "no GPU"
    return f"{len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"


def run_locally(
    folders: Sequence[Path], places: Sequence[Slot], *, retries: int, watch: Callable[[Sequence[Path]], None]
) -> None:
    """Run what is not finished, in order; a failure is noted in its folder, and the others go on.

    Args:
        folders: Run folders with their `run.json`.
        places: Where runs go; so many are at work at once.
        retries: Further tries of a run whose process ended without a result.
        watch: Called several times a second with the folders at work.
    """
    waiting = deque((folder, retries) for folder in folders if not is_finished(folder))
    free = deque(places)
    working: dict[subprocess.Popen[bytes], tuple[Path, int, Slot]] = {}
    try:
        while waiting or working:
            while waiting and free:
                folder, left = waiting.popleft()
                place = free.popleft()
                working[start_run(folder, device=place.device, threads=place.threads)] = folder, left, place
            for process in [process for process in working if process.poll() is not None]:
                folder, left, place = working.pop(process)
                kill_run(process)  # loader processes that outlived it
                free.append(place)
                if is_finished(folder):
                    continue
                record_attempt(folder, explain_exit(folder, process.returncode))
                if left:
                    waiting.appendleft((folder, left - 1))
            watch([folder for folder, _, _ in working.values()])
            time.sleep(_POLL_SECONDS)
    finally:
        for process in working:
            kill_run(process)
