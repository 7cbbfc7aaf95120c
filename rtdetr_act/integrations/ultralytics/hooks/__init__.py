"""The functions of Ultralytics that this package wraps, one file per module of Ultralytics, each with the reason.

`install()` runs when `rtdetr_act` is imported and defers wrapping until Ultralytics' modules are imported, so importing
this package imports neither Ultralytics nor torch. Tested with Ultralytics 8.3.0 and 8.4.190.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
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
    """Wrap functions of Ultralytics, in each module now if it is imported, else on its import; idempotent."""
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
    """Wrap the functions of a module of Ultralytics that has just been imported, unless the hooks were removed."""
    if not _removed:
        _HOOKS[module.__name__](module)


def remove() -> None:
    """Restore every function that `install` wrapped; Ultralytics then rejects patched models."""
    global _removed
    _removed = True
    while replaced:
        owner, name, original = replaced.pop()
        setattr(owner, name, original)


def list_hooks() -> dict[str, bool]:
    """Return the wrapped functions by qualified name, each with whether the wrapper is still in place.

    All modules with hooks are imported first. Empty after `remove`.
    """
    for name in _HOOKS:
        import_module(name)
    found = {}
    for owner, name, original in replaced:
        path = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
        found[f"{path}.{name}"] = getattr(owner, name, original) is not original
    return found


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
