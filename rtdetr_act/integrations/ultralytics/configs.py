"""The model YAMLs that come with the package, found by bare name."""

from __future__ import annotations

import re
from pathlib import Path


def configs_folder() -> Path:
    """Return the folder of the shipped YAMLs: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "model_configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(path: str | Path) -> Path | None:
    """Return the shipped YAML meant by a bare name, or None; a file of that name in the working folder goes first.

    A scale letter may stand in the name, as for Ultralytics: `yolo11s-arelu.yaml` is `yolo11-arelu.yaml` at scale s.
    """
    path = Path(path)
    if path.exists() or path.parent != Path():
        return None
    unscaled = re.sub(r"^(yolo(?:v|e-)?\d+)[nslmx](?=[-.])", r"\1", path.name)
    found = (configs_folder() / name for name in (path.name, unscaled))
    return next((config for config in found if config.is_file()), None)


def config_names() -> list[str]:
    """List the shipped model YAMLs."""
    return sorted(file.name for file in configs_folder().glob("*.yaml"))
