"""ultralytics.data.utils: data sets."""

from __future__ import annotations

from typing import Any

from rtdetr_act.integrations.ultralytics import downloads
from rtdetr_act.integrations.ultralytics.hooks.replacing import replace


def hook_data(utils: Any) -> None:
    """Hook `ultralytics.data.utils`."""
    # If images are missing, it runs the value of `download` in the YAML, which may be arbitrary code.
    replace(utils, "check_det_dataset", downloads.check_det_dataset, by_name=True)
