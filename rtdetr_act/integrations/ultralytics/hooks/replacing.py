"""Wrap functions of another library, recording the originals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

replaced: list[tuple[Any, str, Any]] = []  # (owner, name, original) of each wrapped function, for remove()


def replace(owner: Any, name: str, wrapper: Callable[..., Any], *, by_name: bool = False) -> None:
    """Replace a function by a wrapper, which is called with the original and the arguments.

    Args:
        owner: The module or class that defines the function.
        name: Name of the function.
        wrapper: Called as `wrapper(original, *args, **kwargs)`.
        by_name: Also replace it in modules that have imported it by name. Default: False.
    """
    original = getattr(owner, name)

    @wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    # Modules that are loaded already may have imported the function by name.
    modules = [found for key, found in list(sys.modules.items()) if key.startswith("ultralytics.")] if by_name else []
    for place in (owner, *(found for found in modules if found is not owner and vars(found).get(name) is original)):
        replaced.append((place, name, original))
        setattr(place, name, replacement)
