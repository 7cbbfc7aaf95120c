"""ultralytics.engine.exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rtdetr_act.integrations.ultralytics.hooks.replacing import replace
from rtdetr_act.surgery.model_plan import read_plan


def hook_exporter(exporter: Any) -> None:
    """Hook `ultralytics.engine.exporter`."""
    # A patched model is folded before export, so that inference does not pay for training-time parameters. The export
    # is staged, because Ultralytics overwrites the exported file in place, which a full disk would leave truncated.
    replace(exporter.Exporter, "__call__", _export)


def _export(original: Callable[..., Any], self: Any, model: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Exporter.__call__` to fold and stage the export of a patched model."""
    from rtdetr_act.integrations.ultralytics.export import export_staged, is_our_export

    if read_plan(model) or is_our_export():
        return export_staged(original, self, model, *args, **kwargs)
    return original(self, model, *args, **kwargs)
