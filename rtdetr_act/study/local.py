"""The local engine: runs on this machine, in parallel processes with a GPU or some CPU cores each."""

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
from rtdetr_act.formatting import format_count
from rtdetr_act.study.process import explain_exit, is_finished, kill_run, record_attempt, start_run

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Slot:
    """Resources for one run at a time.

    Attributes:
        device: Ultralytics' `device`: "cpu", "0", or "0,1" for a multi-GPU run.
        threads: Number of torch threads on a CPU; 0 for Ultralytics' default.
    """

    device: str
    threads: int


def find_slots(device: Any, cpus: int | None) -> list[Slot]:
    """Divide this machine into slots, each for one run at a time.

    Args:
        device: Ultralytics' `device` for all runs, where several GPUs ("0,1") are used together by each run. None for a
            GPU per run, or the CPU without a GPU.
        cpus: CPU cores per run; None for 1.

    Raises:
        InputError: A run needs more than the machine has, or the device does not exist.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [name for name in visible.split(",") if name] if visible else list(map(str, range(torch.cuda.device_count())))
    )
    gpus = gpus[: torch.cuda.device_count()]
    names = split_device(device)
    slots = divide_into_slots(names, gpus, _count_cores(), cpus)
    if names and not any(name.isdecimal() for name in names):
        _check_device(device)
    return slots


def _count_cores() -> int:
    """Return the number of CPU cores that this process may use, which a scheduler may limit."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def split_device(device: Any) -> list[str]:
    """Return the devices in Ultralytics' `device`: ["0", "1"] for "0,1", "cuda:0,1" or [0, 1]; [] for None."""
    words = device if isinstance(device, (list, tuple)) else [] if device is None else str(device).split(",")
    return [str(word).strip().removeprefix("cuda:") for word in words if str(word).strip()]


def _check_device(device: Any) -> None:
    """Check with Ultralytics that a device such as cpu, mps or npu:0 exists; raises InputError."""
    if str(device).startswith("mps") and not torch.backends.mps.is_available():
        raise InputError("device=mps is not available on this machine, and Ultralytics would use the CPU instead")
    before = dict(os.environ)
    try:
        select_device(device, verbose=False)
    except (ValueError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"device={quote(device)} is not available: {first}") from None
    finally:  # some releases change CUDA_VISIBLE_DEVICES
        os.environ.clear()
        os.environ.update(before)


def divide_into_slots(device: Sequence[str], gpus: Sequence[str], cores: int, cpus: int | None) -> list[Slot]:
    """Divide GPUs or CPU cores into slots, each for one run at a time.

    Args:
        device: Devices that the study names, as `split_device` returns them; [] for any.
        gpus: Names of the visible GPUs.
        cores: Number of CPU cores of the machine.
        cpus: CPU cores per run; None for 1.

    Raises:
        InputError: A run needs more than the machine has.
    """
    if cpus is not None and not 1 <= cpus <= cores:
        raise InputError(f"cpus={quote(cpus)} is not possible: this process may use {format_count(cores, 'core')}")
    on_gpu = [name for name in device if name.isdecimal()]
    if (on_gpu and len(set(device)) < len(device)) or len(on_gpu) not in (0, len(device)):
        raise InputError(f"device={quote(','.join(device))} is not possible: name each GPU once, and nothing else")
    if device and not on_gpu:  # of cpu, mps and others, only the CPU can be divided
        threads = cpus or 1
        return [Slot(",".join(device), threads)] * (cores // threads if device == ["cpu"] else 1)
    if len(on_gpu) > 1:
        if len(on_gpu) > len(gpus):
            raise InputError(f"device={','.join(on_gpu)} is not available: this machine has {_describe_gpus(gpus)}")
        size = len(on_gpu)
        return [Slot(",".join(gpus[i : i + size]), 0) for i in range(0, len(gpus) - size + 1, size)]
    if on_gpu:
        if on_gpu[0] not in gpus and int(on_gpu[0]) >= len(gpus):
            raise InputError(f"device={on_gpu[0]} is not available: this machine has {_describe_gpus(gpus)}")
        return [Slot(on_gpu[0], 0)]
    if gpus:
        return [Slot(name, 0) for name in gpus]
    return [Slot("cpu", cpus or 1)] * (cores // (cpus or 1))


def _describe_gpus(gpus: Sequence[str]) -> str:
    """Return the number of GPUs, such as "no GPU" or "2 GPUs"."""
    return format_count(len(gpus), "GPU") if gpus else "no GPU"


def run_locally(
    folders: Sequence[Path], slots: Sequence[Slot], *, retries: int, watch: Callable[[Sequence[Path]], None]
) -> None:
    """Run all unfinished runs on this machine, in order, as many in parallel as there are slots.

    A failure is recorded in the run folder and does not stop the other runs.

    Args:
        folders: Run folders with their `run.json`.
        slots: Resources, one run at a time for each.
        retries: Number of further attempts at a run whose process ends without a result.
        watch: Function called several times per second with the folders of the runs in progress.
    """
    pending = deque((folder, retries) for folder in folders if not is_finished(folder))
    free = deque(slots)
    running: dict[subprocess.Popen[bytes], tuple[Path, int, Slot]] = {}
    try:
        while pending or running:
            while pending and free:
                folder, tries_left = pending.popleft()
                slot = free.popleft()
                running[start_run(folder, device=slot.device, threads=slot.threads)] = folder, tries_left, slot
            for process in [process for process in running if process.poll() is not None]:
                folder, tries_left, slot = running.pop(process)
                kill_run(process)  # also its data loader processes
                free.append(slot)
                if is_finished(folder):
                    continue
                record_attempt(folder, explain_exit(folder, process.returncode))
                if tries_left:
                    pending.appendleft((folder, tries_left - 1))
            watch([folder for folder, _, _ in running.values()])
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            kill_run(process)
