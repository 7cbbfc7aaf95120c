"""ultralytics.engine.exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rtdetr_act.integrations.ultralytics.hooks.replacing import replace
from rtdetr_act.surgery.model_plan import read_plan


def hook_exporter(exporter: Any) -> None:
    """Hook `ultralytics.engine.exporter`."""
    # A deployed network should not pay for what training needed: whoever exports a patched model, exports the folded
    # one. And Ultralytics writes over the exported file in place: a full disk leaves half of it over a good one.
    replace(exporter.Exporter, "__call__", _export)


def _export(original: Callable[..., Any], self: Any, model: Any = None, *args: Any, **kwargs: Any) -> Any:
    from rtdetr_act.integrations.ultralytics.export import export_staged, is_our_export

    if read_plan(model) or is_our_export():
        return export_staged(original, self, model, *args, **kwargs)
    return original(self, model, *args, **kwargs)
