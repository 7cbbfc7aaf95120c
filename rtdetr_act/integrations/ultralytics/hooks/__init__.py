"""Every function of Ultralytics that is replaced, in a file for each module that it stands in, with the reason.

`install()` runs when `rtdetr_act` is imported and waits for Ultralytics' modules, so that importing us loads neither
Ultralytics nor torch. Checked against Ultralytics 8.3.0 and 8.4.190.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import wrapt

from rtdetr_act.integrations.ultralytics.hooks.data import hook_data
from rtdetr_act.integrations.ultralytics.hooks.dist import hook_dist
from rtdetr_act.integrations.ultralytics.hooks.engine import hook_model
from rtdetr_act.integrations.ultralytics.hooks.exporter import hook_exporter
from rtdetr_act.integrations.ultralytics.hooks.replacing import replaced
from rtdetr_act.integrations.ultralytics.hooks.tasks import hook_fusing, hook_tasks
from rtdetr_act.integrations.ultralytics.hooks.trainer import hook_trainer

_removed = False
_waiting = False


def install() -> None:
    """Hook Ultralytics' modules, now where they are loaded and on their import where they are not; once."""
    global _waiting, _removed
    _removed = False
    if _waiting:
        loaded = [name for name in _HOOKS if name in sys.modules] if not replaced else []
        for name in loaded:
            _HOOKS[name](sys.modules[name])
        return
    _waiting = True
    for name in _HOOKS:
        wrapt.register_post_import_hook(_on_import, name)


def _on_import(module: Any) -> None:
    if not _removed:
        _HOOKS[module.__name__](module)


def remove() -> None:
    """Put back every function that `install` replaced; Ultralytics then refuses patched models again."""
    global _removed
    _removed = True
    while replaced:
        owner, name, original = replaced.pop()
        setattr(owner, name, original)


_HOOKS: dict[str, Callable[[Any], None]] = {
    "ultralytics.nn.tasks": hook_tasks,
    "ultralytics.data.utils": hook_data,
    "ultralytics.nn.modules.block": hook_fusing,
    "ultralytics.nn.modules.head": hook_fusing,
    "ultralytics.engine.model": hook_model,
    "ultralytics.engine.exporter": hook_exporter,
    "ultralytics.engine.trainer": hook_trainer,
    "ultralytics.utils.dist": hook_dist,
}
