"""Collect what a report of an issue needs: versions, devices, hooks, plugins and tools."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec

import torch
import ultralytics
from ultralytics.utils.torch_utils import get_cpu_info

from rtdetr_act.activations.registry import list_plugins
from rtdetr_act.integrations.ultralytics.export import list_missing_tools
from rtdetr_act.integrations.ultralytics.hooks import list_hooks
from rtdetr_act.integrations.ultralytics.rebuilding import find_edited_defaults
from rtdetr_act.integrations.ultralytics.releases import describe_release
from rtdetr_act.integrations.ultralytics.tracking import list_trackers
from rtdetr_act.kernels.backend import triton
from rtdetr_act.version import __version__

_OTHERS = ("torchvision", "numpy", "typer", "rich", "polars", "scipy", "wrapt")


def collect_checks() -> dict[str, str]:
    """Return what is installed here and whether it works together, by title; nothing is downloaded or written."""
    edited = find_edited_defaults()
    return {
        "rtdetr-act": __version__,
        "Ultralytics": f"{ultralytics.__version__}, {'; '.join([describe_release(ultralytics.__version__), *edited])}",
        "Python": platform.python_version(),
        "system": platform.platform(),
        "torch": f"{torch.__version__}, {_describe_build()}",
        "packages": ", ".join(f"{name} {version}" for name in _OTHERS if (version := find_version(name))),
        "CPU": f"{get_cpu_info()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "GPU": _describe_gpus(),
        "Triton": _describe_triton(),
        "hooks": _describe_hooks(),
        "plugins": _join(f"{name} ({package})" for name, package in list_plugins().items()),
        **_describe_exports(),
        "trackers": _join(f"{name} {'on' if on else 'off'}" for name, on in list_trackers().items()),
        "Ray": find_version("ray") or "not installed",
    }


def find_version(package: str) -> str:
    """Return the version of an installed package, "" if it is not installed.

    >>> find_version("no-such-package")
    ''
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _join(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def _describe_build() -> str:
    """Return what torch was built for."""
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"


def _describe_gpus() -> str:
    """Return the GPUs that torch can use."""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for i, gpu in enumerate(gpus))
    return "mps" if torch.backends.mps.is_available() else "none"


def _describe_triton() -> str:
    """Return the version of Triton, and whether the kernels of activations use it."""
    version = find_version("triton") or find_version("triton-windows")
    if not version:
        return "not installed" if find_spec("triton") is None else "unknown version"
    return f"{version}, {'used' if triton is not None else 'not used, for want of a CUDA GPU'}"


def _describe_hooks() -> str:
    """Return how many functions of Ultralytics are wrapped, and which wrappers were replaced by others."""
    hooks = list_hooks()
    if not hooks:
        return "removed: patched models do not train"
    lost = [name for name, is_there in hooks.items() if not is_there]
    return f"{len(hooks) - len(lost)} of {len(hooks)} in place" + (f", not {', '.join(lost)}" if lost else "")


def _describe_exports() -> dict[str, str]:
    """Return to which formats models can be exported, and which packages the others need."""
    tools = list_missing_tools()
    return {
        "exports to": _join(name for name, missing in tools.items() if not missing),
        "does not export to": _join(f"{name} ({', '.join(missing)})" for name, missing in tools.items() if missing),
    }
