"""Find the model YAMLs that ship with the package by bare name."""

from __future__ import annotations

import re
from pathlib import Path

DEFAULT_MODEL = "rtdetr-n.yaml"  # of commands and studies that name none


def configs_folder() -> Path:
    """Return the folder of the shipped YAMLs: inside an installed package, or at the root of a checkout."""
    installed = Path(__file__).parent / "model_configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(path: str | Path) -> Path | None:
    """Return the shipped YAML of a bare name.

    The name may contain a scale, as in Ultralytics: `yolo11s-arelu.yaml` is `yolo11-arelu.yaml` at scale s.

    Returns:
        The path; None for a path with a folder, for a name that is not shipped, and for a file that exists in the
        working folder, which takes precedence.
    """
    path = Path(path)
    if path.exists() or path.parent != Path():
        return None
    unscaled = re.sub(r"^(yolo(?:v|e-)?\d+)[nslmx](?=[-.])", r"\1", path.name)
    found = (configs_folder() / name for name in (path.name, unscaled))
    return next((config for config in found if config.is_file()), None)


def config_names() -> list[str]:
    """Return the names of the shipped model YAMLs, sorted."""
    return sorted(file.name for file in configs_folder().glob("*.yaml"))
